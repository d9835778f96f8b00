"""Prints as a tree what runs there are and what they log: project, run, keys. The README's trees are made by it.

    uv run python demo3_hierarchical_metrics.py --experiment 7 --dir runs
    uv run python trees.py runs

It takes demos' `--dir` or `wandb` folders, and reads the transaction logs, wandb's record of each run on the disk.
Behind a project stands what all its runs have in common, and below it their artifacts. Keys with a prefix have a line
of their own, `…` stands for more keys, and values of the config are shown where runs differ in them.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from textwrap import shorten
from typing import Any

FIRST = ("loss", "reward/mean", "checkpoint_step", "e2e/speed", "*/accuracy", "grads/grad_norm_0", "errors")
SHOWN = 3  # keys of a pipeline
WIDTH = 96  # of a line without its branch


class Log(defaultdict[str, list]):
    """The records of a run's transaction logs, by type. A run that was resumed has several logs."""

    @property
    def run(self) -> dict[str, Any]:
        return self["run"][0]

    @property
    def config(self) -> dict[str, Any]:
        return {k: v for it in [self.run["config"], *self["config"]] for k, v in it["update"].items()}

    @property
    def axes(self) -> list[str]:
        return list(dict.fromkeys(metric["step_metric"] for metric in self["metric"] if "step_metric" in metric))

    def facts(self) -> list[str]:
        about = {"job type": [self.run.get("job_type")], "group": [self.run.get("run_group")]}
        about |= {"tags": self.run.get("tags", []), "axis" if len(self.axes) == 1 else "axes": self.axes}
        return [f"{what} {' '.join(values)}" for what, values in about.items() if any(values)]

    def keys(self) -> dict[str, str]:
        """Those that are shown, by prefix."""
        hidden = {metric["name"] for metric in self["metric"] if metric.get("options", {}).get("hidden")}
        logged = {key.partition(".")[0] for row in self["history"] for key in row["item"]}  # of a table: name.path, …
        found = {axis.removesuffix("step"): [] for axis in self.axes}
        for key in (key for key in logged - hidden if key[0] != "_"):
            prefix = max(filter(key.startswith, found), key=len)
            name = key.removeprefix(prefix)
            place = next((i for i, pattern in enumerate(FIRST) if fnmatchcase(name, pattern)), len(FIRST))
            found[prefix].append((place, key))
        return {prefix: listed([key for _, key in sorted(keys)]) for prefix, keys in found.items()}


def listed(keys: Sequence[str]) -> str:
    return ", ".join([*keys[:SHOWN], *["…"] * (len(keys) > SHOWN)])


def short(line: str) -> str:
    return shorten(line, WIDTH, placeholder=" …")


def read(folders: Sequence[Path]) -> list[Log]:
    """The runs that these folders are of, the oldest first."""
    logs = defaultdict(lambda: Log(list))
    for folder in folders:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder]
        records = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
        run = next(record["run"] for record in records if record["type"] == "run")
        for record in records:
            logs[run["project"], run["run_id"]][record["type"]].append(record.get(record["type"]))
    return sorted(logs.values(), key=lambda log: log.run["start_time"])


def tree(project: str, logs: Sequence[Log], common: set[str]) -> tuple[str, dict[str, list[str]]]:
    """The project's line, and the lines of its runs and artifacts with those below them.

    common: what is in the config of all runs.
    """
    shared = [fact for fact in logs[0].facts() if len(logs) > 1 and all(fact in log.facts() for log in logs)]
    below = {}
    for log in logs:
        keys, own = log.keys(), [fact for fact in log.facts() if fact not in shared]
        label = log.run["display_name"] + (f" ({', '.join(own)})" if own else "")
        label += f": {bare}" if (bare := keys.pop("", "")) else ""
        config = [f"{k}: {v}" for k, v in log.config.items() if k not in {*common, "used_artifacts"}]
        lines = [*keys.values(), *([f"config {', '.join(config)}"] if config else [])]
        below[short(label)] = list(map(short, lines))
    return project + (f" ({', '.join(shared)})" if shared else ""), below | {line: [] for line in artifacts(logs)}


def artifacts(logs: Sequence[Log]) -> Iterator[str]:
    """A line for each: its aliases, the runs that logged it → those that used it."""
    aliases, made, used = (defaultdict[str, dict[str, None]](dict) for _ in range(3))
    for log in logs:
        run = {log.run["display_name"]: None}
        for artifact in (it for it in log["artifact"] if not it["type"].startswith("wandb-")):  # no tables
            made[artifact["name"]] |= run
            aliases[artifact["name"]] |= dict.fromkeys(artifact["aliases"])
        for name in log.config.get("used_artifacts", ()):
            used[name.rpartition("/")[2].partition(":")[0]] |= run
    for name in {**made, **used}:
        who = f"{' '.join(made[name])} → {', '.join(used[name])}".strip().removesuffix(" →")
        yield short(f"artifact {name}: {' '.join(sorted(aliases[name]))} ({who})")


def draw(labels: Sequence[str] | dict[str, list[str]], indent: str = "") -> Iterator[str]:
    for i, label in enumerate(labels, 1):
        yield indent + ("└── " if i == len(labels) else "├── ") + label
        if isinstance(labels, dict):
            yield from draw(labels[label], indent + ("    " if i == len(labels) else "│   "))


if __name__ == "__main__":
    below = (Path(where).glob(f"{wandb}*run-*-*/") for where in sys.argv[1:] for wandb in ("", "wandb/"))
    folders = {folder.resolve(): None for found in below for folder in found} or sys.exit(__doc__)
    logs = read([*folders])
    common = {key for key in logs[0].config if all(key in log.config for log in logs)}
    for project in dict.fromkeys(log.run["project"] for log in logs):
        label, below = tree(project, [log for log in logs if log.run["project"] == project], common)
        print(label, *draw(below), sep="\n")
