"""What a pipeline actor opens, here without an actor and Ray: the state, the pipelines, the W&B run."""

import json
import pickle
import tempfile
import threading
import time
from pathlib import Path

from backbone import outbox, wandb_internals
from backbone.files import OUTBOXES, Address, this_machine
from backbone.ledger import Ledger
from backbone.pipeline import Pipeline
from backbone.reading import Position, Reading, Record
from backbone.reduction import Reduction
from backbone.run import Run
from backbone.state import Row
from backbone.values import as_report, pack

QUIET = dict(x_disable_stats=True, x_disable_meta=True)
ELSEWHERE = "node"  # where the workers of `Opened` are: what they log comes as a relay brings it


def private_folder() -> Path:
    """Of a run."""
    folder = Path(tempfile.mkdtemp(prefix="wandb-run-"))
    (folder / OUTBOXES).mkdir()
    return folder


class Opened:
    """The run of a pipeline actor. One that is opened again in the same folder goes on as a restarted actor does."""

    def __init__(self, folder: Path, life: str = "life", **init):
        self.init = dict(project="p", name="n", id="run", dir=str(folder), mode="offline", settings=QUIET) | init
        private = folder / f"private-{life}"
        if not private.exists():
            (private / OUTBOXES).mkdir(parents=True)
            private.chmod(0o700)
        self.address = Address("n", f"{self.init['id']}-{life}", private, this_machine(), "")
        self.run = Run.open(self.init, self.address, "owner", threading.RLock())
        self.run.start()
        self.state, self.writer, self.artifacts = self.run.state, self.run.writer, self.run.artifacts

    def join(self, prefix: str = "", reduction: Reduction | None = None, workers: int = 1) -> Pipeline:
        self.run.join(prefix, reduction or Reduction(), workers)
        return self.run.pipeline(prefix)

    def say(self, step: int, metrics: dict, prefix: str = "", worker: str = "w", commit: bool = True, **said) -> None:
        """A worker's report. said: `wall_time`, `label`."""
        box, before = self.run.inbox.boxes.get((ELSEWHERE, worker)), []
        if not box:
            about = json.dumps(dict(name=worker, parent="")).encode()
            before = [Record(0.0, worker, outbox.BEGUN, 0, 0, 0.0, about, Position())]
        number = box.position.records + 1 if box else 1
        kind, content = outbox.COMMIT if commit else outbox.REPORT, pack(as_report(metrics, step))
        end, wall_time = Position(0, 100 * number, number, 100 * number), said.get("wall_time", time.time())
        record = Record(time.monotonic(), worker, kind, self.run.pipeline(prefix).number, step, wall_time, content, end)
        self.run.read([(ELSEWHERE, Reading([*before, record]))])

    report = say

    def push(self, step: int, metrics: dict, prefix: str = "", **said) -> Row:
        """A worker's report, which is a row at once; W&B has not got it."""
        self.writer.run, run = None, self.writer.run
        self.say(step, metrics, prefix, **said)
        self.writer.run = run
        number, packed, wall_time = self.state.db.execute(
            "SELECT number, metrics, wall_time FROM rows ORDER BY number DESC LIMIT 1"
        ).fetchone()
        return Row(number, pickle.loads(packed), wall_time)

    def finish(self, exit_code: int = 0, failure: str | None = None) -> dict[str, Ledger]:
        deadline = time.monotonic() + (self.writer.timeout or float("inf"))
        self.run.read_to_end(deadline)
        self.run.end(self.run.pipelines, deadline)
        return self.run.finish(exit_code, failure, deadline)

    def abandon(self) -> None:
        """As an actor that is killed right after its rows were written."""
        self.writer.run.finish()
        wandb_internals.end_service(10)
        self.state.close()
