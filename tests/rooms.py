"""What a pipeline actor opens, here without an actor and Ray: the store, the pipelines, the W&B run."""

import threading
from pathlib import Path

from backbone import wandb_internals
from backbone.ledger import Ledger
from backbone.pipeline import Pipeline
from backbone.reduction import Reduction
from backbone.run import Run
from backbone.values import as_report, pack

from backbone.inbox import Batch
from backbone.store import Row, Store

QUIET = dict(x_disable_stats=True, x_disable_meta=True)


class Opened:
    """The run of a pipeline actor."""

    def __init__(self, folder: Path, **init):
        (folder / "wandb").mkdir(exist_ok=True)
        self.init = dict(project="p", name="n", id="run", dir=str(folder), mode="offline", settings=QUIET) | init
        self.store = Store(folder / "wandb" / f".{self.init['id']}.store")
        self.run = Run(self.store, self.init, threading.RLock())
        self.run.start()
        self.writer, self.artifacts, self.pipelines = self.run.writer, self.run.artifacts, self.run.pipelines

    def join(self, prefix: str = "", reduction: Reduction | None = None, workers: int = 1) -> Pipeline:
        self.run.join(prefix, reduction or Reduction(), workers)
        return self.pipelines[prefix]

    def push(self, step: int, metrics: dict, prefix: str = "") -> Row:
        """A worker's report, which is a row at once; W&B has not got it."""
        senders = self.pipelines[prefix].inbox.senders
        serial = senders[prefix].floor if prefix in senders else 0
        items = [("w", step, True, pack(as_report(metrics, step)))]
        [row] = self.pipelines[prefix].push(Batch(prefix, prefix, ("node", 7), serial, serial, serial + 1, True, items))
        return row

    def report(self, step: int, metrics: dict, prefix: str = "") -> None:
        self.run.log([self.push(step, metrics, prefix)])

    def finish(self, exit_code: int = 0, failure: str | None = None) -> dict[str, Ledger]:
        self.run.end(list(self.pipelines.values()))
        return self.run.finish(exit_code, failure)

    def abandon(self) -> None:
        """As an actor that is killed right after its rows were written."""
        self.writer.run.finish()
        wandb_internals.end_service(10)
        self.store.close()
