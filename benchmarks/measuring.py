"""What both benchmarks need: processes and what they cost, reports on the disk, tables and targets."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import textwrap
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # Ray's workers

from backbone import transaction_log

import psutil
import ray

if TYPE_CHECKING:
    import wandb


def start_ray() -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")


def start_wandb(directory: str) -> wandb.Run:
    """A run of wandb's own, as people start it."""
    import wandb  # here, because it costs memory that most workers don't need

    settings = wandb.Settings(silent=True, console="off")
    return wandb.init(project="benchmark", dir=directory, mode="offline", settings=settings, reinit="create_new")


def tree(pid: int | None = None) -> list[psutil.Process]:
    """A process and all below it; this one, its Ray and detached wandb-cores if none is named."""
    root = psutil.Process(pid)
    found = [root, *root.children(recursive=True)]
    if pid is None:
        cores = [each for each in psutil.process_iter(["name", "cmdline"]) if each.info["name"] == "wandb-core"]
        found += [core for core in cores if "--detached" in (core.info["cmdline"] or ())]
    return found


def processes(title: str) -> list[int]:
    """Those of this one and its Ray that have `title` in their command line; an actor's begins with `ray::<class>`."""
    found = []
    for process in tree():
        with contextlib.suppress(psutil.Error):  # it has ended
            found += [process.pid] if title in " ".join(process.cmdline()) else []
    return found


def cpu_seconds(pid: int | None = None) -> float:
    """Of a process and all that are, and were, below it; of this one and its Ray if none is named."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # user and system, its own and those of its ended children
    return total


def megabytes(pid: int) -> float:
    """Resident memory of a process and its wandb-core."""
    process = psutil.Process(pid)
    cores = [child for child in process.children() if child.name() == "wandb-core"]
    return sum(each.memory_info().rss for each in (process, *cores)) / 2**20


def wait_for_quiet(actors: Sequence[Any] = ()) -> None:
    """Waits for these actors. Ray starts a spare worker whenever one has taken one: that is no cost of logging."""
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    deadline, before = time.monotonic() + 5, cpu_seconds()
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = cpu_seconds()
        if now - before <= 0.04:
            return
        before = now


def lost(logs: Sequence[Path], sent: int, key: str = "workers") -> float:
    """Reports that are in no row of the transaction logs. key: where a row says how many it stands on.

    wandb writes the last rows a moment after `finish`.
    """
    deadline = time.monotonic() + 3
    while True:
        records = (record for log in logs for record in transaction_log.records(log.parent))
        items = (item for record in records for item in record.history.item)
        missing = sent - sum(json.loads(item.value_json) for item in items if key in (item.key, *item.nested_key))
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def target(measured: float, relation: str, wanted: float) -> dict[str, Any]:
    holds = {"<": measured < wanted, "<=": measured <= wanted, ">=": measured >= wanted}[relation]
    return {"measured": measured, "wanted": f"{relation} {wanted:g}", "holds": "yes" if holds else "no"}


def show(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], args: Namespace) -> None:
    """Prints tables (name -> row -> column -> cell), or JSON if `args` say so."""
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    if args.json:
        print(json.dumps({"machine": machine} | tables, indent=1))
        return
    print(machine, *(f"{name} {value}" for name, value in vars(args).items() if type(value) is int), sep=", ")
    for name, rows in tables.items():
        print()
        print_table(name, rows)


def print_table(title: str, rows: Mapping[str, Mapping[str, float | str]]) -> None:
    heads = [textwrap.wrap(head, 9, break_long_words=False)[::-1] for head in next(iter(rows.values()))]
    lines = [*itertools.zip_longest([title], *heads, fillvalue="")][::-1]
    lines += [(name, *map(_text, row.values())) for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        print(name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.{0 if value == int(value) or value >= 100 else 1 if value >= 10 else 2}f}"
