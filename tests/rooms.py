"""What a pipeline actor opens, here without an actor and Ray: the state, the pipelines, the W&B run.

Its workers are on another node, so what they log comes as a relay brings it. That is a reading, which a test can make
itself; at home it takes processes that log.
"""

import json
import pickle
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from backbone import ledger, records, values, wandb_internals
from backbone.files import OUTBOXES, Address, state_path, this_machine
from backbone.ledger import Ledger
from backbone.page import Position
from backbone.pipeline import Pipeline
from backbone.reading import Reading
from backbone.records import Record
from backbone.reduction import Reduction
from backbone.run import Run
from backbone.state import Row, State
from backbone.takeover import open_run

QUIET = dict(x_disable_stats=True, x_disable_meta=True)
ELSEWHERE = "node"  # where the workers are


class Event(NamedTuple):
    """What is in an outbox; see records.py for the kinds."""

    process: str
    kind: int
    content: bytes = b""
    step: int = 0
    pipeline: int = 0
    wall_time: float = 0.0


def begun(process: str, parent: str = "") -> Event:
    return Event(process, records.BEGUN, json.dumps(dict(name=process, counted_as=parent)).encode())


def who(process: str, name: str, label: str = "", task: str | None = None) -> Event:
    """From here on this worker logs in the process: a task of its own, unless it is said to be another or none."""
    about = dict(name=name, label=label, task=name if task is None else task)
    return Event(process, records.WHO, json.dumps(about).encode())


def report(process: str, step: int, metrics: dict, commit: bool = True, pipeline: int = 0, at: float = 0.0) -> Event:
    """at: wall clock."""
    kind = records.COMMIT if commit else records.REPORT
    content, growing = values.pack_report(values.as_report(metrics, step))
    for table in growing:
        table.note()
    return Event(process, kind, content, step, pipeline, at)


class Kept:
    """A run without its W&B run: what is read becomes rows, and these wait in the state for W&B's start.

    One that is opened in the same folder again goes on as a restarted actor does. life: of the run's id.
    """

    def __init__(self, folder: Path, life: str = "life", **init):
        self.init = dict(project="p", name="n", id="run", dir=str(folder), mode="offline", settings=QUIET) | init
        private = folder / f"private-{life}"
        if not private.exists():
            (private / OUTBOXES).mkdir(parents=True)
            private.chmod(0o700)
        self.address = Address("n", f"{self.init['id']}-{life}", private, this_machine(), "", "")
        self.run = self._open()
        self.state, self.writer, self.inbox = self.run.state, self.run.writer, self.run.inbox

    def _open(self) -> Run:
        runs = Path(self.init["dir"], "wandb")
        runs.mkdir(exist_ok=True)
        state = State(state_path(runs, self.init["project"], self.init["id"], runs.parent))
        return Run(state, self.init, self.address, "owner", threading.RLock())

    def join(self, prefix: str = "", reduction: Reduction | None = None, workers: int = 1) -> Pipeline:
        pipeline = self.run.pipeline(prefix) or self.run.add(prefix, Reduction(), 1)
        pipeline.begin(reduction or Reduction(), workers, {}, {})
        self.run._save()
        return pipeline

    def bring(self, *events: Event, node: str = ELSEWHERE) -> None:
        """One reading of a relay. Outboxes that are new begin by themselves."""
        found, ends = [], dict(self.inbox.positions(node))
        for event in events:
            is_new = event.process not in ends and event.kind != records.BEGUN
            for each in [begun(event.process), event] if is_new else [event]:
                n = ends[each.process].records + 1 if each.process in ends else 0
                ends[each.process] = end = Position(0, 100 * n, n, 100 * n)
                about = each.process, each.kind, each.pipeline, each.step, each.wall_time, each.content, end
                found.append(Record(time.monotonic(), *about))
        self.inbox.know([node])
        self.run.read([(node, Reading(found))])

    def say(self, step: int, metrics: dict, prefix: str = "", worker: str = "w", commit: bool = True) -> None:
        """A worker's report."""
        self.bring(report(worker, step, metrics, commit, self.run.pipeline(prefix).number, time.time()))

    def tell(self, kind: str, **value: Any) -> None:
        """Anything else that a worker says, see said.py."""
        self.bring(Event("w", records.SAID, pickle.dumps((kind, value))))

    def expect(self, workers: int) -> None:
        self.bring(Event("w", records.EXPECT, step=workers))

    @property
    def rows(self) -> list[Row]:
        """Those whose content is kept."""
        kept = self.state.db.execute("SELECT number, metrics, wall_time FROM rows WHERE metrics NOT NULL ORDER BY 1")
        return [Row(number, pickle.loads(metrics), wall_time) for number, metrics, wall_time in kept]

    def in_no_row(self, prefix: str = "") -> int:
        """How many reports are in no row."""
        pipeline = self.run.pipeline(prefix)
        return pipeline.counts["reports"] - sum(n for _, n, _ in ledger.rows_of(self.state, pipeline))

    def end(self, patience: float = 60.0) -> None:
        """Reads to the end, and closes all steps."""
        deadline = time.monotonic() + patience
        self.run.read_to_end(deadline)
        self.run.end(self.run.pipelines, deadline)

    def close(self) -> None:
        self.state.close()


class Opened(Kept):
    """A run of a pipeline actor."""

    def _open(self) -> Run:
        Path(self.init["dir"], "wandb").mkdir(exist_ok=True)
        run = open_run(self.init, self.address, "owner", threading.RLock())
        self.artifacts = run.artifacts
        return run

    def join(self, prefix: str = "", reduction: Reduction | None = None, workers: int = 1) -> Pipeline:
        self.run.join(prefix, reduction or Reduction(), workers)
        return self.run.pipeline(prefix)

    def push(self, step: int, metrics: dict, prefix: str = "") -> Row:
        """A worker's report, which is a row at once; W&B has not got it."""
        self.writer.run, run = None, self.writer.run
        self.say(step, metrics, prefix)
        self.writer.run = run
        return self.rows[-1]

    def finish(self, exit_code: int = 0, failure: str | None = None) -> dict[str, Ledger]:
        self.end()
        return self.run.finish(exit_code, failure, time.monotonic() + self.writer.timeout)

    def abandon(self) -> None:
        """As an actor that is killed right after its rows were written."""
        self.writer.run.finish()
        wandb_internals.end_service(10)
        self.state.close()
