"""When the pipeline actor can't finish its run: it is started anew, or others do it from what it has left."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backbone import ledger, ray_internals, transaction_log
from backbone import recover as recovering
from backbone.files import Address, Letter, state_path, write_letter
from backbone.page import is_alive
from backbone.run import Run
from backbone.said import KNOWN
from backbone.state import State
from backbone.steps import Steps
from backbone.takeover import GivenUpError, open_run
from common import InferencePipelineActor, PipelineActor, WandbRun, pipeline_actor

import pytest
import ray
import wandb
from conftest import ONE_EACH, ROOT, Log, folders, read_rows, wait_for
from processes import below, check_ledger, everything, pipeline_process
from ray._private import state
from rooms import QUIET


@pytest.mark.parametrize(
    ("number", "status", "order"),
    [
        pytest.param(signal.SIGTERM, 143, "the driver last", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, "the driver first", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, "any", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_job_leaves_whole_runs_that_have_failed(busy, tmp_path, number, status, order):
    process = busy(*ONE_EACH)
    pids = everything(process.pid)
    for pid in reversed(pids) if order == "the driver last" else pids:
        os.kill(pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in stderr
    check_ledger(stdout, tmp_path)
    for name in ("training", "inference"):
        logs = [Log(path) for path in folders(tmp_path) if name in path.name]
        rows = {row["_step"]: row for log in logs for row in log.rows}
        assert sorted(rows) == list(range(len(rows)))
        assert logs[-1].exit_code == (143 if number == signal.SIGTERM else 1)
    assert not list(tmp_path.glob("wandb/.*state*"))


# A driver with a Ray of its own


def program(tmp_path: Path, body: str, run: bool = True) -> str:
    """That driver's program; `run` is the run, `actor()` the pipeline actor's process."""
    start = f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from common import WandbRun
        import ray
        from ray._private import state
        def actor():
            return state.actors(run._owned.actor._actor_id.hex())["Pid"]
        if __name__ == "__main__":
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="critical")
            run = {run} and WandbRun("p", "n", id="again", resume="allow", mode="offline", dir={str(tmp_path)!r})
    """
    return textwrap.dedent(start) + textwrap.indent(textwrap.dedent(body), "    ")


LEFT = """
for step in range(100):
    run.log({"tokens": 5}, step)
print("READY", flush=True)
time.sleep(600)
"""


def leave(tmp_path: Path, body: str = LEFT, **variables: str) -> subprocess.Popen:
    """Such a driver that has logged a hundred steps."""
    command = [sys.executable, "-c", program(tmp_path, body, run=body == LEFT)]
    driver = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "READY\n"
    return driver


def kill_all(driver: subprocess.Popen) -> None:
    for pid in reversed(everything(driver.pid)):
        os.kill(pid, signal.SIGKILL)
    driver.communicate()


def test_when_all_of_ray_is_gone_the_driver_finishes_the_run(tmp_path, environment):
    body = """
        for step in range(100):
            run.log({"a": 1.0}, step)
        ray._private.worker.global_worker.threads_stopped.set()  # one of Ray's own, which would take a whole core
        node = ray._private.worker.global_worker.node
        pids = [actor(), *(node.all_processes[name][0].process.pid for name in ("raylet", "gcs_server"))]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for call in (lambda: run.log({"a": 1.0}, 100), run.progress, lambda: run.expect(2), run.flush):
            call()
        ledger = run.finish()
        print("LEDGER", ledger.reports, ledger.rows, ledger.lost, ledger.ok, flush=True)
        os._exit(0)  # Ray's own end takes long
    """
    command = [sys.executable, "-c", program(tmp_path, body)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "LEDGER 101 101 0 True\n" in done.stdout, done.stdout + done.stderr
    rows = {row["_step"]: row["step"] for path in folders(tmp_path) for row in Log(path).rows}
    assert sorted(rows.values()) == list(range(101))


@pytest.mark.parametrize(
    ("actor", "at_last"),
    [
        pytest.param("TrainingPipelineActor", "time.sleep(600)", marks=pytest.mark.slow),
        ("Behind", "time.sleep(600)"),
        pytest.param("Behind", "run.finish()", marks=pytest.mark.slow),
    ],
)
def test_a_driver_that_is_killed_with_its_ray_leaves_finished_runs(tmp_path, environment, actor, at_last):
    """Also where the actor has too much to do yet for the time that Ray leaves it, and in the middle of `finish`."""
    made = f"""
        from backbone.run import Run
        from common import PipelineActor, TrainingPipelineActor, pipeline_actor

        @pipeline_actor
        class Behind(PipelineActor):
            def __init__(self, folder):
                super().__init__(folder)
                Run.finish = lambda *_: time.sleep(600)

        run = WandbRun("p", "n", mode="offline", dir={str(tmp_path)!r}, pipeline={actor})
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    body = textwrap.dedent(made) + LEFT.replace("time.sleep(600)", at_last)
    driver = leave(tmp_path, body, **environment | {"TMPDIR": str(scratch)})
    if at_last == "run.finish()":
        wait_for(lambda: list(scratch.glob("wandb-run-*/closed")))
    pids = [pid for name in (f"ray::{actor}", "wandb-core") for pid in below(driver.pid, name)]
    assert len(pids) == 2
    driver.kill()
    driver.communicate()
    wait_for(lambda: not list(tmp_path.glob("wandb/.*state*")))
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids))
    logs = [Log(path) for path in folders(tmp_path)]
    assert len(logs) == 1 + (actor == "Behind")  # somebody else goes on in a folder of their own
    assert {row["step"] for log in logs for row in log.rows} == set(range(100))
    assert logs[-1].exit_code == (at_last != "run.finish()")  # as that had been called
    wait_for(lambda: not list(scratch.glob("wandb-run-*")))


@pytest.mark.slow
def test_a_run_that_was_left_behind_is_taken_up_by_the_next_of_its_id(run, tmp_path, environment):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    kill_all(leave(tmp_path, **environment | {"TMPDIR": str(scratch)}))
    made = run(id="again", resume="allow")
    for step in range(100, 200):
        made.log({"tokens": 5}, step)
    ledger = made.finish()
    assert (ledger.reports, ledger.rows, ledger.lost) == (200, 200, 0)
    rows = {row["_step"]: row for path in folders(tmp_path) for row in Log(path).rows}
    assert [rows[number]["tokens_total"] for number in sorted(rows)] == list(range(5, 1_001, 5))
    assert not list(scratch.glob("wandb-run-*"))


def recover(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "backbone.recover", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)


def test_runs_that_nobody_finishes_any_more_are_finished_by_hand_and_others_are_left_alone(
    tmp_path, environment, monkeypatch
):
    scratch, mine = tmp_path / "scratch", environment | {"TMPDIR": str(tmp_path / "scratch")}
    scratch.mkdir()
    driver = leave(tmp_path, **mine)
    [folder] = scratch.glob("wandb-run-*")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert recovering.abandoned() == []  # its owner lives
    kill_all(driver)
    assert recovering.abandoned() == [folder]
    elsewhere, damaged = scratch / "wandb-run-of-another-node", scratch / "wandb-run-damaged"
    for path in (elsewhere, damaged):
        path.mkdir(mode=0o700)
    (damaged / "letter").write_bytes(b"half of one")
    (damaged / "letter").chmod(0o600)
    done = recover(**mine)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{damaged}: {damaged}/letter can't be read: "), done.stderr
    shutil.rmtree(damaged)
    assert done.stdout.startswith("n: 100 rows from 100 reports, 0 lost\n")
    assert "the pipeline actor is gone; the run was finished without it" in done.stdout
    assert "Traceback" not in done.stderr
    assert not folder.exists()
    assert not list(tmp_path.glob("wandb/.*state*"))
    logs = [Log(path) for path in folders(tmp_path)]
    rows = {row["_step"]: row["step"] for log in logs for row in log.rows}
    assert rows == {number: number for number in range(100)}
    assert logs[-1].exit_code == 1
    done = recover(str(folder), **mine)  # nothing is left to be done
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{folder}: ")
    assert done.stderr.count("\n") == 1


def letter(folder: Path, **init) -> Letter:
    """Of a run whose private folder this is, and whose owner is dead."""
    folder.mkdir(mode=0o700)
    address = Address("n", "nonce", folder, "", "", "")
    init = dict(dir=str(folder.parent), project="p", id="r", mode="offline", settings={}) | init
    made = Letter(address, "owner", "", init, {}, str(folder.parent), ["program"])
    write_letter(made)
    return made


def test_a_run_that_had_not_begun_is_nothing_to_recover(tmp_path):
    (tmp_path / "wandb").mkdir()
    folder = letter(tmp_path / "private").address.folder
    done = recover(str(folder), **os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not folder.exists()


def test_an_actor_that_comes_back_when_its_run_has_been_finished_goes_and_leaves_nothing(tmp_path):
    """Another process was quicker, and has removed the state."""
    told = letter(tmp_path / "private")
    recovering.write_ledgers(told.address.folder, {})
    with pytest.raises(GivenUpError, match="another process has finished the run"):
        open_run(told.init, told.address, "owner", threading.RLock())
    assert [*(tmp_path / "wandb").iterdir()] == []


def test_an_actor_whose_private_folder_is_gone_leaves_no_state(tmp_path):
    told = letter(tmp_path / "private")
    shutil.rmtree(told.address.folder)
    with pytest.raises(GivenUpError, match="its private folder is gone"):
        open_run(told.init, told.address, "owner", threading.RLock())
    assert [*(tmp_path / "wandb").iterdir()] == []


def test_with_a_run_that_took_up_an_earlier_one_that_one_s_folder_goes(tmp_path, environment):
    earlier = letter(tmp_path / "earlier").address
    told = letter(tmp_path / "private", settings=QUIET)
    (tmp_path / "wandb").mkdir()
    state = State(state_path(tmp_path / "wandb", "p", "r", tmp_path))
    state.note(address=told.address, earlier=dict(address=earlier), deaths=0, begun=False, end=None, **KNOWN)
    state.commit()
    state.close()
    done = recover(str(told.address.folder), **environment)
    assert done.returncode == 0, done.stderr
    assert not earlier.folder.exists()
    assert not told.address.folder.exists()


def test_folders_that_are_not_there_are_named(tmp_path):
    done = recover(str(tmp_path / "a"), str(tmp_path / "b"), **os.environ)
    assert (done.returncode, done.stderr.count("\n")) == (1, 2)
    assert all(str(tmp_path / name) in done.stderr for name in "ab")


def test_whoever_runs_a_run_is_somewhere_even_if_the_owner_s_directory_is_gone(tmp_path):
    told = dataclasses.replace(letter(tmp_path / "private"), directory=str(tmp_path / "gone"))
    write_letter(told)
    code = f"""
import os, pathlib
from backbone.files import move_in, read_letter
os.mkdir("mine"), os.chdir("mine"), os.rmdir("../mine")
move_in(read_letter(pathlib.Path({str(told.address.folder)!r})))
print(os.getcwd())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(told.address.folder), done.stderr


def test_whoever_waits_for_an_actor_gives_up_where_a_later_run_has_taken_its_place(tmp_path):
    (tmp_path / "wandb").mkdir()
    tmp_path.chmod(0o700)
    address = Address("n", "earlier", tmp_path, "", "", "")
    write_letter(Letter(address, "owner", "", dict(dir=str(tmp_path), project="p", id="again"), {}, str(tmp_path), []))
    state = State(state_path(tmp_path / "wandb", "p", "again", tmp_path.parent))
    state.note(address=address._replace(nonce="later"))
    state.commit()
    state.close()
    with pytest.raises(OSError, match="is that of a later run of this id"):
        recovering.recover(tmp_path, wait=True)


@pytest.mark.slow
def test_a_start_that_fails_leaves_an_earlier_run_of_its_id_to_recover(run, tmp_path, environment):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    kill_all(leave(tmp_path, **environment | {"TMPDIR": str(scratch)}))
    with pytest.raises(ValueError, match="can't start"):
        run(id="again", settings={"no_such_setting": 1})
    [folder] = scratch.glob("wandb-run-*")
    done = recover(os.path.relpath(folder, ROOT), **environment | {"TMPDIR": str(scratch)})
    assert done.stdout.startswith("n: 100 rows from 100 reports, 0 lost\n"), done.stdout + done.stderr


# On the Ray of all tests


def test_a_driver_that_is_killed_leaves_its_run_to_the_actor(begin, tmp_path):
    driver = begin("""
made = run(id="r")
for step in range(1, 100):
    made.log({"a": 1.0}, step)
for step in range(3):  # which the actor is not through with when it finds that it has to finish the run
    made.log_artifact("checkpoint", "model", {f"{i}": bytes([step]) for i in range(2000)})
print(made._address.folder, flush=True)
time.sleep(600)
""")
    folder = Path(driver.stdout.readline().strip())
    assert (folder / "outboxes").is_dir()
    driver.kill()
    driver.communicate()
    wait_for(lambda: not folder.exists())
    wait_for(lambda: not list(tmp_path.glob("wandb/.*state*")))
    [path] = folders(tmp_path)
    log = Log(path)
    assert [row["step"] for row in log.rows] == list(range(100))
    assert len(log.of("artifact")) == 3
    assert ledger.count(path)[""].ok
    assert log.exit_code == 1


@pytest.mark.slow
def test_what_comes_while_the_actor_is_killed_again_and_again_is_in_order_and_whole(run):
    """Steps in two calls, flat out, from two workers."""

    @ray.remote
    def work(made: WandbRun, steps: int) -> None:
        for step in range(steps):
            made.log({"tokens": 1}, step)
            made.log({"loss": float(step)}, step)

    made = run(workers=2)
    works = [work.remote(made, 2_000) for _ in range(2)]
    for killed in range(3):
        wait_for(lambda n=killed: made.progress()[0].rows > 400 * (n + 1), every=0.01)
        os.kill(pipeline_process(made), signal.SIGKILL)
    ray.get(works)
    ledger = made.finish()
    rows = {row["_step"]: row for path in ledger.paths for row in Log(path).rows}
    assert (ledger.reports, ledger.lost, ledger.ok) == (8_000, 0, True)
    assert ledger.restarts >= 1
    assert sum(row["tokens"] for row in rows.values() if "tokens" in row) == 4_000
    if ledger.rows == 2_000:  # neither ran so far ahead of the other that a row had to be made without it
        by_step = sorted((row["step"], row["tokens"], row["loss"], row["workers"]) for row in rows.values())
        assert by_step == [(step, 2, step, 2) for step in range(2_000)]


def test_when_wandb_core_dies_the_next_actor_goes_on_with_a_new_one(run):
    made = run()
    for step in range(100):
        made.log({"a": 1.0}, step, commit=True)
    wait_for(lambda: made.progress()[0].rows == 100)
    [core] = victims(made, "wandb-core")
    os.kill(core, signal.SIGKILL)
    for step in range(100, 200):
        made.log({"a": 1.0}, step, commit=True)
    ledger = made.finish()
    assert (ledger.reports, ledger.rows, ledger.restarts, ledger.ok) == (200, 200, 1, True)
    rows = {row["_step"]: row["step"] for path in ledger.paths for row in Log(path).rows}
    assert sorted(rows.values()) == [*range(200)]


@pytest.mark.slow  # what counts the deaths is in test_writer.py
@pytest.mark.parametrize("name", ["actor", "wandb-core"])
def test_an_actor_that_dies_whenever_it_starts_is_given_up_and_its_run_is_finished_without_it(run, name):
    made, step = run(), 0
    for step in range(50):
        made.log({"a": 1.0}, step, commit=True)
    wait_for(lambda: len(read_rows(made.path)) == 50)
    deadline = time.monotonic() + 120
    for _ in iter(lambda: is_there(made) and time.monotonic() < deadline, False):
        time.sleep(0.1)
        for pid in victims(made, name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                step += 1
                made.log({"a": 1.0}, step)  # it is a row that meets the death of wandb-core
    assert not is_there(made)
    ledger = made.finish()
    assert (ledger.reports, ledger.rows, ledger.lost, ledger.ok) == (step + 1, step + 1, 0, True)
    assert [w for w in ledger.warnings if "gone" in w]
    assert {row["step"] for path in ledger.paths for row in Log(path).rows} == {*range(step + 1)}


def is_there(made: WandbRun) -> bool:
    return state.actors(made._owned.actor._actor_id.hex())["State"] != "DEAD"


def victims(made: WandbRun, name: str) -> set[int]:
    """The wandb-core that the pipeline actor has started, or the actor itself as soon as it has."""
    try:
        actor = pipeline_process(made)
        cores = below(actor, "wandb-core")
        return {actor} if cores and name == "actor" else set(cores)
    except OSError:
        return set()


@pytest.mark.slow
def test_an_actor_that_dies_often_but_makes_rows_is_not_given_up(run):
    made = run()
    for round_ in range(4):  # more than in a row are allowed
        for step in range(20 * round_, 20 * round_ + 20):
            made.log({"a": 1.0}, step, commit=True)
        wait_for(lambda n=round_: len(transaction_log.TransactionLogs(made.progress()[0].paths).numbers) == 20 * n + 20)
        os.kill(pipeline_process(made), signal.SIGKILL)
        wait_for(lambda n=round_: made.progress()[0].restarts == n + 1)
    ledger = made.finish()
    assert (ledger.reports, ledger.rows, ledger.restarts, ledger.ok) == (80, 80, 4, True)


@pipeline_actor
class Uploading(PipelineActor):
    """One that has read all, and takes long to upload it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        Run.finish = lambda *_: time.sleep(600)


def test_a_run_whose_actor_is_lost_in_the_middle_of_finish_ends_as_its_owner_has_said(run):
    made = run(pipeline=Uploading)
    for step in range(10):
        made.log({"a": 1.0}, step)
    with ThreadPoolExecutor(1) as thread:
        finishing = thread.submit(made.finish)
        wait_for((made._address.folder / "closed").exists)
        time.sleep(1)
        ray.kill(made._owned.actor)
        ledger = finishing.result()
    assert (ledger.reports, ledger.rows, ledger.lost) == (10, 10, 0)
    assert Log(ledger.path).exit_code == 0


@pytest.mark.slow
def test_a_run_that_a_copy_has_finished_stays_its_owner_s_until_that_finishes_it_too(run):
    @ray.remote(num_cpus=0)
    def finish(copy: WandbRun) -> None:
        copy.finish()

    made, seen_from_elsewhere = run(id="first"), ray.remote(num_cpus=0)(is_alive)
    made.log({"a": 1.0}, 0)
    ray.get(finish.remote(made))
    other = run(id="second")
    other.log({"a": 1.0}, 0)
    # Else its actor thinks that its owner is gone, and cleans up.
    assert ray.get(seen_from_elsewhere.remote(made._address.folder, made._outbox.process.name))
    assert (made.finish().rows, other.finish().rows) == (1, 1)


def test_a_place_of_which_the_actor_had_not_heard_before_it_was_killed_for_good_is_named(run):
    made = run()
    key = made._address.key("place", "abcdef0123 digest")
    ray.kill(made._owned.actor)
    wait_for(lambda: not is_there(made))
    ray_internals.put(key, b"/nowhere")
    ledger = made.finish()
    assert (ledger.ok, ledger.unheard) == (False, ["node abcdef: what was logged there at last"])
    assert ray_internals.get(key) is None


def test_a_run_whose_private_folder_is_gone_with_its_actor_is_no_reason_to_stop(run):
    made = run()
    ray.kill(made._owned.actor)
    wait_for(lambda: not is_there(made))
    shutil.rmtree(made._address.folder)
    ledger = made.finish()
    assert (ledger.ok, ledger.unheard) == (False, ["all places"])


@pytest.mark.slow
def test_a_view_whose_run_has_lost_its_actor_is_no_reason_to_stop(run):
    made = run(prefix="training/")
    view = WandbRun("p", share=made, prefix="inference/")
    ray.kill(made._owned.actor)
    wait_for(lambda: not is_there(made))
    assert not view.finish().ok
    assert made.finish().lost == 0


@pytest.mark.parametrize("name", ["wandb-core", pytest.param("actor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("after", [0.0, pytest.param(0.05, marks=pytest.mark.slow)])
def test_a_death_in_the_middle_of_finish_does_not_spoil_the_ledger(run, name, after):
    made = run()
    for step in range(1_000):
        made.log({"a": 1.0}, step)
    victim = victims(made, name)
    call = made._owned.actor.finish.remote(0)
    time.sleep(after)
    for pid in victim:
        with contextlib.suppress(ProcessLookupError):  # it may have finished
            os.kill(pid, signal.SIGKILL)
    ledger = made.finish()
    assert (ledger.reports, ledger.rows, ledger.lost, ledger.ok) == (1_000, 1_000, 0, True)
    rows = {row["_step"] for path in ledger.paths for row in Log(path).rows}
    assert len(rows) == 1_000
    assert call


def test_a_restart_that_finds_the_state_gone_goes_on_with_a_new_one_and_the_ledger_says_so(run):
    @ray.remote
    class Worker:
        def log(self, made: WandbRun, first: int) -> None:
            for step in range(first, first + 100):
                made.log({"tokens": 1}, step, commit=True)

    made, worker = run(), Worker.remote()
    ray.get(worker.log.remote(made, 0))
    wait_for(lambda: len(transaction_log.TransactionLogs([made.path]).numbers) == 100)
    for file in made.path.parent.glob(".*state*"):
        file.unlink()
    os.kill(pipeline_process(made), signal.SIGKILL)
    ray.get(worker.log.remote(made, 100))  # training goes on
    wait_for(lambda: made.progress()[0].rows >= 100)
    ray.get(worker.log.remote(made, 200))
    ledger = made.finish()
    rows = {row["_step"]: row["step"] for path in folders(made.path.parent.parent) for row in Log(path).rows}
    assert sorted(rows.values()) == [*range(300)]
    assert (ledger.rows, ledger.lost, ledger.ok) == (200, 0, False)
    assert ledger.unheard
    assert [warning for warning in ledger.warnings if "state was lost" in warning]


@pytest.mark.slow
def test_where_somebody_cleans_the_temporary_folder_training_goes_on_and_the_ledger_says_so(run, caplog):
    """The run's private folder, with the outboxes and the letter."""

    @ray.remote
    class Worker:
        def log(self, made: WandbRun, first: int) -> None:
            for step in range(first, first + 100):
                made.log({"tokens": 1}, step, commit=True)

    made, worker = run(), Worker.remote()
    ray.get(worker.log.remote(made, 0))
    wait_for(lambda: made.progress()[0].rows == 100)
    shutil.rmtree(made._address.folder)
    step = 10**6
    while not made._address.folder.exists():  # it is looked at once a second, while somebody logs
        made.log({"tokens": 1}, step, commit=True)
        step += 1
        time.sleep(0.01)
    ray.get(worker.log.remote(made, 100))
    time.sleep(1)
    ray.get(worker.log.remote(made, 200))
    ledger = made.finish()
    steps = {row["step"] for row in Log(ledger.path).rows}
    assert steps >= {*range(100), *range(201, 300)}
    assert ledger.reports == 300 + step - 10**6
    assert ledger.rows == len(steps) == ledger.reports - ledger.lost
    assert 0 < ledger.lost <= 102 + step - 10**6
    assert ledger.unheard
    assert not ledger.ok
    assert "is gone, and made anew" in caplog.text


@pytest.mark.slow
def test_an_id_of_the_environment_is_free_again_when_a_run_could_not_start_with_it(run, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_RUN_ID", "claimed")
    with pytest.raises((OSError, RuntimeError)):
        run(dir="/proc")
    made = run()
    assert made.id == "claimed"
    assert "stays outside" not in caplog.text
    assert made.finish().ok


# Several pipelines


@pytest.mark.slow
def test_many_pipelines_share_a_run_and_each_may_close_its_steps(run):
    @ray.remote(num_cpus=0)
    def log_one(made: WandbRun) -> None:
        made.log({"a": 1.0}, 1)

    first = run(prefix="p0/")
    others = [WandbRun("p", pipeline=InferencePipelineActor, share=first, prefix=f"p{i}/") for i in range(1, 14)]
    for made in (first, *others):
        made.log({"a": 1.0}, 0)
    assert (others[-1].finish().reports, others[-1].progress()[0].rows) == (1, 1)
    assert first.progress()[0].rows == 0
    ray.get(log_one.remote(others[-1]))  # what comes later has rows of its own
    others[0].log({"a": 1.0}, 1)
    ledger = first.finish()
    assert ledger.ok
    assert [(ledger.reports, ledger.rows) for ledger in (ledger, others[0].finish(), others[-1].finish())] == [
        (1, 1),
        (2, 2),
        (2, 2),
    ]
    with pytest.raises(RuntimeError, match="finished"):
        others[-1].log({"a": 1.0}, 1)
    with pytest.raises(ray.exceptions.RayTaskError, match="finished"):
        ray.get(log_one.remote(others[-1]))


@pytest.mark.slow
def test_rows_of_three_threads_and_calls_in_between_are_all_there(run):
    first = run(prefix="p0/")
    pipelines = [first, *(WandbRun("p", share=first, prefix=f"p{i}/") for i in (1, 2))]
    with ThreadPoolExecutor(4) as pool:
        logging = [pool.submit(log_steps, made, 300) for made in pipelines]
        while not all(future.done() for future in logging):
            pool.submit(first.expect, 1).result()
    ledgers = [first.finish(), *(made.finish() for made in pipelines[1:])]
    assert [(ledger.reports, ledger.rows, ledger.lost) for ledger in ledgers] == [(300, 300, 0)] * 3
    rows = Log(first.path).rows
    assert [row["_step"] for row in rows] == list(range(900))
    assert sorted(row["p1/step"] for row in rows if "p1/step" in row) == list(range(300))


def log_steps(made: WandbRun, steps: int) -> None:
    for step in range(steps):
        made.log({"a": 1.0}, step)


# What else the actor does


def test_a_step_that_waits_for_a_silent_worker_gets_its_row_by_the_clock(run):
    @pipeline_actor
    class Hasty(PipelineActor):
        def __init__(self, folder: Path):
            Steps.MINUTE = 1.0
            super().__init__(folder)

    made = run(workers=2, pipeline=Hasty)
    made.log({"a": 1.0}, 0)
    wait_for(lambda: made.progress()[0].reports == 1, every=0.01)
    assert made.progress()[0].rows == 0
    wait_for(lambda: made.progress()[0].rows == 1)
    ledger = made.finish()
    assert (ledger.rows, ledger.partial) == (1, 1)
    assert [warning for warning in ledger.warnings if "step 0 stands on 1 of 2 workers" in warning]


def test_what_another_process_has_finished_is_not_counted_anew(run):
    """As where that was started in vain, and the actor died after all."""
    made, theirs = run(), ledger.Ledger("n", "i", reports=7, rows=7)
    made.log({"loss": 1.0}, 0)
    recovering.write_ledgers(made._address.folder, {"": theirs})
    assert made.finish() == theirs


class Unreadable(wandb.Histogram):
    """It can be sent, and nobody can make it again."""

    def __reduce__(self) -> tuple:
        return int, ("no number",)


def test_a_view_that_is_finished_knows_what_its_steps_have_lost(run):
    first = run(prefix="a/")
    view = WandbRun("p", share=first, prefix="b/")
    view.log({"a": Unreadable([1.0])}, 0)
    view.log({"a": 1.0}, 1)
    ledger = view.finish()
    assert (ledger.reports, ledger.rows, ledger.lost, ledger.ok) == (2, 1, 1, False)
    first.finish()


def test_each_kind_of_warning_is_one_line_with_its_count(run):
    made = run()
    for step in range(50):
        for _ in range(2):
            made.log({"loss": 1.0}, step)  # weighted by tokens, which are not there
    ledger = made.finish()
    assert [w for w in ledger.warnings if "(50 times)" in w]
    assert len(ledger.warnings) == 1


def test_artifacts_under_way_when_the_actor_dies_come_once(run):
    made = run()
    for n in range(12):
        made.log_artifact("checkpoint", "model", {"w": bytes([n]) * 100}, aliases=["latest", f"step-{n}"])
        if n == 5:
            os.kill(pipeline_process(made), signal.SIGKILL)
    ledger = made.finish()
    found = [artifact for path in ledger.paths for artifact in Log(path).of("artifact")]
    steps = [next(a for a in artifact["aliases"] if a.startswith("step-")) for artifact in found]
    assert steps == [f"step-{n}" for n in range(12)]
    assert ledger.ok
