"""The process that makes a run, its owner: starts the pipeline actor, and knows when "Stop run" is pressed."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.runtime_context import get_runtime_context
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import arguments, calls, exits, nodes, process, ray_internals
from .files import OUTBOXES, Address, make_runs_folder, this_machine, this_view
from .letter import Letter, command_line, travelling, write_letter

logger = logging.getLogger("wandb_run")


class Owned(NamedTuple):
    """What the process that makes a run has of it."""

    actor: Any  # Ray's handle
    letter: Letter
    stop: Callable[[], None]  # what "Stop run" does
    undo: contextlib.ExitStack  # of the start

    def watch(self) -> None:
        """In a thread: calls `stop` once, when somebody presses "Stop run" on the run's page; keeps the outbox there.

        Not by a call of the actor that returns then: Ray lets no worker end by itself while it waits for an answer.
        """
        box, file = process.outbox(self.letter.address), exits.stop_file(self.letter.address.folder)

        def watch() -> None:
            stopped = False
            while not box.is_finished and not box.is_closed:
                box.look()
                if not stopped and (stopped := file.exists()):
                    self.stop()
                time.sleep(1)

        threading.Thread(target=watch, daemon=True).start()

    def give_up(self) -> None:
        """The run could not start."""
        self.undo.close()

    def forget(self) -> None:
        """The run is finished."""
        forget(self.letter.address)


def forget(address: Address) -> None:
    """Nothing of a run of this process is needed any more."""
    nodes.give_back(address.nonce)
    process.forget(address)
    shutil.rmtree(address.folder, ignore_errors=True)


def start_actor(pipeline: Any, init: dict[str, Any]) -> Owned:
    """Starts the pipeline actor on this node, where the run's folder and the login are.

    pipeline: the actor class. init: for `wandb.init`. Raises ValueError, TypeError or OSError for what can't work; then
    nothing is left of it.
    """
    context, init = get_runtime_context(), arguments.said(init)
    with contextlib.ExitStack() as undo:
        environ, claim, aside = travelling(init.get("id"))
        undo.callback(claim.give_back)
        own = dict(id=uuid.uuid4().hex[:8], dir=".", job_type=pipeline.job_type)
        init = arguments.complete(init, own, environ)
        if aside:
            logger.warning("run %s %s", init.get("name") or init["id"], aside)
        stop = init["settings"].pop("stop_fn", None) or exits.interrupt
        folder = Path(tempfile.mkdtemp(prefix="wandb-run-"))  # with mode 0700
        (folder / OUTBOXES).mkdir(0o700)
        name = init.get("name") or init["id"]
        address = Address(name, uuid.uuid4().hex, folder, this_machine(), this_view(), context.get_node_id())
        undo.callback(forget, address)
        box = process.outbox(address)
        box.open()
        job = "" if ray_internals.in_driver() else context.get_job_id()
        told = Letter(address, box.process.name, job, init, environ, os.getcwd(), command_line())
        write_letter(told)
        make_runs_folder(init["dir"])
        ray_internals.put(address.key("open"), b"")
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        options = dict(name=address.actor, namespace=calls.NAMESPACE, scheduling_strategy=here)
        actor = pipeline.options(**options).remote(address.folder)
        undo.callback(ray.kill, actor)
        return Owned(actor, told, stop, undo.pop_all())
