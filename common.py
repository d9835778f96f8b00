"""Backbone of the demos: how the metrics of many Ray workers get into one W&B run, and stay there.

    worker: run.log(metrics, step)  ->  batches  ->  pipeline actor: one row per step  ->  W&B run

Read from top to bottom: arguments, dummy metrics, reduction, pipeline actors, `WandbRun`, workers and session.
To use it in a system of your own, copy the file and start at `WandbRun`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

# Under `uv run` Ray would move every worker into a copy of this folder and build a second environment there.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # read when ray is imported

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

if TYPE_CHECKING:  # wandb is imported where it is used: that takes a second of a core, and workers don't need it
    import wandb

logger = logging.getLogger("wandb_run")

# Arguments


@dataclasses.dataclass(frozen=True)
class Args:
    """The command line of a demo. `mode` is resolved and `dir` absolute."""

    steps: int
    training_workers: int
    inference_workers: int
    step_seconds: float
    seed: int
    mode: str
    entity: str | None
    dir: Path
    experiment: str
    address: str | None
    finish_timeout: float
    one_run: bool = False

    @property
    def init(self) -> dict[str, Any]:
        """What every run of a demo passes on to `wandb.init`, whatever the strategy."""
        config = {key: getattr(self, key) for key in ("experiment", "seed", "steps", "step_seconds")}
        settings = {"finish_timeout": self.finish_timeout}
        return dict(mode=self.mode, entity=self.entity, dir=self.dir, resume="allow", config=config, settings=settings)


def parse_args(doc: str, argv: Sequence[str] | None = None) -> Args:
    """Parses a demo's command line; `doc`, its docstring, is the help text.

    Exits with status 2 and one line on stderr for anything that could not work, before Ray is started.
    """
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    form = dict(formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)  # errors are one line
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, **form)
    parser.add_argument("--steps", type=int, default=20, help="rows per pipeline (%(default)s)")
    parser.add_argument("--training-workers", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--inference-workers", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--step-seconds", type=float, default=0.05, metavar="S", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(%(default)s)")
    parser.add_argument("--mode", choices=("online", "offline", "disabled"), help="(WANDB_MODE, else by login)")
    parser.add_argument("--entity", help="W&B user or team (your default one)")
    parser.add_argument("--dir", type=Path, default=Path(), help="runs go to DIR/wandb (this folder)")
    parser.add_argument("--experiment", default=now, metavar="ID", help="in run names (the clock)")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS") or None, help="Ray cluster (start one here)")
    parser.add_argument("--finish-timeout", type=float, default=60, metavar="S", help="upload (%(default)s)")
    if "--one-run" in doc:
        parser.add_argument("--one-run", action="store_true", help="both pipelines in one run")
    args = parser.parse_args(argv)

    least = dict(steps=1, training_workers=1, inference_workers=1, step_seconds=0, seed=0, finish_timeout=1)
    for name, minimum in least.items():
        if not minimum <= getattr(args, name) <= 2**32:
            parser.error(f"--{name.replace('_', '-')} must be a number from {minimum} to {2**32}")
    for name in ("entity", "experiment"):
        value = getattr(args, name)
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", value):
            parser.error(f"--{name} {value!r} must be 1 to 60 letters, digits, '.', '_' or '-'")

    args.mode = args.mode or os.environ.get("WANDB_MODE") or None
    if args.mode not in (None, "online", "offline", "disabled"):
        parser.error(f"WANDB_MODE is {args.mode!r}: use online, offline or disabled")
    if args.mode in (None, "online"):
        import wandb
        from wandb.sdk.lib import wbauth

        host = wandb.setup().settings.base_url
        try:
            login = wbauth.authenticate_session(host=host, source="", prompt=False, update_session=False)
        except wandb.errors.AuthenticationError as error:
            parser.error(f"the API key can't be right: {_line(error)}")
        if args.mode and not login:
            parser.error("online mode needs an API key: run `wandb login`, set WANDB_API_KEY or use --mode offline")
        if not args.mode and not login:
            print("No W&B API key found, so the runs stay on this machine (offline). `wandb login` changes that.")
        args.mode = "online" if login else "offline"

    if "://" in (args.address or ""):
        parser.error(f"--address {args.address}: no Ray Client here; use HOST:PORT or `ray job submit`")
    host, _, port = (args.address or "").rpartition(":")
    if args.address not in (None, "auto"):
        try:
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                plain = os.environ.get("RAY_USE_TLS") != "1"
                if plain and connection.recv(4)[3:] != b"\x04":  # gRPC begins with HTTP/2 SETTINGS
                    raise OSError("something else does")
        except (OSError, ValueError, OverflowError) as error:
            parser.error(f"--address {args.address}: no Ray cluster answers there ({error}); give HOST:PORT")

    args.dir = args.dir.expanduser().absolute()
    try:
        (args.dir / "wandb").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.dir / "wandb").close()
    except OSError as error:
        parser.error(f"--dir {args.dir} can't be written: {error.strerror}")
    return Args(**vars(args))


# Dummy metrics

Metrics = dict[str, "float | int | np.ndarray"]
CHECKPOINT_EVERY = 10  # training steps
SYNC_EVERY = 5  # rollout batches between two weight syncs


def _progress(step: int) -> float:
    """How far learning has come, 0 to 1: an S-curve in log time, so that 20 steps and 2,000 both look like a run."""
    return step**1.5 / (step**1.5 + 12**1.5)


def generate_training_metrics(step: int, rng: np.random.Generator) -> Metrics:
    """One worker's report of one optimiser step of a GRPO/PPO run.

    Scalars are that worker's measurement, `e2e/latency_ms` its 8 micro-batches' times in ms (float array).
    Keys, units and shapes follow what verl, NeMo-RL and prime-rl log.
    """
    learned, spike = _progress(step), step % 37 == 13  # gradients are averaged: every worker sees it
    checkpoint = step % CHECKPOINT_EVERY == 0
    norms = rng.lognormal(np.log([0.25, 0.4]), 0.25) * (1 - 0.4 * learned) * (4 if spike else 1)
    tokens = int(32_768 * rng.uniform(0.9, 1.1))
    latency = rng.lognormal(math.log(900 * tokens / 32_768), 0.08, size=8) * (1.8 if checkpoint else 1)
    wait_s = 7.2 * rng.uniform(0.05, 0.15) * (1 + learned) * (0.3 if checkpoint else 1)  # rollouts catch up
    staleness = step % SYNC_EVERY / SYNC_EVERY
    return {
        "loss": rng.normal(0.01 * math.exp(-step / 50), 0.02),
        "value_loss": (0.05 + 0.8 * math.exp(-step / 15)) * rng.lognormal(0, 0.15),
        "explained_variance": -0.1 + 0.8 * learned + rng.normal(0, 0.03),
        "grads/grad_norm_0": norms[0],
        "grads/grad_norm_1": norms[1],
        "grads/grad_norm_total": math.hypot(*norms),
        "learning_rate": 1e-6 * min(1, (step + 1) / 8),
        "entropy": (0.15 + 0.45 * (1 - learned)) * rng.lognormal(0, 0.05),
        "kl": 0.06 * learned * rng.lognormal(0, 0.15) + (0.03 if spike else 0),
        "clip_fraction": (0.004 + 0.016 * staleness) * rng.lognormal(0, 0.35),
        "mismatch_kl": 1e-3 * rng.lognormal(0, 0.2),
        "tokens": tokens,
        "e2e/speed": tokens / (latency.sum() / 1000 + wait_s),
        "e2e/latency_ms": latency,
        "perf/mfu": 0.38 * rng.uniform(0.95, 1.05) / (1.5 if checkpoint else 1),
        "time/wait_for_batch_s": wait_s,
    }


def generate_inference_metrics(step: int, rng: np.random.Generator) -> Metrics:
    """One worker's report of one batch of 32 rollouts and the 64 requests they took.

    Arrays are samples: `reward`, `success_rate`, `response_length` (tokens), `truncated_fraction` per rollout,
    `e2e/latency_ms` (ms) per request, `staleness` (training steps) per rollout; bool arrays are outcomes.
    """
    learned, syncing = _progress(step), step % SYNC_EVERY == SYNC_EVERY - 1
    success = rng.random(32) < 0.15 + 0.65 * learned
    reward = np.clip(np.where(success, 0.9, 0.08) + rng.normal(0, 0.06, 32), 0, 1)
    wanted = rng.lognormal(math.log(640 + 60 * learned), 0.45 - 0.25 * learned, 32)
    length = np.minimum(wanted, 1024).astype(int)
    load = rng.uniform(0.85, 1.15)
    return {
        "reward": reward,
        "success_rate": success,
        "response_length": length,
        "truncated_fraction": wanted > 1024,
        "rollouts": 32,
        "e2e/speed": 5_200 * load * (rng.uniform(0.03, 0.3) if syncing else 1),
        "e2e/latency_ms": rng.lognormal(math.log(1_100 * load), 0.75, 64) * (1.6 if syncing else 1),
        "kv_cache_utilization": min(0.95, 0.4 + 0.12 * (step % SYNC_EVERY) + rng.uniform(0, 0.06)),
        "requests/running": int(rng.integers(24, 65)),
        "requests/waiting": int(rng.poisson(rng.choice([1, 12]))),
        "policy_version": step // SYNC_EVERY * SYNC_EVERY,
        "staleness": np.minimum(rng.poisson(0.02 + 0.25 * (step % SYNC_EVERY), 32), 2),
    }


# Reduction


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What `reduce_reports` can't tell from the value: how a pipeline's metrics are combined over workers."""

    sums: Sequence[str] = ()  # rates and counts, which add up over workers
    totals: Sequence[str] = ()  # summed keys whose running sum over steps is logged too, as `<key>_total`
    largest: Sequence[str] = ()  # the largest worker's value passes through
    statistics: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # of samples: mean, p99, …

    def __post_init__(self) -> None:
        for name in itertools.chain.from_iterable(self.statistics.values()):
            if not re.fullmatch(r"mean|min|max|std|p\d\d?", name):
                raise ValueError(f"statistic {name!r} must be mean, min, max, std or a percentile such as p99")


def reduce_reports(reports: Sequence[Mapping[str, Any]], reduction: Reduction) -> dict[str, Any]:
    """The reports of one step, one per worker, as one row. The rule sits in the value:

    - a scalar is a worker's measurement: averaged, unless `reduction` names its key
    - an array (any shape) holds samples: pooled over the workers before any statistic is taken; the statistics become
      `key/mean`, … (mean, min and max if `reduction` names none)
    - a bool array holds outcomes: pooled to one fraction under `key`
    - strings and W&B data types pass through, those of one worker: let only one log them

    Workers that lack a key, or have an empty array for it, don't count for it.
    """
    row: dict[str, Any] = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(reports)):
        values = [report[key] for report in reports if key in report]
        kinds = {type(value) for value in values}
        if kinds - {int, float} and (others := [v for v in values if not isinstance(v, int | float | np.ndarray)]):
            row[key] = others[0]
        elif np.ndarray in kinds:
            samples = [np.ravel(value) for value in values if np.size(value)]
            pooled = np.concatenate([[], *samples])  # as float64
            if samples and all(some.dtype == bool for some in samples):
                row[key] = pooled.mean().item()
            elif samples:
                for name in reduction.statistics.get(key, ("mean", "min", "max")):
                    value = np.percentile(pooled, int(name[1:])) if name[0] == "p" else getattr(np, name)(pooled)
                    row[f"{key}/{name}"] = value.item()
        elif key in reduction.sums:
            row[key] = sum(values)
        elif key in reduction.largest:
            row[key] = max(values)
        else:
            row[key] = sum(values) / len(values)
    return row


# Pipeline actors

Sender = tuple[str, int, str]  # node, process, a name of its own


class RunFinishedError(RuntimeError):
    """Something was logged to a run after `finish`."""


@dataclasses.dataclass
class RunReport:
    """The ledger of a pipeline: what came in and what is on disk. `reports` = reports in rows + `lost`."""

    name: str
    id: str
    mode: str = ""  # online, offline or disabled
    url: str | None = None
    paths: list[Path] = dataclasses.field(default_factory=list)  # the run's folders: one, and one more per restart
    restarts: int = 0  # of the pipeline actor, after it died
    uploaded: bool = False  # online: the server has it all
    lost_artifacts: int = 0
    gone: bool = False  # the pipeline actor, for good; what others had not sent yet is counted nowhere
    warnings: list[str] = dataclasses.field(default_factory=list)

    prefix: str = ""
    reports: int = 0  # received
    rows: int = 0  # in the transaction logs, counted there; a row stands on one or more reports
    late: int = 0  # reports that came after their step's row, and got a row of their own
    repeats: int = 0  # reports that were sent again after a restart, and recognised
    lost: int = 0  # reports that are in no row on disk

    @property
    def path(self) -> Path | None:
        """The run's folder, the latest if it was restarted; None for a disabled run."""
        return self.paths[-1] if self.paths else None

    @property
    def ok(self) -> bool:
        """Whether all that was logged is where it should be."""
        return not (self.gone or self.lost or self.lost_artifacts) and (self.uploaded or self.mode != "online")


@dataclasses.dataclass
class _Pipeline:
    """The reports of one pipeline on their way to rows, free of Ray and wandb.

    Each method yields the rows that became due, keys under the prefix. The same calls in the same order lead to the
    same state and the same rows.
    """

    prefix: str
    reduction: Reduction = dataclasses.field(default_factory=Reduction)
    workers: int = 1  # reports that make a step complete
    counts: Counter[str] = dataclasses.field(default_factory=Counter)  # for the fields of `RunReport`
    received: dict[Sender, int] = dataclasses.field(default_factory=dict)  # how many reports of each sender
    left: set[Sender] = dataclasses.field(default_factory=set)  # senders that have sent their last
    open: dict[int, list[bytes]] = dataclasses.field(default_factory=dict)  # step -> reports so far, oldest first
    waiting: int = 0  # reports in `open`
    closed: set[int] = dataclasses.field(default_factory=set)  # steps that have their row,
    floor: int = 0  # as have all below this one
    totals: dict[str, float] = dataclasses.field(default_factory=dict)  # running sums
    last_row: dict[str, float] = dataclasses.field(default_factory=dict)  # its numbers, keys without prefix
    finished: bool = False

    MAX_WAITING: ClassVar = 16_384  # reports in `open`; beyond that the oldest step is closed
    MAX_CLOSED: ClassVar = 32_768  # steps in `closed`

    def push(self, sender: Sender, first: int, reports: Sequence[tuple[int, bytes]], last: bool) -> Iterator[dict]:
        """Takes a sender's next reports, each (step, pickled metrics), numbered from `first`."""
        known = self.received.get(sender, 0)
        repeats = min(max(known - first, 0), len(reports))
        self.received[sender] = max(known, first + len(reports))
        self.counts.update(reports=self.received[sender] - known, repeats=repeats)  # with those that a full disk lost
        if last:
            self.left.add(sender)
        for step, report in reports[repeats:]:
            if step < self.floor or step in self.closed:
                self.counts["late"] += 1
                yield self._row(step, [report])
                continue
            together = self.open.setdefault(step, [])
            together.append(report)
            self.waiting += 1
            if len(together) >= self.workers:
                yield self._close(step)
            elif self.waiting > self.MAX_WAITING:
                yield self._close(next(iter(self.open)))

    def expect(self, workers: int) -> Iterator[dict]:
        """From now on so many reports make a step complete."""
        self.workers = workers
        for step in [step for step, together in self.open.items() if len(together) >= workers]:
            yield self._close(step)

    def finish(self) -> Iterator[dict]:
        """Closes the open steps with the reports that came."""
        self.finished = True
        for step in sorted(self.open):
            yield self._close(step)

    def _close(self, step: int) -> dict[str, Any]:
        together = self.open.pop(step)
        self.waiting -= len(together)
        self.closed.add(step)
        if len(self.closed) > self.MAX_CLOSED:
            self.floor = sorted(self.closed)[self.MAX_CLOSED // 2]
            self.closed = {step for step in self.closed if step >= self.floor}
        return self._row(step, together)

    def _row(self, step: int, together: list[bytes]) -> dict[str, Any]:
        self.counts["rows"] += 1
        metrics = [pickle.loads(report) for report in sorted(together)]  # the order they came in has no effect
        row = reduce_reports(metrics, self.reduction)
        for key in self.reduction.totals:
            if isinstance(row.get(key), int | float):
                row[f"{key}_total"] = self.totals[key] = self.totals.get(key, 0) + row[key]
        row |= {"step": step, "workers": len(together)}
        self.last_row = {key: value for key, value in row.items() if isinstance(value, int | float)}
        return {self.prefix + key: value for key, value in row.items()}


class _Journal:
    """Calls on a pipeline actor, written down before they take effect, so that a SIGKILL of it undoes none.

    A table of pickled calls and snapshots of the state between them, two generations of it. Nothing is synced: what is
    with the kernel outlives the process.
    """

    SECONDS = 5.0  # between snapshots: ten times what wandb may hold back of the rows that a snapshot forgets

    def __init__(self, path: Path):
        self.path = path
        self._db = sqlite3.connect(path, timeout=1, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # a second actor for the same run must not share it
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY, snapshot INTEGER, entry BLOB)")

    def read(self) -> tuple[list[Any], list[tuple]]:
        """The snapshots, and the calls since the first of them."""
        rows = self._db.execute("SELECT snapshot, entry FROM entries ORDER BY id")
        entries = [(snapshot, pickle.loads(entry)) for snapshot, entry in rows]
        return [entry for snapshot, entry in entries if snapshot], [call for snapshot, call in entries if not snapshot]

    def append(self, call: tuple, state: Any) -> None:
        """Adds a call, after a snapshot of the state before it if one is due."""
        if time.monotonic() - self._taken > self.SECONDS:
            self._db.execute("DELETE FROM entries WHERE id < (SELECT max(id) FROM entries WHERE snapshot)")
            self.snapshot(state)
        self._insert(False, call)

    def snapshot(self, state: Any) -> None:
        self._insert(True, state)
        self._taken = time.monotonic()

    def _insert(self, snapshot: bool, entry: Any) -> None:
        blob = pickle.dumps(entry, pickle.HIGHEST_PROTOCOL)
        self._db.execute("INSERT INTO entries (snapshot, entry) VALUES (?, ?)", (snapshot, blob))

    def remove(self) -> None:
        self._db.close()
        for path in self.path.parent.glob(f"{self.path.name}*"):
            path.unlink()


def _inspect(path: Path, *flags: str) -> list[str]:
    """`wandb leet inspect --json`, by its binary: the command in front of it takes a second to start."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *flags]
    return [*command, "--run-file", *map(str, path.glob("*.wandb")), str(path.parent)]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows in a run folder's transaction log, with wandb's own `_step`."""
    with subprocess.Popen(_inspect(path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if '"type":"history"' in line[:60]:
                yield json.loads(line)["history"]["item"]


def read_summary(path: Path) -> dict[str, Any]:
    """What a run folder's transaction log ends with: `state`, `step` (the last row's `_step`), `summary`, …"""
    return json.loads(subprocess.run(_inspect(path, "--summary"), capture_output=True).stdout or "{}")


def _distinct_rows(paths: Sequence[Path]) -> dict[tuple[Path | None, int], dict[str, Any]]:
    """A run's rows over all its folders, by `_step`, which starts over offline, and online goes on and may overlap."""
    return {
        (path if path.name.startswith("offline-") else None, row["_step"]): row
        for path in paths
        for row in read_rows(path)
    }


class PipelineActor:
    """Owns a W&B run, and reduces the reports of its pipeline's workers to one row per step.

    Undecorated, because Ray can't inherit from a decorated class; so it works, and is tested, without Ray too. For a
    pipeline of your own derive a class, set the three attributes and decorate it with `pipeline_actor`.
    """

    prefix = ""  # of a pipeline that shares another one's run and is given none
    job_type: str | None = None
    reduction = Reduction()

    GRACE = 5.0  # seconds that `finish` waits for the last reports of a sender that may be alive

    def __init__(self, init: dict[str, Any], owner: int, environ: Mapping[str, str], argv: list[str]):
        """For `WandbRun` to call.

        init: for `wandb.init`; owner: the process on this node that the run belongs to; environ: its WANDB_… variables;
        argv: its command line.
        """
        os.environ.update(environ)  # an argument, because Ray's state API lists runtime environments
        os.environ.pop("WANDB_SERVICE", None)  # of the owner's own wandb: this process needs a service of its own
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it takes a third of the time of `run.log`
        os.environ.setdefault("WANDB_PROGRAM", os.path.abspath(argv[0]))
        sys.argv = argv  # wandb records both; those of a Ray worker are Ray's own, addresses and all
        self._init, self._owner = init, owner
        self._changed = threading.Condition()  # its lock guards all that follows
        self._report = RunReport(init["name"] or init["id"], init["id"])  # what all its pipelines' ledgers say of it
        self._pipelines = dict[str, _Pipeline]()  # by prefix
        self._tasks = dict[
            str, tuple[str, bytes | str]
        ]()  # artifacts that are being logged or used, by a key of their own
        self._futures, self._threads = dict[str, Future](), dict(log=ThreadPoolExecutor(1), use=ThreadPoolExecutor(1))
        self._closing = dict[str, threading.Event]()  # by prefix
        self._on_disk = 0  # rows that a replay need not log again
        self._finished = False
        self._run: wandb.Run | None = None
        self._journal: _Journal | None = None
        self._disk_is_full = False
        self._journal_path = Path(init["dir"], "wandb", f".{init['id']}.journal")
        restarted = ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed
        if restarted and self._journal_path.exists():  # else `join` starts the run, where its errors reach the caller
            self._start()
        threading.Thread(target=self._watch_owner, daemon=True).start()

    # Starting and restarting

    def join(self, prefix: str, reduction: Reduction, workers: int) -> RunReport:
        """Adds a pipeline to the run, which the first one starts; returns the ledger so far."""
        with self._changed:
            if self._run is None:
                try:
                    self._start()
                except Exception as error:  # wandb's own kinds don't all survive the way to the caller
                    kind = type(error) if type(error) in (TypeError, ValueError, OSError) else RuntimeError
                    raise kind(" ".join(str(error).split())[:500]) from error
            earlier = self._earlier_summary() if self._init.get("resume") else {}
            totals = {key: earlier.get(f"{prefix}{key}_total", 0) for key in reduction.totals}
            not_finite = ("NaN", "Infinity", "-Infinity")  # as summaries spell them
            totals = {key: float(total) if total in not_finite else total for key, total in totals.items()}
            self.call(None, "_join", prefix, reduction, workers, totals)
            return self._ledger(prefix)

    def _join(self, prefix: str, reduction: Reduction, workers: int, totals: dict[str, float]) -> None:
        pipeline = self._pipelines.setdefault(prefix, _Pipeline(prefix, reduction, totals=totals))
        pipeline.workers, pipeline.finished = workers, False
        self._prepare(prefix)

    def _prepare(self, prefix: str) -> None:
        self._closing.setdefault(prefix, threading.Event())
        self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        self._run.define_metric(f"{prefix}step", hidden=True)
        self._run.define_metric(f"{prefix}workers", step_metric=f"{prefix}step", hidden=True)

    def _start(self) -> None:
        """Starts the run, or picks up where a dead actor left it."""
        self._journal_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._journal = _Journal(self._journal_path)
            snapshots, calls = self._journal.read()
        except sqlite3.Error as error:
            raise OSError(f"{self._journal_path}: {error}; is another run of this id going on?") from None
        if snapshots:
            self._report, (_, self._pipelines, self._tasks) = snapshots[-1][0], snapshots[0]
        try:
            run = self._run = self._wandb_init(restart=bool(snapshots))
        except Exception:
            if not snapshots:
                self._journal.remove()
            raise
        report = self._report
        if snapshots:
            rows = _distinct_rows(report.paths)
            self._on_disk, report.restarts = len(rows), report.restarts + 1
            for (folder, number), row in rows.items():  # what the dead actor's client had not brought to the server yet
                if not run.offline and folder is None and number >= run.starting_step:
                    run.log({key: value for key, value in row.items() if key[0] != "_"})
        report.mode = "disabled" if run.disabled else "offline" if run.offline else "online"
        report.url = run.url if report.mode == "online" else report.url
        report.paths += [] if run.disabled else [Path(run.sync_dir)]
        for prefix in self._pipelines:
            self._prepare(prefix)
        for key, task in list(self._tasks.items()):
            self._in_background(key, *task)
        for call in calls:
            self._do(*call)
        self._journal.snapshot(self._state)

    @property
    def _state(self) -> tuple:
        """All that must not be forgotten when this process dies."""
        return self._report, self._pipelines, self._tasks

    def _wandb_init(self, restart: bool) -> wandb.Run:
        import wandb

        settings = self._init.get("settings") or {}
        if isinstance(settings, wandb.Settings):
            settings = {key: getattr(settings, key) for key in settings.model_fields_set}
        self._timeout = (settings.get("finish_timeout") or 60) / 2  # for the artifacts, and again for the rows
        settings = dict(silent=True, console="off", init_timeout=10, x_transaction_log_flush_interval=0.5) | settings
        settings |= dict(finish_timeout=self._timeout, finish_timeout_raises=True)
        init = self._init | dict(settings=wandb.Settings(**settings), reinit="create_new")
        init |= dict(resume="allow") if restart else {}
        before = self._folders()
        with _core_of_its_own():
            try:
                run = wandb.init(**init)
            except wandb.Error as error:
                if not restart and "retrying" not in str(error):  # the server answers, and says no
                    raise
                self._warn(f"the W&B server does not answer, so the run is kept here (offline): {_line(error)}")
                wandb.teardown()  # its service would not take the id a second time
                for empty in set(self._folders()) - set(before):
                    shutil.rmtree(empty)
                run = wandb.init(**init | dict(mode="offline"))
        if not run.disabled:  # else artifacts are staged in the home folder, and gone when `wandb sync` needs them
            os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_CACHE_DIR"] = f"{run.sync_dir}/artifacts"
        return run

    def _folders(self) -> list[Path]:
        """What runs of this id have left here, oldest first."""
        folders = Path(self._init["dir"], "wandb").glob(f"*run-*-{self._init['id']}")
        return sorted(folders, key=lambda folder: folder.name.removeprefix("offline-"))

    def _earlier_summary(self) -> dict[str, Any]:
        """Of the run that is resumed: the latest one here, and the server's."""
        earlier = [folder for folder in self._folders() if folder not in self._report.paths][-1:]
        return (read_summary(*earlier).get("summary", {}) if earlier else {}) | dict(self._run.summary)

    # Receiving

    def call(self, prefix: str | None, method: str, *arguments: Any) -> None:
        """Calls a method of a pipeline (of this actor for None) so that a SIGKILL can't undo it."""
        with self._changed:
            if self._finished or (prefix is not None and self._pipelines[prefix].finished):
                raise RunFinishedError(f"run {self._report.name!r} is finished, so nothing more can be logged to it")
            call = (prefix, method, *arguments)
            try:
                if not self._disk_is_full:
                    self._journal.append(call, self._state)
            except sqlite3.Error as error:
                self._disk_is_full = True
                self._warn(f"{_line(error)}: rows may get lost from now on, training goes on")
            self._do(*call)
            self._changed.notify_all()

    def _do(self, prefix: str | None, method: str, *arguments: Any) -> None:
        target = self if prefix is None else self._pipelines[prefix]
        try:
            for row in getattr(target, method)(*arguments) or ():
                if not self._on_disk or sum(p.counts["rows"] for p in self._pipelines.values()) > self._on_disk:
                    self._log(row)
        except ConnectionError:  # wandb's service process has died: only a new process gets a new one
            os._exit(1)

    def _log(self, row: dict[str, Any]) -> None:
        try:
            self._run.log(row)  # never `step=`: it drops rows that come out of order
        except ConnectionError:
            raise
        except Exception as error:  # refused after all; the ledger says what is lost
            self._warn(f"W&B refused a row: {_line(error)}")

    # Artifacts: wandb blocks when the server is away, so they have threads of their own

    @ray.method(concurrency_group="control")
    def log_artifact(self, files: Mapping[str, Any], **artifact: Any) -> None:
        """Writes the files (bytes, or W&B data types) into the run's folder and has the artifact logged."""
        if self._report.mode == "disabled":
            return
        folder, staged = self._report.path / "artifacts" / uuid.uuid4().hex, dict(files)
        try:
            for file in [file for file, content in files.items() if isinstance(content, bytes)]:
                staged[file] = folder / file
                staged[file].parent.mkdir(parents=True, exist_ok=True)
                staged[file].write_bytes(files[file])
        except OSError as error:  # the disk is full
            self._report.lost_artifacts += 1
            self._warn(f"artifact {artifact['name']!r} is lost: {_line(error)}")
            return
        what = pickle.dumps(artifact | dict(files=staged))  # once it is logged, a data type can't be pickled any more
        self.call(None, "_in_background", folder.name, "log", what)

    def _in_background(self, key: str, task: str, what: bytes | str) -> None:
        for done in [key for key, future in self._futures.items() if future.done() and not future.exception()]:
            del self._futures[done], self._tasks[done]
        self._tasks[key] = task, what
        self._futures[key] = self._threads[task].submit(getattr(self, f"_{task}_artifact"), what)

    def _log_artifact(self, pickled: bytes) -> None:
        import wandb

        what = pickle.loads(pickled)
        artifact = wandb.Artifact(what["name"], what["type"], metadata=what["metadata"])
        for file, content in what["files"].items():
            if isinstance(content, Path):
                artifact.add_file(str(content), file, policy="immutable", skip_cache=True)
            else:
                artifact.add(content, file)
        self._run.log_artifact(artifact, aliases=what["aliases"])

    def _use_artifact(self, name: str) -> None:
        used = dict.fromkeys([*self._run.config.get("used_artifacts", []), name])
        self._run.config.update({"used_artifacts": list(used)}, allow_val_change=True)
        deadline = time.monotonic() + self._timeout
        while self._report.mode == "online":
            try:
                self._run.use_artifact(name)
                return
            except Exception:  # the run that makes it may not have uploaded it yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    # Finishing

    @ray.method(concurrency_group="closing")
    def closing(self, prefix: str) -> None:
        """Returns when the pipeline is being finished: then its outboxes send what they have left."""
        self._closing[prefix].wait()

    @ray.method(concurrency_group="control")
    def progress(self, prefix: str) -> tuple[RunReport, dict[str, Any]]:
        """The ledger so far, and the numbers of the last row (keys without prefix)."""
        return self._ledger(prefix), self._pipelines[prefix].last_row

    def _ledger(self, prefix: str) -> RunReport:
        return dataclasses.replace(self._report, prefix=prefix, **self._pipelines[prefix].counts)

    @ray.method(concurrency_group="control")
    def finish(self, exit_code: int, prefix: str | None = None) -> dict[str, RunReport]:
        """Finishes the run, or only one pipeline of a run that goes on; returns the ledgers by prefix."""
        with self._changed:
            prefixes = list(self._pipelines) if prefix is None else [prefix]
            self._end(prefixes)
            if prefix is None and not self._finished:
                self._finish_run(exit_code)
            return {prefix: self._ledger(prefix) for prefix in prefixes}

    def _end(self, prefixes: Sequence[str]) -> None:
        """Waits for the last reports of each sender and logs the open steps."""
        pipelines = [self._pipelines[prefix] for prefix in prefixes if not self._pipelines[prefix].finished]
        for pipeline in pipelines:
            self._closing[pipeline.prefix].set()
        deadline, here = time.monotonic() + self.GRACE, _node_id()

        def may_send(sender: Sender) -> bool:
            return not any(sender in p.left for p in pipelines) and (sender[0] != here or _is_alive(sender[1]))

        while silent := [sender for pipeline in pipelines for sender in pipeline.received if may_send(sender)]:
            if time.monotonic() > deadline:
                self._warn(f"{len(silent)} processes did not send within {self.GRACE} s what they may still have")
                break
            self._changed.wait(0.1)
        for pipeline in pipelines:
            if not pipeline.finished:  # by another caller, while this one waited
                self.call(pipeline.prefix, "finish")

    def _finish_run(self, exit_code: int) -> None:
        report = self._report
        done, late = wait(self._futures.values(), timeout=self._timeout)
        errors = [future.exception() for future in done if future.exception()]
        if failed := len(errors) + len(late):
            report.lost_artifacts += failed
            why = _line(errors[0]) if errors else f"not possible within {self._timeout:.0f} s"
            self._warn(f"{failed} artifacts were not logged or used: {why}; see {report.path}/artifacts")
        try:
            self._run.finish(exit_code)
            report.uploaded = all(path.name.startswith("run-") for path in report.paths) and report.mode == "online"
        except TimeoutError:
            self._warn(f"the upload did not end within {self._timeout:.0f} s")
        except ConnectionError:
            os._exit(1)  # as in `_do`; Ray repeats the call on the next actor
        # wandb tells nobody of a server that refuses the rows for good, but writes it into the run's own log
        if report.uploaded and '"level":"ERROR"' in (report.path / "logs" / "debug-internal.log").read_text():
            report.uploaded = False
            self._warn("the W&B server refused the upload")
        if missing := self._count_on_disk():
            self._warn(f"{missing} reports are not on disk")
        self._finished = True
        self._journal.remove()

    def _count_on_disk(self) -> int:
        """Counts the rows in the transaction logs, and the reports they stand on; returns how many are in none."""
        counts, paths = [pipeline.counts for pipeline in self._pipelines.values()], self._report.paths
        last = self._run.starting_step + sum(count["rows"] for count in counts) - 1
        if len(paths) == 1 and read_summary(paths[0]).get("step", -1) == last:
            return 0  # all are there, so none need be read
        deadline = time.monotonic() + 3
        while paths:
            rows = _distinct_rows(paths).values()
            for prefix, pipeline in self._pipelines.items():
                reports = [row[f"{prefix}workers"] for row in rows if f"{prefix}workers" in row]
                pipeline.counts["rows"] = len(reports)
                pipeline.counts["lost"] = max(0, pipeline.counts["reports"] - sum(reports))
            if time.monotonic() > deadline or not any(count["lost"] for count in counts):
                break
            time.sleep(0.2)  # the last rows are written a moment after `run.finish`
        return sum(count["lost"] for count in counts)

    def _warn(self, message: str) -> None:
        self._report.warnings.append(message)
        logger.warning("W&B run %s: %s", self._report.name, message)  # for those who use no `_Display`

    def _watch_owner(self) -> None:
        """Finishes the run when the process that constructed it is gone; Ray leaves two seconds for that, or more."""
        raylet = os.getppid()
        while _is_alive(self._owner):
            time.sleep(0.1)
        self.GRACE = 0.5
        try:
            if self._run:
                self.finish(1)
        finally:
            if os.getppid() != raylet:  # all of Ray is gone
                os._exit(0)
            ray.kill(ray.get_runtime_context().current_actor)


@contextlib.contextmanager
def _core_of_its_own() -> Iterator[None]:
    """Keeps this process on one core, and the wandb-core that is started in here on the others.

    `run.log` hands each row to another thread and waits for it, which on one core takes half the time.
    """
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else {0}
    own = {random.choice(sorted(cores))}
    if cores > own:
        os.sched_setaffinity(0, cores - own)
    yield
    if cores > own:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread), own)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def pipeline_actor(cls: type[PipelineActor]) -> ray.actor.ActorClass:
    """Makes a pipeline an actor that comes back when it dies, and outlives its driver until the run is finished."""
    if not issubclass(cls, PipelineActor):
        raise TypeError(f"{cls.__name__} must be derived from PipelineActor")
    lives = dict(max_restarts=-1, max_task_retries=-1, lifetime="detached")
    threads = {"closing": 8, "control": 8}  # next to the one that takes the reports
    return ray.remote(concurrency_groups=threads, num_cpus=0, **lives)(cls)


@pipeline_actor
class TrainingPipelineActor(PipelineActor):
    """Pipeline of the optimiser steps."""

    prefix = "training/"
    job_type = "training"
    reduction = Reduction(
        sums=("tokens", "e2e/speed"),
        totals=("tokens",),
        largest=("learning_rate",),
        statistics={"e2e/latency_ms": ("mean", "p50", "p99")},
    )


@pipeline_actor
class InferencePipelineActor(PipelineActor):
    """Pipeline of the rollout batches."""

    prefix = "inference/"
    job_type = "inference"
    reduction = Reduction(
        sums=("rollouts", "e2e/speed", "requests/running", "requests/waiting"),
        totals=("rollouts",),
        largest=("policy_version",),
        statistics={
            "reward": ("mean", "min", "max", "std"),
            "response_length": ("mean", "p90", "max"),
            "e2e/latency_ms": ("mean", "p50", "p99"),
            "staleness": ("mean", "max"),
        },
    )


# WandbRun


class _Outbox:
    """A process's reports on their way to a pipeline; all handles of it in the process share one.

    One batch is under way at a time while the next one gathers, so a lone report leaves at once and a stream leaves in
    batches. A batch is kept until the actor has it in its journal: Ray sends it again if the actor dies.
    """

    BATCH, LIMIT = 128, 512  # reports in a batch, and in the outbox

    def __init__(self, actor: ray.actor.ActorHandle, prefix: str, closing: ray.ObjectRef):
        self._push = functools.partial(actor.call.remote, prefix, "push", (_node_id(), os.getpid(), uuid.uuid4().hex))
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, bytes]] = []
        self._known = self._closed = False  # the actor knows of this sender; no more reports are taken
        self._error: Exception | None = None
        self.lost = 0
        threading.Thread(target=self._send, daemon=True).start()
        closing.future().add_done_callback(self._close)

    def put(self, step: int, report: bytes) -> None:
        """Appends a report. Waits while the outbox is full, and the first time until the actor knows of this sender."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self.LIMIT or self._closed)
            if self._error and not ray.is_initialized():
                raise RuntimeError("Ray is not running any more, so nothing more can be logged")
            taken = not (self._error or self._closed)
            if taken:
                self._waiting.append((step, report))
                if len(self._waiting) == 1:
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._known)
            elif not self._closed:
                self.lost += 1
            if self._closed and (self._error or not taken):
                raise RunFinishedError("the run is finished, so nothing more can be logged to it")

    def _close(self, closing: Future) -> None:
        """Called when the run is being finished or the driver is gone."""
        if not isinstance(closing.exception(), ray.exceptions.ActorDiedError):  # `_send` hears of that
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _send(self) -> None:
        sent, last = 0, False
        while not (last or self._error):
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                batch = self._waiting[: self.BATCH]
                last = self._closed and len(batch) == len(self._waiting)
            try:
                ray.get(self._push(sent, batch, last))
            except Exception as error:  # finished, or gone for good: Ray retries what can be retried
                self._error = error
            with self._changed:
                if self._error:
                    batch = self._waiting
                    self.lost += len(batch)
                    self._closed |= isinstance(self._error, RunFinishedError)
                    logger.warning("%d reports are lost, training goes on: %s", self.lost, _line(self._error))
                sent += len(batch)
                self._waiting = self._waiting[len(batch) :]
                self._known = True
                self._changed.notify_all()


_outboxes: dict[tuple[ray.ActorID, str], _Outbox] = {}  # this process's
_outboxes_lock = threading.Lock()
_unfinished: list[WandbRun] = []  # constructed by this process


class WandbRun:
    """A W&B run that any number of workers, tasks and threads log to, through the pipeline actor that owns it.

    Construct it in the driver, hand it (it is picklable) to the workers, `log` there, `finish` in the driver. As a
    context manager it finishes at the end, as failed if there was an exception.

    project, name: where the run goes and what it is called.
    pipeline: actor class that reduces the reports, see `pipeline_actor`.
    workers: reports that make a step complete; each worker reports a step once.
    prefix: put before every key, "training/" for instance; the step axis is `<prefix>step`.
    share: another WandbRun; this pipeline gets no run of its own, its rows go to that one's on an axis of their own.
    init: for `wandb.init` as it is (group, job_type, tags, config, notes, entity, mode, dir, id, resume, settings, …).

    Attributes: `id`, `project`, `mode`, `url` (None if not online), `path` (the run's folder, None if disabled).
    Raises ValueError or TypeError for arguments that can't work, OSError for a folder that can't be
    written or an id in use, and RuntimeError if the run can't start.
    """

    def __init__(
        self,
        project: str,
        name: str | None = None,
        *,
        pipeline: ray.actor.ActorClass = TrainingPipelineActor,
        workers: int = 1,
        prefix: str = "",
        share: WandbRun | None = None,
        **init: Any,
    ):
        if not ray.is_initialized():
            raise RuntimeError("Ray is not running: call ray.init() before making a WandbRun")
        if not (isinstance(pipeline, ray.actor.ActorClass) and isinstance(pipeline, PipelineActor)):
            raise TypeError(f"pipeline must be a class decorated with @pipeline_actor, not {pipeline!r}")
        if not isinstance(project, str) or not project:
            raise ValueError(f"project must be a name, not {project!r}")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be a positive integer, not {workers!r}")
        if share is not None:
            if not isinstance(share, WandbRun) or share._report is not None:
                raise ValueError(f"share must be a WandbRun that is not finished, not {share!r}")
            share, prefix = share._host or share, prefix or pipeline.prefix
            if init or project != share.project:
                raise ValueError(f"share= takes the project ({share.project!r}) and the settings of the run it shares")
            if any(prefix.startswith(other) or other.startswith(prefix) for other in share._prefixes):
                raise ValueError(f"prefix {prefix!r} overlaps with {share._prefixes}: each pipeline needs its own")
        if not isinstance(prefix, str) or not re.fullmatch(r"([^_/*][^/*]*/)*", prefix):
            raise ValueError(f"prefix must be a path that ends with '/', such as 'training/', not {prefix!r}")

        self.project, self._prefix, self._prefixes = project, prefix, [prefix]
        self._host, self._guests, self._report = share, list[WandbRun](), None
        if share is None:
            init = {key: value for key, value in init.items() if value is not None}
            folder = os.environ.get("WANDB_DIR", ".")
            init = dict(id=uuid.uuid4().hex[:8], job_type=pipeline.job_type, dir=folder) | init
            init |= dict(project=project, name=name, dir=os.path.abspath(init["dir"]))
            environ = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
            here = NodeAffinitySchedulingStrategy(_node_id(), soft=False)  # where the run's folder and the login are
            self._actor = pipeline.options(scheduling_strategy=here).remote(init, os.getpid(), environ, sys.argv)
        else:
            self._actor = share._actor
        joining = self._actor.join.remote(prefix, pipeline.reduction, workers)
        try:
            started: RunReport = ray.get(joining)
        except KeyboardInterrupt:  # let it get ready, and record it as failed
            ray.get(joining)
            self.finish(1)
            raise
        except ray.exceptions.RayTaskError as error:
            if share is None:
                ray.kill(self._actor)
            hint = "; run `wandb login`, set WANDB_API_KEY or pass mode='offline'" if "API key" in str(error) else ""
            message = f"W&B run {name or init.get('id')!r} of {project!r} can't start: {_line(error.cause)}{hint}"
            raise type(error.cause)(message) from None
        self.name, self.id, self.mode = started.name, started.id, started.mode
        self.url, self.path = started.url, started.path
        self._closing = self._actor.closing.remote(prefix)
        if share is not None:
            share._guests.append(self)
            share._prefixes.append(prefix)
        _unfinished.append(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict(_guests=[], _report=None)

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if exception_type is None else 1)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Reports one worker's metrics of one step; takes microseconds, unless the actor is far behind.

        metrics: key -> number (the worker's measurement), numeric array (samples), string or W&B data type;
        `reduce_reports` says what becomes of them. Later changes of an array don't change what was logged.
        step: the pipeline's own, from 0; any order.

        Raises TypeError or ValueError naming the key that wandb would refuse or drop, RunFinishedError after `finish`.
        """
        if not isinstance(metrics, Mapping):
            raise TypeError(f"metrics must be a mapping from key to value, not {metrics!r:.80}")
        if type(step) is not int:
            if isinstance(step, bool) or not isinstance(step, np.integer):
                raise TypeError(f"step must be an integer, not {step!r}")
            step = int(step)
        if step < 0:
            raise ValueError(f"step must not be negative, as {step} is")
        report = {key: value if type(value) is float else _value(key, value) for key, value in metrics.items()}
        for key in report:
            if type(key) is not str or not key or key[0] == "_" or key in ("step", "workers"):
                kind = ValueError if isinstance(key, str) else TypeError
                raise kind(
                    f"metric key {key!r} must be a string, not empty, no 'step' or 'workers', not start with '_'"
                )
        outbox = _outboxes.get((self._actor._actor_id, self._prefix)) or self._new_outbox()
        outbox.put(step, pickle.dumps(report, pickle.HIGHEST_PROTOCOL))

    def _new_outbox(self) -> _Outbox:
        key = self._actor._actor_id, self._prefix
        with _outboxes_lock:
            if key not in _outboxes:
                if not ray.is_initialized():
                    raise RuntimeError(f"Ray is not running, so nothing can be logged to run {self.name!r}")
                self._raise_if_finished()
                _outboxes[key] = _Outbox(self._actor, self._prefix, self._closing)
            return _outboxes[key]

    def log_artifact(
        self,
        name: str,
        type: str,
        files: Mapping[str, Any] | Sequence[str | Path] | str | Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Logs a version of an artifact; returns when its files are in the run's folder, not when they are uploaded.

        files: name in the artifact -> bytes, a file's path, or a W&B data type such as `wandb.Table`; or only paths.

        Raises ValueError for a name, type or alias that W&B refuses and OSError for a file that can't be read.
        """
        import wandb

        wandb.Artifact(name, type, metadata=dict(metadata or {}))  # raises on what W&B refuses
        if isinstance(aliases, str) or any(not isinstance(a, str) or not a or set(a) & set("/:") for a in aliases):
            raise ValueError(f"aliases must be names without '/' and ':', not {aliases!r}")
        if not isinstance(files, Mapping):
            paths = [files] if isinstance(files, str | Path) else list(files)
            files = {Path(path).name: path for path in paths}
            if len(files) < len(paths):
                raise ValueError(f"files of artifact {name!r} share a name: pass a mapping from name to path")
        if not files:
            raise ValueError(f"artifact {name!r} has no files")
        for file in files:
            if not isinstance(file, str) or not file or file[0] == "/" or ".." in Path(file).parts:
                raise ValueError(f"file {file!r} must be a relative path without '..', as its name in the artifact")
        files = {f: Path(what).read_bytes() if isinstance(what, str | Path) else what for f, what in files.items()}
        for file, what in files.items():  # bytes, because the pipeline actor may be on another node
            if not isinstance(what, bytes) and not _is_data_type(what):
                raise TypeError(f"file {file!r} must be bytes, a path or a W&B data type, not {what!r:.80}")
        artifact = dict(name=name, type=type, metadata=dict(metadata or {}), aliases=list(aliases))
        self._ask("log_artifact", files, **artifact)

    def use_artifact(self, name: str) -> None:
        """Records that this run uses artifact `name`, such as "checkpoint:step-10".

        In the run's config (`used_artifacts`), and online as lineage, as soon as the server has it. For its files use
        `wandb.Api().artifact(name)`.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be an artifact's name, not {name!r}")
        self._ask("call", None, "_in_background", uuid.uuid4().hex, "use", name)

    def expect(self, workers: int) -> None:
        """From now on a step is complete with so many reports: a worker has died or joined."""
        self._ask("call", self._prefix, "expect", max(1, workers))

    def progress(self) -> tuple[RunReport, dict[str, Any]]:
        """The ledger so far and the numbers of the last row (keys without prefix)."""
        if self._report is not None:
            return self._report, {}
        return self._ask("progress", self._prefix) or (RunReport(self.name, self.id), {})

    def finish(self, exit_code: int = 0) -> RunReport:
        """Finishes the run, with all that any copy of the handle logged before, and returns its ledger.

        Waits for the upload, `finish_timeout` seconds of the settings at most (60 by default). Calling it again returns
        the same ledger. A pipeline that shares a run only ends itself; its ledger is final when the run is finished.
        """
        if self._report is not None:
            return self._report
        if not isinstance(exit_code, int):
            raise TypeError(f"exit_code must be an integer, not {exit_code!r}")
        if not ray.is_initialized():
            raise RuntimeError(f"Ray is not running any more, so run {self.name!r} can't be finished; see {self.path}")
        try:
            reports = ray.get(self._actor.finish.remote(exit_code, self._prefix if self._host else None))
            for run in (self, *self._guests):
                run._report = reports[run._prefix]
            if not self._host and self in _unfinished:  # a copy's end is not the end of the others
                ray.kill(self._actor)
        except ray.exceptions.RayActorError as error:
            self._report = self._report_of_the_disk(error)
        _unfinished[:] = [run for run in _unfinished if run._report is None]
        return self._report

    def _report_of_the_disk(self, error: Exception) -> RunReport:
        """The ledger where the actor is gone for good."""
        paths = [self.path] if self.path else []
        workers = [n for row in _distinct_rows(paths).values() if (n := row.get(f"{self._prefix}workers"))]
        lost = getattr(_outboxes.get((self._actor._actor_id, self._prefix)), "lost", 0)
        counts = dict(prefix=self._prefix, rows=len(workers), reports=sum(workers) + lost, lost=lost)
        gone = f"the pipeline actor is gone, so what it had not logged yet is lost: {_line(error)}"
        return RunReport(self.name, self.id, self.mode, self.url, paths, gone=True, warnings=[gone], **counts)

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls the pipeline actor; its troubles are no reason to stop the caller."""
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments, **options))
        except RunFinishedError:
            raise RunFinishedError(f"run {self.name!r} is finished, so nothing more can be logged to it") from None
        except ray.exceptions.RayError as error:
            self._raise_if_finished()
            _warn_once(f"W&B run {self.name}: {method} failed, training goes on: {_line(error)}")

    def _raise_if_finished(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            if ray.wait([self._closing], timeout=0)[0] and ray.get(self._closing) is None:
                raise RunFinishedError(f"run {self.name!r} is finished, so nothing more can be logged to it")


@atexit.register  # runs before Ray's own, which takes the actors down
def _finish_all(failed: bool = False) -> None:
    for run in _unfinished[::-1]:  # guests before their hosts
        if ray.is_initialized():
            run.finish(exit_code=1 if failed or hasattr(sys, "last_type") else 0)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _value(key: object, value: Any) -> Any:
    """`value` as int, float, str, numeric array or W&B data type."""
    if (type(value) is int and abs(value) < 2**63) or _is_data_type(value):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, which the actor might not know
    with contextlib.suppress(Exception):  # ragged lists, tensors that can't be read from here
        array = np.asarray(value)
        if array.dtype.kind in "iufb":
            return array if array.ndim else array.item() + 0  # True is 1
    expected = "a number, a string, a numeric array or a W&B data type"
    raise TypeError(f"metric {key!r} must be {expected}, not {value!r:.80} ({type(value).__name__})")


def _is_data_type(value: Any) -> bool:
    """Whether it is a `wandb.Table`, `wandb.Histogram` or the like."""
    return "wandb" in sys.modules and isinstance(value, sys.modules["wandb"].sdk.data_types.base_types.wb_value.WBValue)


# Workers and session

Hook = Callable[[WandbRun, int, Metrics], None]
FIRST_LOOK = "loss|entropy|kl|reward/mean|success_rate|e2e/speed|e2e/latency_ms/mean"


def _work(run: WandbRun, generate: Callable, args: Args, key: Sequence[int], hook: Hook | None) -> None:
    """A worker's loop. Its numbers depend on (seed, pipeline, worker) and the step alone, not on timing."""
    rng = np.random.default_rng([args.seed, *key])
    for step in range(args.steps):
        time.sleep(args.step_seconds * random.uniform(0.8, 1.2))
        metrics = generate(step, rng)
        try:
            run.log(metrics, step)
            if hook:
                hook(run, step, metrics)
        except RunFinishedError:  # the driver was interrupted
            return


@ray.remote
class TrainingWorker:
    """Stands for a trainer's rank."""

    def run(self, run: WandbRun, args: Args, index: int, hook: Hook | None = None) -> None:
        _work(run, generate_training_metrics, args, (0, index), hook)


@ray.remote
class InferenceWorker:
    """Stands for an inference engine."""

    def run(self, run: WandbRun, args: Args, index: int, hook: Hook | None = None) -> None:
        _work(run, generate_inference_metrics, args, (1, index), hook)


@contextlib.contextmanager
def ray_session(args: Args) -> Iterator[None]:
    """Ray for the length of a demo: joins the cluster at `args.address` or starts one here.

    Ends the program with status 130 after Ctrl-C, 143 after SIGTERM and 1 after an exception, told in one line.
    """
    signals: list[int] = []
    ending = False

    def interrupt(signum: int, _: object) -> None:
        if signals:  # the second time, at once
            os._exit(128 + signum)
        signals.append(signum)
        if not ending:
            raise KeyboardInterrupt

    def catch_signals() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, interrupt)

    status, options = 0, dict(address="local", include_dashboard=False)  # None may join a stranger's Ray
    if args.address:
        options = dict(address=args.address, runtime_env=dict(py_modules=[__file__]))  # workers import this module
    where = args.address or "this machine"
    print(f"Experiment {args.experiment}: {args.steps} steps of training and of inference, Ray on {where}", flush=True)
    try:
        catch_signals()
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        catch_signals()  # Ray has set its own
        yield
    except KeyboardInterrupt:
        status = 1  # and what the signal says
    except Exception as error:
        status = 2 if type(error) is ConnectionError else 1  # no Ray at the address
        hint = "; has it a token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)?" if status == 2 else ""
        print(f"{type(error).__name__}: {_line(error)}{hint}", file=sys.stderr)
    finally:
        ending = True
        _finish_all(failed=status != 0)
        ray.shutdown()
    if status or signals:
        sys.exit(128 + signals[0] if signals else status)


def run_pipelines(
    args: Args,
    training: WandbRun,
    inference: WandbRun,
    *,
    after_training_step: Hook | None = None,
    after_inference_step: Hook | None = None,
) -> int:
    """Runs both pipelines side by side, each at its own pace, finishes their runs and prints where they are.

    A hook is called as hook(run, step, metrics) by the first worker of its pipeline, after each step.
    Returns the exit status: 0, or 1 if a worker failed or something that was logged is not where it should be.
    """
    runs = {"training": training, "inference": inference}
    alive = Counter(training=args.training_workers, inference=args.inference_workers)
    kinds = (("training", TrainingWorker, after_training_step), ("inference", InferenceWorker, after_inference_step))
    actors = []  # kept until their runs are finished, because a process that ends can't say that it has sent all
    working, failed, display = {}, False, _Display(args, runs)
    try:
        with training, inference, contextlib.closing(display):
            for pipeline, worker, hook in kinds:
                for index in range(alive[pipeline]):
                    actors.append(worker.options(scheduling_strategy="SPREAD").remote())
                    ref = actors[-1].run.remote(runs[pipeline], args, index, None if index else hook)
                    working[ref] = pipeline, index
            while working:
                done, _ = ray.wait(list(working), timeout=0.1)
                display.update()
                for ref in done:
                    pipeline, index = working.pop(ref)
                    try:
                        ray.get(ref)
                    except ray.exceptions.RayError as error:
                        failed, cause = True, getattr(error, "cause", None)
                        why = f"{type(cause).__name__}: {_line(cause)}" if cause else "its process died"
                        display.say(f"{pipeline} worker {index} failed: {why}")
                        alive[pipeline] -= 1
                        runs[pipeline].expect(alive[pipeline])
            if failed:
                inference.finish(1), training.finish(1)
    finally:
        display.update()  # what was found out in finishing
        reports = [run._report for run in runs.values() if run._report]
        _summarise(args, reports)
    return 0 if not failed and all(report.ok for report in reports) else 1


class _Display:
    """A live bar for each pipeline on a terminal, and each warning once."""

    HEADLINES: ClassVar = {"training": "loss", "inference": "reward/mean"}

    def __init__(self, args: Args, runs: Mapping[str, WandbRun]):
        self._runs, self._said = runs, set[str]()
        look = dict(total=args.steps, bar_format="{desc:<9} {bar:30} {n_fmt}/{total_fmt} steps{postfix}", disable=None)
        self._bars = {name: tqdm(desc=name, position=i, **look) for i, name in enumerate(runs)}

    def say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            tqdm.write(line, file=sys.stderr)

    def update(self) -> None:
        for name, run in self._runs.items():
            (report, row), bar, headline = run.progress(), self._bars[name], self.HEADLINES[name]
            for warning in report.warnings:
                self.say(f"{report.name}: {warning}")
            if headline in row:
                bar.n = min(report.rows, bar.total)
                bar.set_postfix_str(f"{headline} {row[headline]:.3f}")

    def close(self) -> None:
        self.update()
        for bar in self._bars.values():
            bar.close()


def _summarise(args: Args, reports: Sequence[RunReport]) -> None:
    """Where the runs are, their ledgers, and what to type next."""
    for i, report in enumerate(reports):
        counts = {"late": report.late, "lost": report.lost, "artifacts lost": report.lost_artifacts}
        counts |= {"restarts": report.restarts, "repeats": report.repeats}
        ledger = "".join(f", {n} {what}" for what, n in counts.items() if n)
        name = f"{report.name} {report.prefix}" if args.one_run else report.name
        print(f"{name}: {report.rows} rows from {report.reports} reports{ledger}")
        if report.id not in [other.id for other in reports[i + 1 :]]:  # else the next pipeline shares the run
            print(f"  {report.url or (report.path and _shown(report.path)) or 'disabled: nothing is kept'}")
    if folders := list(dict.fromkeys(path for report in reports for path in report.paths)):
        _open_in_leet(args.dir / "wandb", folders)
        print(f"Look at them here:  {_command('leet', _shown(args.dir / 'wandb'))}")
    if missing := dict.fromkeys(path for report in reports for path in report.paths if not report.uploaded):
        online = ["--no-skip-online"] if any(path.name.startswith("run-") for path in missing) else []
        print(f"Upload them:        {_command('sync', *online, *map(_shown, missing))}")


def _shown(path: Path) -> str:
    """Relative if it is below the folder that the user is in."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _open_in_leet(folder: Path, runs: Sequence[Path]) -> None:
    """Has LEET show these runs, and the metrics to look at first.

    On its own it shows the newest run and all metrics by alphabet. The file is its memory of a folder, which it starts
    afresh if it can't read it; a filter that the user has typed stays.
    """
    memory = folder / ".wandb-leet.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        state = json.loads(memory.read_text()) if memory.exists() else {}
        names = [path.name for path in runs]
        state |= {"selected_runs": names, "pinned_run": names[0], "latest_run": names[-1]}
        state.setdefault("metrics_filter", {"query": f"(^|/)({FIRST_LOOK})$"})
        memory.write_text(json.dumps(state))


def _command(*words: str) -> str:
    """A `wandb` command that works when pasted into the shell that this program was started from."""
    script = str(Path(sys.executable).with_name("wandb"))
    command = ["wandb"] if shutil.which("wandb") == script else [script]
    if "UV" in os.environ:  # `uv run` puts it on the PATH of this program, not of the shell
        here = Path(__file__).parent
        command = ["uv", "run", *(["--project", _shown(here)] if Path.cwd() != here else []), "wandb"]
    return shlex.join([*command, *words])
