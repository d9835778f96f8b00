"""Artifacts: a worker brings their files to the run's folder, the pipeline actor logs them.

The actor has a queue of them in its state, and threads for them alone. wandb blocks while the server is away, and an
artifact that is used may still be on its way there.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from . import media, transaction_log, values, wandb_internals
from .ledger import line
from .state import State

if TYPE_CHECKING:
    from .writer import Writer

PIECE = 8 << 20  # bytes of a file that travel at once between nodes


def check(name: str, type: str, metadata: Mapping[str, Any] | None, aliases: Sequence[str]) -> dict[str, Any]:
    """An artifact's description, in plain values: the pipeline actor has none of the caller's classes.

    Raises ValueError for what W&B refuses, TypeError for what can't be sent.
    """
    import wandb

    artifact = wandb.Artifact(name, type, metadata=dict(metadata or {}))
    values.pack(dict(metadata or {}), f"metadata of artifact {name!r}:")
    if isinstance(aliases, str) or any(not isinstance(a, str) or not a or set(a) & set("/:") for a in aliases):
        raise ValueError(f"aliases must be names without '/' and ':', not {aliases!r}")
    names = dict(name=values.as_text(name), type=values.as_text(type), aliases=[*map(values.as_text, aliases)])
    return names | dict(metadata=artifact.metadata)


def contents(artifact: str, files: Any) -> dict[str, dict[str, Any]]:
    """An artifact's `files` (name -> bytes or path), `references` and `objects` of W&B's.

    files: all of these by name, or paths only; a folder stands for the files below it and below what it links to.
    Raises ValueError, TypeError or OSError.
    """
    if isinstance(files, str | Path):
        files = {"" if Path(files).is_dir() else Path(files).name: files}
    elif not isinstance(files, Mapping):
        paths = list(files)
        files = {Path(path).name: path for path in paths}
        if len(files) < len(paths):
            raise ValueError(f"files of artifact {artifact!r} share a name: pass a mapping from name to path")
    found: dict[str, Any] = {}
    for name, what in files.items():
        if isinstance(what, str | Path) and "://" not in str(what) and Path(what).is_dir():
            found |= {str(PurePosixPath(name, path.relative_to(what))): path for path in files_below(Path(what))}
        else:
            found[name] = what
    if not found:
        raise ValueError(f"artifact {artifact!r} has no files")
    sorted_: dict[str, dict[str, Any]] = {"files": {}, "references": {}, "objects": {}}
    for name, what in found.items():
        if not isinstance(name, str) or not name or name[0] == "/" or ".." in Path(name).parts:
            raise ValueError(f"file {name!r} must be a relative path without '..', as its name in the artifact")
        own_name = values.as_text(name)
        if media.is_data_type(what):
            sorted_["objects"][own_name] = what
        elif isinstance(what, str) and "://" in what:
            sorted_["references"][own_name] = values.as_text(what)
        elif isinstance(what, bytes | str | Path):
            if not isinstance(what, bytes):
                open(what, "rb").close()  # raises here and now
            sorted_["files"][own_name] = what
        else:
            raise TypeError(f"file {name!r} must be bytes, a path, a reference or a W&B data type, not {what!r:.80}")
    return sorted_


def stage(
    content: Mapping[str, Mapping[str, Any]], folder: Path, send: Callable[[Path, int, bytes], object] | None
) -> dict[str, Any]:
    """Brings an artifact's files into `folder`, on this node or by `send`; later changes of them don't change it.

    Returns what the pipeline actor must know of the content.
    """
    for name, source in content["files"].items():
        if send:
            for offset, piece in pieces(source, PIECE):
                send(folder / name, offset, piece)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            (folder / name).write_bytes(source)
        else:
            copy(source, folder / name)
    return {**content, "files": [*content["files"]], "objects": values.pack(content["objects"], "file")}


def files_below(folder: Path, above: Sequence[Path] = ()) -> Iterator[Path]:
    """Files and broken links. Follows links, as W&B's `Artifact.add_dir` does, except to a folder that it is in."""
    above = [*above, folder.resolve()]
    for path in folder.iterdir():
        if path.is_dir():
            if path.resolve() not in above:
                yield from files_below(path, above)
        elif path.is_file() or (path.is_symlink() and not path.exists()):
            yield path


def copy(source: str | Path, to: Path) -> None:
    """Makes a file that stays as it is, whatever becomes of its source, even if that is rewritten in place.

    It takes no room where the file system can let files share blocks until one of them changes.
    """
    with open(source, "rb") as file, open(to, "wb") as made:
        with contextlib.suppress(AttributeError, OSError):  # not on this system, not between these two
            while os.copy_file_range(file.fileno(), made.fileno(), 1 << 30):
                pass
        shutil.copyfileobj(file, made, 1 << 20)  # the rest, if there is one


def pieces(content: bytes | str | Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each piece of a file, `size` bytes at most; at least one."""
    offset = 0
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        while (piece := file.read(size)) or not offset:
            yield offset, piece
            offset += size


class Artifacts:
    """What is to be logged or used, in order; over a restart of the actor each once.

    lock: whoever has it may use the state.
    """

    def __init__(self, state: State, writer: Writer, lock: threading.RLock):
        self._state, self._writer, self._lock = state, writer, lock
        self._threads = {"log_artifact": ThreadPoolExecutor(1), "use_artifact": ThreadPoolExecutor(1)}
        self._futures: list[Future] = []
        self._finishing = threading.Lock()
        self._last = 0  # of those that are begun
        [(begun,)] = state.db.execute("SELECT count(client) FROM artifacts")
        paths = state.facts["paths"] if begun and state.facts["mode"] == "offline" else ()
        self._on_disk = set().union(*map(transaction_log.artifacts, map(Path, paths)))
        self.go_on()

    def go_on(self) -> None:
        """Begins with what has come since the last call, and in the first one with what a dead actor has left."""
        query, facts = "SELECT * FROM artifacts WHERE id > ? ORDER BY id", self._state.facts
        is_on = not self._state.is_finished and facts["mode"] != "disabled"
        for id_, task, client, done in self._state.db.execute(query, (self._last,)).fetchall():
            self._last = id_
            kind, what = pickle.loads(task)
            if done and kind == "log_artifact":
                shutil.rmtree(what["folder"], ignore_errors=True)  # the actor may have died before it did that
            elif not done and client not in self._on_disk and is_on:
                work = {"log_artifact": self._log, "use_artifact": self._use}[kind]
                self._futures.append(self._threads[kind].submit(work, id_, **what))

    def _log(self, id_: int, name: str, type: str, metadata: dict, aliases: list, folder: str, **content: Any) -> None:
        import wandb

        artifact = wandb.Artifact(name, type, metadata=metadata)
        for file in content["files"]:
            artifact.add_file(f"{folder}/{file}", file, policy="immutable", skip_cache=True)
        for file, reference in content["references"].items():
            wandb_internals.add_reference(artifact, file, reference)
        for file, value in values.unpack(content["objects"]).items():
            artifact.add(value, file)
            if excess := media.excess(value):
                with self._lock:
                    self._state.note(lost_artifacts=self._state.facts.get("lost_artifacts", 0) + 1)
                    self._state.warn("artifact", f"{file!r} of artifact {name!r} has {excess}")
        media.remove_copied_files([artifact])
        self._note("client = ?", wandb_internals.client_id(artifact), id_)
        logged = self._writer.run.log_artifact(artifact, aliases=aliases)
        if self._state.facts["mode"] == "online":
            logged.wait()  # else a restart could bring it a second time, and its aliases back
            self._note("done = ?", 1, id_)
            shutil.rmtree(folder, ignore_errors=True)  # offline `wandb sync` needs the copies

    def _use(self, id_: int, name: str) -> None:
        deadline = time.monotonic() + self._writer.timeout
        while self._state.facts["mode"] == "online":
            try:
                self._writer.run.use_artifact(name)
                break
            except Exception:  # the run that makes it may not have uploaded it yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        self._note("done = ?", 1, id_)

    def _note(self, change: str, value: Any, id_: int) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._state.db.execute(f"UPDATE artifacts SET {change} WHERE id = ?", (value, id_))

    def finish(self, deadline: float) -> None:
        """Waits for all of them; counts those that were not possible."""
        timeout = max(0.0, deadline - time.monotonic())
        with self._finishing:  # whoever finishes as well waits, too
            futures, self._futures = self._futures, []
            done, late = wait(futures, None if math.isinf(timeout) else timeout)
            errors = [future.exception() for future in done if future.exception()]
            if failed := len(errors) + len(late):
                self._state.note(lost_artifacts=self._state.facts.get("lost_artifacts", 0) + failed)
                why = line(errors[0]) if errors else f"not possible within {timeout:.0f} s"
                where = f"{self._state.facts['paths'][-1]}/artifacts"
                self._state.warn("artifacts", f"{failed} artifacts were not logged or used: {why}; see {where}")
