"""Prints as a tree what runs there are and what they log: project, run, keys. The README's trees are made by it.

    uv run python demo3_hierarchical_metrics.py --experiment 7 --dir runs
    uv run python trees.py runs

It takes demos' `--dir` or `wandb` folders, and reads the transaction logs, wandb's record of each run on the disk.
`reward/{max,mean}` are two keys, `…` stands for more of the same kind, and config is what not all of the runs have.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import shorten

WIDTH = 92  # of a line below a run


class Log(defaultdict[str, list]):
    """The records of a run's transaction log, by type."""

    def __init__(self, folder: Path):
        super().__init__(list)
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder]
        for record in map(json.loads, subprocess.check_output(command, text=True).splitlines()):
            self[record["type"]].append(record.get(record["type"]))
        self.config = {k: v for it in [self["run"][0]["config"], *self["config"]] for k, v in it["update"].items()}
        self.axes = list(dict.fromkeys(metric["step_metric"] for metric in self["metric"] if "step_metric" in metric))

    def label(self) -> str:
        run, axes = self["run"][0], {"axis" if len(self.axes) == 1 else "axes": self.axes}
        about = {"job type": run.get("job_type"), "group": run.get("run_group"), "tags": run.get("tags")}
        return f"{run['display_name']} ({', '.join(said(about | axes))})"

    def lines(self) -> Iterator[str]:
        """For each axis some keys without a section and those in sections, short ones first; then the artifacts."""
        hidden = {metric["name"] for metric in self["metric"] if metric.get("options", {}).get("hidden")}
        logged = {key.partition(".")[0] for row in self["history"] for key in row["item"]}  # of a table: name.path, …
        pipelines = {axis.removesuffix("step"): defaultdict(list) for axis in self.axes}
        for key in sorted(key for key in logged - hidden if key[0] != "_"):
            prefix = max(filter(key.startswith, pipelines), key=len)
            section, slash, name = key.removeprefix(prefix).rpartition("/")
            pipelines[prefix][prefix + section + slash].append(name)
        for prefix, names in pipelines.items():
            bare = [prefix + name for name in sorted(names.pop(prefix, []), key=len)]
            ends = {section: ",".join(below) for section, below in sorted(names.items())}
            keys = [f"{section}{{{end}}}" if "," in end else section + end for section, end in ends.items()]
            yield ", ".join(bare[:3] + ["…"] * (len(bare) > 3) + sorted(keys, key=len))
        aliases = defaultdict(set)
        for artifact in (it for it in self["artifact"] if not it["type"].startswith("wandb-")):  # no tables
            aliases[f"artifact {artifact['name']}:"] |= set(artifact["aliases"])
        yield from said({artifact: sorted(its) for artifact, its in aliases.items()})


def said(facts: Mapping[str, str | list[str] | None]) -> list[str]:
    return [f"{what} {value if isinstance(value, str) else ' '.join(value)}" for what, value in facts.items() if value]


def tree(logs: list[Log]) -> dict[str, dict]:
    projects = defaultdict(lambda: defaultdict(dict))
    for log in logs:
        own = {f"config {k}:": v for k, v in log.config.items() if any(k not in other.config for other in logs)}
        lines = [line.rstrip(",") for line in (*log.lines(), *said(own)) if line]
        projects[log["run"][0]["project"]][log.label()] |= {
            shorten(line, WIDTH, placeholder=" …"): {} for line in lines
        }
    return projects


def draw(labels: Mapping[str, dict], indent: str = "") -> Iterator[str]:
    for i, (label, below) in enumerate(labels.items(), 1):
        yield indent + ("└── " if i == len(labels) else "├── ") + label
        yield from draw(below, indent + ("    " if i == len(labels) else "│   "))


if __name__ == "__main__":
    below = (Path(where).glob(f"{wandb}*run-*-*/") for where in sys.argv[1:] for wandb in ("", "wandb/"))
    folders = [folder for found in below for folder in found] or sys.exit(__doc__)
    logs = sorted(map(Log, folders), key=lambda log: log["run"][0]["start_time"])
    for project, runs in tree(logs).items():
        print(project, *draw(runs), sep="\n")
