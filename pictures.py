"""Redraws the pictures in `docs/`: every demo in W&B LEET, on a real terminal, and the curves of the dummy metrics.

    uv run --group pictures python pictures.py [DEMO …]

Runs the demos offline, in a temporary folder, and needs tmux, which is the terminal. Its screens become PNG rather than
SVG: LEET draws curves in braille, which the reader's font may not line up. It colours a run by its folder's path: draw
a picture again if two runs look alike.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFont
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
WANDB, OFFLINE = Path(sys.executable).with_name("wandb"), ("WANDB_MODE=offline",)  # offline LEET reports no usage
COLUMNS, CELL, FONT_SIZE, MARGIN = 134, (13, 26), 21.6, 16  # pixels: twice what a README shows
BRAILLE = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))  # column and row of a code point's bits


class Screen(NamedTuple):
    """What LEET is to show, and on how many lines."""

    lines: int
    metrics: str = ""  # regular expression
    rows: int = 2  # of charts
    columns: int = 1
    run: str = ""  # the one whose folder's name has this; else all of them, side by side
    keys: Sequence[str] = ()  # to press


FILTER_OVERVIEW = ("o", "experiment|training_", "Enter")  # to what tells the runs apart
FIND_ARTIFACTS = ("i", "/", "artifact", "Enter", "End")
BARE = r"^(loss|entropy|kl|explained_.*|value_loss|e2e/speed|reward/mean|success_.*|policy_.*|trunc.*|staleness/mean)$"
PATHS = Screen(34, r"^(training/(loss|entropy|kl|e2e/speed)|inference/(reward/mean|e2e/speed))$", 3, 2, keys=("]",))
SCREENS = {
    "demo1_centralized_actors": [Screen(22, BARE, 2, 3, run, FILTER_OVERVIEW) for run in ("training", "inference")],
    "demo2_project_per_job": [Screen(31, r"^e2e/(speed|latency_ms/mean)$", keys=FILTER_OVERVIEW)],
    "demo3_hierarchical_metrics": [PATHS],
    "demo3_hierarchical_metrics--one-run": [PATHS],
    "demo4_extensions": [
        Screen(25, r"^(reward/mean|explained_variance)$", keys=FILTER_OVERVIEW),
        Screen(12, run="training", keys=FIND_ARTIFACTS),
        Screen(14, run="inference", keys=FIND_ARTIFACTS),
    ],
}
plt.rcParams |= {"xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 6.5, "legend.frameon": False}
plt.rcParams |= {"legend.handlelength": 0.8, "legend.columnspacing": 0.8}
STATISTICS = re.compile(r"/(mean|min|max|std|p\d+|grad_norm_\w+|running|waiting)$")  # share a panel


def show(screen: Screen, runs: Path, tmux: Sequence[str]) -> str:
    """The screen with its ANSI colours, but without the status line, which tells this machine's folders."""
    names = sorted(path.name for path in runs.glob("*run-*"))
    shown = [name for name in names if screen.run in name]
    memory = {"metrics_filter": {"query": screen.metrics}, "selected_runs": shown, "latest_run": names[-1]}
    (runs / ".wandb-leet.json").write_text(json.dumps(memory | {"pinned_run": shown[0]}))  # in front of the others
    grid = {"rows": screen.rows, "cols": screen.columns}
    config = {"metrics_grid": grid, "workspace_metrics_grid": grid, "right_sidebar_visible": False}
    config |= {"run_layout": {"left_sidebar": 0.27}, "workspace_layout": {"left_sidebar": 0.33, "right_sidebar": 0.32}}
    (runs / "wandb-leet.json").write_text(json.dumps(config))
    leet = ("env", f"WANDB_CONFIG_DIR={runs}", *OFFLINE, WANDB, "leet", runs / shown[0] if screen.run else runs)
    subprocess.run([*tmux, "resize-window", "-x", str(COLUMNS), "-y", str(screen.lines + 1)], check=True)
    subprocess.run([*tmux, "respawn-pane", "-k", *leet], check=True)
    for key in ("", *screen.keys):
        subprocess.run([*tmux, "send-keys", key], check=True)
        before, text, deadline = None, "", time.monotonic() + 60
        while text != before or "[1" not in text:  # until it has loaded and stands still
            if time.monotonic() > deadline:
                sys.exit(f"LEET does not show the runs:\n{text}")
            time.sleep(0.7)
            before, text = text, subprocess.check_output([*tmux, "capture-pane", "-e", "-p"], text=True)
    return "\n".join(text.split("\n")[: screen.lines])


def draw(text: str) -> Image.Image:
    """A terminal's text as pixels. Braille is drawn dot by dot: the font, matplotlib's, has none."""
    lines = Console(width=COLUMNS, color_system="truecolor").render_lines(Text.from_ansi(text))
    (width, height), fonts = CELL, Path(plt.matplotlib.get_data_path(), "fonts", "ttf")
    regular, bold = (ImageFont.truetype(fonts / f"DejaVuSansMono{kind}.ttf", FONT_SIZE) for kind in ("", "-Bold"))
    size = (COLUMNS * width + 2 * MARGIN, len(lines) * height + 2 * MARGIN)
    canvas = ImageDraw.Draw(image := Image.new("RGB", size, MONOKAI.background_color.hex))
    for row, line in enumerate(lines):
        cells = [(character, style or Style()) for content, style, _ in line for character in content]
        for column, (character, style) in enumerate(cells):
            left, top = MARGIN + column * width, MARGIN + row * height
            front = (style.color or Color.default()).get_truecolor(MONOKAI).hex
            back = (style.bgcolor or Color.default()).get_truecolor(MONOKAI, foreground=False).hex
            canvas.rectangle((left, top, left + width - 1, top + height - 1), back)
            if "\u2800" <= character <= "\u28ff":
                for x, y in (dot for bit, dot in enumerate(BRAILLE) if ord(character) >> bit & 1):
                    canvas.circle((left + 3 + 6.5 * x, top + 3 + 6.5 * y), 3, front)
            else:
                canvas.text((left, top), character, front, bold if style.bold else regular)
    return image


def plot(run: Path) -> Image.Image:
    """All rows of a run, read from its transaction log."""
    log = subprocess.check_output(["env", *OFFLINE, WANDB, "leet", "inspect", "--json", run]).splitlines()
    rows = [record["history"]["item"] for record in map(json.loads, log) if "history" in record]
    keys = [key for key in rows[0] if key[0] != "_" and key not in ("step", "workers")]
    panels = sorted({STATISTICS.sub("", key) for key in keys})
    height = -(-len(panels) // 3)
    figure = plt.figure(figsize=(11, 1.7 * height), dpi=150, layout="constrained")
    for i, panel in enumerate(panels, 1):
        axis = figure.add_subplot(height, 3, i)
        for key in (key for key in keys if STATISTICS.sub("", key) == panel):
            label = key.removeprefix(f"{panel}/")
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=1, label=label)
        axis.set_title(panel, loc="left", fontsize=10, family="monospace")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25)
        if len(axis.lines) > 1:
            axis.legend(ncols=4, loc="lower right", bbox_to_anchor=(1.03, 0.95))
    figure.canvas.draw()
    return Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba()).convert("RGB")


def main() -> None:
    if not shutil.which("tmux"):
        sys.exit("pictures.py needs tmux, which is not installed: apt-get install tmux, brew install tmux, …")
    if unknown := set(sys.argv[1:]) - set(SCREENS):
        sys.exit(f"pictures.py has no {', '.join(unknown)}; it draws {', '.join(SCREENS)}")
    flags = ("--steps", "60", "--seed", "42", "--experiment", "grpo-7", "--mode", "offline", "--dir")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        tmux = ("tmux", "-S", f"{folder}/tmux", "-f", "/dev/null")
        subprocess.run([*tmux, "new-session", "-d"], check=True)
        stack.callback(subprocess.run, [*tmux, "kill-server"])
        for name in sys.argv[1:] or SCREENS:
            (demo, dashes, option), runs = name.partition("--"), Path(folder, name, "wandb")
            demo = (sys.executable, HERE / f"{demo}.py", *filter(None, [dashes + option]), *flags, runs.parent)
            subprocess.run(demo, check=True)
            screens = [show(screen, runs, tmux) for screen in SCREENS[name]]
            pictures = {name: draw(f"\n\x1b[90m{'─' * COLUMNS}\x1b[0m\n".join(screens))}
            if name == "demo1_centralized_actors":
                pictures |= {f"curves_{p}": plot(next(runs.glob(f"*{p}*"))) for p in ("training", "inference")}
            for file, picture in pictures.items():
                picture.quantize(96).save(HERE / "docs" / f"{file}.png", optimize=True)


if __name__ == "__main__":
    main()
