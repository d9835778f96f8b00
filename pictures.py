"""Redraws the pictures in `docs/`: the demos' runs in W&B LEET, on a real terminal, and the curves of all metrics.

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
LEET = ("env", "WANDB_MODE=offline", Path(sys.executable).with_name("wandb"), "leet")  # offline it reports no usage
COLUMNS, CELL, FONT_SIZE, MARGIN = 154, (12, 24), 20, 16  # pixels: twice what a README shows
BRAILLE = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))  # column and row of a code point's bits
SIDEBARS = {"workspace_layout": {"left_sidebar": 0.335, "right_sidebar": 0.23}, "run_layout": {"left_sidebar": 0.2}}
plt.rcParams |= {"xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 6.5, "legend.frameon": False}
plt.rcParams |= {"legend.handlelength": 0.8, "legend.columnspacing": 0.8, "lines.linewidth": 1}


class Screen(NamedTuple):
    """`wandb leet wandb`, with the first look that the demo has left there, and the keys that are pressed then."""

    lines: int
    keys: str = "o ^experiment$ Enter"  # of all that the overview shows of a run
    rows: int = 3  # of charts
    columns: int = 2
    inspect: str = ""  # the job type of a run, of which `wandb leet inspect` shows the records instead


FIRST, SECOND = f"Down Enter {Screen(0).keys}", f"Enter {Screen(0).keys}"  # run alone; the newest is on top
PICTURES = {  # of a demo, by what is added to its name
    "demo1_centralized_actors": {"": [Screen(12, FIRST, 1, 5), Screen(12, SECOND, 1, 4)]},
    "demo2_project_per_job": {"": [Screen(33, "o ^training_ Enter", 4)]},
    "demo3_hierarchical_metrics": {"": [Screen(25, FIRST), Screen(17, SECOND, 2)]},
    "demo3_hierarchical_metrics --one-run": {"--one-run": [Screen(41, SECOND, 5)]},
    "demo4_extensions": {
        "": [Screen(41, rows=5)],
        "--lineage": [
            Screen(12, "/ artifact Enter End", inspect="training"),
            Screen(15, "/ artifact Enter End", inspect="inference"),
            Screen(8, "/ config Enter End", inspect="evaluation"),
        ],
    },
}


def show(screen: Screen, runs: Path, tmux: Sequence[str]) -> str:
    """What is typed, and the screen with its ANSI colours, but no status line: it tells this machine's folders."""
    grid = {"rows": screen.rows, "cols": screen.columns}
    config = SIDEBARS | {"metrics_grid": grid, "workspace_metrics_grid": grid, "right_sidebar_visible": False}
    (runs.parent / "wandb-leet.json").write_text(json.dumps(config))
    what = ["inspect", f"wandb/{next(runs.glob(f'*-{screen.inspect}-7')).name}"] if screen.inspect else ["wandb"]
    subprocess.run([*tmux, "resize-window", "-x", str(COLUMNS), "-y", str(screen.lines + 1)], check=True)
    leet = ("env", f"WANDB_CONFIG_DIR={runs.parent}", *LEET, *what)
    subprocess.run([*tmux, "respawn-pane", "-k", "-c", runs.parent, *leet], check=True)
    for key in ("", *screen.keys.split()):
        subprocess.run([*tmux, "send-keys", key], check=True)
        before, text, deadline = None, "", time.monotonic() + 60
        while text != before or "[1" not in text:  # until it has loaded and stands still
            if time.monotonic() > deadline:
                sys.exit(f"LEET does not show the runs:\n{text}")
            time.sleep(0.7)
            before, text = text, subprocess.check_output([*tmux, "capture-pane", "-e", "-p"], text=True)
    typed = f"\x1b[0;1m$ wandb leet {' '.join(what)}\x1b[0;38;5;245m   {screen.keys}\x1b[0m"
    return "\n".join([typed, *text.split("\n")[: screen.lines]])


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
                    canvas.circle((left + 3 + 6 * x, top + 3 + 6 * y), 2.7, front)
            else:
                canvas.text((left, top), character, front, bold if style.bold else regular)
    return image


def plot(run: Path) -> Image.Image:
    """All that a run has logged, read from its transaction log: names alone, numbers of one section on one panel."""
    log = subprocess.check_output([*LEET, "inspect", "--json", run]).splitlines()
    rows = [record["history"]["item"] for record in map(json.loads, log) if "history" in record]
    axis = "checkpoint_step" if "checkpoint_step" in rows[0] else "step"
    panels: dict[str, list[str]] = {}
    for key in sorted(rows[-1]):
        if not re.match(r"_|(step|workers|checkpoint_step)$|.*\.", key):  # a dot: of a table
            section = "" if isinstance(rows[-1][key], str) else key.rpartition("/")[0]
            panels.setdefault(section or key, []).append(key)
    height = -(-len(panels) // 3)
    figure = plt.figure(figsize=(11, 1.7 * height), dpi=150, layout="constrained")
    figure.supxlabel(axis, fontsize=8)
    for i, (panel, keys) in enumerate(sorted(panels.items()), 1):
        axes = figure.add_subplot(height, 3, i)
        for key in keys:
            look = "." if isinstance(rows[-1][key], str) else "-"
            axes.plot([row[axis] for row in rows], [row[key] for row in rows], look, label=key.rpartition("/")[2])
        axes.set_title(panel if keys[1:] else keys[0], loc="left", fontsize=10, family="monospace")
        if look == "-":
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        if keys[1:]:
            axes.legend(ncols=4, loc="lower right", bbox_to_anchor=(1.03, 0.95))
    figure.canvas.draw()
    return Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba()).convert("RGB")


def main() -> None:
    if not shutil.which("tmux"):
        sys.exit("pictures.py needs tmux, which is not installed: apt-get install tmux, brew install tmux, …")
    if unknown := set(sys.argv[1:]) - set(PICTURES):
        sys.exit(f"pictures.py has no {', '.join(unknown)}; it draws {', '.join(PICTURES)}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        tmux = ("tmux", "-S", f"{folder}/tmux", "-f", "/dev/null")
        subprocess.run([*tmux, "new-session", "-d"], check=True)
        stack.callback(subprocess.run, [*tmux, "kill-server"])
        for name in sys.argv[1:] or PICTURES:
            demo, *flags = name.split()
            runs = Path(folder, name.replace(" ", ""), "wandb")
            flags += ["--steps", "60", "--experiment", "7", "--mode", "offline", "--dir", runs.parent]
            subprocess.run([sys.executable, HERE / f"{demo}.py", *flags], check=True)
            pictures = {}
            for ending, screens in PICTURES[name].items():
                pictures[demo + ending] = draw("\n\n".join(show(screen, runs, tmux) for screen in screens))
            if demo == "demo4_extensions":
                pictures |= {f"curves_{run.name.split('-')[-2]}": plot(run) for run in runs.glob("*run-*")}
            for file, picture in pictures.items():
                picture.quantize(96).save(HERE / "docs" / f"{file}.png", optimize=True)


if __name__ == "__main__":
    main()
