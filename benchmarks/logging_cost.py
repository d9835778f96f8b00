"""What logging costs a Ray worker: the ways that people really use, under the same load, side by side.

    uv run python benchmarks/logging_cost.py
    uv run python benchmarks/logging_cost.py --rounds 5 --json

Every worker logs twice a round. In steps of 10 ms, for the time that it spends in its log call: p50, p99, max and the
share of its step. And flat out, for the rate until everything is on disk (the last write to a transaction log, which
wandb's `finish` does not wait for), for the CPU time of all processes and for the log call of a worker that never
sleeps ("busy"). Memory is that of the largest worker and of the logging process after all that, each with its
wandb-core. What is lost is read from the transaction logs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
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

from common import WandbRun

import numpy as np
import ray
from measuring import cpu_seconds, lost, megabytes, processes, show, start_ray, start_wandb, target, wait_for_quiet
from ray.util.queue import Queue

STEP_SECONDS = 0.01
WARM_UP = 3  # log calls of a worker that are not counted: they open connections
Report = dict[str, float]


class Way:
    """A way to log. Each worker has a copy of it, made after `start`."""

    logger = ""  # in the title of the process that logs, if it is no worker

    def __init__(self, load: Namespace, directory: str):
        self.load, self.directory = load, directory

    def start(self) -> None:
        """In the driver."""

    def begin(self) -> None:
        """In a worker."""

    def log(self, report: Report, step: int, rank: int) -> None:
        """In a worker: this is timed."""

    def end(self) -> None:
        """In a worker, when it has logged all."""

    def drive(self, workers: Sequence[Any], reports: int, first: int, seconds: float) -> np.ndarray:
        """Has each worker log so many reports; the seconds that each log call took."""
        return np.concatenate(ray.get([worker.drive.remote(reports, first, seconds) for worker in workers]))

    def finish(self, workers: Sequence[Any]) -> None:
        self.run.finish()


class Blocking(Way):
    """The worker waits for a logging actor on every row."""

    logger = "ray::Logger"

    def start(self) -> None:
        self.actor = Logger.remote(self.directory)

    def log(self, report: Report, step: int, rank: int) -> None:
        ray.get(self.actor.log.remote(as_row(report, step)))

    def finish(self, workers: Sequence[Any]) -> None:
        ray.get(self.actor.finish.remote())


class Unbounded(Blocking):
    """The same without waiting."""

    def log(self, report: Report, step: int, rank: int) -> None:
        self.last = self.actor.log.remote(as_row(report, step))

    def end(self) -> None:
        ray.get(self.last)  # else its rows are lost when the run is finished


class OwnRun(Way):
    """Every worker has a W&B run of its own."""

    def begin(self) -> None:
        self.run = start_wandb(self.directory)

    def log(self, report: Report, step: int, rank: int) -> None:
        self.run.log(as_row(report, step))

    def finish(self, workers: Sequence[Any]) -> None:
        ray.get([worker.finish.remote() for worker in workers])


class Driver(Way):
    """Workers return metrics, the driver averages and logs. Timed is what a step takes beside its 10 ms."""

    logger = Path(__file__).name

    def start(self) -> None:
        self.run = start_wandb(self.directory)

    def __getstate__(self) -> dict[str, Any]:
        return {"load": self.load}

    def drive(self, workers: Sequence[Any], reports: int, first: int, seconds: float) -> np.ndarray:
        took = []
        for step in range(first, first + reports):
            began = time.perf_counter()
            each = ray.get([worker.report.remote(seconds) for worker in workers])
            means = {key: statistics.fmean(report[key] for report in each) for key in each[0]}
            self.run.log(as_row(means, step, len(workers)))
            took.append(time.perf_counter() - began - seconds)
        return np.array(took[WARM_UP:])


class ThroughQueue(Blocking):
    """A ray.util.queue.Queue into a logging actor, as Ray Tune does."""

    def start(self) -> None:
        super().start()
        self.queue = Queue(actor_options={"num_cpus": 0})
        self.actor.drain.remote(self.queue, self.load.workers * (self.load.paced + self.load.reports))

    def log(self, report: Report, step: int, rank: int) -> None:
        self.queue.put(as_row(report, step))


class DetachedCore(Blocking):
    """Every worker attaches to one run, which a wandb-core outside of Ray has: `wandb beta core start`."""

    logger = "--detached"

    def start(self) -> None:
        self.service = self._core("start", "")
        self.actor = Logger.options(runtime_env={"env_vars": {"WANDB_SERVICE": self.service}}).remote(self.directory)
        self.run_id = ray.get(self.actor.run_id.remote())

    def begin(self) -> None:
        os.environ["WANDB_SERVICE"] = self.service
        import wandb

        self.run = wandb.attach(self.run_id)

    def log(self, report: Report, step: int, rank: int) -> None:
        self.run.log(as_row(report, step))

    def finish(self, workers: Sequence[Any]) -> None:
        super().finish(workers)
        self._core("stop", self.service)

    def _core(self, what: str, service: str) -> str:
        command, environ = (
            [sys.executable, "-m", "wandb", "beta", "core", what],
            os.environ | {"WANDB_SERVICE": service},
        )
        return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


class Rows(Way):
    """common.WandbRun, one row per report."""

    logger = "ray::TrainingPipelineActor"

    def start(self, per_row: int = 1) -> None:
        self.run = WandbRun("benchmark", workers=per_row, mode="offline", dir=self.directory)

    def log(self, report: Report, step: int, rank: int) -> None:
        self.run.log(report, step * self.load.workers + rank)


class Reduced(Rows):
    """common.WandbRun, one row per step over all workers (the default)."""

    def start(self) -> None:
        super().start(per_row=self.load.workers)

    def log(self, report: Report, step: int, rank: int) -> None:
        self.run.log(report, step)


class Packing(Way):
    """Only packs the report, which every way to another process has to do. Nothing is logged."""

    def log(self, report: Report, step: int, rank: int) -> None:
        pickle.dumps(report, pickle.HIGHEST_PROTOCOL)

    def finish(self, workers: Sequence[Any]) -> None:
        pass


class Ceiling(OwnRun):
    """run.log in a tight loop in one process."""

    def start(self) -> None:
        reports = self.load.reports * self.load.workers
        self.load = Namespace(**vars(self.load) | dict(workers=1, reports=reports))


WAYS = {"blocking": Blocking, "unbounded": Unbounded, "own run": OwnRun, "driver": Driver, "queue": ThroughQueue}
WAYS |= {"detached core": DetachedCore, "WandbRun rows": Rows, "WandbRun reduced": Reduced, "ceiling": Ceiling}
WAYS |= {"packing": Packing}


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self, way: Way, rank: int):
        self.way, self.rank, self.rng = way, rank, np.random.default_rng(rank)
        self.keys = [f"group/metric_{i}" for i in range(way.load.values)]
        way.begin()

    def report(self, seconds: float) -> Report:
        if seconds:
            time.sleep(seconds)
        return dict(zip(self.keys, self.rng.random(len(self.keys)).tolist(), strict=True))

    def drive(self, reports: int, first: int, seconds: float) -> np.ndarray:
        took = []
        for step in range(first, first + reports):
            report = self.report(seconds)
            began = time.perf_counter()
            self.way.log(report, step, self.rank)
            took.append(time.perf_counter() - began)
        self.way.end()
        return np.array(took[WARM_UP:])

    def finish(self) -> None:
        self.way.run.finish()


@ray.remote(num_cpus=0)
class Logger:
    def __init__(self, directory: str):
        self.run = start_wandb(directory)

    def run_id(self) -> str:
        return self.run.id

    def log(self, row: Report) -> None:
        self.run.log(row)

    def drain(self, queue: Queue, reports: int) -> None:
        for _ in range(reports):
            self.run.log(queue.get())

    def finish(self) -> None:
        self.run.finish()


def as_row(report: Report, step: int, workers: int = 1) -> Report:
    """With what WandbRun adds to a row, so that all ways write the same."""
    return {**report, "step": step, "workers": workers}


def measure(way: Way) -> dict[str, float]:
    """One round of a way."""
    way.start()
    load, workers = way.load, [Worker.remote(way, rank) for rank in range(way.load.workers)]
    wait_for_quiet(workers)
    paced = way.drive(workers, load.paced, 0, STEP_SECONDS)
    wait_for_quiet()
    cpu, began = cpu_seconds(), time.time()
    busy = way.drive(workers, load.reports, load.paced, 0.0)
    ended = time.time()
    worker_memory = max(map(megabytes, processes("ray::Worker")))
    logger_memory = megabytes(max(processes(way.logger))) if way.logger else 0.0
    way.finish(workers)
    cpu, reports = cpu_seconds() - cpu, load.workers * load.reports
    logs = [*Path(way.directory).glob("wandb/offline-run-*/*.wandb")]
    missing = lost(logs, load.workers * load.paced + reports) if logs else 0
    for worker in workers:
        ray.kill(worker)  # not before: a run that is finished is not yet written
    return {
        "reports/s": reports / (max((log.stat().st_mtime for log in logs), default=ended) - began),
        "x blocking": 0.0,
        "x own run": 0.0,
        "log call p50 us": np.percentile(paced, 50) * 1e6,
        "p99 us": np.percentile(paced, 99) * 1e6,
        "max us": paced.max() * 1e6,
        "% of 10 ms": paced.mean() / STEP_SECONDS * 100,
        "busy p50 us": np.percentile(busy, 50) * 1e6,
        "CPU s per 1,000": cpu / reports * 1000,
        "worker MB": worker_memory,
        "logger MB": logger_memory,
        "lost": missing,
    }


def compare(load: Namespace) -> dict[str, dict[str, float]]:
    """All ways, interleaved; medians over the rounds (of `lost`: the worst), and ratios of medians."""
    measured: dict[str, list] = {name: [] for name in WAYS}
    for round_ in range(load.rounds):
        for name, way in WAYS.items():
            print(f"round {round_ + 1} of {load.rounds}: {name}", file=sys.stderr)
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
                measured[name].append(measure(way(load, directory)))
    result = {}
    for name, runs in measured.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        result[name] = row | {"lost": max(run["lost"] for run in runs)}
    for row in result.values():
        row |= {f"x {other}": row["reports/s"] / result[other]["reports/s"] for other in ("blocking", "own run")}
    return result


def targets(ways: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """What WandbRun is to keep to."""
    rows, reduced, packing = ways["WandbRun rows"], ways["WandbRun reduced"], ways["packing"]
    return {
        "log call / packing, flat out": target(reduced["busy p50 us"] / packing["busy p50 us"], "<=", 3),
        "log call / packing, in steps of 10 ms": target(
            reduced["log call p50 us"] / packing["log call p50 us"], "<=", 2.5
        ),
        "log call flat out, p50 us": target(reduced["busy p50 us"], "<=", 5),
        "log call in steps of 10 ms, p50 us": target(reduced["log call p50 us"], "<=", 60),
        "log call in steps of 10 ms, p99 us": target(reduced["p99 us"], "<=", 100),
        "reduced / blocking": target(reduced["x blocking"], ">=", 10),
        "reduced / own run": target(reduced["x own run"], ">=", 2.8),
        "rows / ceiling": target(rows["reports/s"] / ways["ceiling"]["reports/s"], ">=", 0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--reports", type=int, default=2000, help="per worker, flat out (%(default)s)")
    parser.add_argument("--paced", type=int, default=100, help="per worker, in steps of 10 ms (%(default)s)")
    parser.add_argument("--values", type=int, default=11, help="numbers in a report (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # Ray's warnings
        start_ray()
        ways = compare(args)
        ray.shutdown()
    show({"ways": ways, "targets": targets(ways)}, args)


if __name__ == "__main__":
    main()
