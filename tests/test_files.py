"""The files that a run keeps: private ones, one process's at a time; where they are, and which folders are its own."""

import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backbone import files, transaction_log
from backbone.files import (
    Address,
    check_run_id,
    has_locks,
    is_private,
    is_private_folder,
    make_private_folder,
    state_path,
    this_machine,
)
from backbone.state import State

import pytest
import wandb
from conftest import ROOT


@pytest.fixture
def path(tmp_path) -> Path:
    return state_path(tmp_path, "p", "run", tmp_path)


def left(path: Path) -> list[bytes]:
    """The first bytes of what was set aside."""
    return [file.read_bytes()[:6] for file in path.parent.glob(f"{path.name}.set-aside-*")]


# Whose state it is


class Intruder:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def planted(path, tmp_path) -> Path:
    """A state that runs code when it is opened; returns the folder that this makes."""
    state = State(path)
    state.db.execute("INSERT INTO facts VALUES ('name', ?)", (pickle.dumps(Intruder(tmp_path / "mark")),))
    state.close()
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
    state = State(path)
    assert state.facts == {}
    assert not planted.exists()
    assert left(path) == [b"SQLite"]
    assert f"is no private file of this user: it is set aside as {path.name}.set-aside-" in caplog.text
    state.note(name="n")
    state.commit()
    state.close()
    assert State(path).facts == {"name": "n"}


def test_a_private_file_is_opened(path, planted):
    """So that the test before can fail."""
    State(path).close()
    assert planted.exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_set_aside(path, make):
    make(path, 0o600)
    assert State(path).facts == {}


def test_a_log_of_sqlite_s_that_is_not_private_is_set_aside(path, planted):
    wal = path.with_name(path.name + "-wal")
    wal.write_bytes(b"planted")
    wal.chmod(0o644)
    with pytest.raises(TypeError):  # of the planted pickle, which is no text
        State(path).facts["name"] + ""
    assert [file.read_bytes() for file in path.parent.glob("*-wal.set-aside-*")] == [b"planted"]


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_state_is_private_whatever_the_user_s_mask(path, mask):
    before = os.umask(mask)
    try:
        state = State(path)
        state.note(name="n")
        state.commit()
    finally:
        os.umask(before)
    files = [path, *path.parent.glob(f"{path.name}-*")]
    assert len(files) > 1
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


# A damaged one


def written(path: Path) -> bytes:
    state = State(path)
    state.note(**{f"fact{i}": "x" * 500 for i in range(200)})
    state.commit()
    state.close()
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
def test_a_damaged_state_is_set_aside_with_a_line_and_does_not_come_back(path, damage, caplog):
    path.write_bytes(damage(written(path)))
    path.with_name(path.name + "-wal").write_bytes(b"its log")
    path.with_name(path.name + "-wal").chmod(0o600)
    state = State(path)
    assert state.facts == {}
    assert "is damaged" in caplog.text
    state.note(name="n")
    state.commit()
    state.close()
    caplog.clear()
    assert State(path).facts == {"name": "n"}
    assert caplog.text == ""


def test_an_empty_file_is_a_new_state(path, caplog):
    path.touch(0o600)
    assert State(path).facts == {}
    assert caplog.text == ""


def test_nothing_is_left_of_a_state_that_is_removed(path):
    state = State(path)
    state.note(name="n")
    state.commit()
    assert len(list(path.parent.iterdir())) > 1
    state.remove()
    assert list(path.parent.iterdir()) == []
    state.remove()  # which may have been done


# One process at a time

OPEN = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import os
from pathlib import Path
from backbone.files import state_path
from backbone.state import State
path = state_path(Path(sys.argv[1]), "p", "run", Path(os.environ.get("OWNERS", "")))
state = State(path, patience=float(sys.argv[2]))
state.note(name="n")
state.commit()
print(path, flush=True)
sys.stdin.read()
"""


def opening(folder: Path, patience: float, **variables: str) -> subprocess.Popen:
    command, pipe = [sys.executable, "-c", OPEN, str(folder), str(patience)], subprocess.PIPE
    environ = os.environ | variables
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environ)


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, path, end):
    first = opening(tmp_path, 3)
    assert first.stdout.readline().strip() == str(path)
    with pytest.raises(OSError, match=r"is in use: is another run of this id going on\?"):
        State(path, patience=0.1)
    _, error = opening(tmp_path, 0.1).communicate(timeout=60)
    assert "is another run of this id going on?" in error
    if end == "kill":
        first.kill()
    first.communicate()
    assert State(path).facts == {"name": "n"}


def test_a_state_is_waited_for_a_while(path):
    state = State(path)
    state.note(name="n")
    state.commit()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(State, path, 60)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        state.close()
        assert waiting.result(timeout=60).facts == {"name": "n"}


def test_a_state_that_is_removed_while_it_is_waited_for_is_a_new_one(tmp_path, path):
    state = State(path)
    state.note(name="the finished run")
    state.commit()
    waiting = opening(tmp_path, 60)
    time.sleep(1.5)
    state.remove()
    assert waiting.stdout.readline().strip() == str(path)
    waiting.communicate()
    assert State(path).facts == {"name": "n"}


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
    return dict(LD_PRELOAD=str(library), FOLDER=str(folder), OWNERS=str(temporary))


def test_where_a_folder_has_no_locks_the_state_is_in_the_temporary_folder(tmp_path, without_locks):
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
    command = [sys.executable, "-c", program, str(tmp_path / "lustre" / "state")]
    done = subprocess.run(command, env=os.environ | without_locks, capture_output=True, text=True)
    assert "sqlite3.OperationalError" in done.stderr


def test_a_folder_that_has_locks_holds_the_state(tmp_path):
    assert has_locks(tmp_path)
    assert state_path(tmp_path, "p", "run", tmp_path).parent == tmp_path
    assert state_path(tmp_path, "p", "run", tmp_path).match(".run.*.state")
    assert state_path(tmp_path, "p", "run", tmp_path) != state_path(tmp_path, "q", "run", tmp_path)
    assert list(tmp_path.iterdir()) == []


# Private folders, and where a run's is


def readable_by_all(path: Path) -> None:
    make_private_folder(path)
    path.chmod(0o755)


def a_link(path: Path) -> None:
    make_private_folder(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def a_file(path: Path) -> None:
    path.touch(0o700)


def somebody_else_s(path: Path) -> None:
    make_private_folder(path)
    os.chown(path, 12345, 12345)


FOLDERS = [readable_by_all, a_link, a_file, *([somebody_else_s] if os.getuid() == 0 else [])]


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_private_folder_is_made_once_and_is_private_whatever_the_user_s_mask(tmp_path, mask):
    before = os.umask(mask)
    try:
        for _ in range(2):
            make_private_folder(tmp_path / "deep" / "private")
            (tmp_path / "deep" / "private" / "letter").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "deep" / "private").stat().st_mode & 0o777 == 0o700
    assert is_private_folder(tmp_path / "deep" / "private")
    (tmp_path / "deep" / "private").chmod(0o2700)  # below a folder whose group all below it get
    assert is_private_folder(tmp_path / "deep" / "private")
    assert (tmp_path / "deep" / "private" / "letter").exists()


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_what_is_no_private_folder_of_this_user_is_not_used(tmp_path, make):
    path = tmp_path / "private"
    make(path)
    assert not is_private_folder(path)
    with pytest.raises(OSError, match=r"is no private folder of this user|File exists"):
        make_private_folder(path)
    assert not Address("n", "nonce", path, this_machine(), "", "").is_here


def test_a_run_s_home_is_its_folder_on_its_own_machine(tmp_path):
    """A temporary folder may be on a disk that other machines see, and a container may have another one."""
    home = Address("n", "nonce", tmp_path / "private", this_machine(), "", "node")
    assert not home.is_here
    make_private_folder(home.folder)
    assert home.is_here
    assert not home._replace(machine="another").is_here
    assert pickle.loads(pickle.dumps(home)) == home
    program = "from backbone.files import this_machine; print(this_machine())"
    there = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).strip()
    assert this_machine() == there
    assert len(there) > 20


def test_elsewhere_each_machine_and_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = Address("n", "nonce", tmp_path / "private", "here", "", "node")
    folders = {home.elsewhere, home._replace(nonce="other").elsewhere}
    monkeypatch.setattr(files, "this_machine", lambda: "another-machine")
    folders.add(home.elsewhere)
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {tmp_path}
    assert (
        len({home.key("place", "a"), home.key("place", "b"), home.key("open"), home._replace(nonce="o").key("open")})
        == 4
    )


def test_what_is_unpickled_is_a_file_of_this_user_alone(tmp_path):
    letter = tmp_path / "letter"
    letter.touch(0o600)
    assert is_private(letter)
    for change in KINDS:
        copy = tmp_path / f"letter {change.__name__}"
        copy.touch(0o600)
        change(copy)
        assert not is_private(copy), change


# Ids and folders


@pytest.mark.parametrize("id_", ["7", "seed-7", "a[1]", "x y", "ü" * 64, "x" * 128, "a.b", "-", "*"])
def test_an_id_that_can_be_a_file_s_name_is_taken(id_, tmp_path):
    check_run_id(id_)
    State(state_path(tmp_path, "p" * 128, id_, tmp_path)).close()


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
    assert transaction_log.folders(tmp_path, "p", "7") == mine
    assert transaction_log.folders(tmp_path, "p", "7-1") == [tmp_path / "offline-run-20260101_000000-7-1"]
    assert transaction_log.folders(tmp_path, "p", "1") == []


@pytest.fixture
def in_time_zone(monkeypatch):
    """in_time_zone("UTC+3"): this process is there, three hours behind."""

    def in_time_zone(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield in_time_zone
    monkeypatch.undo()
    time.tzset()


def test_a_run_s_folders_come_in_the_order_in_which_they_were_made(tmp_path, in_time_zone):
    """Their names have the time of a time zone, and a clock is set back once a year."""
    made = []
    for zone in ("UTC-12", "UTC+11"):
        in_time_zone(zone)
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
        run = wandb.init(project="p", id="7", dir=tmp_path, mode="offline", reinit="create_new", settings=settings)
        run.finish()
        made.append(Path(run.sync_dir))
    assert made != sorted(made)
    assert transaction_log.folders(tmp_path / "wandb", "p", "7") == made
    assert transaction_log.folders(tmp_path / "wandb", "another", "7") == []


def test_ids_that_look_like_patterns_are_taken_by_the_letter(tmp_path):
    bracket = folder(tmp_path, "run-20260101_000000-a[1]", "run-a[1].wandb")
    plain = folder(tmp_path, "run-20260101_000000-a1", "run-a1.wandb")
    assert transaction_log.folders(tmp_path, "p", "a[1]") == [bracket]
    assert transaction_log.folders(tmp_path, "p", "a1") == [plain]
    assert transaction_log.folders(tmp_path, "p", "a.") == transaction_log.folders(tmp_path, "p", "*") == []


def test_a_state_says_what_is_wrong_with_the_disk(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        State(tmp_path / "nowhere" / ".run.state")
