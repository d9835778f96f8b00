"""What logging costs a Ray worker: the ways that people really use, under the same load, side by side.

    blocking          the worker waits for a logging actor on every row: ray.get(actor.log.remote(row))
    unbounded         the same without waiting
    own run           every worker has a W&B run of its own and calls run.log
    driver            workers return metrics, the driver averages and logs
    queue             a ray.util.queue.Queue into a logging actor, as Ray Tune does
    WandbRun rows     common.WandbRun, one row per report
    WandbRun reduced  common.WandbRun, one row per step over all workers (the default)
    ceiling           run.log in a tight loop in one process, without Ray

Every way runs twice a round. In steps of 10 ms, for the time that a worker spends in its log call: p50, p99, max and
the share of its step (for the driver's way, how long it stands still between two steps). And flat out, for the rate
until everything is on disk (the last write to a transaction log: wandb's `finish` returns before it, WandbRun's after
it has read the log back) and the CPU time of all processes; "busy p50" is the log call then, in microseconds, and
"finish s" how long `finish` takes. Memory is the peak of the largest worker and of the logging process, each with its
wandb-core. `lost` is read from the transaction logs.

    uv run python benchmarks/logging_cost.py
    uv run python benchmarks/logging_cost.py --reports 2000 --rounds 5 --json
    uv run python benchmarks/logging_cost.py --only memory,scaling,thousand,start
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # Ray's workers

import common  # before ray: it sets what Ray reads when it is imported

import numpy as np
import ray
from ray.util.queue import Queue

STEP_SECONDS = 0.01
WARM_UP = 3  # log calls of a worker that are not counted: they open connections
Log = Callable[[dict[str, Any], int], object]


@dataclasses.dataclass(frozen=True)
class Load:
    """What each of the workers logs."""

    workers: int
    reports: int  # per worker, flat out
    paced: int  # per worker, one every STEP_SECONDS
    values: int  # numbers in a report
    directory: str


# Processes


def processes(root: int) -> dict[int, tuple[str, float]]:
    """`root` and all below it: pid -> (title, CPU seconds, with those of its children that have ended)."""
    found, children = {}, collections.defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            title = (entry / "cmdline").read_text().replace("\0", " ")
            children[int(stat[1])].append(int(entry.name))
            found[int(entry.name)] = title, sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK")
    tree = [root]
    for pid in tree:
        tree += children[pid]
    return {pid: found[pid] for pid in tree if pid in found}


def cpu_seconds(pids: Sequence[int] = ()) -> float:
    """Of these processes and all below them; without any, of this one and all of its Ray."""
    return sum(cpu for pid in pids or [os.getpid()] for _, cpu in processes(pid).values())


def megabytes(pids: Sequence[int], field: str) -> float:
    """Memory of these processes, each with its wandb-core: VmRSS now, or VmHWM, its peak."""
    total, own = 0, set(pids)
    tree = {pid: title for root in own for pid, (title, _) in processes(root).items()}
    for pid in (pid for pid, title in tree.items() if pid in own or "wandb-core" in title):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith(field))
    return total / 1024


def forget_peaks() -> None:
    for pid in processes(os.getpid()):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def titled(name: str) -> list[int]:
    """This Ray's actors of a class."""
    return [pid for pid, (title, _) in processes(os.getpid()).items() if title.startswith(f"ray::{name}")]


def wait_until_quiet(seconds: float = 5.0) -> None:
    """Ray starts spare workers whenever an actor has taken one: that is no cost of logging."""
    deadline, before = time.monotonic() + seconds, cpu_seconds()
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = cpu_seconds()
        if now - before <= 0.04:
            return
        before = now


def lost(paths: Sequence[Path], sent: int) -> int:
    """Reports that are in no row of the transaction logs; wandb writes the last rows a moment after `finish`."""
    deadline = time.monotonic() + 3
    while True:
        missing = sent - sum(row["workers"] for path in paths for row in common.read_rows(path))
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


# What runs in the workers


def drive(log: Log, reports: int, first: int, values: int, seconds: float) -> np.ndarray:
    """Logs `reports` reports, waiting `seconds` before each; the seconds that each log call took."""
    rng, keys, took = np.random.default_rng(first), [f"group/metric_{i}" for i in range(values)], np.empty(reports)
    for i in range(reports):
        if seconds:
            time.sleep(seconds)
        report = dict(zip(keys, rng.random(values).tolist(), strict=True))
        began = time.perf_counter()
        log(report, first + i)
        took[i] = time.perf_counter() - began
    return took[WARM_UP:] if seconds else took


def start_wandb(directory: str) -> Any:
    import wandb

    os.environ.pop("WANDB_SERVICE", None)  # the driver's: this process needs a service of its own
    settings = wandb.Settings(silent=True, console="off")
    return wandb.init(project="benchmark", dir=directory, mode="offline", settings=settings, reinit="create_new")


def as_row(report: Mapping[str, Any], step: int, workers: int = 1) -> dict[str, Any]:
    """With what WandbRun adds to a row, so that all ways write the same."""
    return {**report, "step": step, "workers": workers}


@ray.remote(num_cpus=0)
class Worker:
    def __init__(self, index: int, workers: int):
        self.index, self.workers, self.run = index, workers, None

    def pid(self) -> int:
        return os.getpid()

    def trim(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def drive(self, way: str, target: Any, *load: Any) -> np.ndarray:
        last = None

        def unbounded(report: dict[str, Any], step: int) -> None:
            nonlocal last
            last = target.log.remote(as_row(report, step))

        logs: dict[str, Log] = {
            "blocking": lambda report, step: ray.get(target.log.remote(as_row(report, step))),
            "unbounded": unbounded,
            "own run": lambda report, step: self.run.log(as_row(report, step)),
            "queue": lambda report, step: target.put(as_row(report, step)),
            "WandbRun rows": lambda report, step: target.log(report, step * self.workers + self.index),
            "WandbRun reduced": getattr(target, "log", None),
        }
        took = drive(logs[way], *load)
        if last:
            ray.get(last)  # else its rows are lost when the run is finished
        return took

    def step(self, step: int, values: int, seconds: float) -> tuple[dict[str, float], float, float]:
        """For the driver's way: a report, and when the step began and ended."""
        began = time.perf_counter()
        if seconds:
            time.sleep(seconds)
        rng = np.random.default_rng(step)
        report = {f"group/metric_{i}": value for i, value in enumerate(rng.random(values).tolist())}
        return report, began, time.perf_counter()

    def start_run(self, directory: str) -> None:
        self.run = start_wandb(directory)

    def finish_run(self) -> Path:
        self.run.finish()
        return Path(self.run.sync_dir)

    def drive_senders(self, run: common.WandbRun, senders: int, steps: int, report: dict, seconds: float) -> np.ndarray:
        """`senders` workers' reports of `steps` steps, each through an outbox of its own as if it had a process."""
        assert isinstance(common._outboxes, dict)  # a process's outboxes: with a dict for each, a sender has its own
        outboxes, took, began = [{} for _ in range(senders)], [], time.monotonic()
        for step in range(steps):
            for i, own in enumerate(outboxes):
                due = began + (step + i / senders) * seconds
                time.sleep(max(0.0, due - time.monotonic()))
                common._outboxes = own
                start = time.perf_counter()
                run.log(report, step)
                took.append(time.perf_counter() - start)
        return np.array(took[senders:] or took)  # the first report of a sender waits until the actor knows it

    def drive_one_handle(self, run: common.WandbRun, reports: int, per_step: int, values: int) -> tuple[float, float]:
        """RSS in MB after the first tenth of the reports, and the largest from then on."""
        report = {f"group/metric_{i}": i / 7 for i in range(values)}
        first = peak = 0.0
        for i in range(reports):
            run.log(report, i // per_step)
            if i % (reports // 100) == 0 and i >= reports // 10:
                peak = max(peak, megabytes([os.getpid()], "VmRSS"))
                first = first or peak
        return first, peak


@ray.remote(num_cpus=0)
class Logger:
    def __init__(self, directory: str):
        self.run = start_wandb(directory)

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(row)

    def drain(self, queue: Queue, reports: int) -> None:
        for _ in range(reports):
            self.run.log(queue.get())

    def finish(self) -> Path:
        self.run.finish()
        return Path(self.run.sync_dir)


# The ways: each yields how to drive its workers, how to finish (-> run folders), and the title of its logging process


@dataclasses.dataclass
class Way:
    drive: Callable[[int, int, float], list[np.ndarray]]  # reports per worker, first step, seconds -> seconds per call
    finish: Callable[[], list[Path]]
    logger: Callable[[], list[int]]  # processes that log, other than the workers


def all_workers(workers: Sequence[Any], name: str, target: Any, values: int) -> Callable[..., list[np.ndarray]]:
    def drive(reports: int, first: int, seconds: float) -> list[np.ndarray]:
        return ray.get([worker.drive.remote(name, target, reports, first, values, seconds) for worker in workers])

    return drive


@contextlib.contextmanager
def to_actor(name: str, workers: Sequence[Any], load: Load) -> Iterator[Way]:
    actor = Logger.remote(load.directory)
    ray.get(actor.__ray_ready__.remote())
    yield Way(
        all_workers(workers, name, actor, load.values),
        lambda: [ray.get(actor.finish.remote())],
        lambda: titled("Logger"),
    )
    ray.kill(actor)


@contextlib.contextmanager
def own_run(name: str, workers: Sequence[Any], load: Load) -> Iterator[Way]:
    ray.get([worker.start_run.remote(load.directory) for worker in workers])
    yield Way(
        all_workers(workers, name, None, load.values),
        lambda: ray.get([worker.finish_run.remote() for worker in workers]),
        list,
    )


@contextlib.contextmanager
def by_driver(name: str, workers: Sequence[Any], load: Load) -> Iterator[Way]:
    run = start_wandb(load.directory)

    def drive(reports: int, first: int, seconds: float) -> list[np.ndarray]:
        gaps, ended = [], [0.0] * len(workers)
        for step in range(first, first + reports):
            done = ray.get([worker.step.remote(step, load.values, seconds) for worker in workers])
            means = {key: statistics.fmean(report[key] for report, *_ in done) for key in done[0][0]}
            run.log(as_row(means, step, len(workers)))
            gaps += [began - end for (_, began, _), end in zip(done, ended, strict=True)]  # a worker stands still
            ended = [end for *_, end in done]
        return [np.array(gaps[len(workers) * (WARM_UP if seconds else 1) :])]

    def finish() -> list[Path]:
        run.finish()
        return [Path(run.sync_dir)]

    yield Way(drive, finish, lambda: [os.getpid()])


@contextlib.contextmanager
def by_queue(name: str, workers: Sequence[Any], load: Load) -> Iterator[Way]:
    actor, queue = Logger.remote(load.directory), Queue(actor_options={"num_cpus": 0})
    drained = actor.drain.remote(queue, len(workers) * (load.reports + load.paced))
    yield Way(
        all_workers(workers, name, queue, load.values),
        lambda: [ray.get([drained, actor.finish.remote()])[1]],
        lambda: titled("Logger"),
    )
    queue.shutdown(force=True)
    ray.kill(actor)


@contextlib.contextmanager
def by_wandb_run(name: str, workers: Sequence[Any], load: Load) -> Iterator[Way]:
    per_row = len(workers) if name == "WandbRun reduced" else 1
    run = common.WandbRun("benchmark", workers=per_row, mode="offline", dir=load.directory)

    def finish() -> list[Path]:
        run.finish()
        return [run.path]

    yield Way(all_workers(workers, name, run, load.values), finish, lambda: titled("TrainingPipelineActor"))


@contextlib.contextmanager
def without_ray(name: str, workers: Sequence[Any], load: Load) -> Iterator[Way]:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(_open, load.directory).result()

        def drive(reports: int, first: int, seconds: float) -> list[np.ndarray]:
            total = reports if seconds else reports * load.workers
            return [pool.submit(_drive, total, first, load.values, seconds).result()]

        yield Way(drive, lambda: [pool.submit(_close).result()], lambda: list(pool._processes))


def _open(directory: str) -> None:
    global run  # noqa: PLW0603 - this process exists for it
    run = start_wandb(directory)


def _drive(*load: Any) -> np.ndarray:
    return drive(lambda report, step: run.log(as_row(report, step)), *load)


def _close() -> Path:
    run.finish()
    return Path(run.sync_dir)


WAYS = {
    "blocking": to_actor,
    "unbounded": to_actor,
    "own run": own_run,
    "driver": by_driver,
    "queue": by_queue,
    "WandbRun rows": by_wandb_run,
    "WandbRun reduced": by_wandb_run,
    "ceiling": without_ray,
}


def measure(name: str, workers: Sequence[Any], pids: Sequence[int], load: Load) -> dict[str, float]:
    """One round of one way."""
    ray.get([worker.trim.remote() for worker in workers])
    with WAYS[name](name, workers, load) as way:
        wait_until_quiet()
        forget_peaks()
        paced = np.concatenate(way.drive(load.paced, 0, STEP_SECONDS))
        wait_until_quiet(1)
        cpu, began = cpu_seconds(), time.time()
        flat_out = np.concatenate(way.drive(load.reports, load.paced, 0.0))
        loggers = way.logger()
        peak = megabytes(loggers, "VmHWM")
        peak_worker = max(megabytes([pid], "VmHWM") for pid in pids)
        driven = time.time()
        paths = way.finish()
        finish, cpu = time.time() - driven, cpu_seconds() - cpu
    reports, drivers = load.reports * load.workers, 1 if name == "ceiling" else load.workers
    missing = lost(paths, load.paced * drivers + reports)
    last_write = max(log.stat().st_mtime for path in paths for log in path.glob("*.wandb"))
    return {
        "reports/s": reports / (last_write - began),
        "finish s": finish,
        "p50 us": float(np.percentile(paced, 50)) * 1e6,
        "p99 us": float(np.percentile(paced, 99)) * 1e6,
        "max us": float(paced.max()) * 1e6,
        "% of 10 ms": float(paced.mean()) / STEP_SECONDS * 100,
        "busy p50": float(np.percentile(flat_out, 50)) * 1e6,
        "busy p99": float(np.percentile(flat_out, 99)) * 1e6,
        "CPU s/1000": cpu / reports * 1000,
        "worker MB": 0.0 if name == "ceiling" else peak_worker,
        "logger MB": peak,
        "lost": missing,
    }


def compare(load: Load, rounds: int) -> dict[str, dict[str, float]]:
    """All ways, interleaved; medians over the rounds (of `lost`: the worst), and ratios of medians."""
    plain = [Worker.remote(i, load.workers) for i in range(load.workers)]
    with_wandb = [Worker.remote(i, load.workers) for i in range(load.workers)]  # it costs memory to have it imported
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for round_ in range(rounds):
        for name in WAYS:
            workers = with_wandb if name == "own run" else plain
            pids = ray.get([worker.pid.remote() for worker in workers])
            print(f"\rround {round_ + 1} of {rounds}: {name:<20}", end="", file=sys.stderr, flush=True)
            measured[name].append(measure(name, workers, pids, load))
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    for worker in plain + with_wandb:
        ray.kill(worker)
    result = {}
    for name, runs in measured.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        result[name] = row | {"lost": max(run["lost"] for run in runs)}
    for row in result.values():
        for other in ("blocking", "own run"):
            row[f"x {other}"] = row["reports/s"] / result[other]["reports/s"]
    return result


# One pipeline: memory, scaling, a thousand workers; and the start of a demo


def memory(load: Load, reports: int = 1_000_000, per_step: int = 10) -> dict[str, float]:
    """Growth of worker and pipeline actor over a million reports through one handle."""
    worker = Worker.remote(0, 1)
    run = common.WandbRun("benchmark", workers=per_step, mode="offline", dir=load.directory)
    actor, began = titled("TrainingPipelineActor"), time.perf_counter()
    ref, sizes = worker.drive_one_handle.remote(run, reports, per_step, load.values), []
    while not ray.wait([ref], timeout=0.5)[0]:
        if run.progress()[0].reports >= reports // 10:
            sizes.append(megabytes(actor, "VmRSS"))
    (first, peak), report = ray.get(ref), run.finish()
    seconds = time.perf_counter() - began
    ray.kill(worker)
    return {
        "reports": reports,
        "reports/s": reports / seconds,
        "worker +MB": peak - first,
        "actor +MB": max(sizes, default=0) - (sizes or [0])[0],
        "lost": lost([report.path], reports),
    }


def one_pipeline(load: Load, senders: int, reports: int, arrays: bool, seconds: float = 0.0) -> dict[str, float]:
    """`senders` workers on one pipeline, simulated by a few processes: flat out, or in steps of so many seconds."""
    count = min(4, senders)
    workers, steps = [Worker.remote(i, senders) for i in range(count)], max(1, reports // senders)
    report: dict[str, Any] = {f"group/metric_{i}": i / 7 for i in range(load.values)}
    if arrays:
        report = {f"group/samples_{i}": np.random.default_rng(i).random(64) for i in range(4)}
    run = common.WandbRun("benchmark", workers=senders, mode="offline", dir=load.directory)
    actor = titled("TrainingPipelineActor")
    pids = ray.get([worker.pid.remote() for worker in workers])
    wait_until_quiet()
    cpu, actor_cpu, began = cpu_seconds(), cpu_seconds(actor), time.perf_counter()
    took = ray.get([w.drive_senders.remote(run, senders // count, steps, report, seconds) for w in workers])
    driven = time.perf_counter() - began
    while run.progress()[0].reports < steps * senders:
        time.sleep(0.02)
    actor_cpu, arrived = cpu_seconds(actor) - actor_cpu, time.perf_counter() - began
    path = run.finish().path
    cpu, total = cpu_seconds() - cpu, steps * senders
    result = {
        "reports/s": total / arrived,
        "CPU s/1000": cpu / total * 1000,
        "actor CPU s/1000": actor_cpu / total * 1000,
        "actor cores": actor_cpu / driven,
        "p99 us": float(np.percentile(np.concatenate(took), 99)) * 1e6,
        "worker MB": max(megabytes([pid], "VmRSS") for pid in pids),
        "lost": lost([path], total),
    }
    for worker in workers:
        ray.kill(worker)
    return result


def scaling(load: Load, rounds: int, reports: int = 4_000) -> dict[str, dict[str, float]]:
    """From 4 to 64 workers with so many reports each on one pipeline: numbers, and arrays (4 keys of 64 samples)."""
    runs = collections.defaultdict(list)
    for _ in range(rounds):
        for arrays in (False, True):
            for senders in (4, 16, 64):
                name = f"{senders} workers, {'arrays' if arrays else 'numbers'}"
                runs[name].append(one_pipeline(load, senders, senders * reports, arrays))
    return {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}


def thousand(load: Load) -> dict[str, dict[str, float]]:
    """The reports of 1,000 workers into one pipeline: in steps of 1 s and of 0.25 s, and flat out."""
    return {
        "1000 workers, 1 s": one_pipeline(load, 1000, 20_000, arrays=False, seconds=1.0),
        "1000 workers, 1 s, arrays": one_pipeline(load, 1000, 20_000, arrays=True, seconds=1.0),
        "1000 workers, 0.25 s": one_pipeline(load, 1000, 40_000, arrays=False, seconds=0.25),
        "1000 workers, flat out": one_pipeline(load, 1000, 100_000, arrays=False),
    }


EMPTY = """
import ray
class A:
    def f(self): pass
ray.init(address="local", include_dashboard=False, log_to_driver=False)
ray.get([ray.remote(A).remote().f.remote() for _ in range(2)])
ray.shutdown()
"""


def start(load: Load, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a demo with default flags, and of a script that starts Ray and two trivial actors and stops."""
    demo = [sys.executable, str(ROOT / "demo1_centralized_actors.py"), "--dir", load.directory, "--mode", "offline"]
    commands = {"empty script": [sys.executable, "-c", EMPTY], "demo 1": demo}
    runs = collections.defaultdict(list)
    for _ in range(rounds):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            runs[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(times) for name, times in runs.items()}
    return {name: {"seconds": s, "x empty": s / seconds["empty script"]} for name, s in seconds.items()}


def print_table(title: str, rows: Mapping[str, Mapping[str, float]], columns: Sequence[str] = ()) -> None:
    columns = columns or list(next(iter(rows.values())))
    width = max(map(len, [title, *rows]))
    print(f"{title:<{width}}  " + "  ".join(f"{column:>9}" for column in columns))
    for name, row in rows.items():
        cells = [f"{row[c]:,.{2 if row[c] < 10 else 1 if row[c] < 100 else 0}f}" for c in columns]
        cells = [f"{row[c]:,.0f}" if c == "lost" else cell for c, cell in zip(columns, cells, strict=True)]
        print(f"{name:<{width}}  " + "  ".join(f"{t:>{max(9, len(c))}}" for t, c in zip(cells, columns, strict=True)))
    print()


COLUMNS = ("reports/s", "x blocking", "x own run", "finish s", "p50 us", "p99 us", "max us", "% of 10 ms", "busy p50")
COLUMNS += ("CPU s/1000", "worker MB", "logger MB", "lost")
PARTS = ("ways", "memory", "scaling", "thousand", "start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--reports", type=int, default=500, help="per worker, flat out (%(default)s)")
    parser.add_argument("--paced", type=int, default=50, help="per worker, in steps of 10 ms (%(default)s)")
    parser.add_argument("--values", type=int, default=11, help="numbers in a report (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["ways"], metavar=",".join(PARTS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, not {', '.join(unknown)}")

    result: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, Python {platform.python_version()}"}
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):  # Ray's warnings
        load = Load(args.workers, args.reports, args.paced, args.values, directory)
        if "start" in args.only:
            result["start"] = start(load, args.rounds)
        if set(args.only) - {"start"}:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
        if "ways" in args.only:
            result["ways"] = compare(load, args.rounds)
        if "scaling" in args.only:
            result["scaling"] = scaling(load, args.rounds)
        if "thousand" in args.only:
            result["thousand"] = thousand(load)
        if "memory" in args.only:
            result["memory"] = {"one handle": memory(load)}
        ray.shutdown()
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result.pop('machine')}; {args.workers} workers, {args.values} values a report, {args.rounds} rounds\n")
    for part, rows in result.items():
        print_table(part, rows, COLUMNS if part == "ways" else ())


if __name__ == "__main__":
    main()
