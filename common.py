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
import inspect
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
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

# Under `uv run` Ray would move every worker into a copy of this folder and build a second environment there.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # read when ray is imported

import numpy as np
import ray
import wandb
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm
from wandb.sdk.data_types.base_types.wb_value import WBValue
from wandb.sdk.lib import wbauth
from wandb.util import get_core_path

logger = logging.getLogger("wandb_run")

# --- Arguments -------------------------------------------------------------------------------------------------------


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_args(doc: str, argv: Sequence[str] | None = None) -> Args:
    """Parses a demo's command line; `doc`, its docstring, is the help text.

    Exits with status 2 and one line on stderr for anything that could not work, before Ray is started.
    """

    def number(kind: type, least: float) -> Callable[[str], Any]:
        def parse(text: str) -> Any:
            value = kind(text)
            if not least <= value < math.inf:
                raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {least}")
            return value

        parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
        return parse

    def plain_name(text: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", text):
            raise argparse.ArgumentTypeError(f"{text!r} must be 1 to 60 letters, digits, '.', '_' or '-'")
        return text

    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", type=number(int, 1), default=20, help="rows per pipeline (%(default)s)")
    parser.add_argument("--training-workers", type=number(int, 1), default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--inference-workers", type=number(int, 1), default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--step-seconds", type=number(float, 0), default=0.05, metavar="S", help="(%(default)s)")
    parser.add_argument("--seed", type=number(int, 0), default=42, help="(%(default)s)")
    parser.add_argument("--mode", choices=("online", "offline", "disabled"), help="(WANDB_MODE, else by login)")
    parser.add_argument("--entity", type=plain_name, help="W&B user or team (your default one)")
    parser.add_argument("--dir", type=Path, default=Path(), help="runs go to DIR/wandb (this folder)")
    parser.add_argument("--experiment", type=plain_name, default=now, metavar="ID", help="in run names (the clock)")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS") or None, help="Ray cluster (start one here)")
    parser.add_argument("--finish-timeout", type=number(float, 1), default=60, metavar="S", help="upload (%(default)s)")
    if "--one-run" in doc:
        parser.add_argument("--one-run", action="store_true", help="both pipelines in one run")
    args = parser.parse_args(argv)

    args.mode = args.mode or os.environ.get("WANDB_MODE")
    if args.mode not in (None, "", "online", "offline", "disabled"):
        parser.error(f"WANDB_MODE is {args.mode!r}: use online, offline or disabled")
    if args.mode in (None, "", "online"):
        settings = wandb.setup().settings
        key = os.environ.get("WANDB_API_KEY") or settings.api_key
        key_file = os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        if key and (problem := wbauth.check_api_key(key)):
            parser.error(f"WANDB_API_KEY can't be right: {problem}")
        found = key or key_file or wbauth.read_netrc_auth(host=wbauth.HostUrl(settings.base_url))
        if args.mode and not found:
            parser.error("online mode needs an API key: run `wandb login`, set WANDB_API_KEY or use --mode offline")
        if not args.mode and not found:
            print("No W&B API key found, so the runs stay on this machine (offline). `wandb login` changes that.")
        args.mode = "online" if found else "offline"

    host, _, port = (args.address or "").rpartition(":")
    if args.address not in (None, "auto", "local"):
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError, OverflowError) as error:
            parser.error(f"--address {args.address}: no Ray cluster answers there ({error}); give HOST:PORT")

    args.dir = args.dir.expanduser().absolute()
    try:
        (args.dir / "wandb").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.dir / "wandb").close()
    except OSError as error:
        parser.error(f"--dir {args.dir} can't be written: {error.strerror}")
    return Args(**vars(args))


# --- Dummy metrics ---------------------------------------------------------------------------------------------------

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
    learned, spike = _progress(step), rng.random() < 0.03
    checkpoint = step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1
    norms = rng.lognormal(np.log([0.25, 0.4]), 0.25) * (1 - 0.4 * learned) * (4 if spike else 1)
    tokens = int(32_768 * rng.uniform(0.9, 1.1))
    latency = rng.lognormal(math.log(900 * tokens / 32_768), 0.08, size=8) * (1.8 if checkpoint else 1)
    wait_s = latency.sum() / 1000 * rng.uniform(0.05, 0.15) * (1 + 2 * learned)  # rollouts grow longer
    staleness = step % SYNC_EVERY / SYNC_EVERY
    return {
        "loss": rng.normal(0.01 * math.exp(-step / 50), 0.02),
        "value_loss": 0.05 + 0.8 * math.exp(-step / 15) * rng.lognormal(0, 0.1),
        "explained_variance": -0.1 + 0.8 * learned + rng.normal(0, 0.03),
        "grads/grad_norm_0": norms[0],
        "grads/grad_norm_1": norms[1],
        "grads/grad_norm_total": math.hypot(*norms),
        "learning_rate": 1e-6 * min(1, (step + 1) / 8),
        "entropy": 0.15 + 0.45 * (1 - learned) * rng.lognormal(0, 0.04),
        "kl": 0.06 * learned * rng.lognormal(0, 0.15) + (0.03 if spike else 0),
        "clip_fraction": 0.004 + 0.02 * staleness * rng.lognormal(0, 0.2),
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
    wanted = rng.lognormal(math.log(420 + 260 * learned), 0.5 - 0.15 * learned, 32)
    length = np.minimum(wanted, 1024).astype(int)
    load = rng.uniform(0.85, 1.15)
    return {
        "reward": reward,
        "success_rate": success,
        "response_length": length,
        "truncated_fraction": wanted > 1024,
        "rollouts": 32,
        "e2e/speed": 5_200 * load * (0.04 if syncing else 1),
        "e2e/latency_ms": rng.lognormal(math.log(1_100 * load), 0.75, 64) * (1.6 if syncing else 1),
        "kv_cache_utilization": min(0.95, 0.4 + 0.12 * (step % SYNC_EVERY) + rng.uniform(0, 0.06)),
        "requests/running": int(rng.integers(24, 65)),
        "requests/waiting": int(rng.poisson(rng.choice([1, 12]))),
        "policy_version": step // SYNC_EVERY * SYNC_EVERY,
        "staleness": rng.choice(3, size=32, p=[0.6, 0.3, 0.1]),
    }


# --- Reduction -------------------------------------------------------------------------------------------------------

STATISTICS: dict[str, Callable[[np.ndarray], Any]] = {
    "mean": np.mean,
    "min": np.min,
    "max": np.max,
    "std": np.std,
    "p50": lambda samples: np.percentile(samples, 50),
    "p90": lambda samples: np.percentile(samples, 90),
    "p99": lambda samples: np.percentile(samples, 99),
}


def reduce_reports(
    reports: Sequence[Mapping[str, Any]],
    *,
    sums: Sequence[str] = (),
    largest: Sequence[str] = (),
    statistics: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The reports of one step, one per worker, as one row. The rule sits in the value:

    a scalar is a worker's measurement and is averaged, unless its key is in `sums` (rates and counts that add up over
    workers) or in `largest`; an array holds samples (any shape), which are pooled over the workers before `statistics[key]`
    (names of `STATISTICS`; mean, min and max by default) are taken as `key/mean`, …; samples that are bool are outcomes,
    pooled to one fraction under `key`; strings and W&B data types pass through. Workers that lack a key don't count for it.
    """
    row: dict[str, Any] = {}
    for key in dict.fromkeys(key for report in reports for key in report):
        values = [report[key] for report in reports if key in report]
        if any(isinstance(value, np.ndarray) for value in values):
            pooled = np.concatenate([np.ravel(value) for value in values])
            if pooled.dtype == bool:
                row[key] = float(pooled.mean()) if pooled.size else math.nan
            elif pooled.size:
                for name in (statistics or {}).get(key, ("mean", "min", "max")):
                    row[f"{key}/{name}"] = STATISTICS[name](pooled).item()
        elif not all(isinstance(value, int | float) for value in values):
            row[key] = values[-1]
        elif key in sums:
            row[key] = sum(values) if all(isinstance(value, int) for value in values) else _sum(values)
        elif key in largest:
            row[key] = max(values)
        else:
            row[key] = _sum(values) / len(values)
    return row


def _sum(values: Sequence[float]) -> float:
    """Exact, hence the same in any order; NaN and infinities as `+` would have them."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond 1e308, or inf - inf
        return float(np.sum(values))


# --- Pipeline actors -------------------------------------------------------------------------------------------------


class RunFinishedError(RuntimeError):
    """Something was logged to a run after `finish`."""


@dataclasses.dataclass(frozen=True)
class RunReport:
    """The ledger of a pipeline: what came in and what is on disk. `reports` = reports in rows + `lost`."""

    name: str
    id: str
    mode: str  # online | offline | disabled
    url: str | None
    paths: tuple[Path, ...]  # the run's folders: one, and one more for each restart
    reports: int  # received
    rows: int  # in the transaction logs, counted there; a row stands on one or more reports
    late: int  # reports that came after their step's row, and got a row of their own
    lost: int  # reports that are in no row on disk
    restarts: int  # of the pipeline actor, after it died
    repeats: int  # reports that were sent again after a restart, and recognised
    uploaded: bool  # the server has it all (online only)
    warnings: tuple[str, ...]

    @property
    def path(self) -> Path | None:
        """The run's folder, the one to give to `wandb leet` and `wandb sync`."""
        return self.paths[-1] if self.paths else None

    @property
    def ok(self) -> bool:
        return not self.lost and (self.uploaded or self.mode != "online")


@dataclasses.dataclass
class _State:
    """All that a pipeline knows. The same calls in the same order lead to the same state and the same rows."""

    workers: int
    reports: int = 0
    rows: int = 0  # logged, own ones
    in_rows: int = 0  # reports in own rows
    guest_rows: int = 0  # logged for the pipelines that share the run
    late: int = 0
    repeats: int = 0
    restarts: int = 0
    starting_step: int = 0
    paths: list[Path] = dataclasses.field(default_factory=list)
    received: dict[str, int] = dataclasses.field(default_factory=dict)  # sender -> reports
    left: set[str] = dataclasses.field(default_factory=set)  # senders that have sent their last
    open: OrderedDict[int, list[bytes]] = dataclasses.field(default_factory=OrderedDict)  # step -> its reports so far
    held: int = 0  # reports in `open`
    closed: set[int] = dataclasses.field(default_factory=set)  # steps that have their row,
    floor: int = 0  # as have all below this one
    totals: dict[str, float] = dataclasses.field(default_factory=dict)
    guests: list[str] = dataclasses.field(default_factory=list)  # prefixes of the pipelines that share the run
    tasks: dict[str, tuple[str, tuple]] = dataclasses.field(default_factory=dict)  # artifacts to log or use


class _Journal:
    """Calls on a pipeline, written down before they take effect, so that a SIGKILL of its actor loses nothing.

    Two files, each a pickled `_State` and the calls since. What is written is safe from the death of the process at
    once (the kernel has it); `rotate` drops what is older than any row that wandb could still hold in memory.
    """

    ROTATE_BYTES, ROTATE_SECONDS = 1 << 20, 5.0  # ten times the flush interval of the transaction log

    def __init__(self, path: Path):
        self.path, self.previous = path, path.with_name(path.name + ".previous")

    def exists(self) -> bool:
        return self.path.exists() or self.previous.exists()

    def replay(self) -> Iterator[Any]:
        """The oldest state there is, then each call since, as (method, arguments); a torn last entry is cut off."""
        started = False
        for path in (self.previous, self.path):
            if not path.exists():
                continue
            with path.open("r+b") as file:
                end = 0
                with contextlib.suppress(EOFError, pickle.UnpicklingError):
                    while True:
                        entry = pickle.load(file)
                        end = file.tell()
                        if not (started and isinstance(entry, _State)):
                            started = True
                            yield entry
                file.truncate(end)

    def open(self, state: _State) -> None:
        self.file, self.since = self.path.open("ab", buffering=0), time.monotonic()
        if not self.file.tell():
            self.append(state)

    def append(self, entry: Any) -> None:
        data = pickle.dumps(entry, pickle.HIGHEST_PROTOCOL)
        if self.file.write(data) < len(data):
            raise OSError("the disk is full")

    def due(self) -> bool:
        return self.file.tell() > self.ROTATE_BYTES and time.monotonic() - self.since > self.ROTATE_SECONDS

    def rotate(self, state: _State) -> None:
        self.file.close()
        self.path.replace(self.previous)
        self.open(state)

    def remove(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)


def read_log(path: Path, prefix: str) -> dict[int, int]:
    """The rows of the pipeline with this prefix in a run folder's transaction log: `_step` -> reports in the row."""
    found = {}
    with _inspect(path) as lines:
        for line in lines:
            if '"type":"history"' in line[:60]:
                row = json.loads(line)["history"]["item"]
                if f"{prefix}workers" in row:
                    found[row["_step"]] = row[f"{prefix}workers"]
    return found


def read_summary(path: Path) -> dict[str, Any]:
    """State, `step` (the last row's number, from 0) and last values of a run folder's transaction log; {} if empty."""
    with _inspect(path, "--summary") as lines:
        return json.loads("".join(lines) or "{}")


@contextlib.contextmanager
def _inspect(path: Path, *flags: str) -> Iterator[Iterator[str]]:
    """The output of `wandb leet inspect --json`, by its binary: the command in front of it takes a second to start."""
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *flags]
    command += ["--run-file", *map(str, path.glob("*.wandb")), str(path.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield iter(process.stdout)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What a pipeline actor is made from; `environ` may hold the API key, so it is kept out of `repr`."""

    init: dict[str, Any]  # for wandb.init
    workers: int
    prefix: str
    owner: int  # process that constructed the run, on this node
    share: WandbRun | None = None
    environ: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)


class PipelineActor:
    """Owns the W&B run of a pipeline and reduces its workers' reports to one row per step.

    Undecorated, because Ray can't inherit from a decorated class; so it also works, and is tested, without Ray. To make
    one of your own, derive a class, set the attributes and decorate it with `pipeline_actor`.
    """

    prefix = ""  # of a pipeline that shares a run and is given none
    job_type: str | None = None
    sums: Sequence[str] = ()
    totals: Sequence[str] = ()  # summed keys whose running sum is logged too, as `<key>_total`
    largest: Sequence[str] = ()
    statistics: Mapping[str, Sequence[str]] = {}

    MAX_HELD = 16_384  # reports that wait for the rest of their step; the oldest step is closed beyond that
    MAX_CLOSED = 32_768  # steps remembered as closed
    GRACE = 5.0  # seconds that finish waits for a sender of which it can't tell whether it lives

    def __init__(self, spec: _Spec):
        self._spec, self._lock = spec, threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._run: Any = None
        self._report: RunReport | None = None
        self._last_row: dict[str, Any] = {}
        self._warnings: list[str] = []
        self._state = _State(spec.workers)
        self._closing = threading.Event()
        self._logged = 0  # rows that a replay need not log again
        self._outbox: _Outbox | None = None  # where rows go if the run is another pipeline's
        self._threads, self._futures = dict(log=ThreadPoolExecutor(1), use=ThreadPoolExecutor(1)), dict[str, Future]()
        folder = Path(spec.init["dir"], "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self._journal: _Journal | None = _Journal(folder / f".journal-{spec.init['id']}{spec.prefix.replace('/', '-')}")
        if self._journal.exists():  # this is a restart: nobody will call `start`
            self.start()
        threading.Thread(target=self._watch_owner, daemon=True).start()

    # Starting and restarting

    def start(self) -> dict[str, Any]:
        """Starts the run, or picks up where a dead actor left it; returns its `url`, `path`, `mode` and `warnings`."""
        with self._lock:
            if self._run is None:
                self._start()
            return dict(url=self._url, path=self._state.paths[-1], mode=self._mode, warnings=list(self._warnings))

    def _start(self) -> None:
        entries = list(self._journal.replay()) if self._journal and self._journal.exists() else []
        if entries:
            self._state = entries.pop(0)
        if share := self._spec.share:
            run, self._mode, self._url, opened = share, share.mode, share.url, (share.path, 0)
            ray.get(share._actor.call.remote("_add_guest", self._spec.prefix))
            self._outbox = _Outbox(share._actor, f"guest:{self._spec.prefix}", "_push_rows", self._state.rows)
        else:
            os.environ.update(self._spec.environ)
            os.environ.pop("WANDB_SERVICE", None)  # of the driver's own wandb: this process needs a service of its own
            run, self._mode = self._wandb_init()
            self._url = run.url if self._mode == "online" else None
            opened = (Path(run.sync_dir) if self._mode != "disabled" else None, run.starting_step)
            if self._mode == "online" and entries:  # the rows that the server has
                self._logged = run.starting_step - self._state.starting_step
            elif entries:  # the rows that the dead actors' wandb had written
                paths = self._state.paths + [entry[1] for entry in entries if entry[0] == "_open"]
                self._logged = sum(read_summary(path).get("step", -1) + 1 for path in paths)
        self._run = run
        for prefix in (self._spec.prefix, *self._state.guests):
            self._define_axis(prefix)
        for key in self._state.tasks:
            self._submit(key)
        for method, *arguments in entries:
            getattr(self, method)(*arguments)
        if self._journal:
            self._journal.open(self._state)
        self.call("_open", *opened)

    def _wandb_init(self) -> tuple[wandb.Run, str]:
        settings = self._spec.init.get("settings") or {}
        if isinstance(settings, wandb.Settings):
            settings = settings.model_dump(exclude_unset=True)
        timeout = settings.get("finish_timeout", 60)
        self._timeout = timeout / 2  # for the artifacts, then for the rows
        ours = dict(silent=True, console="off", init_timeout=20, x_transaction_log_flush_interval=0.5)
        ours |= settings | dict(finish_timeout=self._timeout, finish_timeout_raises=True)
        init = self._spec.init | dict(settings=wandb.Settings(**ours), reinit="create_new")
        if self._state.paths:  # a restart
            init["resume"] = "allow"
        try:
            run = wandb.init(**init)
        except wandb.errors.CommError as error:
            if "init_timeout" not in str(error):
                raise
            self._warn(f"The W&B server does not answer, so the run is kept here (offline): {error}".splitlines()[0])
            run = wandb.init(**init | dict(mode="offline"))
        # Files of offline artifacts would be staged in the home folder and be gone when `wandb sync` needs them.
        os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_CACHE_DIR"] = run.dir.removesuffix("files") + "artifacts"
        return run, "disabled" if run.disabled else "offline" if run.offline else "online"

    def _open(self, path: Path | None, starting_step: int) -> None:
        if self._state.paths:
            self._state.restarts += 1
        else:
            self._state.starting_step = starting_step
        self._state.paths.append(path)

    def _add_guest(self, prefix: str) -> None:
        if prefix not in self._state.guests:
            self._state.guests.append(prefix)
            self._define_axis(prefix)

    def _define_axis(self, prefix: str) -> None:
        if not self._spec.share:
            self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
            self._run.define_metric(f"{prefix}step", hidden=True)
            self._run.define_metric(f"{prefix}workers", step_metric=f"{prefix}step", hidden=True)

    # Receiving: each call is written down, then done, so that a restart can do it again

    def call(self, method: str, *arguments: Any) -> None:
        """Does `method(*arguments)` in a way that a SIGKILL of this process can't undo."""
        with self._lock:
            if self._run is None or self._report:
                raise RunFinishedError(f"run {self._spec.init['name']!r} is finished")
            if self._journal:
                try:
                    self._journal.append((method, *arguments))
                    if self._journal.due():
                        self._rotate()
                except OSError as error:
                    self._warn(f"{error}: rows may be lost from now on; training goes on")
                    self._journal = None
            try:
                getattr(self, method)(*arguments)
            except ConnectionError:  # wandb's service process died: only a new process gets a new one
                os._exit(1)
            self._changed.notify_all()

    def _rotate(self) -> None:
        if self._outbox:
            self._outbox.drain()  # what the journal forgets must be in the owner's
        for key in [key for key, future in self._futures.items() if future.done() and not future.exception()]:
            del self._futures[key], self._state.tasks[key]
        self._journal.rotate(self._state)

    def _fresh(self, sender: str, first: int, reports: Sequence[Any], last: bool) -> Sequence[Any]:
        """The reports, numbered from `first` by their sender, that have not been received before."""
        state, received = self._state, self._state.received.get(sender, 0)
        repeats = min(max(received - first, 0), len(reports))
        state.repeats += repeats
        state.received[sender] = max(received, first + len(reports))
        if last:
            state.left.add(sender)
        return reports[repeats:]

    def _push(self, sender: str, first: int, reports: Sequence[tuple[int, bytes]], last: bool) -> None:
        """Takes a sender's next reports: (step, pickled metrics) each."""
        state = self._state
        for step, report in self._fresh(sender, first, reports, last):
            state.reports += 1
            if step < state.floor or step in state.closed:
                state.late += 1
                self._log_step(step, [report])
                continue
            waiting = state.open.setdefault(step, [])
            waiting.append(report)
            state.held += 1
            if len(waiting) >= state.workers:
                self._close(step)
            elif state.held > self.MAX_HELD:
                self._close(next(iter(state.open)))

    def _push_rows(self, sender: str, first: int, rows: Sequence[bytes], last: bool) -> None:
        """Takes the next rows of a pipeline that shares this run."""
        for row in self._fresh(sender, first, rows, last):
            self._log(pickle.loads(row))
            self._state.guest_rows += 1

    def _expect(self, workers: int) -> None:
        """From now on a step is complete with so many reports: a worker has left, or joined."""
        self._state.workers = workers
        for step in [step for step, waiting in self._state.open.items() if len(waiting) >= workers]:
            self._close(step)

    def _close(self, step: int) -> None:
        state = self._state
        reports = state.open.pop(step)
        state.held -= len(reports)
        state.closed.add(step)
        if len(state.closed) > self.MAX_CLOSED:
            state.floor = sorted(state.closed)[self.MAX_CLOSED // 2]
            state.closed = {step for step in state.closed if step >= state.floor}
        self._log_step(step, reports)

    def _log_step(self, step: int, reports: list[bytes]) -> None:
        state, prefix = self._state, self._spec.prefix
        metrics = [pickle.loads(report) for report in sorted(reports)]  # so that the order they came in has no effect
        row = reduce_reports(metrics, sums=self.sums, largest=self.largest, statistics=self.statistics)
        for key in row.keys() & self.totals:
            row[f"{key}_total"] = state.totals[key] = state.totals.get(key, 0) + row[key]
        self._last_row = row
        self._log(
            {prefix + key: value for key, value in row.items()}
            | {f"{prefix}step": step, f"{prefix}workers": len(reports)}
        )
        state.rows += 1
        state.in_rows += len(reports)

    def _log(self, row: dict[str, Any]) -> None:
        if self._outbox:
            self._outbox.put(pickle.dumps(row))
        elif self._state.rows + self._state.guest_rows >= self._logged:
            self._run.log(row)  # never `step=`: rows that come out of order would be dropped

    # Artifacts: wandb checks them against the server, which may be away, so they have a thread of their own

    @ray.method(concurrency_group="control")
    def log_artifact(self, artifact: dict[str, Any]) -> None:
        """Copies the files into the run's folder and has the artifact logged."""
        key = uuid.uuid4().hex
        staged = {}
        for name, content in artifact["files"].items():
            if isinstance(content, bytes | Path):
                path = (
                    self._state.paths[-1].joinpath("artifacts", key, name)
                    if self._state.paths[-1]
                    else Path(os.devnull)
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    shutil.copyfile(content, path)
                content = path
            staged[name] = content
        self.call("_in_background", "log", (artifact | dict(files=staged),))

    def _in_background(self, task: str, arguments: tuple[Any, ...]) -> None:
        key = uuid.uuid4().hex
        self._state.tasks[key] = (task, arguments)
        self._submit(key)

    def _submit(self, key: str) -> None:
        task, arguments = self._state.tasks[key]
        self._futures[key] = self._threads[task].submit(getattr(self, f"_{task}_artifact"), *arguments)

    def _log_artifact(self, spec: dict[str, Any]) -> None:
        artifact = wandb.Artifact(spec["name"], spec["type"], metadata=spec["metadata"])
        for name, content in spec["files"].items():
            if isinstance(content, Path):
                artifact.add_file(str(content), name, policy="immutable", skip_cache=True)
            else:
                artifact.add(content, name)
        self._run.log_artifact(artifact, aliases=spec["aliases"])

    def _use_artifact(self, name: str) -> None:
        used = dict.fromkeys([*self._run.config.get("used_artifacts", []), name])
        self._run.config.update({"used_artifacts": list(used)}, allow_val_change=True)
        deadline = time.monotonic() + self._timeout
        while self._mode == "online":
            try:
                self._run.use_artifact(name)
                return
            except (ValueError, wandb.errors.CommError):  # the run that makes it has not uploaded it yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    # Finishing

    @ray.method(concurrency_group="closing")
    def closing(self) -> None:
        """Returns when the run is being finished: every `_Outbox` waits for that, and then sends what it has left."""
        self._closing.wait()

    @ray.method(concurrency_group="control")
    def progress(self) -> dict[str, Any]:
        """`rows` so far, the last `row`, the run's `paths` and `warnings`."""
        state = self._state
        return dict(rows=state.rows, row=self._last_row, paths=state.paths, warnings=list(self._warnings))

    @ray.method(concurrency_group="control")
    def finish(self, exit_code: int = 0) -> RunReport:
        """Waits for every sender's last report, logs the open steps, finishes the run and reads back what is on disk."""
        self._closing.set()
        with self._changed:
            deadline = time.monotonic() + self.GRACE
            while any(map(self._expected, self._state.received)) and time.monotonic() < deadline:
                self._changed.wait(0.1)
            if self._report is None:
                self._report = self._finish(exit_code)
            return self._report

    def _expected(self, sender: str) -> bool:
        node, pid, _ = sender.split("/")
        return sender not in self._state.left and (node != _node_id() or _alive(int(pid)))

    def _finish(self, exit_code: int) -> RunReport:
        state, prefix = self._state, self._spec.prefix
        for step in sorted(state.open):
            self._close(step)
        uploaded = False
        if self._outbox:
            self._outbox.close()
        else:
            done, late = wait(self._futures.values(), timeout=self._timeout)
            for error in filter(None, (future.exception() for future in done)):
                self._warn(f"An artifact was not logged: {error}".splitlines()[0])
            if late:
                self._warn(f"{len(late)} artifacts could not be logged within {self._timeout:.0f} s")
            try:
                self._run.finish(exit_code)
                uploaded = self._mode == "online" and not self._upload_error()
            except TimeoutError:
                self._warn(f"The upload did not end within {self._timeout:.0f} s")
        rows, in_rows = self._on_disk()
        if in_rows < state.in_rows:
            self._warn(f"{state.in_rows - in_rows} reports are not on disk")
        if self._journal:
            self._journal.remove()
        return RunReport(
            name=self._spec.init["name"] or self._spec.init["id"],
            id=self._spec.init["id"],
            mode=self._mode,
            url=self._url,
            paths=tuple(filter(None, state.paths)),
            reports=state.reports,
            rows=rows,
            late=state.late,
            lost=max(0, state.in_rows - in_rows),
            restarts=state.restarts,
            repeats=state.repeats,
            uploaded=uploaded,
            warnings=tuple(self._warnings),
        )

    def _on_disk(self) -> tuple[int, int]:
        """(rows, reports in them) of this pipeline, counted in the transaction logs."""
        state, paths = self._state, list(filter(None, self._state.paths))
        if share := self._spec.share:
            paths = ray.get(share._actor.progress.remote())["paths"]
        elif len(paths) == 1:  # the last row's number tells, if nothing is wrong
            if read_summary(paths[0]).get("step", -1) + 1 == state.starting_step + state.rows + state.guest_rows:
                return state.rows, state.in_rows
        deadline = time.monotonic() + (3 if share else 0)  # a run that goes on is written every half second
        while paths:
            found = {}
            for path in paths:
                for step, reports in read_log(path, self._spec.prefix).items():
                    found[step if self._mode == "online" else (path, step)] = reports  # online, restarts overlap
            if len(found) >= state.rows or time.monotonic() > deadline:
                return len(found), sum(found.values())
            time.sleep(0.2)
        return state.rows, state.in_rows

    def _upload_error(self) -> str | None:
        """wandb says nothing of a server that refuses the rows for good, but writes it into the run's own log."""
        log = self._state.paths[-1] / "logs" / "debug-internal.log"
        with log.open() as lines:
            return next((line for line in lines if '"level":"ERROR"' in line), None)

    def _warn(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.append(message)
            logger.warning("W&B run %s: %s", self._spec.init["name"], message)

    def _watch_owner(self) -> None:
        """Finishes the run when the process that constructed it is gone. Ray leaves two seconds for that, or more."""
        while _alive(self._spec.owner):
            time.sleep(0.1)
        self.GRACE = 0.5
        if self._run:
            self.finish(1)
        ray.kill(ray.get_runtime_context().current_actor)


def pipeline_actor(cls: type[PipelineActor]) -> ray.actor.ActorClass:
    """Makes a pipeline an actor that comes back when it dies, and outlives its driver until the run is finished."""
    groups = {"closing": 1, "control": 8}  # next to the default one, which takes the reports
    options = dict(max_restarts=-1, max_task_retries=-1, num_cpus=0, lifetime="detached")
    return ray.remote(concurrency_groups=groups, **options)(cls)


@pipeline_actor
class TrainingPipelineActor(PipelineActor):
    """Pipeline of the optimiser steps."""

    prefix = "training/"
    job_type = "training"
    sums = ("tokens", "e2e/speed")
    totals = ("tokens",)
    largest = ("learning_rate",)
    statistics = {"e2e/latency_ms": ("mean", "p50", "p99")}


@pipeline_actor
class InferencePipelineActor(PipelineActor):
    """Pipeline of the rollout batches."""

    prefix = "inference/"
    job_type = "inference"
    sums = ("rollouts", "e2e/speed", "requests/running", "requests/waiting")
    totals = ("rollouts",)
    largest = ("policy_version",)
    statistics = {
        "reward": ("mean", "min", "max", "std"),
        "response_length": ("mean", "p90", "max"),
        "e2e/latency_ms": ("mean", "p50", "p99"),
        "staleness": ("mean", "max"),
    }


# --- WandbRun --------------------------------------------------------------------------------------------------------


class _Outbox:
    """A process's reports on their way to a pipeline actor; all handles of a run in a process share one.

    One batch is under way at a time and the next one gathers meanwhile, so that a lone report leaves at once and a
    stream leaves in batches. A batch is kept until the actor has it on disk; Ray sends it again if the actor dies.
    """

    BATCH, LIMIT = 128, 512  # reports in a batch, and in the outbox

    def __init__(self, actor: Any, sender: str, method: str = "_push", first: int = 0, closing: Any = None):
        self._actor, self._sender, self._method, self._first = actor, sender, method, first
        self._changed = threading.Condition()
        self._waiting: list[Any] = []
        self._known = self._closed = False
        self.lost = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()
        if closing is not None:
            threading.Thread(target=self._await, args=(closing,), daemon=True).start()

    def put(self, report: Any) -> None:
        """Appends a report; waits while the outbox is full, and the first time until the actor knows this sender."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self.LIMIT or self._closed)
            if self._closed:
                raise RunFinishedError("the run is finished, so nothing more can be logged to it")
            if self._error:
                self.lost += 1
                return
            self._waiting.append(report)
            if len(self._waiting) == 1:
                self._changed.notify_all()
            if not self._known:
                self._changed.wait_for(lambda: self._known)
                if isinstance(self._error, RunFinishedError):
                    raise RunFinishedError("the run is finished, so nothing more can be logged to it")

    def drain(self) -> None:
        """Waits until the actor has all reports."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def close(self) -> None:
        """Sends what is left and tells the actor that no more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _await(self, closing: Any) -> None:
        try:
            ray.get(closing)
        except ray.exceptions.ActorDiedError:
            return  # `_send` will hear of it too
        except Exception:  # the driver is gone; the actor, for a while, is not
            pass
        self.close()

    def _send(self) -> None:
        last = False
        while not last:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                batch = self._waiting[: self.BATCH]
                last = self._closed and len(batch) == len(self._waiting)
            try:
                ray.get(self._actor.call.remote(self._method, self._sender, self._first, batch, last))
            except Exception as error:  # Ray retries what can be retried
                self._give_up(error)
            with self._changed:
                self._first += len(batch)
                del self._waiting[: len(batch)]
                self._known = True
                self._changed.notify_all()

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            self.lost += len(self._waiting)
            self._waiting.clear()
            if self.lost:
                logger.warning("%d reports are lost, training goes on: %s", self.lost, str(error).splitlines()[0])
            self._closed |= isinstance(error, RunFinishedError)
            self._error = error


_outboxes: dict[str, _Outbox] = {}  # run -> this process's outbox
_outboxes_lock = threading.Lock()
_unfinished: list[WandbRun] = []  # constructed by this process


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


class WandbRun:
    """A W&B run that any number of workers, tasks and threads log to, through the pipeline actor that owns it.

    Construct it in the driver, hand it (it is picklable) to the workers, `log` there, `finish` in the driver. As a context
    manager it finishes at the end, as failed if there was an exception.

    project, name: where the run goes and what it is called.
    pipeline: actor class that reduces the reports, see `pipeline_actor`.
    workers: reports that make a step complete; each worker reports a step once.
    prefix: put before every key, "training/" for instance; the step axis is `<prefix>step`.
    share: another WandbRun; this pipeline then gets no run of its own, but its rows and step axis go to that one's.
    init: for `wandb.init` as it is (group, job_type, tags, config, notes, entity, mode, dir, id, resume, settings, …).

    Raises ValueError or TypeError for arguments that can't work and RuntimeError if the run can't start.
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
        if not hasattr(pipeline, "__ray_metadata__"):
            raise TypeError(f"pipeline must be a class decorated with @pipeline_actor, not {pipeline!r}")
        cls = pipeline.__ray_metadata__.modified_class
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be a positive integer, not {workers!r}")
        if share is not None:
            prefix = prefix or cls.prefix
            if share.project != project:
                raise ValueError(
                    f"a shared run stays in its project, {share.project!r}, so project can't be {project!r}"
                )
            for other in share._prefixes:
                if prefix.startswith(other) or other.startswith(prefix):
                    raise ValueError(
                        f"prefix {prefix!r} overlaps with {other!r} of the same run: metrics would get mixed up"
                    )
            if init:
                raise TypeError(f"share= makes no run of its own, so {', '.join(init)} can't be set")
        if not re.fullmatch(r"([^_/][^/]*/)*", prefix):
            raise ValueError(f"prefix must be '' or a path that ends with '/', such as 'training/', not {prefix!r}")
        if unknown := init.keys() - inspect.signature(wandb.init).parameters.keys():
            raise TypeError(f"wandb.init has no argument {', '.join(sorted(unknown))}")
        if not isinstance(project, str) or not project:
            raise ValueError(f"project must be a name, not {project!r}")
        if share is None:
            init = dict(id=uuid.uuid4().hex[:8], job_type=cls.job_type) | {
                k: v for k, v in init.items() if v is not None
            }
            wandb.Settings(
                project=project, run_id=init["id"], run_tags=init.get("tags")
            )  # raises on what wandb refuses
            init["dir"] = os.path.abspath(init.get("dir", "."))
            os.makedirs(os.path.join(init["dir"], "wandb"), exist_ok=True)
        else:
            init = dict(id=share.id, dir=share._dir)
        self.project, self.id, self._dir, self._prefixes = project, init["id"], init["dir"], [prefix]
        self._name = name or self.id
        environ = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
        init |= dict(project=project, name=name)
        spec = _Spec(init, workers, prefix, os.getpid(), share, environ)
        here = NodeAffinitySchedulingStrategy(_node_id(), soft=False)  # where the run folder and the login are
        self._actor = pipeline.options(scheduling_strategy=here).remote(spec)
        try:
            started = ray.get(self._actor.start.remote())
        except ray.exceptions.RayTaskError as error:
            ray.kill(self._actor)
            if not isinstance(error.cause, wandb.errors.Error):
                raise error.cause from None
            what = str(error.cause).splitlines()[0].rstrip(".")
            hint = "log in with `wandb login`, set WANDB_API_KEY, or pass mode='offline'"
            raise RuntimeError(f"W&B run {self._name!r} in project {project!r} can't start: {what}; {hint}") from None
        self.url: str | None = started["url"]  # None if not online
        self.path: Path | None = started["path"]  # the run's folder, None if disabled
        self.mode: str = started["mode"]  # online, offline or disabled
        self.warnings: list[str] = started["warnings"]
        self._closing = self._actor.closing.remote()
        self._guests: list[WandbRun] = []
        self._report: RunReport | None = None
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

    @property
    def _outbox(self) -> _Outbox:
        key = self._actor._actor_id.hex()
        if key not in _outboxes:
            if not ray.is_initialized():
                raise RuntimeError(f"Ray is not running, so nothing can be logged to run {self._name!r}")
            with _outboxes_lock:
                if key not in _outboxes:
                    sender = f"{_node_id()}/{os.getpid()}/{uuid.uuid4().hex}"
                    _outboxes[key] = _Outbox(self._actor, sender, closing=self._closing)
        return _outboxes[key]

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Reports one worker's metrics of one step; returns within microseconds, unless the actor is far behind.

        metrics: key -> number (the worker's measurement), numeric array (samples), string or W&B data type;
        `reduce_reports` says what becomes of them. Later changes of an array don't change what was logged.
        step: the pipeline's own, from 0; any order.

        Raises TypeError or ValueError naming the key that wandb would refuse or drop, RunFinishedError after `finish`.
        """
        if type(step) is not int:
            if isinstance(step, bool) or not isinstance(step, np.integer):
                raise TypeError(f"step must be an integer, not {step!r}")
            step = int(step)
        if step < 0:
            raise ValueError(f"step must not be negative, as {step} is")
        report = {key: value if type(value) in (float, int) else _value(key, value) for key, value in metrics.items()}
        for key in report:
            if type(key) is not str or not key or key[0] == "_" or key in ("step", "workers"):
                raise _key_error(key)
        self._outbox.put((step, pickle.dumps(report, pickle.HIGHEST_PROTOCOL)))

    def log_artifact(
        self,
        name: str,
        type: str,
        files: Mapping[str, Any] | Sequence[str | Path] | str | Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Logs a version of an artifact; returns when its files are copied into the run's folder, not when uploaded.

        files: name inside the artifact -> content (bytes, the path of a file, or a W&B data type such as
        `wandb.Table`); or the path of a file or folder, or several of them.

        Raises ValueError for a name, type or alias that W&B refuses and OSError for a file that can't be read.
        """
        wandb.Artifact(name, type, metadata=dict(metadata or {}))  # raises on what W&B refuses
        if isinstance(aliases, str) or not all(isinstance(a, str) and a and not set(a) & set("/:") for a in aliases):
            raise ValueError(f"aliases must be names without '/' and ':', not {aliases!r}")
        content = _contents(files)
        if not content:
            raise ValueError(f"artifact {name!r} has no files")
        artifact = dict(name=name, type=type, files=content, metadata=dict(metadata or {}), aliases=list(aliases))
        self._ask("log_artifact", artifact)

    def use_artifact(self, name: str) -> None:
        """Records that this run uses artifact `name`, such as "checkpoint:step-10".

        In the run's config (`used_artifacts`), and online as W&B's lineage, as soon as the server has the artifact.
        To get at its files use `wandb.Api().artifact(name)`.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be an artifact's name, not {name!r}")
        self._ask("call", "_in_background", "use", (name,))

    def expect(self, workers: int) -> None:
        """From now on a step is complete with so many reports: tell it when a worker has died or joined."""
        if self._report is None:
            self._ask("call", "_expect", max(1, workers))

    def progress(self) -> dict[str, Any]:
        """`rows` so far, the last `row` (without prefix), the run's `paths` and `warnings`."""
        return ray.get(self._actor.progress.remote())

    def finish(self, exit_code: int = 0) -> RunReport:
        """Finishes the run, with all that was logged before by any copy of the handle, and returns its ledger.

        Blocks for the upload, `finish_timeout` seconds of the settings at most (60 by default). To call it again is harmless.
        """
        if self._report is None:
            if not ray.is_initialized():
                raise RuntimeError(
                    f"Ray is not running any more, so run {self._name!r} can't be finished; see {self.path}"
                )
            for guest in self._guests:
                guest.finish(exit_code)
            try:
                self._report = ray.get(self._actor.finish.remote(exit_code))
            except ray.exceptions.RayActorError as error:
                self._report = self._salvage(error)
            if self in _unfinished:
                _unfinished.remove(self)
        return self._report

    def _salvage(self, error: Exception) -> RunReport:
        """The ledger of a run whose actor is gone for good: what the disk says."""
        log = read_log(self.path, self._prefixes[0]) if self.path else {}
        outbox = _outboxes.get(self._actor._actor_id.hex())
        lost, warning = outbox.lost if outbox else 0, f"The pipeline actor died for good: {error}".splitlines()[0]
        return RunReport(
            name=self._name,
            id=self.id,
            mode=self.mode,
            url=self.url,
            paths=(self.path,) if self.path else (),
            reports=sum(log.values()) + lost,
            rows=len(log),
            late=0,
            lost=lost,
            restarts=0,
            repeats=0,
            uploaded=False,
            warnings=(*self.warnings, warning),
        )

    def _ask(self, method: str, *arguments: Any) -> None:
        try:
            ray.get(getattr(self._actor, method).remote(*arguments))
        except RunFinishedError:
            raise RunFinishedError(f"run {self._name!r} is finished, so nothing more can be logged to it") from None
        except ray.exceptions.RayError as error:  # a trouble of the logging, not of the caller
            logger.warning(
                "W&B run %s: %s failed, training goes on: %s", self._name, method, str(error).splitlines()[0]
            )


@atexit.register  # runs before Ray's own, which would kill the actors
def _finish_all() -> None:
    for run in reversed(_unfinished):
        if ray.is_initialized():
            run.finish(exit_code=1 if hasattr(sys, "last_type") else 0)


def _value(key: object, value: Any) -> Any:
    """`value` as float, int, str, numeric array or W&B data type."""
    if isinstance(value, str | WBValue):
        return value
    try:
        array = np.asarray(value)
    except Exception:  # ragged lists, tensors on another device
        array = np.asarray(None)
    if array.dtype.kind not in "biuf" or isinstance(value, Mapping):
        what = "a number, string, numeric array or W&B data type"
        raise TypeError(f"metric {key!r} must be {what}, not {value!r:.80} ({type(value).__name__})")
    return array if array.ndim else array.item() + 0  # True counts as 1


def _key_error(key: object) -> Exception:
    if not isinstance(key, str):
        return TypeError(f"metric key {key!r} must be a string")
    if key in ("step", "workers"):
        return ValueError(f"metric key {key!r} is taken: every row has its own")
    return ValueError(f"metric key {key!r} must not be empty or start with '_': wandb would drop it without a word")


def _contents(files: Any) -> dict[str, Any]:
    """An artifact's files by name: bytes, W&B data types, and paths, whose files are on this machine."""
    if isinstance(files, str | Path):
        files = [files]
    if not isinstance(files, Mapping):
        files = {Path(path).name: path for path in files}
    found = {}
    for name, content in files.items():
        if isinstance(content, bytes | WBValue):
            found[name] = content
        elif not isinstance(content, str | Path):
            raise TypeError(f"file {name!r} must be bytes, a path or a W&B data type, not {content!r:.80}")
        elif Path(content).is_dir():
            inside = sorted(path for path in Path(content).rglob("*") if path.is_file())
            found |= {f"{name}/{path.relative_to(content)}": path.read_bytes() for path in inside}
        else:
            found[name] = Path(content).read_bytes()  # the actor may be on another node
    return found


# --- Workers and session ---------------------------------------------------------------------------------------------

Hook = Callable[[WandbRun, int, Metrics], None]


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
    interrupted = []

    def interrupt(signum: int, _: object) -> None:
        if interrupted:
            os._exit(128 + signum)
        interrupted.append(signum)
        raise KeyboardInterrupt

    def catch_signals() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, interrupt)

    catch_signals()
    status = 0
    try:
        options: dict[str, Any] = dict(include_dashboard=False)
        if args.address:
            options = dict(address=args.address, runtime_env={"py_modules": [str(Path(__file__).parent / "common.py")]})
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        catch_signals()  # Ray has set its own
        yield
    except KeyboardInterrupt:
        status = 128 + interrupted[0]
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        status = 1
    finally:
        _finish_all()
        ray.shutdown()
    if status:
        sys.exit(status)


def run_pipelines(
    args: Args,
    training: WandbRun,
    inference: WandbRun,
    *,
    after_training_step: Hook | None = None,
    after_inference_step: Hook | None = None,
) -> int:
    """Runs both pipelines side by side, each at its own pace, finishes their runs and prints where they are.

    A hook is called as hook(run, step, metrics) in the first worker of its pipeline, after each step.
    Returns the exit status: 0, or 1 if a worker failed or something that was logged is not where it should be.
    """
    failures: list[str] = []
    runs = {training: "training", inference: "inference"}
    try:
        with training, inference:
            pending = {}
            pipelines = (
                (training, TrainingWorker, args.training_workers, after_training_step),
                (inference, InferenceWorker, args.inference_workers, after_inference_step),
            )
            for run, worker, count, hook in pipelines:
                for warning in run.warnings:
                    _say(warning)
                for index in range(count):
                    actor = worker.options(scheduling_strategy="SPREAD").remote()
                    ref = actor.run.remote(run, args, index, hook if index == 0 else None)
                    pending[ref] = (run, index, actor)
            with _Bars(args, runs) as bars:
                while pending:
                    done, _ = ray.wait(list(pending), timeout=0.1)
                    for ref in done:
                        run, index, _ = pending.pop(ref)
                        try:
                            ray.get(ref)
                        except ray.exceptions.RayError as error:
                            cause = getattr(error, "cause", None)
                            why = f"{type(cause).__name__}: {cause}" if cause else "it died"
                            failures.append(f"{runs[run]} worker {index} failed: {why}".splitlines()[0])
                            _say(failures[-1])
                            run.expect(sum(run is other for other, *_ in pending.values()))
                    bars.update()
            if failures:
                raise RuntimeError(failures[0])
    except RuntimeError:
        if not failures:
            raise
    finally:
        reports = [run._report for run in runs if run._report]
        _summarise(args, reports)
    return 0 if not failures and all(report.ok for report in reports) else 1


def _say(line: str) -> None:
    with tqdm.external_write_mode(sys.stderr):
        print(line, file=sys.stderr)


class _Bars:
    """A live bar per pipeline on a terminal; elsewhere a plain line, once."""

    HEADLINES = {"training": "loss", "inference": "reward/mean"}

    def __init__(self, args: Args, runs: Mapping[WandbRun, str]):
        self._runs = runs
        off = not sys.stderr.isatty()
        form = "{desc:<9} {bar:30} {n_fmt}/{total_fmt} steps{postfix}"
        self._bars = {
            run: tqdm(desc=name, total=args.steps, position=position, disable=off, bar_format=form)
            for position, (run, name) in enumerate(runs.items())
        }
        if off:
            print(f"{args.steps} steps of training and inference, {args.experiment}", flush=True)

    def __enter__(self) -> _Bars:
        return self

    def update(self) -> None:
        for run, bar in self._bars.items():
            progress = run.progress() if not bar.disable else {"row": {}}
            headline = self.HEADLINES[self._runs[run]]
            if headline in progress["row"]:
                bar.n = min(progress["rows"], bar.total)
                bar.set_postfix_str(f"{headline} {progress['row'][headline]:.3f}")

    def __exit__(self, *_: object) -> None:
        self.update()
        for bar in self._bars.values():
            bar.close()


def _summarise(args: Args, reports: Sequence[RunReport]) -> None:
    """Where the runs are, their ledgers, and what to type next."""
    for report in reports:
        where = report.url or (os.path.relpath(report.path) if report.path else "nowhere (disabled)")
        extras = [
            f"{getattr(report, key)} {key}" for key in ("late", "lost", "restarts", "repeats") if getattr(report, key)
        ]
        print(f"{report.name}: {', '.join([f'{report.rows} rows from {report.reports} reports', *extras])}\n  {where}")
        for warning in report.warnings:
            print(f"  {warning}", file=sys.stderr)
    folders = list(dict.fromkeys(os.path.relpath(path) for report in reports for path in report.paths))
    if folders:
        print(f"Look at them here:  {_command('leet', os.path.relpath(args.dir / 'wandb'))}")
    not_uploaded = [report for report in reports if not report.uploaded]
    if folders and not_uploaded:
        online = ["--no-skip-online"] if any(report.mode == "online" for report in not_uploaded) else []
        print(f"Upload them:        {_command('sync', *online, *folders)}")


def _command(*words: str) -> str:
    """A `wandb` command that works when pasted into the shell that this program was started from."""
    if "UV" in os.environ:
        prefix = ["uv", "run", "wandb"]
        if Path.cwd() != Path(__file__).parent:
            prefix[2:2] = ["--project", os.path.relpath(Path(__file__).parent)]
    else:
        wandb_script = Path(sys.executable).with_name("wandb")
        prefix = ["wandb"] if shutil.which("wandb") == str(wandb_script) else [str(wandb_script)]
    return shlex.join([*prefix, *words])
