"""The demos' stage: Ray, bars and the last lines. Nothing in here is needed to log."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from types import FrameType
from typing import Any

import arguments
import backbone
import common
from arguments import Args, parse_args, shown, wandb_command
from backbone import exits, wandb_internals
from backbone.actor import uncoloured
from backbone.ledger import line
from backbone.ray_internals import ray_answers
from backbone.writer import PREEMPTED
from common import CHECKPOINT_EVERY, Ledger, WandbRun

import ray
from tqdm import tqdm

__all__ = ["Args", "paced", "parse_args", "ray_session", "run_to_end"]
HEADLINES = {"training": "loss", "inference": "reward/mean", "evaluation": "gsm8k/accuracy"}  # on the bars
FIRST_LOOK = "loss|entropy|kl|reward/mean|success_rate|e2e/speed|e2e/latency_ms/mean|[a-z0-9]+/accuracy"  # in LEET


def paced(args: Args) -> Iterator[int]:
    """The steps of a worker, each after the time that it takes to make one."""
    for step in range(args.steps):
        time.sleep(args.step_seconds * random.uniform(0.8, 1.2))
        yield step


@contextlib.contextmanager
def ray_session(args: Args) -> Iterator[None]:
    """Ray for the length of a demo: joins the cluster at `args.address` or starts one here.

    Ends the program with status 130 after Ctrl-C, 143 after SIGTERM, 2 if there is no Ray at the address, and 1 after
    any other exception, told in one line.
    """
    status, failure, signals = 0, None, _Signals()
    steps, where = f"{args.steps} steps of training and of inference", args.address or "this machine"
    print(f"Experiment {args.experiment}: {steps}, Ray on {where}", flush=True)
    try:
        with signals.held():  # a process that is interrupted in the middle of this may crash at its end
            ray.init(**_ray_at(args.address), log_to_driver=False, logging_level=logging.ERROR)
        yield
    except KeyboardInterrupt as error:
        status, failure = _exit_code(error), "KeyboardInterrupt"
    except Exception as error:
        status = 2 if type(error) is ConnectionError else 1  # no Ray at the address
        hint = "; has it a token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)?" if status == 2 else ""
        failure = f"{type(error).__name__}: {line(error)}"
        print(f"{failure}{hint}", file=sys.stderr)
    finally:
        signals.interrupt = False
        of_runs = status if status == PREEMPTED else int(status != 0)  # their exit code, if they are not finished yet
        exits.unfinished.finish(of_runs, failure)
        if ray.is_initialized() and not ray_answers():  # its shutdown would take long, and say much
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(signals.status or status or 1)
        ray.shutdown()
        signals.give_back()
    if status := signals.status or status:
        sys.exit(status)


class _Signals:
    """SIGINT and SIGTERM: the first one is a KeyboardInterrupt, if it may `interrupt`, the second one ends all."""

    def __init__(self) -> None:
        self.status, self.interrupt = 0, False  # exit status of a program that such a signal ends
        self._before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def catch(self) -> None:
        for signum in self._before:
            signal.signal(signum, self._take)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds them back. If one has come meanwhile, raises KeyboardInterrupt in the end."""
        self.catch()
        yield
        self.catch()  # Ray has set its own
        self.interrupt = True
        if self.status:
            raise KeyboardInterrupt(self.status - 128)

    def give_back(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _take(self, signum: int, _: FrameType | None) -> None:
        if self.status:
            os._exit(128 + signum)
        self.status = 128 + signum
        if self.interrupt:
            raise KeyboardInterrupt(signum)


def _exit_code(error: KeyboardInterrupt) -> int:
    """Of the runs that are interrupted. A job that is preempted gets SIGTERM; W&B's sweeps queue such a run again."""
    return PREEMPTED if error.args == (signal.SIGTERM,) else 1


def _ray_at(address: str | None) -> dict[str, Any]:
    if not address:
        return dict(address="local", include_dashboard=False)  # without an address it may join a stranger's Ray
    modules = [common.__file__, arguments.__file__, __file__, str(Path(backbone.__file__).parent)]
    return dict(address=address, runtime_env=dict(py_modules=modules))  # workers import these


def run_to_end(args: Args, **pipelines: tuple[WandbRun, Sequence[ray.ObjectRef]]) -> int:
    """Waits until the workers have ended, finishes the runs and prints where they are.

    pipelines: by name, the run and the calls of its workers.
    Returns the exit status: 0, or 1 if a worker failed or something that was logged is not where it should be.
    """
    runs = {name: run for name, (run, _) in pipelines.items()}
    bars, failure, exit_code, ledgers = _Bars(args, runs), "interrupted", 1, []
    try:
        failure = _follow(pipelines, bars)
        exit_code = int(bool(failure))
    except KeyboardInterrupt as error:
        exit_code = _exit_code(error)
        raise
    finally:
        exits.unfinished.finish(exit_code, failure)  # all at the same time; then `run.finish` returns the ledger
        for run in runs.values():
            with contextlib.suppress(Exception):  # it can't be finished, which has been told
                ledgers.append(run.finish(exit_code, failure=failure))
        bars.close()
        _summarise(args, ledgers)
    all_well = len(ledgers) == len(runs) and all(ledger.ok for ledger in ledgers)
    return 0 if all_well and not failure else 1


def _follow(pipelines: Mapping[str, tuple[WandbRun, Sequence[ray.ObjectRef]]], bars: _Bars) -> str | None:
    """Returns when all workers have ended; what the first failure was, a line and then the rest."""
    working = {
        call.future(): f"{name} worker {i}" for name, (_, calls) in pipelines.items() for i, call in enumerate(calls)
    }
    failure = None
    while working:
        for future in wait(working, timeout=0.1, return_when="FIRST_COMPLETED").done:
            worker = working.pop(future)
            if error := future.exception():
                cause = getattr(error, "cause", None)
                why = f"{worker} failed: " + (f"{type(cause).__name__}: {line(cause)}" if cause else "its process died")
                bars.say(why)
                failure = failure or f"{why}\n{uncoloured(error)}"  # the traceback is for the run's Logs
        bars.update()
    return failure


class _Bars:
    """A live bar for each pipeline on a terminal, and each warning once."""

    def __init__(self, args: Args, runs: Mapping[str, WandbRun]):
        self._runs, self._said = runs, set[str]()
        look = dict(bar_format="{desc:<10} {bar:30} {n_fmt}/{total_fmt} steps{postfix}", disable=None)
        steps = dict.fromkeys(runs, args.steps) | {"evaluation": len(range(0, args.steps, CHECKPOINT_EVERY))}
        self._bars = {name: tqdm(desc=name, total=steps[name], position=i, **look) for i, name in enumerate(runs)}

    def say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            tqdm.write(line, file=sys.stderr)

    def update(self) -> None:
        for name, run in self._runs.items():
            (ledger, row), bar, headline = run.progress(), self._bars[name], HEADLINES[name]
            for warning in ledger.warnings:
                self.say(f"{ledger.name}: {warning}")
            bar.n = min(ledger.rows, bar.total)
            if headline in row:
                bar.set_postfix_str(f"{headline} {row[headline]:.3f}", refresh=False)
            bar.refresh()

    def close(self) -> None:
        self.update()  # with what was found out in finishing
        for bar in self._bars.values():
            bar.close()


def _summarise(args: Args, ledgers: Sequence[Ledger]) -> None:
    """Where the runs are, their ledgers, and what to type next."""
    for i, ledger in enumerate(ledgers):
        counts = {"values lost": ledger.lost_values, "artifacts lost": ledger.lost_artifacts}
        counts |= {"not heard": len(ledger.unheard), "restarts": ledger.restarts}
        more = "".join(f", {n} {what}" for what, n in counts.items() if n)
        name = f"{ledger.name} {ledger.prefix}" if args.one_run else ledger.name
        print(f"{name}: {ledger.rows} rows from {ledger.reports} reports, {ledger.lost} lost{more}")
        if ledger.id not in [other.id for other in ledgers[i + 1 :]]:  # else the next pipeline shares the run
            print(f"  {ledger.url or (ledger.path and shown(ledger.path)) or 'disabled: nothing is kept'}")
    if folders := list(dict.fromkeys(path for ledger in ledgers for path in ledger.paths)):
        wandb_internals.open_in_leet(args.dir / "wandb", folders, f"(^|/)({FIRST_LOOK})$")
        print(f"Look at them here:  {wandb_command('leet', shown(args.dir / 'wandb'))}")
    if missing := dict.fromkeys(path for ledger in ledgers for path in ledger.paths if not ledger.uploaded):
        online = ["--no-skip-online"] if any(path.name.startswith("run-") for path in missing) else []
        print(f"Upload them:        {wandb_command('sync', *online, *map(shown, missing))}")
