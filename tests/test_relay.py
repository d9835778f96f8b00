"""What relays bring, on the node of this process. Those of other nodes: see test_cluster.py."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import uuid
from pathlib import Path

from backbone import process, ray_internals, relay
from backbone.files import OUTBOXES, Address, this_machine
from backbone.records import REPORT
from backbone.relay import Relays

import pytest
import ray
from conftest import wait_for
from ray._private import state
from ray.runtime_context import get_runtime_context

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def place(tmp_path, ray_here, monkeypatch):
    """Where somebody logs: the run's address, and the place's key in Ray's key-value store."""
    monkeypatch.setattr(relay.Relay.__ray_metadata__.modified_class, "IDLE", 0.5)
    folder, node = tmp_path / "private", get_runtime_context().get_node_id()
    (folder / OUTBOXES).mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)
    address = Address("n", uuid.uuid4().hex, folder, this_machine(), "", node)
    ray_internals.put(address.key("open"), b"")
    return address, address.key("place", f"{node} digest")


class Task:
    """An idle process of Ray's, as a fork of this one."""

    def __init__(self, address: Address):
        self._pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=self._go, args=(address, theirs), daemon=True)
        self.process.start()

    def _go(self, address: Address, pipe) -> None:
        process.Process.in_task = True
        box = process.outbox(address)
        while True:
            box.put(REPORT, 0, pipe.recv(), b"")
            pipe.send(None)

    def log(self, number: int) -> None:
        self._pipe.send(number)
        self._pipe.recv()


class Bringing:
    """Takes what relays bring, as the pipeline actor does."""

    def __init__(self, address: Address):
        self.records, self.gone = [], []
        self.relays = Relays(address, lambda place: self._positions(), lambda *gone: self.gone.append(gone))

    def _positions(self) -> dict:
        return {record.outbox: record.end for record in self.records}

    def bring(self) -> list[int]:
        """The numbers that have come by now."""
        for name, reading in self.relays.brought():
            self.records += reading.records
            self.relays.go_on(name)
        return [record.step for record in self.records if record.kind == REPORT]

    def finish(self) -> list[int]:
        self.relays.close()
        wait_for(lambda: (self.bring(), not self.relays.places)[1], every=0.01)
        return self.bring()


def bringing_what(task: Task, address: Address, key: bytes) -> Bringing:
    """What a task has logged there is on its way."""
    ray_internals.put(key, os.fsencode(address.folder))
    made = Bringing(address)
    made.relays.look()
    task.log(0)
    return made


def test_what_is_logged_while_a_relay_goes_is_read_at_the_end(place):
    """The run is being finished when the word comes that it has gone."""
    (address, key), task = place, Task(place[0])
    made = bringing_what(task, address, key)
    wait_for(lambda: made.bring() == [0], every=0.01)
    wait_for(lambda: ray_internals.get(key) is None)  # nobody has asked it for an answer since
    task.log(1)
    ray_internals.put(key, os.fsencode(address.folder))  # as whoever logs there does
    assert made.finish() == [0, 1]
    assert made.gone == []
    assert ray_internals.get(key) is None
    assert not address.folder.exists()
    task.process.kill()


def test_where_a_relay_has_gone_the_run_s_end_is_told_and_nothing_is_left(place):
    (address, key), task = place, Task(place[0])
    made = bringing_what(task, address, key)
    wait_for(lambda: (made.bring(), not made.relays.places)[1], every=0.01)
    assert made.finish() == [0]
    assert (made.gone, address.folder.exists()) == ([], False)
    task.process.kill()
    task.process.join()


def relay_process(made: Bringing, killed: int | None = None) -> int:
    """killed: of the one before, which may not have been noticed yet."""
    [there] = made.relays.places.values()

    def process() -> int:
        made.bring()
        pid = state.actors(there.relay._actor_id.hex())["Pid"] if there.relay else 0
        return 0 if pid == killed else pid

    return wait_for(process, every=0)


def test_whoever_kills_a_relay_costs_no_report(place):
    """While somebody logs, and when the run is being finished."""
    (address, key), task = place, Task(place[0])
    made, killed = bringing_what(task, address, key), None
    for number in range(1, 2000):
        pid = relay_process(made, killed) if number in (200, 1000) else None
        task.log(number)
        if pid:
            time.sleep(0.1)
            os.kill(pid, signal.SIGSTOP)  # so that it is not told that what it has brought is safe
        made.bring()
        if pid:
            os.kill(killed := pid, signal.SIGKILL)
    os.kill(pid := relay_process(made, killed), signal.SIGSTOP)
    task.log(2000)
    made.relays.close()
    for _ in range(20):
        made.bring()
        time.sleep(0.01)
    assert made.relays.places
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: (made.bring(), not made.relays.places)[1], every=0.01)
    assert made.bring() == [*range(2001)]  # each once, and in order
    assert made.gone == []
    task.process.kill()


def test_a_place_whose_relay_does_not_answer_is_named_and_not_waited_for_for_ever(place):
    (address, key), task = place, Task(place[0])
    made = bringing_what(task, address, key)
    wait_for(lambda: made.bring() == [0], every=0.01)
    os.kill(pid := relay_process(made), signal.SIGSTOP)
    task.log(1)
    made.relays.close()
    began = time.monotonic()
    while made.relays.places and time.monotonic() < began + 60:
        made.bring()
        for name in made.relays.silent(2):
            made.relays.give_up(name, "it did not answer")
    assert made.gone == [(key.decode().rpartition("/")[2], "it did not answer")]
    os.kill(pid, signal.SIGKILL)
    task.process.kill()


@pytest.fixture
def elsewhere(place, tmp_path, monkeypatch):
    """elsewhere("second"): where a process with this temporary folder logs to the run of another node."""
    address, made = place[0]._replace(machine="another", node="another"), []

    def elsewhere(temporary: str, node: str = "") -> Path:
        (tmp_path / temporary).mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / temporary))
        here = process.RayProcess()
        here.node = node or here.node
        made.append(here.find_folder(address).parent)
        return made[-1]

    yield elsewhere
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


def places(address: Address) -> dict[str, Path]:
    prefix = address.key("place")
    return {key.decode(): Path(os.fsdecode(ray_internals.get(key))) for key in ray_internals.keys(prefix)}


def test_each_folder_in_which_somebody_logs_on_a_node_is_a_place(place, elsewhere):
    folders = [elsewhere("first"), elsewhere("first"), elsewhere("second")]
    assert sorted(places(place[0]).values()) == sorted({*folders})
    assert len({*folders}) == 2


def test_where_two_nodes_of_ray_share_a_folder_one_of_them_reads_it_as_long_as_it_lives(place, elsewhere):
    mine = get_runtime_context().get_node_id()
    folder = elsewhere("shared")
    assert elsewhere("shared", node="f" * 56) == folder
    [key] = places(place[0])
    assert f"/{mine} " in key
    (folder / "node").unlink()
    (folder / "node").symlink_to("e" * 56)  # a node that is dead
    elsewhere("shared")
    assert os.readlink(folder / "node") == mine


@pytest.mark.slow
def test_a_relay_goes_when_only_an_idle_process_is_left_and_comes_back_when_that_logs(place, elsewhere):
    """Nodes must get free for the autoscaler. Whoever logs after the end is told, each time."""

    @ray.remote(num_cpus=0)
    def log(address: Address, number: int) -> str:
        box = process.outbox(address)
        try:
            box.put(REPORT, 0, number, b"")
        except RuntimeError as error:
            return type(error).__name__
        return f"{os.getpid()}"

    address, made = place[0]._replace(machine="another", node="another"), None
    made = Bringing(address)
    pids = set()
    for number in range(3):
        pids.add(ray.get(log.remote(address, number)))
        wait_for(lambda: (made.relays.look(), made.bring())[1] == [*range(number + 1)], every=0.05)  # noqa: B023
        wait_for(lambda: (made.bring(), not made.relays.places)[1], every=0.05)
        time.sleep(1.1)  # a process looks once a second whether anybody reads
    assert len(pids) == 1
    assert places(address) == {}
    assert made.finish() == [0, 1, 2]
    assert ray.get([log.remote(address, 3) for _ in range(3)]) == ["RunFinishedError"] * 3
    assert made.gone == []
    assert not [*Path(tempfile.gettempdir()).glob(f"wandb-run-{address.nonce}*")]


def test_a_node_that_dies_is_named(place):
    address, key = place[0], place[0].key("place", f"{'ab' * 28} digest")
    ray_internals.put(key, os.fsencode(address.folder))
    made = Bringing(address)
    made.relays.look()
    wait_for(lambda: (made.bring(), not made.relays.places)[1], every=0.01)
    assert [name for name, _ in made.gone] == [f"{'ab' * 28} digest"]


def test_a_place_that_is_gone_is_named_unless_a_relay_had_read_all_of_it(place):
    address, key = place
    for known in (False, True):
        ray_internals.put(key, os.fsencode(address.folder / "gone"))
        made = Bringing(address)
        made.relays.look()
        if not known:
            ray_internals.delete(key)
        wait_for(lambda made=made: (made.bring(), not made.relays.places)[1], every=0.01)
        assert [name.partition(" ")[2] for name, why in made.gone if why] == ["digest"] * known
