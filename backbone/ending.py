"""How a run ends whose pipeline actor is gone: from its store, by

    python -m backbone.ending STORE LETTER

That is a process of its own. The run's owner starts it, because wandb has runs of the user's in the owner; or the
actor itself, as its heir, when the owner is gone.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import disk, guest
from .files import store_path
from .ledger import Ledger, Ledgers, line
from .run import Run
from .store import Store

if TYPE_CHECKING:
    from .starting import Owned


def finish_without_actor(
    owned: Owned | None, exit_code: int, failure: str | None, why: Exception, begun: Ledger, prefixes: Sequence[str]
) -> Ledgers:
    """Finishes a run, whatever has become of it.

    owned: the run, None in a process that did not make it. why: its actor can't be reached. begun: how it began.
    """
    try:
        if owned is None:
            raise FileNotFoundError("only the process that made the run can finish it then")
        return _take_over(owned, exit_code, failure)
    except FileNotFoundError as error:
        problem = line(error)
    except OSError as error:  # mostly: another process has the store, so the actor lives
        owned.letter.ended = exit_code, failure
        guest.rewrite_letter(owned.path, owned.letter)
        problem = f"{line(error)}; if the actor lives, it finishes the run when this process has ended"
    warnings = [f"the pipeline actor can't be reached: {line(why)}; {problem}"]
    return {prefix: dataclasses.replace(begun, prefix=prefix, gone=True, warnings=warnings) for prefix in prefixes}


def _take_over(owned: Owned, exit_code: int, failure: str | None) -> Ledgers:
    """Raises OSError if another process has the store, or there is none."""
    from ray import cloudpickle  # here, in the owner, which has it

    letter = owned.letter
    path = store_path(Path(letter.init["dir"], "wandb"), letter.init["id"])
    if not path.exists():
        raise FileNotFoundError(f"{path} is gone")
    process = _start([], path, owned.path, stderr=subprocess.PIPE)
    upload = letter.init["settings"].get("finish_timeout") or letter.environ.get("WANDB_FINISH_TIMEOUT") or 60
    said, seconds = b"", 30 + float(upload)
    try:
        _, said = process.communicate(cloudpickle.dumps((letter, exit_code, failure)), timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    run = Run(Store(path), letter.init, threading.RLock())
    if "ledgers" not in run.store.facts:
        why = said.decode(errors="replace").strip().rpartition("\n")[2] or f"it took more than {seconds:.0f} s"
        run.store.note(gone=True)
        run.store.warn("not finished", f"the run could not be finished: {why}")
        for pipeline in run.pipelines.values():
            pipeline.end()
        run.conclude(lambda: disk.numbers(run.store.facts.get("paths", ())).__contains__)
    ledgers = run.store.facts["ledgers"]
    run.store.remove()
    return ledgers


def appoint_heir(path: Path, letter: guest.Letter, exit_code: int, failure: str | None) -> subprocess.Popen:
    """Has the run finished if this process, its actor, is killed before it has done that itself.

    path: of the letter. The heir waits as long as stdin of the returned process is open. It is no child of this one,
    because Ray kills an actor's children with it.
    """
    store = store_path(Path(letter.init["dir"], "wandb"), letter.init["id"])
    orphan = ["sh", "-c", 'exec 3<&0; "$@" <&3 3<&- &', "sh"]  # a shell gives what it leaves behind no stdin of its own
    process = _start(orphan, store, path, stderr=None)
    process.stdin.write(pickle.dumps((None, exit_code, failure)))
    process.stdin.flush()
    return process


def _start(prefix: Sequence[str], store: Path, letter: Path, stderr: int | None) -> subprocess.Popen:
    module, root = __name__, Path(__file__).resolve().parents[len(__name__.split(".")) - 1]
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", module, str(store), str(letter)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])},  # a config's classes
        start_new_session=True,  # a signal to this process's group has been meant for this process
    )


def main() -> None:
    path, life = Path(sys.argv[1]), sys.argv[2]
    letter, exit_code, failure = pickle.load(sys.stdin.buffer)
    is_heir = letter is None  # else the owner has sent it, in case that the file is gone
    letter = letter or guest.read_letter(Path(life))
    sys.stdin.buffer.read()  # an heir waits here until the actor has ended
    store = Store(path) if path.exists() else None  # then the actor got through
    if store and store.facts.get("life") == life:  # it may be that of another run of this id
        guest.move_in(letter)
        _finish(Run(store, letter.init, threading.RLock()), exit_code, failure)
    if is_heir:  # else the owner does this
        if store and store.facts.get("life", life) == life:
            store.remove()
        guest.forget_letter(Path(life))


def _finish(run: Run, exit_code: int, failure: str | None) -> None:
    if "ledgers" in run.store.facts:
        return
    gone = "the pipeline actor is gone; what it had taken is in the run, what workers said after that is lost"
    run.store.note(gone=True)
    run.store.warn("gone", gone)
    for pipeline in run.pipelines.values():
        pipeline.end()
    run.start()
    run.finish(exit_code, failure)


if __name__ == "__main__":
    main()
