"""The files that a run keeps outside of its folder: they are private. One process at a time has the state."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import shutil
import sqlite3
import stat
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("wandb_run")


OUTBOXES, CLOSED = "outboxes", "closed"  # folder of a run's outboxes in a private folder, and its name in the end


class Address(NamedTuple):
    """Where a run's private folder is: all that a process needs in order to log to it."""

    name: str  # of the run
    nonce: str  # of this life of the run, since an id can be used again
    folder: Path  # on the owner's node
    machine: str  # that node's, see `this_machine`
    view: str  # of its files, see `this_view`
    node: str  # its name in Ray

    def key(self, kind: str, place: str = "") -> bytes:
        """In the key-value store of Ray's GCS. place: a node's name in Ray, and a view of its files."""
        return f"{kind}/{self.nonce}/{place}".encode()

    @property
    def actor(self) -> str:
        """The name of the pipeline actor."""
        return f"wandb-run-{self.nonce}"

    @property
    def is_here(self) -> bool:
        """Whether this process is on that node and sees the folder. A temporary folder may be on a shared disk."""
        return self.machine == this_machine() and is_private_folder(self.folder)

    @property
    def elsewhere(self) -> Path:
        """The private folder of another node."""
        return Path(tempfile.gettempdir(), f"wandb-run-{self.nonce}-{this_machine()[:13]}-{this_view()}")


@functools.cache
def this_machine() -> str:
    """What tells machines apart, and lives of one machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return ""


@functools.cache
def this_view() -> str:
    """What tells containers apart, each of which may have a temporary folder of its own."""
    try:
        return str(os.stat("/proc/self/ns/mnt").st_ino)
    except OSError:
        return ""


def make_private_folder(path: Path) -> None:
    """Makes it, unless it is there. Raises OSError where it is somebody else's."""
    path.mkdir(0o700, parents=True, exist_ok=True)
    if not is_private_folder(path):
        raise OSError(f"{path} is no private folder of this user")


def is_private_folder(path: Path) -> bool:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    owned = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700)
    return stat.S_ISDIR(found.st_mode) and owned


def make_runs_folder(path: str | Path) -> None:
    """Makes the folder `wandb` below `path`, where runs are. Raises an OSError of one line if it can't be written."""
    try:
        Path(path, "wandb").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(path, "wandb")).close()
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror}") from None


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that no other user may read, and that is there as a whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # with mode 0600
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(name, path)


def disk_is_full(path: Path) -> bool:
    """Nearly: nobody wants the last of a disk to be taken by a backlog."""
    found = shutil.disk_usage(path)
    return found.free < found.total / 10


def state_path(folder: Path, run_id: str) -> Path:
    """Where the state of a run below `folder` is: in `folder`, or on this node where that has no locks (Lustre)."""
    if has_locks(folder):
        return folder / f".{run_id}.state"
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]
    return Path(tempfile.gettempdir(), f"wandb-run-{name}-{run_id}.state")


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
