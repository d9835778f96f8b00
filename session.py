"""The demos' stage: arguments, Ray, workers, bars and the last lines. Nothing in here is needed to log."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import FrameType
from typing import Any

import backbone
import common
from backbone import guest, wandb_internals
from backbone.calls import ray_answers
from backbone.ledger import line
from common import Ledger, Metrics, RunFinishedError, WandbRun

import numpy as np
import ray
from tqdm import tqdm

NAMES = ("training", "inference", "evaluation")  # of the pipelines, in the order of a demo's runs
HEADLINES = {"training": "loss", "inference": "reward/mean", "evaluation": "gsm8k/accuracy"}  # on the bars
FIRST_LOOK = "loss|entropy|kl|reward/mean|success_rate|e2e/speed|e2e/latency_ms/mean|[a-z0-9]+/accuracy"  # in LEET

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
    args.mode = _mode(args.mode, parser)
    args.address = _address(args.address, parser)
    args.dir = args.dir.expanduser().absolute()
    try:
        (args.dir / "wandb").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.dir / "wandb").close()
    except OSError as error:
        parser.error(f"--dir {args.dir} can't be written: {error.strerror}")
    return Args(**vars(args))


def _mode(flag: str | None, parser: argparse.ArgumentParser) -> str:
    """The flag, else what the environment or `wandb offline` says, else by login."""
    mode = flag or os.environ.get("WANDB_MODE") or wandb_internals.mode_of_this_folder()
    if mode not in (None, "online", "offline", "disabled"):
        parser.error(f"the W&B mode is {mode!r}: use online, offline or disabled")
    if mode in ("offline", "disabled"):
        return mode
    try:
        login = wandb_internals.has_login()
    except ValueError as error:
        parser.error(f"the API key can't be right: {error}")
    if mode and not login:
        parser.error("online mode needs an API key: run `wandb login`, set WANDB_API_KEY or use --mode offline")
    if not login:
        print("No W&B API key found, so the runs stay on this machine (offline). `wandb login` changes that.")
    return "online" if login else "offline"


def _address(address: str | None, parser: argparse.ArgumentParser) -> str | None:
    """The address of a Ray that answers; None for one of our own."""
    if address in (None, "local", "auto"):
        return address if address == "auto" else None
    if address.startswith("ray://"):
        parser.error(f"--address {address}: no Ray Client here; use HOST:PORT on a node, or `ray job submit`")
    if "://" in address:
        parser.error(f"--address {address}: that is for `ray job submit --address`; here it is HOST:PORT of the GCS")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        parser.error(f"--address {address}: no Ray cluster answers there ({error}); give HOST:PORT")
    return address


# Workers

Hook = Callable[[WandbRun, int, Metrics], None]


class _Worker:
    """Reports made-up metrics of one step after the other.

    hook: called as hook(run, step, metrics) after each step.
    """

    def __init__(self, run: WandbRun, args: Args, rank: int, hook: Hook | None = None):
        self.run, self.args, self.rank, self.hook = run, args, rank, hook

    def work(self) -> None:
        # the numbers depend on seed, pipeline, worker and step alone, not on timing
        rng = np.random.default_rng([self.args.seed, self.pipeline, self.rank])
        for step in range(self.args.steps):
            time.sleep(self.args.step_seconds * random.uniform(0.8, 1.2))
            metrics = self.generate(step, rng)
            try:
                self.run.log(metrics, step)
                if self.hook:
                    self.hook(self.run, step, metrics)
            except RunFinishedError:  # the driver was interrupted
                return


@ray.remote(scheduling_strategy="SPREAD")
class TrainingWorker(_Worker):
    """Stands for a trainer's rank."""

    pipeline, generate = 0, staticmethod(common.generate_training_metrics)


@ray.remote(scheduling_strategy="SPREAD")
class InferenceWorker(_Worker):
    """Stands for an inference engine."""

    pipeline, generate = 1, staticmethod(common.generate_inference_metrics)


# Session


@contextlib.contextmanager
def ray_session(args: Args) -> Iterator[None]:
    """Ray for the length of a demo: joins the cluster at `args.address` or starts one here.

    Ends the program with status 130 after Ctrl-C, 143 after SIGTERM and 1 after an exception, told in one line.
    """
    signals: list[int] = []
    ending = False

    def interrupt(signum: int, _: FrameType | None) -> None:
        if signals:  # the second time, at once
            os._exit(128 + signum)
        signals.append(signum)
        if not ending:
            raise KeyboardInterrupt

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def catch_signals() -> None:
        for signum in before:
            signal.signal(signum, interrupt)

    status, options = 0, dict(address="local", include_dashboard=False)  # None may join a stranger's Ray
    if args.address:  # workers import these
        modules = [common.__file__, __file__, str(Path(backbone.__file__).parent)]
        options = dict(address=args.address, runtime_env=dict(py_modules=modules))
    where = args.address or "this machine"
    print(f"Experiment {args.experiment}: {args.steps} steps of training and of inference, Ray on {where}", flush=True)
    failure = None
    try:
        catch_signals()
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        catch_signals()  # Ray has set its own
        yield
    except KeyboardInterrupt:
        status, failure = 1, "KeyboardInterrupt"  # and what the signal says
    except Exception as error:
        status = 2 if type(error) is ConnectionError else 1  # no Ray at the address
        hint = "; has it a token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)?" if status == 2 else ""
        failure = f"{type(error).__name__}: {line(error)}"
        print(f"{failure}{hint}", file=sys.stderr)
    finally:
        ending = True
        guest.unfinished.finish(int(status != 0), failure)
        status = 128 + signals[0] if signals else status
        if ray.is_initialized() and not ray_answers():  # its shutdown would take long, and say much
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status or 1)
        ray.shutdown()
        status = 128 + signals[0] if signals else status
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if status:
        sys.exit(status)


def run_to_end(args: Args, workers: Sequence[ray.actor.ActorHandle], *runs: WandbRun) -> int:
    """Has the workers work, each at its own pace, finishes the runs and prints where they are.

    runs: of the training, the inference and, if there is one, the evaluation pipeline.
    Returns the exit status: 0, or 1 if a worker failed or something that was logged is not where it should be.
    """
    named = dict(zip(NAMES, runs, strict=False))
    display, failure = _Display(args, named), "interrupted"
    try:
        failure = _follow(args, workers, named, display)
    finally:
        display.update()
        guest.unfinished.finish(int(bool(failure)), failure)
        ledgers = [run.finish() for run in runs]
        display.close(ledgers)
        _summarise(args, ledgers)
    return 0 if not failure and all(ledger.ok for ledger in ledgers) else 1


def _follow(args: Args, workers: Sequence[Any], runs: Mapping[str, WandbRun], display: _Display) -> str | None:
    """Returns when all workers have ended; what the first failure was."""
    names = [re.search(r"\((\w+)Worker", repr(worker))[1].lower() for worker in workers]
    working: dict[Future, tuple[str, int]] = {}
    for i, (name, worker) in enumerate(zip(names, workers, strict=True)):
        working[worker.work.remote().future()] = name, names[:i].count(name)
    alive, failure = {name: names.count(name) for name in names}, None
    while working:
        for future in wait(working, timeout=0.1, return_when="FIRST_COMPLETED").done:
            name, index = working.pop(future)
            if error := future.exception():
                cause = getattr(error, "cause", None)
                why = f"{type(cause).__name__}: {line(cause)}" if cause else "its process died"
                failure = failure or f"{name} worker {index} failed: {why}"
                display.say(f"{name} worker {index} failed: {why}")
                alive[name] -= 1
                runs[name].expect(alive[name])
        display.update()
    return failure


class _Display:
    """A live bar for each pipeline on a terminal, and each warning once."""

    def __init__(self, args: Args, runs: Mapping[str, WandbRun]):
        self._runs, self._said = runs, set[str]()
        look = dict(bar_format="{desc:<10} {bar:30} {n_fmt}/{total_fmt} steps{postfix}", disable=None)
        steps = dict.fromkeys(runs, args.steps) | {"evaluation": len(range(0, args.steps, common.CHECKPOINT_EVERY))}
        self._bars = {name: tqdm(desc=name, total=steps[name], position=i, **look) for i, name in enumerate(runs)}

    def say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            tqdm.write(line, file=sys.stderr)

    def update(self) -> None:
        for name, run in self._runs.items():
            (ledger, row), bar, headline = run.progress(), self._bars[name], HEADLINES[name]
            self._warn(ledger)
            if headline in row:
                bar.n = min(ledger.rows, bar.total)
                bar.set_postfix_str(f"{headline} {row[headline]:.3f}")

    def _warn(self, ledger: Ledger) -> None:
        for warning in ledger.warnings:
            self.say(f"{ledger.name}: {warning}")

    def close(self, ledgers: Sequence[Ledger]) -> None:
        for ledger in ledgers:  # what was found out in finishing
            self._warn(ledger)
        for bar in self._bars.values():
            bar.close()


def _summarise(args: Args, ledgers: Sequence[Ledger]) -> None:
    """Where the runs are, their ledgers, and what to type next."""
    for i, ledger in enumerate(ledgers):
        counts = {"lost": ledger.lost, "values lost": ledger.lost_values, "artifacts lost": ledger.lost_artifacts}
        counts |= {"silent": ledger.silent, "restarts": ledger.restarts, "repeats": ledger.repeats}
        more = "".join(f", {n} {what}" for what, n in counts.items() if n) + (", actor gone" if ledger.gone else "")
        name = f"{ledger.name} {ledger.prefix}" if args.one_run else ledger.name
        print(f"{name}: {ledger.rows} rows from {ledger.reports} reports{more}")
        if ledger.id not in [other.id for other in ledgers[i + 1 :]]:  # else the next pipeline shares the run
            print(f"  {ledger.url or (ledger.path and _shown(ledger.path)) or 'disabled: nothing is kept'}")
    if folders := list(dict.fromkeys(path for ledger in ledgers for path in ledger.paths)):
        wandb_internals.open_in_leet(args.dir / "wandb", folders, f"(^|/)({FIRST_LOOK})$")
        print(f"Look at them here:  {_command('leet', _shown(args.dir / 'wandb'))}")
    if missing := dict.fromkeys(path for ledger in ledgers for path in ledger.paths if not ledger.uploaded):
        online = ["--no-skip-online"] if any(path.name.startswith("run-") for path in missing) else []
        print(f"Upload them:        {_command('sync', *online, *map(_shown, missing))}")


def _shown(path: Path) -> str:
    """Relative if it is below the folder that the user is in."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _command(*words: str) -> str:
    """A `wandb` command that works when pasted into the shell that this program was started from."""
    script = str(Path(sys.executable).with_name("wandb"))
    command = ["wandb"] if shutil.which("wandb") == script else [script]
    if "UV" in os.environ:  # `uv run` puts it on the PATH of this program, not of the shell
        here = Path(__file__).parent
        command = ["uv", "run", *(["--project", _shown(here)] if Path.cwd() != here else []), "wandb"]
    return shlex.join([*command, *words])
