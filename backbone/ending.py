"""How a run ends: its last rows, its ledgers. Also that of a dead pipeline actor, for which the driver calls

    python -m backbone.ending STORE

in a process of its own, because wandb has runs of the user's in the driver.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from . import disk, guest
from .artifacts import Artifacts
from .ledger import Ledger
from .pipeline import Pipeline
from .store import Store
from .writer import Writer


def ledger(store: Store, pipeline: Pipeline, there: Callable[[int], bool] | None = None) -> Ledger:
    """A pipeline's account: so far, or at the end, when it is known which rows are `there`."""
    facts, counts = store.facts, pipeline.counts
    known = ("name", "id", "mode", "url", "restarts", "uploaded", "lost_artifacts", "gone")
    account = Ledger(**{"name": "", "id": ""} | {field: facts[field] for field in known if field in facts})
    account.prefix, account.paths, account.warnings = (
        pipeline.prefix,
        [*map(Path, facts.get("paths", ()))],
        store.warnings,
    )
    for field in ("reports", "rows", "partial", "repeats", "lost_values", "silent"):
        setattr(account, field, counts[field])
    if there:
        found = store.account(pipeline.prefix, there)
        account.reports, account.rows = pipeline.said, found["rows"]
        account.lost = account.reports - found["reports"]
        account.lost_values += found["lost_values"]
    return account


def conclude(
    store: Store, pipelines: Mapping[str, Pipeline], there: Callable[[], Callable[[int], bool]]
) -> dict[str, Ledger]:
    """The ledgers, by prefix, of a finished run. They stay in the store until they have arrived."""
    deadline = time.monotonic() + 3
    while True:
        now = there()
        ledgers = {prefix: ledger(store, pipeline, now) for prefix, pipeline in pipelines.items()}
        if time.monotonic() > deadline or not any(account.lost for account in ledgers.values()):
            break
        time.sleep(0.2)  # the last rows are written a moment after `run.finish`
    if lost := sum(account.lost for account in ledgers.values()):
        store.warn("lost", f"{lost} reports are in no row")
        for account in ledgers.values():
            account.warnings = store.warnings
    store.note(ledgers=ledgers)
    return ledgers


def take_over(
    path: Path, letter: guest.Letter, exit_code: int, failure: str | None, seconds: float
) -> dict[str, Ledger]:
    """Finishes the run of a dead actor from its store, within so many seconds; returns the ledgers by prefix.

    Raises OSError if another process has the store, or there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is gone")
    from ray import cloudpickle  # here, in the driver, which has it

    module, root = __name__, Path(__file__).resolve().parents[len(__name__.split(".")) - 1]
    search = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": search},
        start_new_session=True,  # a signal to this process's group has been meant for this process
    )
    try:
        process.communicate(cloudpickle.dumps((letter, exit_code, failure)), timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    store = Store(path)
    if "ledgers" not in store.facts:  # it had no time, or could not start the run
        pipelines = Pipeline.all(store)
        for pipeline in pipelines.values():
            pipeline.end()
        conclude(store, pipelines, lambda: disk.numbers(store.facts.get("paths", ())).__contains__)
    ledgers = store.facts["ledgers"]
    store.remove()
    return ledgers


def main() -> None:
    letter, exit_code, failure = pickle.load(sys.stdin.buffer)
    store = Store(Path(sys.argv[1]), patience=10)
    guest.move_in(letter)
    if "ledgers" in store.facts:
        return
    pipelines = Pipeline.all(store)
    store.note(gone=True)
    store.warn(
        "gone", "the pipeline actor is gone; what it had taken is in the run, what workers said after that is lost"
    )
    for pipeline in pipelines.values():
        pipeline.end()
    writer = Writer(store, letter.init)
    writer.start(pipelines)
    Artifacts(store, writer, threading.RLock()).finish(writer.timeout)
    writer.finish(exit_code, failure)
    conclude(store, pipelines, writer.there)


if __name__ == "__main__":
    main()
