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
        import wandb
        from wandb.sdk.lib import wbauth

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
    if args.address not in (None, "auto"):
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
    wanted = rng.lognormal(math.log(640 + 60 * learned), 0.45 - 0.25 * learned, 32)
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


# Reduction

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

    - a scalar is a worker's measurement: averaged, unless its key is in `sums` (rates and counts that add up over
      workers) or in `largest`
    - an array (any shape) holds samples: pooled over the workers before `statistics[key]`, names of `STATISTICS`, are
      taken; they become `key/mean`, … (mean, min and max if nothing is given)
    - a bool array holds outcomes: pooled to one fraction under `key`
    - strings and W&B data types pass through

    Workers that lack a key don't count for it.
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


# Pipeline actors


class RunFinishedError(RuntimeError):
    """Something was logged to a run after `finish`."""


Sender = tuple[str, int, str]  # node, process, a name of its own


@dataclasses.dataclass
class RunReport:
    """The ledger of a pipeline: what came in and what is on disk. `reports` = reports in rows + `lost`."""

    name: str
    id: str
    mode: str = ""  # online, offline or disabled
    url: str | None = None
    paths: list[Path] = dataclasses.field(default_factory=list)  # the run's folders: one, and one more per restart
    reports: int = 0  # received
    rows: int = 0  # in the transaction logs, counted there; a row stands on one or more reports
    late: int = 0  # reports that came after their step's row, and got a row of their own
    lost: int = 0  # reports that are in no row on disk
    lost_artifacts: int = 0
    restarts: int = 0  # of the pipeline actor, after it died
    repeats: int = 0  # reports that were sent again after a restart, and recognised
    uploaded: bool = False  # online: the server has it all
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def path(self) -> Path | None:
        return self.paths[-1] if self.paths else None

    @property
    def ok(self) -> bool:
        return not (self.lost or self.lost_artifacts) and (self.uploaded or self.mode != "online")


@dataclasses.dataclass
class _State:
    """All that a pipeline knows. The same calls in the same order lead to the same state and the same rows."""

    report: RunReport
    workers: int  # reports that make a step complete
    in_rows: int = 0  # reports in rows
    guest_rows: int = 0  # rows of the pipelines that share the run
    starting_step: int = 0  # rows that a resumed run had already
    guests: list[str] = dataclasses.field(default_factory=list)  # prefixes of the pipelines that share the run
    received: dict[Sender, int] = dataclasses.field(default_factory=dict)  # how many reports of each sender
    left: set[Sender] = dataclasses.field(default_factory=set)  # senders that have sent their last
    open: OrderedDict[int, list[bytes]] = dataclasses.field(default_factory=OrderedDict)  # step -> reports so far
    held: int = 0  # reports in `open`
    closed: set[int] = dataclasses.field(default_factory=set)  # steps that have their row,
    floor: int = 0  # as have all below this one
    totals: dict[str, float] = dataclasses.field(default_factory=dict)  # running sums
    tasks: dict[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)  # artifacts to log or use


class _Journal:
    """Calls on a pipeline, written down before they take effect, so that a SIGKILL of its actor undoes none.

    Two files, each a pickled `_State` and the calls since. What is written outlives the process at once, being with the
    kernel; `rotate` forgets only what is older than any row that wandb could still hold in memory.
    """

    ROTATE_BYTES, ROTATE_SECONDS = 1 << 20, 5.0  # ten times the flush interval of the transaction log

    def __init__(self, path: Path):
        self.path, self.previous = path, path.with_name(path.name + ".previous")

    def replay(self) -> Iterator[Any]:
        """The oldest state that is kept, then each call since: (method, *arguments). Nothing without a journal."""
        started = False
        for path in filter(Path.exists, (self.previous, self.path)):
            with path.open("r+b") as file:
                while True:
                    end = file.tell()
                    try:
                        entry = pickle.load(file)
                    except Exception:  # the end, or an entry that was being written: its sender sends it again
                        file.truncate(end)
                        break
                    if not (started and isinstance(entry, _State)):
                        started = True
                        yield entry

    def open(self, state: _State) -> None:
        self.file, self.opened = self.path.open("ab", buffering=0), time.monotonic()
        if not self.file.tell():
            self.append(state)

    def append(self, entry: Any) -> None:
        data = pickle.dumps(entry, pickle.HIGHEST_PROTOCOL)
        if self.file.write(data) < len(data):
            raise OSError("No space left on device")

    def is_due(self) -> bool:
        return self.file.tell() > self.ROTATE_BYTES and time.monotonic() - self.opened > self.ROTATE_SECONDS

    def rotate(self, state: _State) -> None:
        self.file.close()
        self.path.replace(self.previous)
        self.open(state)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)


@contextlib.contextmanager
def _inspect(path: Path, *flags: str) -> Iterator[Iterator[str]]:
    """`wandb leet inspect --json`, by its binary: the command in front of it takes a second to start."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *flags]
    command += ["--run-file", *map(str, path.glob("*.wandb")), str(path.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield iter(process.stdout)


def read_summary(path: Path) -> dict[str, Any]:
    """What a run folder's transaction log ends with: `state`, `step` (the last row's number, from 0), `summary`, …"""
    with _inspect(path, "--summary") as lines:
        return json.loads("".join(lines) or "{}")


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


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True


class PipelineActor:
    """Owns the W&B run of a pipeline and reduces its workers' reports to one row per step.

    Undecorated, because Ray can't inherit from a decorated class; so it also works, and is tested, without Ray. For a
    pipeline of your own derive a class, set the attributes and decorate it with `pipeline_actor`.
    """

    prefix = ""  # of a pipeline that shares a run and is given none
    job_type: str | None = None
    sums: Sequence[str] = ()
    totals: Sequence[str] = ()  # summed keys whose running sum is logged too, as `<key>_total`
    largest: Sequence[str] = ()
    statistics: ClassVar[Mapping[str, Sequence[str]]] = {}

    MAX_HELD = 16_384  # reports that wait for the rest of their step; beyond that the oldest step is closed
    MAX_CLOSED = 32_768  # steps remembered as closed
    GRACE = 5.0  # seconds that `finish` waits for the last reports of a sender that may be alive

    def __init__(
        self,
        init: dict[str, Any],  # for wandb.init
        workers: int,
        prefix: str,
        owner: int,  # the process on this node that constructed the run
        share: ray.actor.ActorHandle | None = None,  # pipeline actor whose run gets the rows
        environ: Mapping[str, str] | None = None,  # the owner's WANDB_…: Ray's state API lists no arguments
    ):
        os.environ.update(environ or {})
        self._init, self._prefix, self._owner, self._share = init, prefix, owner, share
        self._lock = threading.RLock()
        self._changed, self._closing = threading.Condition(self._lock), threading.Event()
        self._state = _State(RunReport(init["name"] or init["id"], init["id"]), workers)
        self._run: wandb.Run | None = None
        self._outbox: _Outbox | None = None  # to `share`
        self._finished = False
        self._threads, self._futures = dict(log=ThreadPoolExecutor(1), use=ThreadPoolExecutor(1)), dict[str, Future]()
        self._last_row: dict[str, Any] = {}
        self._skip = 0  # rows that a replay need not log again
        self._journal = _Journal(Path(init["dir"], "wandb", f".{init['id']}{prefix.replace('/', '-')}.journal"))
        self._journaling = init.get("mode") != "disabled"
        if any(self._journal.replay()):  # a restart: nobody will call `start`
            self.start()
        threading.Thread(target=self._watch_owner, daemon=True).start()

    # Starting and restarting

    def start(self) -> RunReport:
        """Starts the run, or picks up where a dead actor left it; returns the ledger so far."""
        with self._lock:
            if not (self._run or self._outbox):
                try:
                    self._start()
                except Exception as error:  # wandb's own kinds don't all survive the way to the caller
                    kind = type(error) if type(error) in (TypeError, ValueError, OSError) else RuntimeError
                    raise kind(" ".join(str(error).split())[:500]) from error
            return self._state.report

    def _start(self) -> None:
        self._state, *calls = list(self._journal.replay()) or [self._state]
        state = self._state
        folders = [*state.report.paths, *(path for method, path, *_ in calls if method == "_open")]
        if self._share:
            shared = ray.get(self._share.start.remote())
            ray.get(self._share.call.remote("_add_guest", self._prefix))
            self._outbox = _Outbox(self._share, ("", 0, self._prefix), "_push_rows", first=state.report.rows)
            opened = (shared.path, shared.mode, shared.url, 0)
        else:
            run = self._run = self._wandb_init(restart=bool(folders))
            mode = "disabled" if run.disabled else "offline" if run.offline else "online"
            path, url = None if run.disabled else Path(run.sync_dir), run.url if mode == "online" else None
            opened = (path, mode, url, run.starting_step)
            if folders and mode == "online":  # the rows that the server has
                self._skip = run.starting_step - state.starting_step
            elif folders:  # the rows that the dead actors' wandb had written
                self._skip = sum(read_summary(folder).get("step", -1) + 1 for folder in folders) - state.starting_step
            elif self._init.get("resume"):
                earlier = Path(self._init["dir"], "wandb").glob(f"*run-*-{self._init['id']}")
                summaries = [read_summary(folder) for folder in earlier if folder != path]
                last = max(summaries, key=lambda summary: summary.get("start_time", ""), default={}).get("summary", {})
                totals = {key: (dict(run.summary) or last).get(f"{self._prefix}{key}_total") for key in self.totals}
                state.totals = {key: total for key, total in totals.items() if total}
            for prefix in (self._prefix, *state.guests):
                self._define_axis(prefix)
            for key in state.tasks:
                self._submit(key)
        for method, *arguments in calls:
            getattr(self, method)(*arguments)
        if self._journaling:
            self._journal.open(state)
        self.call("_open", *opened)

    def _wandb_init(self, restart: bool) -> wandb.Run:
        import wandb

        os.environ.pop("WANDB_SERVICE", None)  # of the owner's own wandb: this process needs a service of its own
        settings = self._init.get("settings") or {}
        if isinstance(settings, wandb.Settings):
            settings = settings.model_dump(exclude_unset=True)
        self._timeout = settings.get("finish_timeout", 60) / 2  # for the artifacts, and again for the rows
        settings = dict(silent=True, console="off", init_timeout=20, x_transaction_log_flush_interval=0.5) | settings
        settings |= dict(finish_timeout=self._timeout, finish_timeout_raises=True)
        init = self._init | dict(settings=wandb.Settings(**settings), reinit="create_new")
        if restart:
            init["resume"] = "allow"
        try:
            run = wandb.init(**init)
        except wandb.errors.CommError as error:
            if "init_timeout" not in str(error):  # the server answers, and says no
                raise
            self._warn(f"the W&B server does not answer, so the run stays on this machine (offline): {_line(error)}")
            run = wandb.init(**init | dict(mode="offline"))
        if not run.disabled:  # else artifacts are staged in the home folder, and gone when `wandb sync` needs them
            os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_CACHE_DIR"] = f"{run.sync_dir}/artifacts"
        return run

    def _open(self, path: Path | None, mode: str, url: str | None, starting_step: int) -> None:
        report = self._state.report
        if report.mode:
            report.restarts += 1
        else:
            self._state.starting_step = starting_step
        report.mode, report.url = mode, url
        if path and path not in report.paths:
            report.paths.append(path)

    def _add_guest(self, prefix: str) -> None:
        if prefix not in self._state.guests:
            self._state.guests.append(prefix)
            self._define_axis(prefix)

    def _define_axis(self, prefix: str) -> None:
        self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        self._run.define_metric(f"{prefix}step", hidden=True)
        self._run.define_metric(f"{prefix}workers", step_metric=f"{prefix}step", hidden=True)

    # Receiving

    def call(self, method: str, *arguments: Any) -> None:
        """Does `method(*arguments)` so that a SIGKILL of this process can't undo it; raises after `finish`."""
        with self._lock:
            if self._finished or not (self._run or self._outbox):
                raise RunFinishedError(f"run {self._state.report.name!r} is finished")
            if self._journaling:
                try:
                    self._journal.append((method, *arguments))
                    if self._journal.is_due():
                        self._rotate()
                except OSError as error:
                    self._journaling = False
                    self._warn(f"{_line(error)}: rows may get lost from now on, training goes on")
            try:
                getattr(self, method)(*arguments)
            except ConnectionError:  # wandb's service process has died: only a new process gets a new one
                os._exit(1)
            self._changed.notify_all()

    def _rotate(self) -> None:
        if self._outbox:
            self._outbox.drain()
        for key in [key for key, future in self._futures.items() if future.done() and not future.exception()]:
            del self._futures[key], self._state.tasks[key]
        self._journal.rotate(self._state)

    def _fresh(self, sender: Sender, first: int, reports: Sequence[Any], last: bool) -> Sequence[Any]:
        """Those of a sender's reports, numbered from `first`, that have not been received before."""
        state, received = self._state, self._state.received.get(sender, 0)
        repeats = min(max(received - first, 0), len(reports))
        state.report.repeats += repeats
        state.received[sender] = max(received, first + len(reports))
        if last:
            state.left.add(sender)
        return reports[repeats:]

    def _push(self, sender: Sender, first: int, reports: Sequence[tuple[int, bytes]], last: bool) -> None:
        """Takes a sender's next reports, each (step, pickled metrics)."""
        state = self._state
        for step, report in self._fresh(sender, first, reports, last):
            state.report.reports += 1
            if step < state.floor or step in state.closed:
                state.report.late += 1
                self._log_step(step, [report])
                continue
            waiting = state.open.setdefault(step, [])
            waiting.append(report)
            state.held += 1
            if len(waiting) >= state.workers:
                self._close(step)
            elif state.held > self.MAX_HELD:
                self._close(next(iter(state.open)))

    def _push_rows(self, sender: Sender, first: int, rows: Sequence[dict[str, Any]], last: bool) -> None:
        """Takes the next rows of a pipeline that shares this run."""
        for row in self._fresh(sender, first, rows, last):
            self._log(row)
            self._state.guest_rows += 1

    def _expect(self, workers: int) -> None:
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
        state = self._state
        metrics = [pickle.loads(report) for report in sorted(reports)]  # the order they came in has no effect
        row = reduce_reports(metrics, sums=self.sums, largest=self.largest, statistics=self.statistics)
        for key in self.totals:
            if key in row:
                row[f"{key}_total"] = state.totals[key] = state.totals.get(key, 0) + row[key]
        self._last_row = row | {"step": step, "workers": len(reports)}
        self._log({self._prefix + key: value for key, value in self._last_row.items()})
        state.report.rows += 1
        state.in_rows += len(reports)

    def _log(self, row: dict[str, Any]) -> None:
        if self._outbox:
            self._outbox.put(row)
        elif self._state.report.rows + self._state.guest_rows >= self._skip:
            self._run.log(row)  # never `step=`: it drops rows that come out of order

    # Artifacts: wandb blocks when the server is away, so they have threads of their own

    @ray.method(concurrency_group="control")
    def log_artifact(self, files: Mapping[str, Any], **artifact: Any) -> None:
        """Writes the files (bytes, or W&B data types) into the run's folder and has the artifact logged."""
        folder = Path(self._state.report.path or tempfile.mkdtemp(), "artifacts", uuid.uuid4().hex)
        staged = dict(files)
        for file, content in files.items():
            if isinstance(content, bytes):
                staged[file] = folder / file
                staged[file].parent.mkdir(parents=True, exist_ok=True)
                staged[file].write_bytes(content)
        self.call("_in_background", "log", folder.name, artifact | dict(files=staged))

    def _in_background(self, task: str, key: str, what: Any) -> None:
        self._state.tasks[key] = (task, what)
        self._submit(key)

    def _submit(self, key: str) -> None:
        task, what = self._state.tasks[key]
        self._futures[key] = self._threads[task].submit(getattr(self, f"_{task}_artifact"), what)

    def _log_artifact(self, what: Mapping[str, Any]) -> None:
        import wandb

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
        while self._state.report.mode == "online":
            try:
                self._run.use_artifact(name)
                return
            except Exception:  # the run that makes it may not have uploaded it yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    # Finishing

    @ray.method(concurrency_group="closing")
    def closing(self) -> None:
        """Returns when the run is being finished: every outbox waits for that, and then sends what it has left."""
        self._closing.wait()

    @ray.method(concurrency_group="control")
    def progress(self) -> tuple[RunReport, dict[str, Any]]:
        """The ledger so far, and the last row (keys without prefix)."""
        return self._state.report, self._last_row

    @ray.method(concurrency_group="control")
    def finish(self, exit_code: int = 0) -> RunReport:
        """Waits for each sender's last reports, logs the open steps, finishes the run and counts what is on disk."""
        self._closing.set()
        with self._changed:
            deadline = time.monotonic() + self.GRACE
            while any(map(self._may_send, self._state.received)) and time.monotonic() < deadline:
                self._changed.wait(0.1)
            if not self._finished:
                self._finish(exit_code)
            return self._state.report

    def _may_send(self, sender: Sender) -> bool:
        node, pid, _ = sender
        return sender not in self._state.left and (node != _node_id() or _is_alive(pid))

    def _finish(self, exit_code: int) -> None:
        state, report = self._state, self._state.report
        for step in sorted(state.open):
            self._close(step)
        if self._outbox:
            self._outbox.close()
            report.paths = ray.get(self._share.start.remote()).paths
        else:
            self._finish_artifacts()
            try:
                self._run.finish(exit_code)
                report.uploaded = report.mode == "online"
            except TimeoutError:
                self._warn(f"the upload did not end within {self._timeout:.0f} s")
            # wandb tells nobody of a server that refuses the rows for good, but writes it into the run's own log
            if report.uploaded and '"level":"ERROR"' in (report.path / "logs" / "debug-internal.log").read_text():
                report.uploaded = False
                self._warn("the W&B server refused the upload")
        logged = state.in_rows
        report.rows, on_disk = self._count_on_disk()
        report.lost = max(0, logged - on_disk)
        if report.lost:
            self._warn(f"{report.lost} reports are not on disk")
        self._journal.remove()
        self._finished = True

    def _finish_artifacts(self) -> None:
        done, late = wait(self._futures.values(), timeout=self._timeout)
        errors = [future.exception() for future in done if future.exception()]
        self._state.report.lost_artifacts = len(errors) + len(late)
        if errors or late:
            why = _line(errors[0]) if errors else f"not possible within {self._timeout:.0f} s"
            self._warn(f"{len(errors) + len(late)} artifacts were not logged: {why}")

    def _count_on_disk(self) -> tuple[int, int]:
        """(rows, reports in them) of this pipeline in the transaction logs."""
        state, report = self._state, self._state.report
        last = state.starting_step + report.rows + state.guest_rows - 1
        if len(report.paths) == 1 and self._run and read_summary(report.path).get("step", -1) == last:
            return report.rows, state.in_rows  # all is well, so there is no need to read every row
        deadline = time.monotonic() + (3 if self._share else 0)  # a shared run goes on, and is written now and then
        while report.paths:
            online = report.mode == "online"  # where the numbers go on after a restart, and may overlap
            found = {
                (online or path, step): reports
                for path in report.paths
                for step, reports in read_log(path, self._prefix).items()
            }
            if len(found) >= report.rows or time.monotonic() > deadline:
                return len(found), sum(found.values())
            time.sleep(0.2)
        return report.rows, state.in_rows

    def _warn(self, message: str) -> None:
        self._state.report.warnings.append(message)
        logger.warning("W&B run %s: %s", self._state.report.name, message)

    def _watch_owner(self) -> None:
        """Finishes the run when the process that constructed it is gone; Ray leaves two seconds for that, or more."""
        raylet = os.getppid()
        while _is_alive(self._owner):
            time.sleep(0.1)
        self.GRACE = 0.5
        if self._run or self._outbox:
            self.finish(1)
        if os.getppid() != raylet:  # all of Ray is gone
            os._exit(0)
        ray.kill(ray.get_runtime_context().current_actor)


def pipeline_actor(cls: type[PipelineActor]) -> ray.actor.ActorClass:
    """Makes a pipeline an actor that comes back when it dies, and outlives its driver until the run is finished."""
    lives = dict(max_restarts=-1, max_task_retries=-1, lifetime="detached")
    threads = {"closing": 1, "control": 8}  # next to the one that takes the reports
    return ray.remote(concurrency_groups=threads, num_cpus=0, **lives)(cls)


@pipeline_actor
class TrainingPipelineActor(PipelineActor):
    """Pipeline of the optimiser steps."""

    prefix = "training/"
    job_type = "training"
    sums = ("tokens", "e2e/speed")
    totals = ("tokens",)
    largest = ("learning_rate",)
    statistics: ClassVar = {"e2e/latency_ms": ("mean", "p50", "p99")}


@pipeline_actor
class InferencePipelineActor(PipelineActor):
    """Pipeline of the rollout batches."""

    prefix = "inference/"
    job_type = "inference"
    sums = ("rollouts", "e2e/speed", "requests/running", "requests/waiting")
    totals = ("rollouts",)
    largest = ("policy_version",)
    statistics: ClassVar = {
        "reward": ("mean", "min", "max", "std"),
        "response_length": ("mean", "p90", "max"),
        "e2e/latency_ms": ("mean", "p50", "p99"),
        "staleness": ("mean", "max"),
    }


# WandbRun


class _Outbox:
    """A process's reports on their way to a pipeline actor; all handles of a run in a process share one.

    One batch is under way at a time while the next one gathers, so a lone report leaves at once and a stream leaves in
    batches. A batch is kept until the actor has it on disk: Ray sends it again if the actor dies.
    """

    BATCH, LIMIT = 128, 512  # reports in a batch, and in the outbox

    def __init__(self, actor: ray.actor.ActorHandle, sender: Sender, method: str = "_push", first: int = 0):
        self._actor, self._sender, self._method, self._first = actor, sender, method, first
        self._changed = threading.Condition()
        self._waiting: list[Any] = []
        self._known = self._closed = False
        self._error: Exception | None = None
        self.lost = 0
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def put(self, report: Any) -> None:
        """Appends a report. Waits while the outbox is full, and the first time until the actor knows this sender."""
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
        self._thread.join()

    def close_after(self, closing: ray.ObjectRef) -> None:
        try:
            ray.get(closing)
        except ray.exceptions.ActorDiedError:
            return  # `_send` hears of it too
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
            except Exception as error:  # the actor is gone for good: Ray retries what can be retried
                self._error = error
            with self._changed:
                if self._error and self._waiting:
                    self.lost += len(self._waiting)
                    batch = self._waiting
                    logger.warning("%d reports are lost, training goes on: %s", self.lost, _line(self._error))
                self._first += len(batch)
                self._waiting = self._waiting[len(batch) :]
                self._known = True
                self._changed.notify_all()


_outboxes: dict[str, _Outbox] = {}  # this process's, by pipeline actor
_outboxes_lock = threading.Lock()
_unfinished: list[WandbRun] = []  # constructed by this process


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


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
        if not isinstance(pipeline, ray.actor.ActorClass):
            raise TypeError(f"pipeline must be a class decorated with @pipeline_actor, not {pipeline!r}")
        if not isinstance(project, str) or not project:
            raise ValueError(f"project must be a name, not {project!r}")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be a positive integer, not {workers!r}")
        cls = pipeline.__ray_metadata__.modified_class
        if share is not None:
            prefix = prefix or cls.prefix
            if init or project != share.project:
                raise ValueError(f"share= takes the project ({share.project!r}) and the settings of the run it shares")
            if any(prefix.startswith(other) or other.startswith(prefix) for other in share._prefixes):
                raise ValueError(
                    f"prefix {prefix!r} overlaps with {share._prefixes} of the same run; both need their own"
                )
            init = dict(id=share.id, dir=share._dir, mode=share.mode)
        if not re.fullmatch(r"([^_/][^/]*/)*", prefix):
            raise ValueError(f"prefix must be a path that ends with '/', such as 'training/', not {prefix!r}")
        init = dict(id=uuid.uuid4().hex[:8], job_type=cls.job_type, dir=".") | {
            key: value for key, value in init.items() if value is not None
        }
        init |= dict(project=project, name=name, dir=os.path.abspath(init["dir"]))
        os.makedirs(os.path.join(init["dir"], "wandb"), exist_ok=True)
        environ = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
        here = NodeAffinitySchedulingStrategy(_node_id(), soft=False)  # where the run's folder and the login are
        self._actor = pipeline.options(scheduling_strategy=here).remote(
            init, workers, prefix, os.getpid(), share and share._actor, environ
        )
        try:
            started: RunReport = ray.get(self._actor.start.remote())
        except ray.exceptions.RayTaskError as error:
            ray.kill(self._actor)
            hint = "; run `wandb login`, set WANDB_API_KEY or pass mode='offline'" if "API key" in str(error) else ""
            why = f"{_line(error.cause)}{hint}"
            raise type(error.cause)(f"W&B run {name or init['id']!r} of {project!r} can't start: {why}") from None
        self.project, self.id, self.mode = project, started.id, started.mode
        self.url, self.path, self.warnings = started.url, started.path, started.warnings
        self._name, self._dir, self._prefixes = started.name, init["dir"], [prefix]
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

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Reports one worker's metrics of one step; takes microseconds, unless the actor is far behind.

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
        outbox = _outboxes.get(self._actor._actor_id) or self._new_outbox()
        outbox.put((step, pickle.dumps(report, pickle.HIGHEST_PROTOCOL)))

    def _new_outbox(self) -> _Outbox:
        with _outboxes_lock:
            if self._actor._actor_id not in _outboxes:
                if not ray.is_initialized():
                    raise RuntimeError(f"Ray is not running, so nothing can be logged to run {self._name!r}")
                outbox = _Outbox(self._actor, (_node_id(), os.getpid(), uuid.uuid4().hex))
                threading.Thread(target=outbox.close_after, args=(self._closing,), daemon=True).start()
                _outboxes[self._actor._actor_id] = outbox
            return _outboxes[self._actor._actor_id]

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
            files = {Path(path).name: path for path in ([files] if isinstance(files, str | Path) else files)}
        if not files:
            raise ValueError(f"artifact {name!r} has no files")
        content = {file: _content(file, value) for file, value in files.items()}
        artifact = dict(name=name, type=type, metadata=dict(metadata or {}), aliases=list(aliases))
        self._ask("log_artifact", content, **artifact)

    def use_artifact(self, name: str) -> None:
        """Records that this run uses artifact `name`, such as "checkpoint:step-10".

        In the run's config (`used_artifacts`), and online as lineage, as soon as the server has it. For its files use
        `wandb.Api().artifact(name)`.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be an artifact's name, not {name!r}")
        self._ask("call", "_in_background", "use", uuid.uuid4().hex, name)

    def expect(self, workers: int) -> None:
        """From now on a step is complete with so many reports: a worker has died or joined."""
        self._ask("call", "_expect", max(1, workers))

    def progress(self) -> tuple[RunReport, dict[str, Any]]:
        """The ledger so far and the last row (keys without prefix)."""
        return self._ask("progress") or (RunReport(self._name, self.id), {})

    def finish(self, exit_code: int = 0) -> RunReport:
        """Finishes the run, with all that any copy of the handle logged before, and returns its ledger.

        Waits for the upload, `finish_timeout` seconds of the settings at most (60 by default). Calling it again returns
        the same ledger.
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
            except ray.exceptions.RayActorError as error:  # gone for good: what the disk says
                found = read_log(self.path, self._prefixes[0]) if self.path else {}
                report = RunReport(self._name, self.id, self.mode, self.url, [self.path] if self.path else [])
                outbox = _outboxes.get(self._actor._actor_id)
                report.rows, report.lost = len(found), outbox.lost if outbox else 0
                report.reports = sum(found.values()) + report.lost
                report.warnings = [f"the pipeline actor is gone, and what it held is lost: {_line(error)}"]
                self._report = report
            if self in _unfinished:
                _unfinished.remove(self)
        return self._report

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls the pipeline actor; its troubles are no reason to stop the caller."""
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments, **options))
        except RunFinishedError:
            raise RunFinishedError(f"run {self._name!r} is finished, so nothing more can be logged to it") from None
        except ray.exceptions.RayError as error:
            logger.warning("W&B run %s: %s failed, training goes on: %s", self._name, method, _line(error))


@atexit.register  # runs before Ray's own, which takes the actors down
def _finish_all() -> None:
    for run in list(_unfinished):
        if ray.is_initialized():
            run.finish(exit_code=1 if hasattr(sys, "last_type") else 0)


def _value(key: object, value: Any) -> Any:
    """`value` as int, float, str, numeric array or W&B data type."""
    if isinstance(value, str) or _is_data_type(value):
        return value
    with contextlib.suppress(Exception):  # ragged lists, tensors that can't be read from here
        array = np.asarray(value)
        if array.dtype.kind in "iufb":
            return array if array.ndim else array.item() + 0  # True is 1
    expected = "a number, a string, a numeric array or a W&B data type"
    raise TypeError(f"metric {key!r} must be {expected}, not {value!r:.80} ({type(value).__name__})")


def _key_error(key: object) -> Exception:
    if not isinstance(key, str):
        return TypeError(f"metric key {key!r} must be a string")
    if key in ("step", "workers"):
        return ValueError(f"metric key {key!r} is taken: every row has its own")
    return ValueError(f"metric key {key!r} must not be empty or start with '_': wandb would drop it without a word")


def _is_data_type(value: Any) -> bool:
    """Whether it is a `wandb.Table`, `wandb.Histogram` or the like."""
    return "wandb" in sys.modules and isinstance(value, sys.modules["wandb"].sdk.data_types.base_types.wb_value.WBValue)


def _content(file: str, value: Any) -> Any:
    """A file's bytes (the pipeline actor may be on another node), or the W&B data type."""
    if isinstance(value, bytes) or _is_data_type(value):
        return value
    if isinstance(value, str | Path):
        return Path(value).read_bytes()
    raise TypeError(f"file {file!r} must be bytes, a path or a W&B data type, not {value!r:.80}")


# Workers and session

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
    signals: list[int] = []

    def interrupt(signum: int, _: object) -> None:
        if signals:  # the second time, at once
            os._exit(128 + signum)
        signals.append(signum)
        raise KeyboardInterrupt

    def catch_signals() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, interrupt)

    options: dict[str, Any] = dict(address="local", include_dashboard=False)  # None may join a stranger's Ray
    if args.address:
        options = dict(address=args.address, runtime_env=dict(py_modules=[__file__]))  # workers import this module
    status = 0
    catch_signals()
    where = args.address or "this machine"
    print(f"Experiment {args.experiment}: {args.steps} steps of training and of inference, Ray on {where}", flush=True)
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        catch_signals()  # Ray has set its own
        yield
    except KeyboardInterrupt:
        status = 128 + signals[0]
    except Exception as error:
        print(f"{type(error).__name__}: {_line(error)}", file=sys.stderr)
        status = 2 if isinstance(error, ConnectionError) else 1  # no Ray at the address
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

    A hook is called as hook(run, step, metrics) by the first worker of its pipeline, after each step.
    Returns the exit status: 0, or 1 if a worker failed or something that was logged is not where it should be.
    """
    runs = {"training": training, "inference": inference}
    workers = (
        *(("training", TrainingWorker, i, after_training_step) for i in range(args.training_workers)),
        *(("inference", InferenceWorker, i, after_inference_step) for i in range(args.inference_workers)),
    )
    failed = False
    try:
        with training, inference, _Display(args, runs) as display:
            working = {}
            for pipeline, worker, index, hook in workers:
                actor = worker.options(scheduling_strategy="SPREAD").remote()
                ref = actor.run.remote(runs[pipeline], args, index, None if index else hook)
                working[ref] = (pipeline, index, actor)
            while working:
                done, _ = ray.wait(list(working), timeout=0.1)
                display.update()
                for ref in done:
                    pipeline, index, _ = working.pop(ref)
                    try:
                        ray.get(ref)
                    except ray.exceptions.RayError as error:
                        failed = True
                        cause = getattr(error, "cause", None)
                        why = f"{type(cause).__name__}: {_line(cause)}" if cause else "its process died"
                        display.say(f"{pipeline} worker {index} failed: {why}")
                        runs[pipeline].expect(sum(pipeline == other for other, *_ in working.values()))
            if failed:
                training.finish(1), inference.finish(1)
    finally:
        reports = [run._report for run in runs.values() if run._report]
        _summarise(args, reports)
    return 0 if not failed and all(report.ok for report in reports) else 1


class _Display:
    """A live bar for each pipeline on a terminal, and each warning once."""

    HEADLINES: ClassVar = {"training": "loss", "inference": "reward/mean"}

    def __init__(self, args: Args, runs: Mapping[str, WandbRun]):
        self._runs, self._said = runs, set[str]()
        for run in runs.values():
            for warning in run.warnings:
                self.say(warning)
        look = dict(total=args.steps, bar_format="{desc:<9} {bar:30} {n_fmt}/{total_fmt} steps{postfix}", disable=None)
        self._bars = {name: tqdm(desc=name, position=i, **look) for i, name in enumerate(runs)}

    def __enter__(self) -> _Display:
        return self

    def say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            tqdm.write(line, file=sys.stderr)

    def update(self) -> None:
        for name, run in self._runs.items():
            (report, row), headline = run.progress(), self.HEADLINES[name]
            for warning in report.warnings:
                self.say(warning)
            if headline in row:
                self._bars[name].n = min(report.rows, self._bars[name].total)
                self._bars[name].set_postfix_str(f"{headline} {row[headline]:.3f}")

    def __exit__(self, *_: object) -> None:
        self.update()
        for bar in self._bars.values():
            bar.close()


def _summarise(args: Args, reports: Sequence[RunReport]) -> None:
    """Where the runs are, their ledgers, and what to type next."""
    for report in reports:
        counts = {"late": report.late, "lost": report.lost, "artifacts lost": report.lost_artifacts}
        counts |= {"restarts": report.restarts, "repeats": report.repeats}
        ledger = [
            f"{report.rows} rows from {report.reports} reports",
            *(f"{n} {what}" for what, n in counts.items() if n),
        ]
        where = report.url or (os.path.relpath(report.path) if report.path else "disabled: nothing is kept")
        print(f"{report.name}: {', '.join(ledger)}\n  {where}")
        for warning in report.warnings:
            print(f"  {warning}", file=sys.stderr)
    folders = list(dict.fromkeys(os.path.relpath(path) for report in reports for path in report.paths))
    missing = [report for report in reports if not report.uploaded]
    if folders:
        print(f"Look at them here:  {_command('leet', os.path.relpath(args.dir / 'wandb'))}")
    if folders and missing:
        online = ["--no-skip-online"] if any(report.mode == "online" for report in missing) else []
        print(f"Upload them:        {_command('sync', *online, *folders)}")


def _command(*words: str) -> str:
    """A `wandb` command that works when pasted into the shell that this program was started from."""
    script = str(Path(sys.executable).with_name("wandb"))
    command = ["wandb"] if shutil.which("wandb") == script else [script]
    if "UV" in os.environ:  # `uv run` puts it on the PATH of this program, not of the shell
        here = Path(__file__).parent
        command = ["uv", "run", *(["--project", os.path.relpath(here)] if Path.cwd() != here else []), "wandb"]
    return shlex.join([*command, *words])
