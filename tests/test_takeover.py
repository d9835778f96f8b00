"""When the pipeline actor can't finish its run: it is started anew, or the driver does it from what the actor left."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backbone import disk
from backbone.steps import Steps
from common import InferencePipelineActor, PipelineActor, WandbRun, pipeline_actor

import pytest
import ray
from conftest import ONE_EACH, ROOT, Log, folders, read_rows, wait_for
from processes import below, check_ledger, everything, pipeline_process
from ray._private import state


@pytest.mark.parametrize(
    ("number", "status", "order"),
    [
        (signal.SIGTERM, 143, "the driver last"),
        pytest.param(signal.SIGTERM, 143, "the driver first", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, "any", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_job_leaves_whole_runs_that_have_failed(busy, tmp_path, number, status, order):
    process = busy(*ONE_EACH)
    pids = everything(process.pid)
    began = time.monotonic()
    for pid in reversed(pids) if order == "the driver last" else pids:
        os.kill(pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert time.monotonic() - began < 30  # 15 on a machine that does nothing else
    assert "Traceback" not in stderr
    check_ledger(stdout, tmp_path)
    for name in ("training", "inference"):
        logs = [Log(path) for path in folders(tmp_path) if name in path.name]
        rows = {row["_step"]: row for log in logs for row in log.rows}
        assert sorted(rows) == list(range(len(rows)))
        assert logs[-1].exit_code == 1
    assert not list(tmp_path.glob("wandb/.*store*"))


def program(tmp_path: Path, body: str, run: bool = True) -> str:
    """A driver's program with a Ray of its own; `run` is the run, `actor()` the pipeline actor's process."""
    start = f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from common import WandbRun
        import ray
        from ray._private import state
        def actor():
            return state.actors(run._actor._actor_id.hex())["Pid"]
        def show(ledger):
            print("LEDGER", ledger.reports, ledger.rows, ledger.lost, ledger.gone, ledger.ok, flush=True)
            print(*ledger.warnings, sep="\\n", flush=True)
        if __name__ == "__main__":
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="critical")
            run = {run} and WandbRun("p", "n", mode="offline", dir={str(tmp_path)!r})
    """
    return textwrap.dedent(start) + textwrap.indent(textwrap.dedent(body), "    ")


def shown(stdout: str) -> list[str]:
    return next(line.split()[1:] for line in stdout.splitlines() if line.startswith("LEDGER"))


def test_when_all_of_ray_is_gone_the_driver_finishes_the_run(tmp_path, environment):
    body = """
        for step in range(100):
            run.log({"a": 1.0}, step)
        run.flush()
        ray._private.worker.global_worker.threads_stopped.set()  # one of Ray's own, which would take a whole core
        node = ray._private.worker.global_worker.node
        pids = [actor(), *(node.all_processes[name][0].process.pid for name in ("raylet", "gcs_server"))]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        for call in (lambda: run.log({"a": 1.0}, 100), run.progress, lambda: run.expect(2), run.flush):
            call()
        print("BOUNDED" if time.monotonic() - began < 30 else time.monotonic() - began, flush=True)
        show(run.finish())
        os._exit(0)  # Ray's own end takes long
    """
    command = [sys.executable, "-c", program(tmp_path, body)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert shown(done.stdout) == ["100", "100", "0", "True", "False"], done.stdout + done.stderr
    assert "BOUNDED\n" in done.stdout
    rows = {row["_step"]: row["step"] for path in folders(tmp_path) for row in Log(path).rows}
    assert sorted(rows.values()) == list(range(100))


@pytest.mark.parametrize("actor", [pytest.param("TrainingPipelineActor", marks=pytest.mark.slow), "Behind"])
def test_a_driver_that_is_killed_with_its_ray_leaves_finished_runs(tmp_path, environment, actor):
    """Also where the actor has too much to do yet for the time that Ray leaves it."""
    made = f"""
        from common import PipelineActor, TrainingPipelineActor, pipeline_actor

        @pipeline_actor
        class Behind(PipelineActor):
            def finish(self, *arguments, **options):
                time.sleep(600)

        run = WandbRun("p", "n", mode="offline", dir={str(tmp_path)!r}, pipeline={actor})
        for step in range(100):
            run.log({{"a": 1.0}}, step)
        run.flush()
        print("READY", flush=True)
        time.sleep(600)
    """
    command, scratch = [sys.executable, "-c", program(tmp_path, made, run=False)], tmp_path / "scratch"
    scratch.mkdir()
    variables = environment | {"TMPDIR": str(scratch)}
    driver = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "READY\n"
    pids = [pid for name in (f"ray::{actor}", "wandb-core") for pid in below(driver.pid, name)]
    assert len(pids) == 2
    driver.kill()
    driver.communicate()
    wait_for(lambda: not list(tmp_path.glob("wandb/.*store*")), seconds=20)
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids), seconds=20)
    logs = [Log(path) for path in folders(tmp_path)]
    assert {row["step"] for log in logs for row in log.rows} == set(range(100))
    assert logs[-1].exit_code == 1
    assert not list(scratch.glob("wandb-run-*"))


@ray.remote(num_cpus=0)
def log_late(made: WandbRun) -> int:
    """Logs after the actor is gone; returns how long it took in all, in seconds."""
    began = time.monotonic()
    for step in range(1_000, 1_100):
        made.log({"a": 1.0}, step)
    return time.monotonic() - began


def test_training_goes_on_when_somebody_kills_the_actor(run):
    made = run()
    for step in range(50):
        made.log({"a": 1.0}, step)
    made.flush()
    ray.kill(made._actor)
    assert ray.get(log_late.remote(made)) < 10
    ledger = made.finish()
    assert (ledger.reports, ledger.rows, ledger.lost, ledger.gone, ledger.ok) == (50, 50, 0, True, False)
    assert Log(ledger.path).exit_code == 0


@pytest.mark.parametrize("name", ["actor", pytest.param("wandb-core", marks=pytest.mark.slow)])
def test_an_actor_that_dies_whenever_it_starts_is_given_up(run, name):
    made, step = run(), 0
    for step in range(50):
        made.log({"a": 1.0}, step)
    made.flush()
    wait_for(lambda: len(read_rows(made.path)) == 49)
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
    assert (ledger.gone, ledger.ok) == (True, False)
    assert ledger.reports == ledger.rows + ledger.lost
    assert [w for w in ledger.warnings if "gone" in w]
    steps = {row["step"] for path in ledger.paths for row in Log(path).rows}
    assert steps >= set(range(50))


def is_there(made: WandbRun) -> bool:
    return state.actors(made._actor._actor_id.hex())["State"] != "DEAD"


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
        wait_for(lambda n=round_: len(disk.numbers(made.progress()[0].paths)) == 20 * n + 20)
        os.kill(pipeline_process(made), signal.SIGKILL)
        wait_for(lambda n=round_: made.progress()[0].restarts == n + 1)
    ledger = made.finish()
    assert (ledger.reports, ledger.rows, ledger.restarts, ledger.ok) == (80, 80, 4, True)


@pytest.mark.parametrize("name", ["actor", pytest.param("wandb-core", marks=pytest.mark.slow)])
@pytest.mark.parametrize("after", [0.0, pytest.param(0.05, marks=pytest.mark.slow)])
def test_a_death_in_the_middle_of_finish_does_not_spoil_the_ledger(run, name, after):
    made = run()
    for step in range(1_000):
        made.log({"a": 1.0}, step)
    made.flush()
    victim = victims(made, name)
    call = made._actor.finish.remote(0)
    time.sleep(after)
    for pid in victim:
        with contextlib.suppress(ProcessLookupError):  # it may have finished
            os.kill(pid, signal.SIGKILL)
    ledger = made.finish()
    assert (ledger.reports, ledger.rows, ledger.lost, ledger.ok) == (1_000, 1_000, 0, True)
    rows = {row["_step"] for path in ledger.paths for row in Log(path).rows}
    assert len(rows) == 1_000
    assert call


@ray.remote(num_cpus=0)
def log_one(made: WandbRun) -> None:
    made.log({"a": 1.0}, 1)


def test_many_pipelines_share_a_run(run):
    first = run(prefix="p0/")
    others = [WandbRun("p", pipeline=InferencePipelineActor, share=first, prefix=f"p{i}/") for i in range(1, 14)]
    for made in (first, *others):
        made.log({"a": 1.0}, 0)
    began = time.monotonic()
    assert others[-1].finish().reports == 1
    assert time.monotonic() - began < 4
    with pytest.raises(RuntimeError, match="finished"):
        others[-1].log({"a": 1.0}, 1)
    with pytest.raises(RuntimeError, match="finished"):
        ray.get(log_one.remote(others[-1]))  # whose process doesn't know yet
    others[0].log({"a": 1.0}, 1)
    ledger = first.finish()
    assert (ledger.reports, others[0].finish().reports, ledger.ok) == (1, 2, True)


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


def test_a_step_that_waits_for_a_silent_worker_gets_its_row_by_the_clock(run):
    @pipeline_actor
    class Hasty(PipelineActor):
        CLOCK = 0.2

        def __init__(self, letter: Path):
            Steps.MINUTE = 1.0
            super().__init__(letter)

    made = run(workers=2, pipeline=Hasty)
    made.log({"a": 1.0}, 0)
    made.flush()
    assert made.progress()[0].rows == 0
    wait_for(lambda: made.progress()[0].rows == 1, seconds=20)
    ledger = made.finish()
    assert (ledger.rows, ledger.partial) == (1, 1)
    assert [warning for warning in ledger.warnings if "step 0 stands on 1 of 2 workers" in warning]


def test_each_kind_of_warning_is_one_line_with_its_count(run):
    made = run()
    for step in range(50):
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


def test_a_run_that_was_left_behind_is_taken_up_by_the_next_of_its_id(run, tmp_path, environment):
    body = """
        for step in range(100):
            run.log({"tokens": 5}, step)
        run.flush()
        print("READY", flush=True)
        time.sleep(600)
    """
    text = program(tmp_path, body).replace('"n", mode', '"n", id="again", resume="allow", mode')
    process = subprocess.Popen([sys.executable, "-c", text], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "READY\n"
    for pid in reversed(everything(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    made = run(id="again", resume="allow")
    for step in range(100, 200):
        made.log({"tokens": 5}, step)
    ledger = made.finish()
    assert (ledger.reports, ledger.rows, ledger.lost) == (200, 200, 0)
    rows = {row["_step"]: row for path in folders(tmp_path) for row in Log(path).rows}
    assert [rows[number]["tokens_total"] for number in sorted(rows)] == list(range(5, 1_001, 5))
