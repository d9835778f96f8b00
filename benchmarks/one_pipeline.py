"""What one pipeline of `common.WandbRun` carries, and how long a demo takes to start.

    uv run python benchmarks/one_pipeline.py
    uv run python benchmarks/one_pipeline.py --only scaling --json

million    a million reports of one worker, ten to a step: how much its process and the pipeline actor (with its
           wandb-core) grow after the first tenth, and how long `finish` takes after 100,000 rows
scaling    the same number of reports from 4, 16 and 64 workers, flat out: 10 numbers, or 4 arrays of 64 samples
thousand   1,000 workers that report every second, every quarter of one, and flat out
idle       1,000 workers that have logged and live on
start      demo 1 with its default flags, and a script that only starts Ray and two actors

Workers are simulated by a few processes: each worker has an outbox of its own, as if it were a process. What is lost is
read from the transaction log.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbone.outbox import Outbox
from backbone.process import Process
from common import WandbRun

import numpy as np
import ray
from measuring import ROOT, cpu_seconds, lost, megabytes, processes, show, start_ray, target, wait_for_quiet


def as_worker(run: WandbRun, name: str) -> WandbRun:
    """A copy of the run whose reports are another worker's, as if it had a process of its own."""
    own, process = copy.copy(run), Process()
    process.name = f"worker {name}"
    own._outbox = Outbox(run._address, process)
    return own


@ray.remote(num_cpus=0)
class Workers:
    """Some workers of a pipeline, which reports `report` again and again."""

    def __init__(self, run: WandbRun, names: Sequence[str], report: dict[str, Any]):
        self.runs, self.report = [as_worker(run, name) for name in names], report
        self.drive(range(1), 1, 0.0)  # a worker's first call opens its outbox

    def drive(self, steps: range, calls: int, seconds: float) -> np.ndarray:
        """Each worker reports each step in so many calls. The seconds that these took."""
        took, n, began = np.ones(len(steps) * len(self.runs) * calls, np.float32), 0, time.monotonic()
        for step in steps:
            for i, run in enumerate(self.runs):
                if seconds:
                    due = began + (step - steps[0] + i / len(self.runs)) * seconds
                    time.sleep(max(0.0, due - time.monotonic()))
                for _ in range(calls):
                    start = time.perf_counter()
                    run.log(self.report, step)
                    took[n], n = time.perf_counter() - start, n + 1
        return took


def carry(
    at_most: int,
    workers: int,
    steps: int,
    calls: int = 1,
    seconds: float = 0.0,
    arrays: bool = False,
    idle: float = 0.0,
) -> dict[str, float]:
    """So many workers, in `at_most` so many processes, report so many steps: flat out, or every so many seconds.

    Then they say nothing for `idle` seconds.
    """
    report: dict[str, Any] = {f"group/metric_{i}": i / 7 for i in range(10)}
    if arrays:
        report = {f"group/samples_{i}": np.random.default_rng(i).random(64) for i in range(4)}
    report["tokens"] = 1  # its sum says on how many reports a row stands
    reports, count = workers * steps * calls, min(at_most, workers)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        run = WandbRun("benchmark", workers=workers, mode="offline", dir=directory)
        groups = [Workers.remote(run, [f"{i}-{j}" for j in range(i, workers, count)], report) for i in range(count)]
        wait_for_quiet(groups)
        actor, process, sizes = max(processes("ray::TrainingPipelineActor")), max(processes("ray::Workers")), []
        folders, disk = (run._address.folder, Path(directory, "wandb")), 0
        cpu, actor_cpu, began = cpu_seconds(), cpu_seconds(actor), time.perf_counter()
        drives = [group.drive.remote(range(1, 1 + steps), calls, seconds) for group in groups]
        while (arrived := run.progress()[0].reports - workers) < reports:
            disk = max(disk, sum(map(size_on_disk, folders)))
            if arrived >= reports / 10:
                sizes.append((megabytes(process), megabytes(actor)))
            time.sleep(0.25 if arrived < 0.9 * reports else 0.02)
        took, actor_cpu, there = ray.get(drives), cpu_seconds(actor) - actor_cpu, time.perf_counter()
        if idle:
            quiet = cpu_seconds(actor)
            time.sleep(idle)
            quiet = (cpu_seconds(actor) - quiet) / idle
            there += idle
        ledger = run.finish()
        finished, cpu = time.perf_counter(), cpu_seconds() - cpu
        for group in groups:
            ray.kill(group)
        logs = [*ledger.path.glob("*.wandb")]
        worker_growth, actor_growth = np.ptp(sizes or [(0.0, 0.0)], axis=0)
        return {
            "reports/s": reports / (there - began),
            "CPU s per 1,000": cpu / reports * 1000,
            "actor CPU s per 1,000": actor_cpu / reports * 1000,
            "log call p50 us": float(np.percentile(np.concatenate(took), 50)) * 1e6,
            "p99 us": float(np.percentile(np.concatenate(took), 99)) * 1e6,
            "process +MB": float(worker_growth),
            "actor +MB": float(actor_growth),
            "disk MB": disk / 2**20,
            "rows": ledger.rows,
            "finish s": finished - there,
            **({"idle % of a core": 100 * quiet} if idle else {}),
            "lost": lost(logs, reports + workers, "tokens"),
        }


def size_on_disk(folder: Path) -> int:
    """Bytes of the files below a folder but for the transaction logs, which are wandb's."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it has been read, and removed
            total += path.stat().st_size if path.suffix != ".wandb" else 0
    return total


EMPTY = """
import ray
class A:
    def f(self): pass
ray.init(address="local", include_dashboard=False, log_to_driver=False)
ray.get([ray.remote(A).remote().f.remote() for _ in range(2)])
ray.shutdown()
"""


def starts(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds from start to end."""
    demo = [sys.executable, str(ROOT / "demo1_centralized_actors.py"), "--mode", "offline"]
    runs: dict[str, list[float]] = {"empty script": [], "demo 1": []}
    for _ in range(rounds):
        for name, command in zip(runs, ([sys.executable, "-c", EMPTY], demo), strict=True):
            with tempfile.TemporaryDirectory() as directory:
                began = time.perf_counter()
                subprocess.run(command, cwd=directory, check=True, capture_output=True)
                runs[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(times) for name, times in runs.items()}
    return {name: {"seconds": each, "x empty": each / seconds["empty script"]} for name, each in seconds.items()}


def loads(args: Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """What each part has a pipeline carry."""
    scaling = {
        f"{workers} workers, {kind}": dict(workers=workers, steps=args.reports // workers, arrays=kind == "arrays")
        for kind in ("numbers", "arrays")
        for workers in (4, 16, 64)
    }
    thousand = {
        f"{args.workers:,} workers, {name}": dict(workers=args.workers, steps=args.steps, seconds=seconds)
        for name, seconds in (("1 s", 1.0), ("0.25 s", 0.25), ("flat out", 0.0))
    }
    million = {f"{args.million:,} reports": dict(workers=1, steps=args.million // 10, calls=10)}
    idle = {f"{args.workers:,} workers": dict(workers=args.workers, steps=1, idle=20.0)}
    return {"million": million, "scaling": scaling, "thousand": thousand, "idle": idle}


def targets(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """What WandbRun and the demos are to keep to, of what was measured."""
    found = {}
    for row in result.get("million", {}).values():
        found["growth of the worker's process, MB"] = target(row["process +MB"], "<", 50)
        found["growth of the pipeline actor, MB"] = target(row["actor +MB"], "<", 50)
        found["on the disk at any time, MB"] = target(row["disk MB"], "<", 100)
        found[f"finish after {row['rows']:,} rows, s"] = target(row["finish s"], "<", 2)
    if rows := result.get("scaling"):
        for kind in ("numbers", "arrays"):
            few, many = (rows[f"{workers} workers, {kind}"]["CPU s per 1,000"] for workers in (4, 64))
            found[f"CPU a report, 64 / 4 workers, {kind}"] = target(many / few, "<=", 1)
    if rows := result.get("thousand"):
        row = next(iter(rows.values()))
        found["cores of the actor, 1,000 reports/s"] = target(row["actor CPU s per 1,000"], "<=", 0.5)
    for row in result.get("idle", {}).values():
        found["idle, % of a core"] = target(row["idle % of a core"], "<=", 5)
    if rows := result.get("start"):
        found["demo 1 / empty script"] = target(rows["demo 1"]["x empty"], "<", 1.8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("million", "scaling", "thousand", "idle", "start")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="what to measure (all)")
    parser.add_argument("--million", type=int, default=1_000_000, help="reports of one worker (%(default)s)")
    parser.add_argument("--reports", type=int, default=128_000, help="of 4, 16 and 64 workers (%(default)s)")
    parser.add_argument("--workers", type=int, default=1000, help="of the third part (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of each of these (%(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="that simulate workers (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the start (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):  # Ray's warnings
        if "start" in args.only:
            result["start"] = starts(args.rounds)
        start_ray()
        for part, each in loads(args).items():
            if part in args.only:
                result[part] = {name: carry(args.processes, **load) for name, load in each.items()}
        ray.shutdown()
    kept = targets(result)
    show(result | ({"targets": kept} if kept else {}), args)


if __name__ == "__main__":
    main()
