"""Before a pipeline ends, each of its processes has its last word. Whether one that says nothing is dead, Ray knows."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private import state

from .calls import is_refused, ray_answers
from .inbox import Sender
from .pipeline import Pipeline
from .run import Run
from .steps import is_task

PAUSE = 0.3  # seconds without news after which those have said all who can't be asked


def hear_out(pipelines: Sequence[Pipeline], run: Run, changed: threading.Condition, wait: float) -> None:
    """Waits for the last word of each sender, `wait` seconds after it was heard of; then warns of it.

    changed: has been acquired, and tells of what is pushed meanwhile.
    """
    began, look = time.time(), time.time() + 0.5
    while any(_may_be_on_its_way(pipeline, began, wait) for pipeline in pipelines):
        changed.wait(PAUSE)
    while silent := _silent(pipelines):
        changed.wait(0.05)
        if time.time() > look and ray_answers():  # Ray may know more by now; where it is gone, it would not answer
            look = time.time() + 1.0
            actors, nodes = state.actors(), {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            with ThreadPoolExecutor(32) as pool:  # a machine that is gone lets each ask for a second
                senders = [sender for _, _, sender in silent]
                gone = [*pool.map(_is_gone, senders, itertools.repeat(actors), itertools.repeat(nodes))]
            for pipeline, id_, _ in itertools.compress(silent, gone):
                with contextlib.suppress(sqlite3.Error):  # the disk is full
                    run.log(pipeline.died(id_))
        if all(time.time() - max(began, sender.heard) > wait for _, _, sender in silent):
            break
    for _, _, sender in _silent(pipelines):
        node, pid = sender.process
        run.store.warn(
            f"silent {pid} {node}",
            f"process {pid} on node {node} did not answer within {wait} s: {sender.received} of its reports "
            f"have arrived, of {sender.said} at least",
        )


def _may_be_on_its_way(pipeline: Pipeline, began: float, wait: float) -> bool:
    """Whether a task's report may be, or the first of a process: an async actor doesn't wait for the answer to that."""
    senders, now = pipeline.inbox.senders.values(), time.time()
    missing = len(senders) < pipeline.steps.workers
    of_task = now - began < wait and any(is_task(s.worker) and now - s.heard < PAUSE for s in senders)
    return of_task or (missing and now - began < PAUSE)


def _silent(pipelines: Sequence[Pipeline]) -> list[tuple[Pipeline, str, Sender]]:
    """Senders that may have more to say."""
    each = ((pipeline, *found) for pipeline in pipelines for found in pipeline.inbox.senders.items())
    return [found for found in each if not found[2].ended]


def _is_gone(sender: Sender, actors: Mapping[str, Any], nodes: Set[str]) -> bool:
    """Whether the process of a sender is dead, as far as Ray knows, which takes a while to know of a node."""
    actor = actors.get(sender.worker.removeprefix("actor "))
    if not actor or sender.process[0] not in nodes:
        return sender.process[0] not in nodes
    address = actor["Address"]
    restarted = (address["NodeID"], actor["Pid"]) != sender.process
    # An actor whose last handle was dropped is DEAD to Ray at once, but its process may still send what is left.
    return restarted or is_refused(address["IPAddress"], address["Port"])
