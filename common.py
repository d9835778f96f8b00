"""W&B runs that the workers of an RL system on Ray log to, and metrics that look like those of a real one.

    training = WandbRun("my-project", "training-7", pipeline=TrainingPipelineActor, workers=8)   # in the driver
    training.log({"loss": 0.1, "tokens": 4096}, step)                                            # in each worker
    training.finish()                                                                            # -> a ledger

`WandbRun` starts an actor that owns the run, and is a handle that can be passed to any worker. The actor makes one row
of what all workers say of a step. How it does that, and goes on when something dies, is in `backbone`. To use it in a
system of your own copy this file and that folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import pickle
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from backbone import arguments, artifacts, exits, owner, process, ray_internals, records, said, values
from backbone import reduction as reducing
from backbone.actor import ActorGoneError, PipelineActor, call, pipeline_actor
from backbone.files import Address
from backbone.ledger import Ledger, Ledgers, RunFinishedError, line, run_is_finished
from backbone.nodes import node_metrics
from backbone.reduction import Reduction
from backbone.run import Started

import numpy as np
import ray
from ray.util import client

__all__ = ["InferencePipelineActor", "TrainingPipelineActor", "WandbRun"]
__all__ += ["generate_evaluation_metrics", "generate_inference_metrics", "generate_training_metrics"]
__all__ += ["Ledger", "PipelineActor", "Reduction", "RunFinishedError", "node_metrics", "pipeline_actor"]
__all__ += ["reduce_reports"]
logger = logging.getLogger("wandb_run")


@pipeline_actor
class TrainingPipelineActor(PipelineActor):
    """Pipeline of the optimiser steps."""

    prefix = "training/"
    job_type = "training"
    reduction = Reduction(
        sums=("tokens", "e2e/speed", "off_policy/dropped"),
        totals=("tokens",),
        largest=("learning_rate",),
        weights=dict.fromkeys(("loss", "kl", "entropy", "clip_fraction", "mismatch_kl"), "tokens"),
        statistics={"e2e/latency_ms": ("mean", "p50", "p99"), "off_policy": ("mean", "max")},
    )


@pipeline_actor
class InferencePipelineActor(PipelineActor):
    """Pipeline of the rollout batches."""

    prefix = "inference/"
    job_type = "inference"
    reduction = Reduction(
        sums=("rollouts", "tokens", "e2e/speed", "requests/*"),
        totals=("rollouts", "tokens"),
        largest=("policy_version",),
        statistics={
            "reward": ("mean", "min", "max", "std", "p10", "p90"),
            "reward/*": ("mean",),
            "response_length": ("mean", "p90", "max"),
            "e2e/latency_ms": ("mean", "p50", "p99"),
            "staleness": ("mean", "max"),
        },
        worst=("time/step_s",),
        best={"reward/mean": "max"},
    )


class Handle:
    """A reference to a run: whoever has it can log. It is plain data, so it can be pickled; `WandbRun` says more."""

    def __init__(self, address: Address, prefix: str, started: Started):
        self._address, self._prefix, self._counted_as = address, prefix, ""
        self._made: owner.Owned | None = None  # see `_owned`
        self._ledgers: Ledgers = {}  # of a finished run, by prefix; shared with its views
        self._finishing = threading.RLock()  # shared with them, too
        self._at_start, self.config, self.project, self._pipeline = started
        self.name, self.id, self.mode = self._at_start.name, self._at_start.id, self._at_start.mode
        self.url, self.path = self._at_start.url, self._at_start.path
        self._outbox = process.outbox(address)
        self._outbox.copies += 1

    def __getstate__(self) -> dict[str, Any]:
        self._outbox.hand_on()
        here = dict(_made=None, _ledgers={}, _finishing=None, _outbox=None)
        return self.__dict__ | here | dict(_counted_as=self._outbox.process.children_counted_as)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _finishing=threading.RLock())
        self._outbox = process.outbox(self._address, self._counted_as)
        self._outbox.copies += 1

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # one that never started; the interpreter's end
            self._outbox.let_go()

    @property
    def _owned(self) -> owner.Owned | None:
        """What the process has that has made the run. A fork of it has a copy, as others have."""
        return self._made if self._made and self._made.pid == os.getpid() else None

    def log(self, metrics: Mapping[str, Any], step: int, commit: bool = False, *, label: str = "") -> None:
        """Logs metrics of one worker for one step. Takes microseconds: it appends them to a file of this process.

        When it has returned, the kernel has them, so they outlive the process. It waits while 4,096 reports or 32 MB of
        it are unread, but only five seconds for a reader that makes no progress. Then they are lost with 1 GB unread,
        or with less than a tenth of the disk free; and whenever they can't be written. The ledger counts them.

        metrics: key -> number, array, tensor or list of numbers (samples), string, W&B data type, or a figure or data
        frame, which becomes one; nested mappings become paths. `reduce_reports` says what becomes of them. A table with
        `log_mode="INCREMENTAL"` is for one pipeline: only rows are sent that were not logged before under its key.
        step: the pipeline's own, a whole number from 0, in several calls if you like. The metrics may have it, too.
        commit: nothing more comes from this worker for this step. Otherwise its next step says so.
        label: what the worker wants to be called, "rank 3" for instance.

        Raises TypeError or ValueError naming the key of what can't be logged, ValueError for more than 900 MB at once,
        RunFinishedError after `finish`, and RuntimeError in a driver whose Ray is not running any more.
        """
        if commit and isinstance(commit, str):
            raise TypeError(f"commit must be True or False, not {commit!r}; or was it meant as label=?")
        kind, step = records.COMMIT if commit else records.REPORT, values.as_step(step)
        values.check_label(label)
        report, growing = values.pack_report(values.as_report(metrics, step))
        if self._outbox.put(kind, self._pipeline, step, report, label):
            for table in growing:
                table.note()

    def alert(self, title: str, text: str = "", level: Any = "INFO", wait_duration: float | timedelta = 60.0) -> None:
        """Sends W&B's alert, by mail or Slack as the user's settings say.

        level: INFO, WARN or ERROR, or a `wandb.AlertLevel`. wait_duration: time in which no other one of this title
        goes out, however many workers send it, in seconds if it is a number. Raises ValueError for another level or a
        duration that can't be, TypeError for no duration, and RunFinishedError after `finish`.
        """
        self._say("alert", said.alert(title, text, level, wait_duration))

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Adds to the run's config, or changes it. Raises TypeError or ValueError for what W&B can't record."""
        self._say("config", arguments.as_recorded(config))

    def update_summary(self, summary: Mapping[str, Any]) -> None:
        """Adds to the run's summary, or changes it. Raises TypeError or ValueError for what W&B can't record."""
        self._say("summary", arguments.as_recorded(summary, "summary"))

    def logging_handler(self, label: str = "") -> logging.Handler:
        """A handler for `logging` that brings lines to the run's Logs, each with `label`: 1,000 a minute at most."""
        values.check_label(label)
        return said.LogHandler(lambda text: self._say("log_line", values.encodable(text), label))

    def _say(self, kind: str, value: Any, label: str = "") -> None:
        self._outbox.put(records.SAID, self._pipeline, 0, pickle.dumps((kind, value)), label)

    def flush(self, timeout: float = 60.0) -> bool:
        """Waits until what this process has logged has left its node; whether it has within `timeout` seconds.

        On the node of the run that is so at once.
        """
        return self._outbox.flush(timeout)

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

        files: name in the artifact -> bytes, path of a file or folder, reference (`s3://…`, which is not looked up: the
        same address counts as the same content) or W&B data type such as `wandb.Table`; or only paths.

        Raises ValueError for a name, type or alias that W&B refuses, OSError for a file that can't be read, TypeError
        for what can't be sent, and RunFinishedError after `finish`.
        """
        what, content = artifacts.check(name, type, metadata, aliases), artifacts.contents(name, files)
        if self.path:  # else it is a disabled run
            folder = self.path / "artifacts" / uuid.uuid4().hex
            send = None if self._address.is_here and self.path.is_dir() else functools.partial(self._ask, "stage")
            what |= artifacts.stage(content, folder, send) | dict(folder=str(folder))
        self._say("log_artifact", what)

    def use_artifact(self, name: str) -> None:
        """Records that this run uses artifact `name`, such as "checkpoint:step-10".

        In the run's config (`used_artifacts`), and online as lineage, as soon as the server has it. For its files use
        `wandb.Api().artifact(name)`. Raises RunFinishedError after `finish`.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be an artifact's name, not {name!r}")
        self._say("use_artifact", dict(name=values.as_text(name)))

    def expect(self, workers: int) -> None:
        """From now on so many workers make a step complete, because some have left or joined.

        Raises ValueError for what is no number of workers, and RunFinishedError after `finish`.
        """
        arguments.check_workers(workers, least=0)
        self._outbox.put(records.EXPECT, self._pipeline, max(1, workers), b"")

    def progress(self) -> tuple[Ledger, dict[str, Any]]:
        """The ledger so far and the numbers of the row of the highest step (keys without prefix)."""
        if self._ledgers:
            return self._ledgers[self._prefix], {}
        return self._ask("progress", self._prefix) or (Ledger(self.name, self.id), {})

    def _call(self, method: str, *arguments: Any) -> Any:
        return call(self._address, self._owned.actor if self._owned else None, method, *arguments)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Calls the pipeline actor; its troubles are no reason to stop the caller."""
        if self._ledgers:
            raise run_is_finished(self.name)
        try:
            return self._call(method, *arguments)
        except ActorGoneError as error:
            _warn_once(f"W&B run {self.name}: {method} failed, training goes on: {line(error)}")


class WandbRun(Handle):
    """A W&B run that any number of workers, tasks, threads and processes log to.

    Construct it in the driver (or in a task or actor), hand it to the workers, `log` there, `finish` where it was
    constructed. As a context manager it does that at the end, as failed if there was an exception. A copy is plain
    data: it can be pickled, and processes without Ray can log with it.

    project, name: where the run goes and what it is called.
    pipeline: actor class that reduces the reports, see `pipeline_actor`. The default one has rules for the keys of the
    demos' training, such as `loss` and `tokens`.
    workers: how many workers report a step. A worker is an actor, a task, or else a process.
    prefix: put before every key, "training/" for instance; the step axis is `<prefix>step`. That of the pipeline's
    class counts only where the run is shared.
    share: another WandbRun; this is a view of it: its rows go to the same run, under another prefix, on an axis of
    their own. It has the name of that run.
    init: for `wandb.init` as it is (group, job_type, tags, config, notes, entity, mode, dir, id, resume, settings, …).

    Attributes: `id`, `name`, `project`, `mode`, `config`, `url` (None if not online), `path` (the run's folder, None if
    disabled). Raises ValueError or TypeError for arguments that can't work, OSError for a folder that can't be written
    or an id in use, RunFinishedError for a view of a run that a copy has finished, and RuntimeError if the run can't
    start.
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
        prefix = prefix or (getattr(pipeline, "prefix", "") if share is not None else "")
        _check(project, pipeline, workers, prefix, share, init)
        owned = share._owned if share else owner.start_actor(pipeline, init | dict(project=project, name=name))
        super().__init__(owned.letter.address, prefix, owned.join(prefix, pipeline.reduction, workers))
        self._made, self._is_view = owned, bool(share)
        if share:
            self._ledgers, self._finishing = share._ledgers, share._finishing
        else:
            owned.watch()
            if ray_internals.in_driver():
                exits.unfinished.add(self)

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._owned:  # a copy leaves it to the owner
            code, failure = exits.how_it_ends(error)
            self.finish(code, failure=failure)

    def finish(self, exit_code: int = 0, *, failure: str | None = None) -> Ledger:
        """Finishes the run, with all that was logged before on any node, and returns its ledger.

        Waits for the upload, `finish_timeout` seconds of the settings at most (60 by default). Calling it again returns
        the same ledger. A view (`share=`) only makes rows of its open steps; its ledger is final when the run is.

        exit_code: as a process's, 0 for success. failure: what went wrong, for the run's summary.

        Raises TypeError or ValueError for what is no exit code or text, and RunFinishedError in a copy of a finished
        run. All else that goes wrong is in the ledger.
        """
        if not isinstance(exit_code, int):
            raise TypeError(f"exit_code must be an integer, not {exit_code!r}")
        if not -(2**31) <= exit_code < 2**31:
            raise ValueError(f"exit_code must have 32 bits at most, not {exit_code}")
        if not isinstance(failure, str | None):
            raise TypeError(f"failure must be a string, not {values.shown(failure)}")
        if failure:
            failure = values.encodable(failure)
        with self._finishing:
            if self._is_view and not self._ledgers:
                ledgers = self._ask("finish", exit_code, failure, self._prefix)
                return ledgers[self._prefix] if ledgers else dataclasses.replace(self._at_start, unheard=["all places"])
            if not self._ledgers:
                self._finish(exit_code, failure)
            return self._ledgers[self._prefix]

    def _finish(self, exit_code: int, failure: str | None) -> None:
        gone = None
        try:
            ledgers = self._call("finish", exit_code, failure)
        except ActorGoneError as error:
            if not self._owned:
                raise RuntimeError(f"run {self.name!r} can only be finished by its owner: {line(error)}") from None
            gone = error
            self._outbox.exit = exit_code, failure
            self._outbox.say_exit()
            ledgers = owner.finish_without_actor(self._owned, error, self._at_start)
        except RunFinishedError:
            if self._ledgers:  # a signal handler has finished it meanwhile
                return
            exits.unfinished.remove(self)
            raise
        self._ledgers.update(ledgers)
        exits.unfinished.remove(self)
        if self._owned and not gone:
            self._owned.leave()  # last, because a signal handler may finish the run at any moment


def reduce_reports(
    reports: Sequence[Mapping[str, Any]],
    reduction: Reduction,
    warn: Callable[[str, str], None] = lambda kind, what: None,
    who: Sequence[str] = (),
) -> dict[str, Any]:
    """The row of a step's reports, each as `log` takes it. For the rules see `backbone.reduction.reduce_reports`."""
    taken = [values.unpack(values.pack(values.as_report(report))) for report in reports]
    return reducing.reduce_reports(taken, reduction, warn, who)


def _check(project: Any, pipeline: Any, workers: Any, prefix: Any, share: Any, init: Mapping[str, Any]) -> None:
    """Raises on arguments that can't work, before anything is started."""
    if client.ray.is_connected():
        raise RuntimeError(
            "Ray Client (ray://) can't host a WandbRun: use `ray job submit`, or ray.init(address='auto') on a node"
        )
    if not ray.is_initialized():
        raise RuntimeError("Ray is not running: call ray.init() before making a WandbRun")
    if not (isinstance(pipeline, ray.actor.ActorClass) and isinstance(pipeline, PipelineActor)):
        raise TypeError(f"pipeline must be a class decorated with @pipeline_actor, not {pipeline!r}")
    if not isinstance(project, str) or not project:
        raise ValueError(f"project must be a name, not {project!r}")
    arguments.check_workers(workers, least=1)
    if not isinstance(prefix, str) or not re.fullmatch(r"([^_/*][^/*]*/)*", prefix):
        raise ValueError(f"prefix must be a path that ends with '/', such as 'training/', not {prefix!r}")
    if share is None:
        return
    if not isinstance(share, WandbRun) or not share._owned or share._ledgers:
        raise ValueError(f"share must be a WandbRun of this process that is not finished, not {share!r}")
    if init or project not in (share.project, share._owned.letter.init["project"]):  # a server may call it otherwise
        raise ValueError(f"share= takes the project ({share.project!r}) and the settings of the run it shares")
    prefixes = share._owned.prefixes
    others = [other for other in prefixes if other]  # one with bare keys may be shared
    if not prefix or any(prefix.startswith(other) or other.startswith(prefix) for other in others):
        raise ValueError(f"prefix {prefix!r} overlaps with {prefixes}: each pipeline needs its own")


_warn_once = functools.cache(logger.warning)


# Dummy metrics

Metrics = dict[str, "float | int | np.ndarray"]
CHECKPOINT_EVERY = 10  # training steps
SYNC_EVERY = 5  # rollout batches between two weight syncs
GROUP = 8  # rollouts of one prompt, whose rewards GRPO compares with each other


def _progress(step: float) -> float:
    """How far learning has come, 0 to 1: an S-curve in log time, so that 20 steps and 2,000 both look like a run."""
    return step**1.5 / (step**1.5 + 12**1.5)


def generate_training_metrics(step: int, rng: np.random.Generator) -> Metrics:
    """One worker's report of one optimiser step of a GRPO/PPO run.

    Scalars are that worker's measurement. Arrays are samples: `e2e/latency_ms` of its 8 micro-batches (ms),
    `off_policy` of the 32 rollouts that the step consumed (their age in training steps, which is known only where they
    are consumed). Keys, units and shapes follow what verl, NeMo-RL and prime-rl log.
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
        "off_policy": np.minimum(age := rng.poisson(0.2 + 1.2 * staleness, 32), 4),
        "off_policy/dropped": int((age > 4).sum()),  # too old to be used
    }


def generate_inference_metrics(step: int, rng: np.random.Generator, rank: int = 0) -> Metrics:
    """One worker's report of one batch of 32 rollouts (4 groups, half of them of each source) and their 64 requests.

    Arrays are samples: `reward`, `success_rate`, `response_length` (tokens), `truncated_fraction`, `errors` (of the
    environment or verifier) per rollout, `reward/<source>` per rollout of that source, `groups/…` per group,
    `e2e/latency_ms` (ms) per request, `staleness` (training steps) per rollout; bool arrays are outcomes.

    rank: of the engine. Number 1 is sick now and then, and 20 % slower than the others.
    """
    slow = 1.2 if rank == 1 and step % 20 >= 8 else 1.0
    learned, syncing = _progress(step), step % SYNC_EVERY == SYNC_EVERY - 1
    chance = np.repeat([0.2 + 0.74 * _progress(1.6 * step), 0.1 + 0.66 * _progress(0.6 * step)], 2)  # gsm8k is easier
    chance = np.repeat(np.clip(chance + rng.normal(0, 0.2, 4), 0.02, 0.98), GROUP)  # prompts differ
    wanted = rng.lognormal(math.log(640 + 60 * learned), 0.45 - 0.25 * learned, 32)
    truncated = wanted > 1024  # before there is an answer
    success = (rng.random(32) < chance) & ~truncated
    reward = np.clip(np.where(success, 0.9, 0.08) + rng.normal(0, 0.06, 32), 0, 1)
    load, length = rng.uniform(0.85, 1.15), np.minimum(wanted, 1024).astype(int)
    return {
        "reward": reward,
        "reward/gsm8k": reward[:16],
        "reward/code": reward[16:],
        "groups/all_solved": success.reshape(-1, GROUP).all(axis=1),
        "groups/none_solved": ~success.reshape(-1, GROUP).any(axis=1),
        "success_rate": success,
        "response_length": length,
        "truncated_fraction": truncated,
        "rollouts": 32,
        "tokens": int(length.sum()),
        "e2e/speed": 5_200 / slow * load * (rng.uniform(0.03, 0.3) if syncing else 1),
        "e2e/latency_ms": rng.lognormal(math.log(1_100 * load), 0.75, 64) * (1.6 if syncing else 1),
        "kv_cache_utilization": min(0.95, 0.4 + 0.12 * (step % SYNC_EVERY) + rng.uniform(0, 0.06)),
        "requests/running": int(rng.integers(24, 65)),
        "requests/waiting": int(rng.poisson(rng.choice([1, 12]))),
        "policy_version": step // SYNC_EVERY * SYNC_EVERY,
        "staleness": np.minimum(rng.poisson(0.02 + 0.25 * (step % SYNC_EVERY), 32), 2),
        "errors": rng.random(32) < 0.01,
        "time/step_s": slow * rng.lognormal(math.log(4.1), 0.03),
        "time/wait_for_policy_s": rng.uniform(0.5, 1.5) if syncing else rng.uniform(0, 0.05),
    }


def generate_evaluation_metrics(step: int, rng: np.random.Generator) -> Metrics:
    """One worker's report of one evaluation: of the checkpoint of training step `step`, on 200 problems of each source.

    Arrays are samples: `<source>/accuracy` says of each problem whether the first of 4 answers was right (bool),
    `<source>/pass@4` whether any of them was, `response_length` (tokens) is of the first answers.
    """
    metrics: Metrics = {"checkpoint_step": step, "response_length": rng.lognormal(math.log(690), 0.25, 600).astype(int)}
    for source, pace, best in (("gsm8k", 1.3, 0.88), ("math", 0.7, 0.74), ("code", 0.5, 0.68)):
        learned = _progress(pace * step)
        # In the end a problem is solved always or never, so that four answers are little better than one.
        mean, evenness = 0.15 + (best - 0.15) * learned, 0.3 + 5 * (1 - learned) ** 2
        chance = rng.beta(mean * evenness, (1 - mean) * evenness, 200)
        right = rng.random((4, 200)) < chance
        metrics |= {f"{source}/accuracy": right[0], f"{source}/pass@4": right.any(axis=0)}
    return metrics
