"""The files that a run keeps outside of its folder: they are private, and one process at a time has them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sqlite3
import stat
import tempfile
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("wandb_run")


def store_path(folder: Path, run_id: str) -> Path:
    """Where the store of a run below `folder` is: in `folder`, or on this node where that has no locks (Lustre)."""
    if has_locks(folder):
        return folder / f".{run_id}.store"
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]
    return Path(tempfile.gettempdir(), f"wandb-run-{name}-{run_id}.store")


def has_locks(folder: Path) -> bool:
    if fcntl is None:
        return True  # SQLite has its own way there
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.lockf(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def check_run_id(run_id: str) -> None:
    """Raises ValueError for an id that W&B refuses, or that can't be part of a file's name."""
    fits = isinstance(run_id, str) and re.fullmatch(r"[^\s./\\#?%:][^/\\#?%:]*", run_id) and run_id.isprintable()
    if not fits or run_id != run_id.strip() or len(os.fsencode(run_id)) > 128:
        raise ValueError(rf"id {run_id!r} must be 1 to 128 characters without / \ # ? % :, and can't begin with '.'")


def is_private(path: Path) -> bool:
    """Whether it is a file of this user that no other may write or read: only that is ever unpickled."""
    found = path.lstat()
    owned = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o600)
    return stat.S_ISREG(found.st_mode) and owned and found.st_nlink == 1


def open_database(path: Path, patience: float) -> sqlite3.Connection:
    """The database at `path`, for this process alone; a new one if there is none, or what is there can't be trusted.

    patience: seconds to wait for a process that has it. Raises OSError if that does not end.
    """
    for file in _files(path):
        if os.path.lexists(file) and not is_private(file):
            _set_aside(file, "is no private file of this user")
    deadline = time.monotonic() + patience
    while True:
        try:
            return _open(path)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise OSError(str(error)) from None
            time.sleep(0.1)


def _open(path: Path) -> sqlite3.Connection:
    """Raises BlockingIOError if another process has it, or has just removed it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    opened = os.fstat(file)
    os.close(file)
    database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA journal_mode=WAL")  # takes the lock
        database.execute("PRAGMA synchronous=OFF")
        [(state,)] = database.execute("PRAGMA quick_check(1)")  # a machine that has lost its power
        if state != "ok":
            raise sqlite3.DatabaseError(state)
    except sqlite3.OperationalError as error:
        database.close()
        if "locked" in str(error) or not path.exists():
            raise BlockingIOError(f"{path} is in use: is another run of this id going on?") from None
        raise OSError(f"{path}: {error}") from None
    except sqlite3.DatabaseError as error:
        database.close()
        _set_aside(path, f"is damaged ({error})")  # SQLite drops a log that is left beside a new file
        return _open(path)
    if not path.exists() or not os.path.samestat(opened, path.stat()):
        database.close()
        raise BlockingIOError(f"{path} was removed while it was opened")
    return database


def _files(path: Path) -> list[Path]:
    """A database and what SQLite keeps beside it."""
    return [path.with_name(path.name + end) for end in ("", "-wal", "-journal", "-shm")]


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"{path.name}.set-aside-{time.time_ns()}")
    path.rename(aside)
    logger.warning("%s %s: it is set aside as %s", path, why, aside.name)


def remove_database(path: Path) -> None:
    for file in _files(path):
        file.unlink(missing_ok=True)
