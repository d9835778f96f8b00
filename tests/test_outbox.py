"""What `put` has taken is read, whatever becomes of its process: plain processes log, and a reader reads."""

import contextlib
import dis
import gc
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backbone import outbox, page, process, records
from backbone.files import OUTBOXES, Address, this_machine
from backbone.ledger import RunFinishedError
from backbone.outbox import Outbox
from backbone.page import OTHER, Backpressure, Position, is_alive, lost_by_pipeline
from backbone.reading import Reader
from backbone.records import BEGUN, ENDED, LOST, REPORT, SAID, VANISHED, WHO, Record

import pytest
from conftest import wait_for

FORK = multiprocessing.get_context("fork")


def make_address(folder: Path) -> Address:
    """Of a run whose private folder this is."""
    (folder / OUTBOXES).mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)
    return Address("n", uuid.uuid4().hex, folder, this_machine(), "", "")


@pytest.fixture
def address(tmp_path) -> Address:
    return make_address(tmp_path / "private")


class Child:
    """A fork of this process that does `work`, and ends at once. It talks to its parent by `pipe`."""

    def __init__(self, work: Callable, *arguments):
        self.pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(target=self._do, args=(work, theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def _do(self, work: Callable, pipe, *arguments) -> None:
        self.pipe.close()
        work(pipe, *arguments)
        os._exit(0)

    def told(self):
        """What it sends. Fails where it ends without, or hangs."""
        assert self.pipe.poll(60)
        try:
            return self.pipe.recv()
        except EOFError:
            raise AssertionError("it has ended") from None

    def wait(self) -> None:
        """Until it has ended, as it should."""
        self._process.join(60)
        assert self._process.exitcode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@pytest.fixture
def child(address) -> Iterator[Callable[..., Child]]:
    """child(work): a process that logs; work(pipe, its outbox)."""
    made = []

    def child(work: Callable, *arguments) -> Child:
        made.append(Child(lambda pipe: work(pipe, process.outbox(address), *arguments)))
        return made[-1]

    yield child
    for each in made:
        each.kill()


def put(box: Outbox, number: int, size: int = 0, label: str = "") -> None:
    box.put(REPORT, 0, number, b"x" * size, label)


def put_some(pipe, box: Outbox, reports: int = 1) -> None:
    """Logs, says so, and lives on."""
    for number in range(reports):
        put(box, number, size=10)
    pipe.send(box.process.name)
    pipe.poll(None)


def read(reader: Reader, until: Callable[[list[Record]], object] | None = None) -> list[Record]:
    """All that there is, or what comes until that is true of it; it is committed."""
    found = []

    def go_on() -> object:
        reading = reader.read(look=True)
        found.extend(reading.records)
        reader.acknowledge(reading)
        return until(found) and not reading.is_cut if until else reading.is_empty

    wait_for(go_on, every=0.002)
    return found


def numbers(records: list[Record]) -> list[int]:
    """Of the reports."""
    return [record.step for record in records if record.kind == REPORT]


def kinds(records: list[Record], kind: int) -> int:
    return sum(record.kind == kind for record in records)


def has_ended(records: list[Record]) -> int:
    return kinds(records, ENDED)


def lost(records: list[Record]) -> int:
    last = {record.outbox: record.content for record in records if record.kind == LOST}
    return sum(sum(lost_by_pipeline(content).values()) for content in last.values())


def on_sleep(call: Callable[[], object]) -> None:
    """Calls it when this process waits in an outbox."""

    def sleep(seconds: float) -> None:
        call()
        time.sleep(seconds)

    outbox.time = types.SimpleNamespace(**vars(time) | dict(sleep=sleep))


def never_waits() -> None:
    """To be called in a child."""

    def fail() -> None:
        raise AssertionError("it waits")

    on_sleep(fail)


def warnings() -> list[str]:
    """What this process is warned of from now on."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    outbox.logger.addHandler(handler)
    return found


# However its process ends, and whatever comes in between


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(0)])
def test_a_process_that_is_killed_right_after_it_logged_leaves_all_of_it(address, child, end):
    def work(pipe, box: Outbox) -> None:
        for number in range(500):
            put(box, number)
        end()

    child(work)
    records = read(Reader(address.folder, {}), has_ended)
    assert numbers(records) == [*range(500)]
    assert records[-1].kind == ENDED
    assert not [*(address.folder / OUTBOXES).iterdir()]  # what has been read of a dead process is removed


class TimeIsUpError(TimeoutError):
    """What handlers raise; it is an OSError, too."""


def raise_time_is_up(*_) -> None:
    raise TimeIsUpError


def put_with_time_outs(box: Outbox, times: int) -> list[int]:
    """Logs while a signal handler raises again and again; the numbers of the reports whose `put` has returned."""
    returned, number, found = [], itertools.count(), 0
    signal.signal(signal.SIGALRM, raise_time_is_up)
    while found < times:
        try:
            # Again after a second: what is raised in a callback of Python's collector gets nowhere.
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0, 0.0005) + 1e-6, 1.0)
            while True:
                n = next(number)
                put(box, n, label=str(n // 7))
                returned.append(n)
        except TimeIsUpError:
            found += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    return returned


def test_hundreds_of_time_outs_out_of_a_signal_handler_cost_no_report_whose_put_has_returned(
    address, child, monkeypatch
):
    monkeypatch.setattr("backbone.records.SEGMENT", 2_000)
    monkeypatch.setattr(Backpressure, "LIMIT", 10**9)

    def work(pipe, box: Outbox) -> None:
        never_waits()
        returned = put_with_time_outs(box, 300)
        for n in (more := range(10**6, 10**6 + 100)):  # they go on at once
            put(box, n)
        pipe.send([*returned, *more])

    logging_child = child(work)
    returned = logging_child.told()
    logging_child.wait()
    records = read(Reader(address.folder, {}), has_ended)
    found = numbers(records)
    assert not set(returned) - set(found)
    assert found == sorted(set(found))  # each once, and in order
    assert len(found) <= len(returned) + 300  # besides these only some that were interrupted
    who = None
    for record in records:  # none is taken for another one's
        if record.kind == WHO:
            who = json.loads(record.content)["label"]
        elif record.kind == REPORT and record.step < 10**6:
            assert who == str(record.step // 7)


PLACES = outbox.__file__, page.__file__, records.__file__


def at_place(number: int, meanwhile: Callable[[], None], call: Callable[[], None]) -> bool:
    """Does something in the middle of a call; whether the outbox's code has so many places where a signal handler runs.

    These are: behind a call, at the begin of a function and of another round.
    """
    left, before = number, ""

    def trace(frame, event, _):
        nonlocal left, before
        if frame.f_code.co_filename not in PLACES or frame.f_code.co_name in ("<genexpr>", "parse"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= before.startswith(("CALL", "RESUME", "JUMP_BACKWARD"))
            before = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if left == 0:
                sys.settrace(None)
                meanwhile()
        return trace

    sys.settrace(trace)
    try:
        call()
    except TimeIsUpError:
        pass
    finally:
        sys.settrace(None)
    return left <= 0


@pytest.mark.parametrize("size", [0, 400])
def test_an_exception_at_any_place_of_put_harms_no_other_report(address, child, monkeypatch, size):
    monkeypatch.setattr("backbone.records.SEGMENT", 300)  # each begins one if it is larger

    def work(pipe, box: Outbox) -> None:
        box.open()
        for at in itertools.count(1):
            if not at_place(at, raise_time_is_up, lambda at=at: put(box, 2 * at, size, label=str(at))):
                break
            put(box, 2 * at + 1, size)
        pipe.send(at)

    logging_child = child(work)
    tried = logging_child.told()
    assert tried > 10
    found = numbers(read(Reader(address.folder, {}), has_ended))
    assert [n for n in found if n % 2] == [2 * at + 1 for at in range(1, tried)]
    assert found == sorted(set(found))


def test_a_signal_handler_may_log_in_the_middle_of_put(address, child, monkeypatch):
    monkeypatch.setattr("backbone.records.SEGMENT", 2_000)
    monkeypatch.setattr(Backpressure, "LIMIT", 10**9)

    def work(pipe, box: Outbox) -> None:
        handled, done = itertools.count(10**6), []

        def handler(*_) -> None:
            put(box, next(handled), label="handler")
            done.append(None)

        box.open()
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        for number in itertools.takewhile(lambda _: len(done) < 300, itertools.count()):
            put(box, number)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send((number + 1, len(done)))

    logged, done = child(work).told()
    found = numbers(read(Reader(address.folder, {}), has_ended))
    assert [n for n in found if n < 10**6] == [*range(logged)]
    assert sorted(n for n in found if n >= 10**6) == [*range(10**6, 10**6 + done)]  # one may come in another one


@pytest.mark.parametrize("raises", [False, True])
def test_a_signal_handler_may_log_or_raise_while_the_outbox_is_opened(address, child, raises):
    def work(pipe, _: Outbox) -> None:
        for at in itertools.count(1):
            box = Outbox(address, process.Process())
            meanwhile = raise_time_is_up if raises else lambda at=at, box=box: put(box, 10**6 + at)
            if not at_place(at, meanwhile, lambda at=at, box=box: put(box, at)):
                break
            put(box, 2 * 10**6 + at)
        pipe.send(at)
        os._exit(0)

    tried = child(work).told()
    assert tried > 30
    found = sorted(numbers(read(Reader(address.folder, {}), lambda found: has_ended(found) >= tried)))
    assert [n for n in found if n >= 2 * 10**6] == [*range(2 * 10**6 + 1, 2 * 10**6 + tried)]
    if not raises:
        assert [n for n in found if n < 2 * 10**6] == [*range(1, tried + 1), *range(10**6 + 1, 10**6 + tried)]


def test_a_destructor_may_log_whenever_the_collector_runs(address, child, monkeypatch):
    monkeypatch.setattr(Backpressure, "LIMIT", 10**9)

    class Cycle:
        def __init__(self, box: Outbox, number: int):
            self.itself, self.box, self.number = self, box, number

        def __del__(self) -> None:
            put(self.box, self.number, label="destructor")

    def work(pipe, box: Outbox) -> None:
        gc.set_threshold(5, 2, 2)
        for number in range(500):
            Cycle(box, 10**6 + number)
            put(box, number)
        gc.collect()

    child(work).wait()
    assert sorted(numbers(read(Reader(address.folder, {}), has_ended))) == [*range(500), *range(10**6, 10**6 + 500)]


def test_threads_share_an_outbox(address, child, monkeypatch):
    monkeypatch.setattr("backbone.records.SEGMENT", 2_000)

    def work(pipe, box: Outbox) -> None:
        sys.setswitchinterval(1e-5)

        def log(first: int) -> None:
            for number in range(first, first + 200):
                put(box, number)

        threads = [threading.Thread(target=log, args=(1_000 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    child(work).wait()
    records = read(Reader(address.folder, {}), has_ended)
    found = numbers(records)
    assert kinds(records, BEGUN) == 1
    assert all([n for n in found if n // 1_000 == i] == [*range(1_000 * i, 1_000 * i + 200)] for i in range(8))
    assert len(found) == 1_600


def test_forks_log_also_while_another_thread_does_and_forks_of_forks(address, child, monkeypatch):
    """Each has an outbox of its own, is counted as the process that it comes from, and leaves that one's alone."""
    monkeypatch.setattr(Backpressure, "LIMIT", 10**9)

    def fork(box: Outbox, number: int, again: bool) -> int:
        if pid := os.fork():
            return pid
        signal.alarm(60)  # one that hangs ends by that
        for n in range(number, number + 5):
            put(box, n)
        if again:
            assert os.waitstatus_to_exitcode(os.waitpid(fork(box, number + 5, False), 0)[1]) == 0
        os._exit(0)

    def work(pipe, box: Outbox) -> None:
        on = itertools.count()
        thread = threading.Thread(target=lambda: [put(box, 10**6 + next(on)) for _ in iter(lambda: over, [1])])
        over: list[int] = []
        put(box, 0)
        thread.start()
        forks = [fork(box, 100 * i, True) for i in range(1, 21)]
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in forks]
        over.append(1)
        thread.join()
        pipe.send((box.process.name, ended, next(on)))
        pipe.poll(None)

    parent = child(work)
    name, ended, on = parent.told()
    assert ended == [0] * 20
    records = read(Reader(address.folder, {}), lambda found: has_ended(found) == 40)
    found = [n for n in numbers(records) if n < 10**6]
    assert sorted(found) == [0, *(100 * i + n for i in range(1, 21) for n in range(10))]
    assert len(numbers(records)) - len(found) == on
    about = [json.loads(record.content) for record in records if record.kind == BEGUN]
    assert sorted(each["counted_as"] for each in about) == ["", *[name] * 40]
    [mine] = [each["name"] for each in about if not each["counted_as"]]
    assert mine == name
    assert is_alive(address.folder, name)  # none of the forks has freed its lock


def test_who_looks_at_a_page_at_the_same_time_is_not_taken_for_its_process(address, child):
    worker = child(put_some)
    worker.told()
    [path] = address.folder.glob("*/*.page")
    assert page.see(path).is_alive
    worker.kill()
    with path.open() as looks:
        page.fcntl.flock(looks, page.fcntl.LOCK_SH)  # as `see` does, in another thread or process
        assert not page.see(path).is_alive


def test_a_fork_that_outlives_its_parent_keeps_no_lock_of_it(address, child, monkeypatch):
    """Also where another thread was in the middle of `put`, which in the fork has the files for ever."""
    waits, check = threading.Event(), Backpressure.check
    monkeypatch.setattr(Backpressure, "LIMIT", 1)
    monkeypatch.setattr(Backpressure, "check", lambda *arguments: (waits.set(), check(*arguments))[1])

    def work(pipe, box: Outbox) -> None:
        put(box, 0)
        threading.Thread(target=put, args=(box, 1), daemon=True).start()
        waits.wait()
        if not os.fork():
            pipe.send(os.getpid())
            time.sleep(600)
        pipe.poll(None)

    parent = child(work)
    fork = parent.told()
    try:
        parent.kill()
        assert numbers(read(Reader(address.folder, {}), has_ended)) == [0]
        os.kill(fork, 0)  # it lives
    finally:
        os.kill(fork, signal.SIGKILL)


# A full disk


def test_what_a_full_disk_does_not_take_is_counted_warned_of_once_and_logging_goes_on_when_there_is_room(
    address, child
):
    """A limit for files, so that the last one that is taken is cut."""

    def work(pipe, box: Outbox) -> None:
        told, hard = warnings(), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        never_waits()
        for limit, reports in (
            (6_000, range(50)),
            (hard, range(50, 60)),
            (8_000, range(60, 110)),
            (hard, range(110, 120)),
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            for number in reports:
                put(box, number, size=100)
            box.put(SAID, 0, 0, b"x" * 100)
        pipe.send(told)

    told = child(work).told()
    assert [warning for warning in told if "reports are lost, training goes on" in warning] == told
    assert len(told) == 1
    records = read(Reader(address.folder, {}), has_ended)
    found = numbers(records)
    assert {0, *range(50, 60), *range(110, 120)} <= set(found)
    assert found == sorted(set(found))
    assert lost(records) == 120 - len(found) + 2
    *_, content = (record.content for record in records if record.kind == LOST)
    assert lost_by_pipeline(content) == {0: 120 - len(found), OTHER: 2}  # what is no report counts apart


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=64k,nr_inodes=20"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def take_room(disk: Path) -> None:
    with (disk / "other").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 20)) == 1 << 20:
            pass


def take_names(disk: Path) -> None:
    """The disk takes no further file."""
    for name in itertools.count():
        try:
            (disk / f"other-{name}").touch()
        except OSError:
            return


@pytest.mark.parametrize("take", [take_room, take_names])
@pytest.mark.parametrize("opened", [False, True])
def test_where_not_even_an_outbox_can_be_opened_that_is_counted_too(disk, take, opened):
    """Neither an exception nor a SIGBUS; also where one was open, and somebody has cleaned the temporary folder."""
    address = make_address(disk / "private")

    def work(pipe) -> None:
        box, told, logged = process.outbox(address), warnings(), 10 * opened
        for number in range(logged):
            put(box, number)
        others = [path.open() for path in (address.folder / OUTBOXES).iterdir()]  # as forks may have them
        shutil.rmtree(address.folder / OUTBOXES)
        take(disk)
        until = time.monotonic() + 1.5 * opened  # it is looked at once a second
        while logged < 20 or time.monotonic() < until:
            put(box, logged)
            logged += 1
            time.sleep(0.01)
        for other in disk.glob("other*"):
            other.unlink()
        del others
        while not [*(address.folder / OUTBOXES).glob("*.page")]:
            put(box, logged)
            logged += 1
            time.sleep(0.01)
        put(box, logged)
        pipe.send((logged, told))

    logging_child = Child(work)
    logged, told = logging_child.told()
    logging_child.wait()
    records = read(Reader(address.folder, {}), has_ended)
    assert [logged - 1, logged][-len(numbers(records)) :] == numbers(records)
    assert lost(records) + len(numbers(records)) == logged + 1
    assert len(told) == 1


# Limits


def test_put_waits_for_the_reader_where_so_many_records_are_unread(address, child, monkeypatch):
    monkeypatch.setattr(Backpressure, "LIMIT", 10)
    monkeypatch.setattr(Backpressure, "PATIENCE", float("inf"))

    def work(pipe, box: Outbox) -> None:
        waited = told_once(pipe)
        for number in range(35):
            waited(number)
            put(box, number)

    waits, reader = child(work), Reader(address.folder, {})
    for first in (0, 10, 20):
        assert waits.told() == first + 10  # this one waits
        reading = reader.read(look=True)
        assert numbers(reading.records) == [*range(first, first + 10)]
        reader.acknowledge(reading)
    waits.wait()
    assert numbers(read(reader)) == [*range(30, 35)]


def told_once(pipe) -> Callable[[int], None]:
    """To be called with the number of each report: where it waits, the parent is told."""
    now, told = [-1], set()

    def tell() -> None:
        if now[0] not in told:
            told.add(now[0])
            pipe.send(now[0])

    on_sleep(tell)
    return lambda number: now.__setitem__(0, number)


def test_put_waits_where_so_many_bytes_are_unread_and_a_larger_record_passes_when_nothing_is(
    address, child, monkeypatch
):
    monkeypatch.setattr(Backpressure, "LIMIT_BYTES", 1_000)
    monkeypatch.setattr(Backpressure, "PATIENCE", float("inf"))

    def work(pipe, box: Outbox) -> None:
        waited = told_once(pipe)
        for number, size in enumerate((5_000, 5_000, 300, 300, 5_000)):
            waited(number)
            put(box, number, size)

    waits, reader = child(work), Reader(address.folder, {})
    for waiting, before in ((1, [0]), (2, [1]), (4, [2, 3])):
        assert waits.told() == waiting
        reading = reader.read(look=True)
        assert numbers(reading.records) == before
        reader.acknowledge(reading)
    waits.wait()
    assert numbers(read(reader)) == [4]


@pytest.mark.parametrize("disk_is_nearly_full", [False, True])
def test_a_reader_that_stands_still_is_waited_for_once_and_what_is_beyond_the_backlog_is_lost(
    address, child, monkeypatch, disk_is_nearly_full
):
    monkeypatch.setattr(Backpressure, "LIMIT", 10)
    monkeypatch.setattr(Backpressure, "PATIENCE", 0.0)
    monkeypatch.setattr(Backpressure, "BACKLOG", 5_000)
    # Nearly: a backlog must not fill it.
    monkeypatch.setattr("backbone.page.disk_is_nearly_full", lambda path: disk_is_nearly_full)

    def work(pipe, box: Outbox) -> None:
        told, waited = warnings(), []
        on_sleep(lambda: waited.append(number))
        for number in range(100):
            put(box, number, size=50)
        pipe.send((sorted({*waited}), told))
        pipe.recv()  # it has got on
        waited.clear()
        for number in range(100, 115):
            put(box, number)
        pipe.send((sorted({*waited}), told))

    waits, reader = child(work), Reader(address.folder, {})
    waited, told = waits.told()
    assert waited == [10]
    assert len(told) == 1
    found = numbers(before := read(reader))
    assert found == [*range(10 if disk_is_nearly_full else len(found))]
    assert disk_is_nearly_full or 10 < len(found) < 100
    assert lost(before) == 100 - len(found)
    waits.pipe.send("go on")
    waited, told = waits.told()
    assert waited == [110]
    assert len(told) == 1
    records = read(reader, has_ended)
    assert numbers(records) == [*range(100, 110 if disk_is_nearly_full else 115)]
    assert lost(before + records) == 100 - len(found) + 5 * disk_is_nearly_full


def test_the_end_of_a_process_comes_right_behind_its_last_record_also_where_others_have_more_to_read(
    address, child, monkeypatch
):
    """Else it would come behind the first report of whoever takes its place."""
    monkeypatch.setattr(Reader, "LIMIT", 4096)
    first = child(put_some, 2)
    first.told()
    first.kill()
    second = child(put_some, 1000)
    second.told()
    reader = Reader(address.folder, {})
    reading = reader.read(look=True)
    assert reading.is_cut
    kinds_of_first = [record.kind for record in reading.records if record.outbox == reading.records[0].outbox]
    assert ENDED in [record.kind for record in reading.records]
    [end] = [i for i, record in enumerate(reading.records) if record.kind == ENDED]
    assert numbers(reading.records[:end]) == [0, 1]
    assert kinds_of_first
    assert all(record.outbox != reading.records[end].outbox for record in reading.records[end + 1 :])


@pytest.mark.parametrize("what", ["half a record", "an empty segment"])
def test_a_process_has_ended_also_where_it_left_something_that_nobody_can_read(address, child, monkeypatch, what):
    worker = child(put_some, 3)
    worker.told()
    worker.kill()
    [segment] = (address.folder / OUTBOXES).glob("*.0")
    if what == "half a record":  # as where it was killed in the middle of a write
        with segment.open("ab") as file:
            file.write(records.record(REPORT, b"x" * 100, 0.0)[:80])
    else:  # as where the disk was full
        monkeypatch.setattr("backbone.records.SEGMENT", segment.stat().st_size)
        segment.with_suffix(".1").touch()
    found = read(Reader(address.folder, {}), has_ended)
    assert numbers(found) == [0, 1, 2]
    assert [*(address.folder / OUTBOXES).glob("*.page")] == []


def test_who_does_not_listen_that_the_run_is_finished_logs_nothing_more(address, child):
    """Else whoever reads to the end would never be through."""

    def work(pipe, box: Outbox) -> None:
        put(box, 0)
        pipe.send(None)
        pipe.recv()
        for number in range(1, 100):
            with contextlib.suppress(RunFinishedError):
                put(box, number)
        pipe.send(None)
        pipe.poll(None)

    worker, reader = child(work), Reader(address.folder, {})
    worker.told()
    read(reader)
    reader.close()
    worker.pipe.send("go on")
    worker.told()
    assert numbers(read(reader)) in ([], [1])


# What is removed or closed


def test_where_its_segment_is_removed_a_process_begins_anew_and_says_what_is_lost(address, child):
    """Such as where somebody deletes what is large in the temporary folder."""

    def work(pipe, box: Outbox) -> None:
        put(box, 0)
        pipe.send(time.monotonic())
        pipe.recv()
        time.sleep(1.05)  # it looks once a second
        for number in (1, 2):
            put(box, number)
        pipe.send(None)

    worker, reader = child(work), Reader(address.folder, {})
    worker.told()
    assert numbers(read(reader)) == [0]
    [segment] = (address.folder / OUTBOXES).glob("*.0")
    segment.unlink()
    worker.pipe.send("go on")
    worker.told()
    records = read(reader, has_ended)
    assert kinds(records, VANISHED) == 1
    assert (numbers(records), lost(records)) == ([2], 1)


def test_a_process_that_reads_its_own_page_keeps_its_lock(address, child):
    """Whoever copies all of the temporary folder does that."""

    def work(pipe, box: Outbox) -> None:
        put(box, 0)
        for path in (address.folder / OUTBOXES).glob("*.page"):
            path.read_bytes()
        pipe.send(None)
        pipe.recv()
        time.sleep(1.05)
        for number in (1, 2):
            put(box, number)
        pipe.send(None)

    worker, reader = child(work), Reader(address.folder, {})
    worker.told()
    worker.pipe.send("go on")
    worker.told()
    worker.wait()
    records = read(reader, has_ended)
    assert (numbers(records), lost(records)) == ([0, 1, 2], 0)


@pytest.mark.parametrize("what", [resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE], ids=["room", "file descriptors"])
def test_a_process_that_never_has_room_for_an_outbox_is_named(address, child, what):
    def work(pipe, box: Outbox) -> None:
        free = os.open("/", os.O_RDONLY)  # the first descriptor that would be taken
        os.close(free)
        resource.setrlimit(what, (free if what == resource.RLIMIT_NOFILE else 0, resource.getrlimit(what)[1]))
        for number in range(3):
            put(box, number)
        pipe.send(box.process.name)

    worker, reader = child(work), Reader(address.folder, {})
    name = worker.told()
    worker.wait()
    records = read(reader)
    [about] = [json.loads(record.content) for record in records if record.kind == BEGUN]
    assert (about["name"], kinds(records, VANISHED)) == (name, 1)
    assert [*(address.folder / OUTBOXES).iterdir()] == []


def test_more_than_a_run_can_keep_is_refused_at_the_caller_and_harms_nothing(address, child, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 1 << 20)

    def work(pipe, box: Outbox) -> None:
        put(box, 0)
        with pytest.raises(ValueError, match="2 MB at once are too much"):
            put(box, 1, 2 << 20)
        put(box, 2)

    child(work).wait()
    assert numbers(read(Reader(address.folder, {}), has_ended)) == [0, 2]


def test_segments_rotate_and_what_is_read_is_removed(address, child, monkeypatch):
    monkeypatch.setattr("backbone.records.SEGMENT", 2_000)
    segments = lambda: [path for path in (address.folder / OUTBOXES).iterdir() if path.suffix != ".page"]  # noqa: E731

    def work(pipe, box: Outbox) -> None:
        for first in range(0, 1_000, 100):
            for number in range(first, first + 100):
                put(box, number, size=100)
            pipe.send("logged")
            pipe.recv()

    logging_child, reader, found = child(work), Reader(address.folder, {}), []
    for _ in range(10):
        logging_child.told()
        with min(segments(), key=lambda path: int(path.suffix[1:])).open("rb") as as_a_fork_may_have_it:
            assert len(segments()) > 5
            found += numbers(read(reader))
            assert os.fstat(as_a_fork_may_have_it.fileno()).st_size == 0
        assert len(segments()) == 1
        logging_child.pipe.send("go on")
    assert found == [*range(1_000)]
    read(reader, has_ended)
    assert not segments()


# The end


def test_what_put_took_without_an_error_is_read_and_whoever_comes_later_is_told_that_the_run_is_finished(
    address, child, monkeypatch
):
    """Processes that log on and on, and others that log for the first time, while the run is being finished."""
    monkeypatch.setattr(Backpressure, "LIMIT", 10**9)

    def log_on(pipe, box: Outbox, name: int) -> None:
        number = 0
        try:
            for number in itertools.count(name):
                put(box, number)
                if number == name:
                    pipe.send("logs")
        except RunFinishedError:
            pipe.send(number - name)
        try:
            put(box, 0)
        except RunFinishedError:
            pipe.send("finished")

    def log_once(pipe, box: Outbox, name: int) -> None:
        try:
            put(box, name)
            pipe.send(1)
        except RunFinishedError:
            pipe.send(0)

    lasting = {10**7 * i: child(log_on, 10**7 * i) for i in range(1, 4)}
    for each in lasting.values():
        each.told()
    reader = Reader(address.folder, {})
    new = {10**6 + i: child(log_once, 10**6 + i) for i in range(20)}
    reader.close()
    records = read(reader)
    new |= {2 * 10**6 + i: child(log_once, 2 * 10**6 + i) for i in range(3)}
    returned = {name + n for name, each in (lasting | new).items() for n in range(each.told())}
    assert [each.told() for each in lasting.values()] == ["finished"] * 3
    assert not returned - {*numbers(records)}
    assert not returned & {2 * 10**6 + i for i in range(3)}  # at once


@pytest.mark.parametrize("opened", [False, True])
def test_a_run_that_is_finished_in_the_middle_of_put_has_its_report_or_put_raises(tmp_path, opened):
    """At each place of it in turn."""
    addresses = [make_address(tmp_path / str(i)) for i in range(150)]

    def work(pipe) -> None:
        def is_finished_meanwhile() -> None:
            pipe.send("now")
            pipe.recv()

        for at, address in enumerate(addresses, 1):
            box = Outbox(address, process.Process())
            if opened:
                box.open()
            try:
                if not at_place(at, is_finished_meanwhile, lambda box=box: put(box, 0)):
                    return pipe.send("that was all")
                pipe.send("returned")
            except RunFinishedError:
                pipe.send("raised")

    finished, outcomes = Child(work), []
    for address in addresses:
        if finished.told() == "that was all":
            break
        reader = Reader(address.folder, {})
        reader.close()
        found = len(numbers(read(reader)))
        finished.pipe.send("is finished")
        outcomes.append((finished.told(), found))
    finished.wait()
    assert {*outcomes} <= {("returned", 1), ("raised", 0), ("raised", 1)}
    assert len(outcomes) > 10


def test_a_process_that_waits_for_room_is_told_that_the_run_is_finished(address, child, monkeypatch):
    monkeypatch.setattr(Backpressure, "LIMIT", 10)
    monkeypatch.setattr(Backpressure, "PATIENCE", float("inf"))

    def work(pipe, box: Outbox) -> None:
        on_sleep(lambda: pipe.send("waits"))
        try:
            for number in range(11):
                put(box, number)
        except RunFinishedError:
            os._exit(0)
        os._exit(1)

    waits, reader = child(work), Reader(address.folder, {})
    assert waits.told() == "waits"
    reader.close()
    waits.wait()


def test_a_worker_that_outlives_a_hundred_runs_has_few_files_open(tmp_path):
    addresses = [make_address(tmp_path / str(run)) for run in range(100)]
    opened = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731

    def work(pipe) -> None:
        before, most = opened(), 0
        for address in addresses:
            put(box := process.outbox(address), 0)
            most = max(most, opened() - before)
            pipe.send("logged")
            pipe.recv()  # it is finished
            assert box.is_closed
        pipe.send(most)

    worker = Child(work)
    for address in addresses:
        worker.told()
        Reader(address.folder, {}).close()
        worker.pipe.send("finished")
    most = worker.told()
    worker.wait()
    assert most <= 10


# Reading


def test_only_whole_records_are_read(address, child, tmp_path):
    child(put_some, 3).told()
    [segment] = (address.folder / OUTBOXES).glob("*.0")
    content, other = segment.read_bytes(), make_address(tmp_path / "other")
    shutil.copy(segment.with_suffix(".page"), other.folder / OUTBOXES)
    reader, record = Reader(other.folder, {}), records.HEAD.size + 10
    with (other.folder / OUTBOXES / segment.name).open("wb", buffering=0) as file:
        for length in range(1, len(content) + 1):
            file.write(content[length - 1 : length])
            reading = reader.read()
            whole = (len(content) - length) % record == 0 and (len(content) - length) // record < 3
            assert numbers(reading.records) == ([2 - (len(content) - length) // record] if whole else [])
            assert not reading.is_cut


def test_a_reading_that_leaves_something_behind_is_in_the_order_of_time_with_the_next_one(address, child, monkeypatch):
    """Else a worker's next epoch comes before what another one has said of this one."""
    monkeypatch.setattr(Reader, "LIMIT", 1)  # 4 kB of each outbox

    def work(pipe, box: Outbox, size: int) -> None:
        for epoch in range(100):
            pipe.recv()
            put(box, epoch, size)
            pipe.send(epoch)

    pair, reader = [child(work, size) for size in (300, 0)], Reader(address.folder, {})
    for _ in range(100):
        for each in pair:
            each.pipe.send("go on")
            each.told()
    epochs, cut = [], 0
    while not (reading := reader.read()).is_empty:
        epochs += numbers(reading.records)
        cut += reading.is_cut
        reader.acknowledge(reading)
    assert cut > 3
    assert epochs == [epoch for epoch in range(100) for _ in pair]


@pytest.mark.parametrize("committed", ["nowhere", "by the run"])
def test_a_reader_that_dies_before_it_has_committed_is_followed_by_one_that_reads_the_same_once(
    address, child, monkeypatch, committed
):
    monkeypatch.setattr("backbone.records.SEGMENT", 1_000)
    monkeypatch.setattr(Reader, "LIMIT", 1)
    logging_child, positions, found = child(put_some, 1_000), {}, []
    logging_child.told()
    for life in range(2_000):
        reader = Reader(address.folder, positions)
        reading = reader.read(look=True)
        if reading.is_empty:
            break
        if life % 3:  # else it dies before the run has committed it
            positions |= {record.outbox: record.end for record in reading.records}
            found += numbers(reading.records)
        if life % 3 == 2 or (life % 3 and committed == "nowhere"):
            reader.acknowledge(reading)  # else it dies just after that
    assert life > 10
    assert found == [*range(1_000)]
    assert positions == {name: Position(*end) for name, end in positions.items()}


def test_a_living_process_is_not_taken_for_dead_however_many_pages_come_and_go(address, child):
    def work(pipe, _: Outbox) -> None:
        boxes = []
        for number in range(400):
            boxes.append(Outbox(address, process.Process()))
            put(boxes[-1], number)
        pipe.send("logged")
        pipe.poll(None)

    def log_and_end(pipe, box: Outbox) -> None:
        put(box, 10**6)

    lasting, reader = child(work), Reader(address.folder, {})
    others = [child(log_and_end) for _ in range(20)]
    records = read(reader, lambda found: len(numbers(found)) == 420 and has_ended(found) >= 20)
    lasting.told()
    for each in others:
        each.wait()
    records += read(reader)
    assert (kinds(records, BEGUN), has_ended(records)) == (420, 20)
    lasting.kill()
    records += read(reader, lambda found: has_ended(found) == 400)


def test_a_process_that_reads_where_it_logs_keeps_its_own_lock(address, child):
    def work(pipe, box: Outbox) -> None:
        put(box, 0)
        Reader(address.folder, {}).read(look=True)
        pipe.send(box.process.name)
        pipe.poll(None)

    logging_child = child(work)
    name = logging_child.told()
    assert is_alive(address.folder, name)
    assert not has_ended(read(Reader(address.folder, {})))
    logging_child.kill()
    assert not is_alive(address.folder, name)


def test_what_comes_when_the_run_is_found_to_be_finished_is_not_called_lost(address, child):
    def work(pipe, box: Outbox) -> None:
        put(box, 0)
        told = warnings()

        def may_write(size: int) -> bool:  # another thread finds that out, in between
            box.close(finished=True)
            return True

        box._may_write = may_write
        with contextlib.suppress(RunFinishedError):
            put(box, 1)
            told.append("it returned")
        pipe.send((told, box._lost))

    assert child(work).told() == ([], {})


def test_what_is_lost_with_a_folder_counts_for_the_pipeline_that_was_logged_to(address, child):
    def work(pipe, box: Outbox) -> None:
        for number in range(3):
            box.put(REPORT, 1, number, b"")
        shutil.rmtree(address.folder / OUTBOXES)
        box.flush(0.0)
        box.keep_reachable(time.monotonic() + 2)
        pipe.send(box._lost)

    assert child(work).told() == {1: 3}


def test_where_somebody_cleans_the_temporary_folder_logging_goes_on_and_what_could_not_be_read_is_counted(
    address, child
):
    def work(pipe, box: Outbox) -> None:
        told = warnings()
        for number in range(10):
            put(box, number)
        pipe.send("logged")
        pipe.recv()
        number = 10
        while not [*(address.folder / OUTBOXES).glob("*.page")]:  # it is looked at once a second
            put(box, number)
            number += 1
            time.sleep(0.01)
        put(box, number)
        pipe.send((number + 1, told))

    logging_child, reader = child(work), Reader(address.folder, {})
    logging_child.told()
    records = read(reader)
    assert numbers(records) == [*range(10)]
    shutil.rmtree(address.folder / OUTBOXES)
    logging_child.pipe.send("go on")
    logged, told = logging_child.told()
    records += read(reader, has_ended)
    assert kinds(records, VANISHED) == 1
    assert len(numbers(records)) + lost(records) == logged
    assert numbers(records)[10:] == [logged - 1]
    assert len(told) == 1


def test_threads_log_on_while_somebody_cleans_the_temporary_folder_again_and_again(address, child, monkeypatch):
    monkeypatch.setattr(Backpressure, "LIMIT", 8)
    monkeypatch.setattr(Backpressure, "PATIENCE", 0.0)

    def work(pipe, box: Outbox) -> None:
        sys.setswitchinterval(1e-6)
        until = time.monotonic() + 2

        def log(number: int) -> None:
            while time.monotonic() < until:
                put(box, number)

        with ThreadPoolExecutor(4) as threads:
            logging = [threads.submit(log, number) for number in range(4)]
            while time.monotonic() < until:
                shutil.rmtree(address.folder / OUTBOXES, ignore_errors=True)
                box._next_look = 0.0  # else it is looked at once a second
                time.sleep(0.001)
        pipe.send(["".join(traceback.format_exception(error)) for future in logging if (error := future.exception())])

    assert child(work).told() == []


# Who may see it, and where it is


def test_all_that_is_kept_is_private(address, child):
    before = os.umask(0)
    try:
        logging_child = child(put_some)
        logging_child.told()
    finally:
        os.umask(before)
    files = [*(address.folder / OUTBOXES).iterdir()]
    assert len(files) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_nobody_lives_in_a_folder_that_is_being_removed(address, monkeypatch):
    for folder in ("one", "other"):
        (address.folder / folder).mkdir()
        (address.folder / folder / "a.page").touch()

    def see(path: Path) -> None:
        shutil.rmtree(address.folder)

    monkeypatch.setattr(page, "see", see)
    assert not is_alive(address.folder, "owner")


@pytest.fixture
def away(tmp_path, monkeypatch) -> Address:
    """Of a run on another node, which this one has told of its folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    address = Address("n", uuid.uuid4().hex, tmp_path / "on another node", "another", "", "node")
    make_address(address.elsewhere)
    (address.elsewhere / "known").touch()
    return address


def test_flush_waits_on_another_node_until_all_has_left_whatever_has_interrupted_put(away, monkeypatch):
    """At home it returns at once."""
    monkeypatch.setattr(Backpressure, "LIMIT", 10**9)

    def work(pipe) -> None:
        box = process.outbox(away)
        box.open()
        put_with_time_outs(box, 50)
        for at in itertools.count(1, 7):
            if not at_place(at, raise_time_is_up, lambda: put(box, 0)):
                break
        for _ in range(2):
            put(box, 0)
            pipe.send(box.flush(0))
            pipe.recv()  # it has left
            pipe.send(box.flush(0))

    logging_child, reader = Child(work), Reader(away.elsewhere, {})
    for _ in range(2):
        assert not logging_child.told()
        read(reader)
        logging_child.pipe.send("read")
        assert logging_child.told()
    logging_child.wait()


def test_of_one_that_died_all_is_read_also_behind_a_record_that_is_larger_than_a_share(address, child):
    """It fills a segment, so the others are in the next one."""

    def work(pipe, box: Outbox) -> None:
        put(box, 0, size=2 * records.SEGMENT)
        for number in range(1, 11):
            put(box, number)
        pipe.send("logged")
        pipe.recv()

    for each in (pair := [child(work), child(work)]):
        each.told()
        each.kill()
    found = read(Reader(address.folder, {}))
    assert sorted(numbers(found)) == sorted([*range(11)] * 2)
    assert has_ended(found) == len(pair)


def test_what_a_process_counts_as_lost_at_last_is_seen_with_its_end(address, child, monkeypatch):
    worker = child(put_some)
    worker.told()
    [path], flock = [*address.folder.glob("*/*.page")], page.fcntl.flock

    def dies_before(file, flags: int) -> None:
        with path.open("r+b") as counted:
            counted.seek(page.LOST_AT)
            counted.write(struct.pack("<Q", 7))
        worker.kill()
        flock(file, flags)

    monkeypatch.setattr(page.fcntl, "flock", dies_before)
    seen = page.see(path)
    assert (seen.is_alive, lost_by_pipeline(seen.lost)) == (False, {0: 7})


def test_who_lives_is_not_taken_for_dead_where_the_folder_is_renamed_meanwhile(address, child, monkeypatch):
    """Another process would be started to finish the run."""
    worker, see = child(put_some), page.see
    name = worker.told()

    def renamed(path: Path):
        if path.parent.name == OUTBOXES:
            path.parent.rename(address.folder / "closed")
        return see(path)

    monkeypatch.setattr(page, "see", renamed)
    assert is_alive(address.folder, name)


def test_at_home_there_is_nothing_to_flush(child):
    def work(pipe, box: Outbox) -> None:
        put(box, 0)
        pipe.send(box.flush(0))

    assert child(work).told()


def test_a_process_that_nobody_could_tell_the_run_of_is_told_what_to_do(away):
    (away.elsewhere / "known").unlink()

    def work(pipe) -> None:
        try:
            put(process.outbox(away), 0)
        except RunFinishedError as error:
            pipe.send(str(error))

    told = Child(work).told()
    assert "is on another machine, and nobody has told it of this process" in told
    assert "pickle the handle, in the Ray worker that started this process" in told
