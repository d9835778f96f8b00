"""The files that a run keeps: private ones, one process's at a time; and which of the folders there are its own."""

import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backbone import disk
from backbone.files import check_run_id, has_locks, remove_database, store_path

import pytest
from backbone.store import Store
from conftest import ROOT


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / ".run.store"


def left(path: Path) -> list[bytes]:
    """The first bytes of what was set aside."""
    return [file.read_bytes()[:6] for file in path.parent.glob(f"{path.name}.set-aside-*")]


# Whose store it is


class Intruder:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def planted(path, tmp_path) -> Path:
    """A store that runs code when it is opened; returns the folder that this makes."""
    store = Store(path)
    store.db.execute("INSERT INTO facts VALUES ('name', ?)", (pickle.dumps(Intruder(tmp_path / "mark")),))
    store.close()
    return tmp_path / "mark"


def readable_by_others(path: Path) -> None:
    path.chmod(0o644)


def writable_by_the_group(path: Path) -> None:
    path.chmod(0o660)


def elsewhere(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def with_a_second_name(path: Path) -> None:
    path.with_name("second").hardlink_to(path)


def of_another_user(path: Path) -> None:
    os.chown(path, 12345, 12345)


KINDS = [readable_by_others, writable_by_the_group, elsewhere, with_a_second_name]
KINDS += [of_another_user] if os.getuid() == 0 else []  # nobody else can give a file away


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_is_no_private_file_of_this_user_is_set_aside_and_never_unpickled(path, planted, caplog, make):
    make(path)
    store = Store(path)
    assert store.facts == {}
    assert not planted.exists()
    assert left(path) == [b"SQLite"]
    assert "is no private file of this user: it is set aside as .run.store.set-aside-" in caplog.text
    store.note(name="n")
    store.close()
    assert Store(path).facts == {"name": "n"}


def test_a_private_file_is_opened(path, planted):
    """So that the test before can fail."""
    Store(path).close()
    assert planted.exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_set_aside(path, make):
    make(path, 0o600)
    assert Store(path).facts == {}


def test_a_log_of_sqlite_s_that_is_not_private_is_set_aside(path, planted):
    wal = path.with_name(path.name + "-wal")
    wal.write_bytes(b"planted")
    wal.chmod(0o644)
    with pytest.raises(TypeError):  # of the planted pickle, which is no text
        Store(path).facts["name"] + ""
    assert [file.read_bytes() for file in path.parent.glob("*-wal.set-aside-*")] == [b"planted"]


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_store_is_private_whatever_the_user_s_mask(path, mask):
    before = os.umask(mask)
    try:
        store = Store(path)
        store.note(name="n")
    finally:
        os.umask(before)
    files = [path, *path.parent.glob(f"{path.name}-*")]
    assert len(files) > 1
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


# A damaged one


def written(path: Path) -> bytes:
    store = Store(path)
    store.note(**{f"fact{i}": "x" * 500 for i in range(200)})
    store.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"no database at all" * 100,
        lambda content: content[: len(content) // 2],
        lambda content: content[:5000],
        lambda content: content[:8192] + bytes(4096) + content[12288:],
        lambda content: content[:4096] + os.urandom(len(content) - 4096),
    ],
    ids=["foreign", "half", "a piece", "an empty page", "noise"],
)
def test_a_damaged_store_is_set_aside_with_a_line_and_does_not_come_back(path, damage, caplog):
    path.write_bytes(damage(written(path)))
    path.with_name(path.name + "-wal").write_bytes(b"its log")
    path.with_name(path.name + "-wal").chmod(0o600)
    store = Store(path)
    assert store.facts == {}
    assert "is damaged" in caplog.text
    store.note(name="n")
    store.close()
    caplog.clear()
    assert Store(path).facts == {"name": "n"}
    assert caplog.text == ""


def test_an_empty_file_is_a_new_store(path, caplog):
    path.touch(0o600)
    assert Store(path).facts == {}
    assert caplog.text == ""


def test_nothing_is_left_of_a_store_that_is_removed(path):
    store = Store(path)
    store.note(name="n")
    assert len(list(path.parent.iterdir())) > 1
    store.remove()
    assert list(path.parent.iterdir()) == []
    remove_database(path)  # which may have been done


# One process at a time

OPEN = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from backbone.files import store_path
from backbone.store import Store
path = store_path(Path(sys.argv[1]), "run")
Store.PATIENCE = float(sys.argv[2])
store = Store(path)
store.note(name="n")
print(path, flush=True)
sys.stdin.read()
"""


def opening(folder: Path, patience: float, **variables: str) -> subprocess.Popen:
    command, pipe = [sys.executable, "-c", OPEN, str(folder), str(patience)], subprocess.PIPE
    environ = os.environ | variables
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environ)


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, path, end, monkeypatch):
    monkeypatch.setattr(Store, "PATIENCE", 0.1)
    first = opening(tmp_path, 3)
    assert first.stdout.readline().strip() == str(path)
    with pytest.raises(OSError, match=r"is in use: is another run of this id going on\?"):
        Store(path)
    _, error = opening(tmp_path, 0.1).communicate(timeout=60)
    assert "is another run of this id going on?" in error
    if end == "kill":
        first.kill()
    first.communicate()
    assert Store(path).facts == {"name": "n"}


def test_a_store_is_waited_for_a_while(path):
    store = Store(path)
    store.note(name="n")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(Store, path)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        store.close()
        assert waiting.result(timeout=60).facts == {"name": "n"}


def test_a_store_that_is_removed_while_it_is_waited_for_is_a_new_one(tmp_path, path):
    store = Store(path)
    store.note(name="the finished run")
    waiting = opening(tmp_path, 60)
    time.sleep(1.5)
    store.remove()
    assert waiting.stdout.readline().strip() == str(path)
    waiting.communicate()
    assert Store(path).facts == {"name": "n"}


# File systems without locks

NO_LOCKS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int refused(int file, int command) {
    char link[64], path[4096] = "";
    if (command != F_SETLK && command != F_SETLKW && command != F_GETLK) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    return readlink(link, path, sizeof path - 1) > 0 && !strncmp(path, getenv("FOLDER"), strlen(getenv("FOLDER")));
}

#define WRAP(name)                                                                       \
    int name(int file, int command, ...) {                                               \
        va_list list;                                                                    \
        va_start(list, command);                                                         \
        void *argument = va_arg(list, void *);                                           \
        va_end(list);                                                                    \
        if (refused(file, command)) return errno = ENOSYS, -1;                           \
        return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, #name))(file, command, argument); \
    }
WRAP(fcntl)
WRAP(fcntl64)
"""


@pytest.fixture
def without_locks(tmp_path) -> dict[str, str]:
    """Variables for a process in which a folder has no locks, as Lustre mounted without `flock`."""
    library, folder, temporary = tmp_path / "no_locks.so", tmp_path / "lustre", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    compiler = ["cc", "-shared", "-fPIC", "-o", library, "-x", "c", "-", "-ldl"]
    subprocess.run(compiler, input=NO_LOCKS, text=True, check=True)
    return dict(LD_PRELOAD=str(library), FOLDER=str(folder), TMPDIR=str(temporary))


def test_where_a_folder_has_no_locks_the_store_is_in_the_temporary_folder(tmp_path, without_locks):
    folder, temporary = tmp_path / "lustre", tmp_path / "tmp"
    first = opening(folder, 3, **without_locks)
    path = Path(first.stdout.readline().strip())
    assert path.parent == temporary
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(folder.iterdir()) == []
    _, error = opening(folder, 0.1, **without_locks).communicate(timeout=60)
    assert "is another run of this id going on?" in error
    first.kill()
    first.communicate()
    again = opening(folder, 3, **without_locks)
    assert again.stdout.readline().strip() == str(path)
    again.communicate()
    other = tmp_path / "lustre too"
    other.mkdir()
    elsewhere = opening(other, 3, **without_locks)
    assert elsewhere.stdout.readline().strip() != str(path)
    elsewhere.communicate()


def test_without_locks_sqlite_could_not_be_used_there(tmp_path, without_locks):
    """So that the test before can fail."""
    program = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('CREATE TABLE t (x)')"
    command = [sys.executable, "-c", program, str(tmp_path / "lustre" / "store")]
    done = subprocess.run(command, env=os.environ | without_locks, capture_output=True, text=True)
    assert "sqlite3.OperationalError" in done.stderr


def test_a_folder_that_has_locks_holds_the_store(tmp_path):
    assert has_locks(tmp_path)
    assert store_path(tmp_path, "run") == tmp_path / ".run.store"
    assert list(tmp_path.iterdir()) == []


# Ids and folders


@pytest.mark.parametrize("id_", ["7", "seed-7", "a[1]", "x y", "ü" * 64, "x" * 128, "a.b", "-", "*"])
def test_an_id_that_can_be_a_file_s_name_is_taken(id_, tmp_path):
    check_run_id(id_)
    Store(store_path(tmp_path, id_)).close()


@pytest.mark.parametrize(
    "id_",
    [
        *(
            "",
            ".",
            "..",
            ".x",
            "x/../../../evil",
            "a/b",
            "a\\b",
            "a#",
            "a?",
            "a%",
            "a:",
            " a",
            "a ",
            "a\n",
            "a\0",
            "a\ud800",
        ),
        *("x" * 129, "ü" * 100, 7, None),
    ],
    ids=repr,
)
def test_an_id_that_can_not_be_one_is_refused(id_):
    with pytest.raises(ValueError, match="must be 1 to 128 characters without"):
        check_run_id(id_)


def folder(parent: Path, name: str, log: str | None) -> Path:
    (parent / name).mkdir()
    if log:
        (parent / name / log).touch()
    return parent / name


def test_a_run_s_folders_are_those_of_its_very_id(tmp_path):
    mine = [
        folder(tmp_path, "offline-run-20260101_000000-7", "run-7.wandb"),
        folder(tmp_path, "run-20260101_000001-7", "run-7.wandb"),
        folder(tmp_path, "offline-run-20260101_000001-7-1", "run-7.wandb"),  # a second one in the same second
    ]
    for name, log in {
        "offline-run-20260101_000000-seed-7": "run-seed-7.wandb",
        "offline-run-20260101_000000-7-1": "run-7-1.wandb",
        "offline-run-20260101_000002-7": None,
        "offline-run-20260101_000003-7-1": None,
        "offline-run-7": "run-7.wandb",
        "my-offline-run-20260101_000000-7": "run-7.wandb",
    }.items():
        folder(tmp_path, name, log)
    assert disk.folders(tmp_path, "7") == mine
    assert [path.name[-2:] for path in disk.folders(tmp_path, "7", begun=True)] == ["-7", "-7", "-1", "-7"]
    assert disk.folders(tmp_path, "7-1") == [tmp_path / "offline-run-20260101_000000-7-1"]
    assert disk.folders(tmp_path, "1") == []


def test_ids_that_look_like_patterns_are_taken_by_the_letter(tmp_path):
    bracket = folder(tmp_path, "run-20260101_000000-a[1]", "run-a[1].wandb")
    plain = folder(tmp_path, "run-20260101_000000-a1", "run-a1.wandb")
    assert disk.folders(tmp_path, "a[1]") == [bracket]
    assert disk.folders(tmp_path, "a1") == [plain]
    assert disk.folders(tmp_path, "a.") == disk.folders(tmp_path, "*") == []


def test_totals_are_those_of_the_pipeline_s_own_keys():
    metrics = {
        "training/tokens_total": 5,
        "training/loss": 0.5,
        "inference/rollouts_total": 7,
        "tokens_total": 1,
        "training/n_total": float("nan"),
        "training/text_total": "x",
    }
    assert disk.totals(metrics, "training/") == {"tokens": 5}
    assert disk.totals({"a_total": 2}, "") == {"a": 2}


def test_a_store_says_what_is_wrong_with_the_disk(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        Store(tmp_path / "nowhere" / ".run.store")
