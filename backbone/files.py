"""The files that a run keeps outside of its folder. They are private, and one process at a time has the state.

A run's private folder is `wandb-run-…` in the temporary folder of its owner, and one on each other node. There are:

outboxes/   pages and segments of the processes that log; it is `closed/` when nothing more is taken
letter      what the pipeline actor must know of the owner
pipelines   which there are, in case that the state is lost
stop        somebody has pressed "Stop run"
places      other places that have outboxes, for whoever finishes the run without its actor
ledgers     the run is finished
known       on other nodes: the run has been told of this folder
node        on other nodes: whose relay reads here, if several nodes of Ray are on one machine
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pickle
import re
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from .ledger import line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

OUTBOXES, CLOSED_FOLDER, LEDGERS = "outboxes", "closed", "ledgers"


class Address(NamedTuple):
    """Where a run's private folder is: all that a process needs in order to log to it."""

    name: str  # of the run
    nonce: str  # of this life of the run, since an id can be used again
    folder: Path  # on the owner's node
    machine: str  # that node's, see `this_machine`
    view: str  # of its files, see `this_view`
    node: str  # its name in Ray

    def key(self, kind: str, place: str = "") -> bytes:
        """In the key-value store of Ray's GCS. place: a node's name in Ray, and the digest of a folder there."""
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
    """An id of this machine, since it was booted."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return ""


@functools.cache
def this_view() -> str:
    """An id of this container, which may have a temporary folder of its own."""
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
    return stat.S_ISDIR(found.st_mode) and found.st_mode & 0o777 == 0o700 and found.st_uid == os.getuid()


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


def disk_is_nearly_full(path: Path) -> bool:
    """Whether less than a tenth is free: nobody wants a backlog to take the last of a disk."""
    try:
        found = shutil.disk_usage(path)
    except OSError:  # somebody has removed it
        return False
    return found.free < found.total / 10


def state_path(folder: Path, project: str, run_id: str, temporary: Path) -> Path:
    """Where the state of a run below `folder` is: in `folder`, or on this node where that has no locks (Lustre).

    temporary: the owner's temporary folder, because Ray's processes may have another one.
    """
    name = f"{run_id}.{digest(project)}.state"  # in another project a run may have the same id
    if has_locks(folder):
        return folder / f".{name}"
    return Path(temporary, f"wandb-run-{digest(folder.absolute())}-{name}")


def digest(text: str | Path) -> str:
    """For the name of a file or a key."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def has_locks(folder: Path) -> bool:
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
    owned = found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o600
    return stat.S_ISREG(found.st_mode) and owned and found.st_nlink == 1


# What the owner tells whoever runs its run: the pipeline actor, or `recover`

# What wandb needs to reach its server, and to find a login.
NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
NETWORK += ("CURL_CA_BUNDLE", "NETRC", "HOME")


@dataclasses.dataclass
class Letter:
    """What the pipeline actor is told. Not by its constructor's arguments, which Ray's GCS keeps and shows."""

    address: Address
    process: str  # the owner's name
    job: str  # the owner's Ray job, if it is a worker of Ray's; empty for a driver
    init: dict[str, Any]  # for `wandb.init`
    environ: dict[str, str]
    directory: str  # where the owner is: wandb's settings and the repository are found from there
    argv: list[str]


def write_letter(letter: Letter) -> None:
    """Raises TypeError for an argument that can't be sent."""
    from ray import cloudpickle  # a config may have objects of the user's `__main__`

    for name, value in letter.init.items():
        try:
            cloudpickle.dumps(value)
        except Exception as error:
            raise TypeError(f"{name}={value!r:.80} can't be sent to the pipeline actor: {line(error)}") from None
    write_private(letter.address.folder / "letter", cloudpickle.dumps(letter))


def read_letter(folder: Path) -> Letter:
    """Raises OSError where there is none that can be trusted."""
    path = folder / "letter"
    if not is_private(path):
        raise OSError(f"{path} is no private file of this user")
    try:
        return pickle.loads(path.read_bytes())
    except Exception as error:  # an earlier version of this code has written it
        raise OSError(f"{path} can't be read: {line(error)}") from None


def move_in(letter: Letter) -> None:
    """Makes this process look to wandb as its owner does."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.upper() in NETWORK]:
        del os.environ[name]
    os.environ.update(letter.environ)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it takes a third of the time of `run.log`
    os.environ.setdefault("WANDB_PROGRAM", letter.argv[0])
    sys.argv = letter.argv  # wandb records it; that of a Ray worker is Ray's own, addresses and all
    # If the owner's directory is gone, this process may be in it, too, and wandb can't start there.
    os.chdir(letter.directory if os.path.isdir(letter.directory) else letter.address.folder)
