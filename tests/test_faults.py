"""Nothing that was logged is lost, whatever dies: real signals to real processes, then the transaction log is read."""

import contextlib
import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import (
    InferencePipelineActor,
    PipelineActor,
    RunFinishedError,
    TrainingPipelineActor,
    WandbRun,
    pipeline_actor,
)

import ml_dtypes
import numpy as np
import pytest
import ray
import wandb
from conftest import ONE_EACH, ROOT, Log, folders, logs, wait_for
from processes import below, check_ledger, ledger, reports_in_rows, steps_on_disk


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_after_an_interrupt_every_report_is_in_a_row_and_the_runs_have_failed(busy, tmp_path, number, status):
    process = busy(*ONE_EACH)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in stdout + stderr
    check_ledger(stdout, tmp_path)
    for log in logs(tmp_path).values():
        assert log.exit_code == (143 if number == signal.SIGTERM else 1)  # with which a sweep queues it again
        assert [row["step"] for row in log.rows] == list(range(len(log.rows)))


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_damages_nothing(busy, tmp_path):
    process = busy(*ONE_EACH)
    [actor] = below(process.pid, "ray::TrainingPipelineActor")
    os.kill(actor, signal.SIGSTOP)  # so that the end waits for it
    while process.poll() is None:  # an interrupt that comes before the first was handled is no second one
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.returncode == 130
    assert "rows from" not in process.communicate()[0]  # the first one would have led to the last lines
    for name in ("training", "inference"):
        assert steps_on_disk(tmp_path, name) > 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(actor, signal.SIGKILL)


@pytest.mark.slow
def test_after_a_sigkill_of_the_driver_all_is_on_disk_and_nothing_is_left_running(busy, tmp_path):
    process = busy("--step-seconds", "0.1")  # so that the actors manage it, and nobody goes on in folders of their own
    pids = [pid for name in ("PipelineActor", "Worker", "wandb-core") for pid in below(process.pid, name)]
    assert len(pids) >= 8
    process.kill()
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids), seconds=20)
    for name, log in logs(tmp_path).items():
        assert log.exit_code == 1
        steps = [row["step"] for row in log.rows]
        assert steps == list(range(len(steps))), name
        assert max(row["workers"] for row in log.rows) == 2
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, folders(tmp_path))]
    dry = subprocess.run(command, capture_output=True, text=True)
    assert "Would sync 2 run(s)" in dry.stdout + dry.stderr
    assert not list(tmp_path.glob("wandb/.*state*"))


@pytest.mark.slow
def test_a_demo_goes_on_whoever_of_its_processes_dies(start, tmp_path):
    """A pipeline actor, the other one's wandb-core and a worker: no step is missing or different; it says who died."""
    process = start("demo1", "--steps", "300", "--step-seconds", "0.02", "--mode", "offline", "--training-workers", "1")
    wait_for(lambda: len(folders(tmp_path)) == 2)
    wait_for(lambda: steps_on_disk(tmp_path, "training") and steps_on_disk(tmp_path, "inference"))
    [actor] = below(process.pid, "ray::TrainingPipelineActor")
    [core] = below(below(process.pid, "ray::InferencePipelineActor")[0], "wandb-core")
    worker, _ = below(process.pid, "ray::InferenceWorker")
    for pid in (actor, core, worker):
        os.kill(pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.fullmatch(r"inference worker \d failed: its process died\n", stderr)
    check_ledger(stdout, tmp_path)
    for name in ("training", "inference"):
        assert ledger(stdout, name)["restarts"] == 1
        parts = [Log(path) for path in folders(tmp_path) if name in path.name]
        assert len(parts) == 2
        assert {part.run["run_id"] for part in parts} == {f"demo1-{name}-x"}
        assert parts[-1].exit_code == 1
        rows: dict[int, dict] = {}
        for row in (row for part in parts for row in part.rows):  # of which some are in both
            said = {key: value for key, value in row.items() if key[0] != "_"}
            assert rows.setdefault(row["_step"], said) == said
        assert sorted(rows) == list(range(len(rows)))
        assert {row["step"] for row in rows.values()} == set(range(300))
        total = "tokens" if name == "training" else "rollouts"
        assert rows[len(rows) - 1][f"{total}_total"] == sum(row[total] for row in rows.values())
    assert not list(tmp_path.glob("wandb/.*state*"))


# `WandbRun` on its own


def test_an_exception_in_the_driver_finishes_the_run_as_failed(run):
    with pytest.raises(ZeroDivisionError), run() as made:
        made.log({"a": 1.0}, 0)
        1 / 0  # noqa: B018
    log = Log(made.path)
    assert (log.exit_code, len(log.rows)) == (1, 1)


def test_an_exception_in_a_worker_keeps_all_rows_up_to_then(ray_here, run):
    @ray_here.remote
    def work(made: WandbRun, fail_at: int) -> None:
        for step in range(20):
            if step == fail_at:
                raise ValueError("out of rollouts")
            made.log({"a": float(step)}, step)

    made = run(workers=2)
    refs = [work.remote(made, fail_at) for fail_at in (7, 99)]
    with pytest.raises(ValueError, match="out of rollouts"):
        ray_here.get(refs)
    ray_here.get(refs[1])
    report = made.finish(1)
    assert (report.reports, report.rows, report.lost) == (27, 20, 0)
    assert [row["workers"] for row in Log(made.path).rows] == [2] * 7 + [1] * 13


@pytest.mark.slow
def test_a_driver_that_ends_without_finish_loses_nothing(tmp_path, environment):
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from common import WandbRun
import ray
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
run = WandbRun("p", "n", workers=2, mode="offline", dir={str(tmp_path)!r})
for step in range(500): run.log({{"a": 1.0}}, step)
"""
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    log = Log(folders(tmp_path)[0])
    assert [row["step"] for row in log.rows] == list(range(500))
    assert log.exit_code == 0


@pytest.mark.slow
def test_threads_and_processes_share_a_handle(ray_here, run):
    @ray_here.remote
    class Worker:
        def work(self, made: WandbRun) -> None:
            def log() -> None:
                for step in range(250):
                    made.log({"tokens": 1}, step)

            threads = [threading.Thread(target=log) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    made = run(workers=2)
    ray_here.get([worker.work.remote(made) for worker in [Worker.remote() for _ in range(2)]])
    report = made.finish()
    rows = Log(made.path).rows
    assert (report.reports, report.rows, report.lost) == (4_000, len(rows), 0)
    assert sum(row["tokens"] for row in rows) == 4_000
    assert {row["step"] for row in rows} == set(range(250))


def test_a_flood_makes_log_wait_and_memory_stays_flat(ray_here, run):
    @ray_here.remote
    class Worker:
        def work(self, made: WandbRun) -> float:
            samples, memory = np.zeros(1_000), []
            for i in range(7_500):  # 60 MB
                made.log({"a": samples}, i // 100)
                if i % 100 == 0:  # Ray's shared memory is not counted: it holds what is under way
                    [anonymous] = re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
                    memory.append(int(anonymous) / 1024)
            return max(memory) - memory[0]

    made = run()
    megabytes = ray_here.get(Worker.remote().work.remote(made))
    report = made.finish()
    assert (report.reports, report.rows, report.lost) == (7_500, 75, 0)
    assert megabytes < 50


@pytest.mark.slow
def test_a_straggler_thousands_of_steps_behind_gets_its_rows(ray_here, run):
    @ray_here.remote
    class Worker:
        def work(self, made: WandbRun) -> None:
            for step in range(3_000):
                made.log({"a": 1.0}, step)

    made = run(workers=2)
    for _ in range(2):
        ray_here.get(Worker.remote().work.remote(made))
    report = made.finish()
    rows = Log(made.path).rows
    assert (report.reports, reports_in_rows(rows), report.lost) == (6_000, 6_000, 0)
    assert {row["step"] for row in rows} == set(range(3_000))


class Text(str):
    """A kind of string that no pipeline actor knows."""


def test_what_can_not_be_logged_raises_at_the_caller_and_harms_nothing(run):
    made = run()
    nothing = object()
    for key in ("", "_step", "step", "workers"):
        with pytest.raises(ValueError, match=repr(key)):
            made.log({key: 1.0}, 0)
    with pytest.raises(TypeError, match="5"):
        made.log({5: 1.0}, 0)
    for value in (nothing, {"a": nothing}, [[1], [2, 3]], np.array(["x"]), 1j, 10**400):
        with pytest.raises(TypeError, match="'bad"):
            made.log({"good": 1.0, "bad": value}, 0)
    for step in (-1, 1.5, "1", None, True):
        with pytest.raises((TypeError, ValueError), match="step"):
            made.log({"a": 1.0}, step)
    with pytest.raises(TypeError, match="commit must be True or False, not 'rank 0'; or was it meant as label="):
        made.log({"a": 1.0}, 0, "rank 0")
    for arguments in (
        ("bad/name", "model", {"f": b"x"}),
        ("name", "model", {"f": 5}),
        ("name", "model", {}),
        ("name", "model", "/no/such/file"),
    ):
        with pytest.raises((TypeError, ValueError, OSError)):
            made.log_artifact(*arguments)
    with pytest.raises(ValueError, match="aliases"):
        made.log_artifact("name", "model", {"f": b"x"}, aliases=["a:b"])
    made.log({"a": np.float32(1.5), "b": True, "c": Text("x"), "d": [1, 2], "e": np.array([])}, np.int64(3))
    report = made.finish()
    assert report.reports == 1
    [row] = Log(made.path).rows
    assert {key: value for key, value in row.items() if key[0] != "_"} == {
        **{"a": 1.5, "b": 1, "c": "x", "d/mean": 1.5, "d/min": 1, "d/max": 2},
        **{"step": 3, "workers": 1},
    }


def test_all_kinds_of_values_are_in_the_row_as_what_they_are(ray_here, run):
    @ray_here.remote
    def work(made: WandbRun, rank: int) -> None:
        table = wandb.Table(columns=["rank"], data=[[rank]])
        kinds = {"bf16": ml_dtypes.bfloat16(1.5), "histogram": wandb.Histogram([1, 2, 2]), "nan": math.nan}
        made.log({"nested": {"deep": {"loss": float(rank)}}, "none": None, "rollouts": table, **kinds}, 0)

    made = run(workers=2)
    ray_here.get([work.remote(made, rank) for rank in range(2)])
    assert made.finish().ok
    [row] = Log(made.path).rows
    assert (row["nested/deep/loss"], row["bf16"], row["histogram._type"], row["workers"]) == (0.5, 1.5, "histogram", 2)
    assert sum(row["histogram.values"]) == 3  # of one of them
    assert row["nan"] == "NaN"
    assert not [key for key in row if key.startswith("none")]
    table = json.loads((made.path / "files" / row["rollouts.path"]).read_text())
    assert sorted(table["data"]) == [[0], [1]]


def test_a_constructor_that_can_not_work_says_so(run):
    for options, named in (
        ({"workers": 0}, "workers"),
        ({"prefix": "training"}, "prefix"),
        ({"pipeline": object}, "pipeline"),
        ({"bogus": 1}, "bogus"),
        ({"id": "a/b"}, "id 'a/b'"),
        ({"tags": [""]}, "tag"),
        ({"notes": threading.Lock()}, "notes=.* can't be sent"),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=named) as raised:
            run(**options)
        assert not re.search(r"\n|\x1b|ray::", str(raised.value))  # the cause, in one plain line
    for project in ("", "a/b", 5):
        with pytest.raises((TypeError, ValueError, RuntimeError), match="project"):
            WandbRun(project, mode="offline")
    owner = run(prefix="training/")
    for workers in (-1, "3", 2.5, True):
        with pytest.raises(ValueError, match="workers"):
            owner.expect(workers)
    with pytest.raises(TypeError, match="metadata of artifact 'a': 'lock' can't be sent"):
        owner.log_artifact("a", "model", {"f": b""}, metadata={"lock": threading.Lock()})
    with pytest.raises(ValueError, match="overlap"):
        WandbRun("p", share=owner)
    with pytest.raises(ValueError, match="project"):
        WandbRun("q", share=owner, prefix="inference/")
    owner.finish()


def test_an_id_that_is_no_file_name_is_refused_before_anything_is_touched(run, tmp_path):
    with pytest.raises(ValueError, match="evil"):
        run(id="x/../../../evil", dir=tmp_path / "runs")
    assert not list(tmp_path.iterdir())


def test_after_finish_log_raises_everywhere_and_finish_returns_the_same(ray_here, run):
    @ray_here.remote
    def late(made: WandbRun) -> str:
        try:
            made.log({"a": 1.0}, 1)
        except RunFinishedError as error:
            return str(error)
        return ""

    made = run()
    made.log({"a": 1.0}, 0)
    report = made.finish()
    assert made.finish() == report
    with pytest.raises(RunFinishedError, match="finished"):
        made.log({"a": 1.0}, 1)
    with pytest.raises(RunFinishedError, match="finished"):
        made.log_artifact("name", "model", {"f": b"x"})
    assert "finished" in ray_here.get(late.remote(made))
    assert len(Log(made.path).rows) == 1


def test_a_copy_may_finish_the_run_and_the_ledger_is_the_same(ray_here, run):
    @ray_here.remote
    def finish(made: WandbRun):
        made.log({"a": 1.0}, 0)
        return made.finish()

    made = run()
    report = ray_here.get(finish.remote(made))
    assert (report.reports, report.rows, report.ok) == (1, 1, True)
    with pytest.raises(RunFinishedError, match="finished"):
        made.log({"a": 1.0}, 1)
    assert made.finish() == report


@pytest.mark.slow
def test_two_may_finish_a_run_at_once(run):
    made = run()
    made.log({"a": 1.0}, 0)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(made.finish, (0, 1))
    assert one == other
    assert (one.reports, one.rows, one.lost, one.ok) == (1, 1, 0, True)


@pytest.fixture
def lingering() -> ray.actor.ActorClass:
    """A pipeline that is slow to go when its run is finished."""

    @pipeline_actor
    class Lingering(PipelineActor):
        def leave(self):
            self._host.forget()
            time.sleep(2)
            super().leave()

    return Lingering


def test_while_the_actor_goes_the_run_is_finished_for_all(run, lingering, tmp_path):
    made = run(pipeline=lingering)
    made.log({"a": 1.0}, 0)
    other = copy.copy(made)
    assert made.finish().ok
    wait_for(lambda: not [*tmp_path.glob("wandb/.*state*")], every=0.01)
    calls = [other.finish, other.progress, lambda: other.expect(2), lambda: other.log({"a": 1.0}, 1)]
    for call in [*calls, lambda: other.use_artifact("a:latest"), lambda: other.log_artifact("a", "files", {"a": b"a"})]:
        with pytest.raises(RunFinishedError, match="finished"):
            call()


@pytest.mark.slow
def test_a_signal_handler_may_finish_a_run_that_is_being_finished(run, lingering):
    """Also where the handler's `finish` is over, and the actor on its way out, before the other one asks for it."""
    for pipeline, after in ((TrainingPipelineActor, 0.05), (lingering, 0.001)):
        ledgers, made = [], run(pipeline=pipeline)

        def finish(*_, ledgers=ledgers, made=made) -> None:
            ledgers.append(made.finish(1))
            time.sleep(0.5)

        for step in range(1_000):
            made.log({"a": 1.0}, step)
        before = signal.signal(signal.SIGALRM, finish)
        try:
            signal.setitimer(signal.ITIMER_REAL, after)
            ledgers.append(made.finish())
            wait_for(lambda ledgers=ledgers: len(ledgers) == 2)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert ledgers[0] == ledgers[1]
        assert (ledgers[0].rows, ledgers[0].ok) == (1_000, True)


def test_a_run_whose_actor_somebody_has_killed_is_finished_without_it_and_training_goes_on(ray_here, run, caplog):
    """Whoever asks that actor for something is warned once."""

    @ray_here.remote
    def work(made: WandbRun) -> None:
        for step in range(50, 100):
            made.log({"a": 1.0}, step)
        assert made.flush()
        made.expect(2)

    made = run()
    for step in range(50):
        made.log({"a": 1.0}, step)
    ray_here.kill(made._owned.actor)
    for _ in range(5):
        made.progress()
    assert caplog.text.count("progress failed") == 1
    ray_here.get(work.remote(made))
    ledger = made.finish(3)
    assert (ledger.reports, ledger.rows, ledger.lost, ledger.ok) == (100, 100, 0, True)
    assert ledger.warnings == ["the pipeline actor is gone; the run was finished without it"]
    rows = {row["_step"]: row["step"] for path in ledger.paths for row in Log(path).rows}
    assert sorted(rows.values()) == [*range(100)]
    assert Log(ledger.path).exit_code == 3
    assert not list(made.path.parent.glob(".*state*"))
    assert not made._address.folder.exists()


def test_an_id_can_not_be_used_twice_at_once(run):
    made = run(id="same")
    with pytest.raises(OSError, match="is another run of this id going on"):
        run(id="same")
    made.log({"a": 1.0}, 0)
    assert made.finish().rows == 1


@pytest.mark.slow
def test_one_run_can_carry_two_pipelines(run):
    training = run(prefix="training/", workers=2)
    inference = WandbRun("p", pipeline=InferencePipelineActor, share=training)
    assert (inference.id, inference.path) == (training.id, training.path)
    for step in range(10):
        inference.log({"reward": np.array([0.0, 1.0])}, step)
        training.log({"loss": 1.0}, step)
    report, shared = training.finish(), inference.finish()
    assert (report.reports, report.rows, shared.reports, shared.rows) == (10, 10, 10, 10)
    rows = Log(training.path).rows
    assert [row["inference/reward/mean"] for row in rows if "inference/step" in row] == [0.5] * 10
    assert sum(row.get("training/workers", 0) for row in rows) == 10


@pytest.mark.slow
def test_after_ray_shutdown_the_driver_finishes_the_run_and_a_handle_says_that_ray_is_gone(tmp_path, environment):
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from common import WandbRun
import ray
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
run, other = (WandbRun("p", n, mode="offline", dir={str(tmp_path)!r}) for n in "ab")
run.finish()
for step in range(100): other.log({{"a": 1.0}}, step)
ray.shutdown()
print(run.finish().rows)
calls = (lambda: run.log({{"a": 1.0}}, 0), lambda: other.log({{"a": 1.0}}, 0), lambda: WandbRun("p"))
for call in (*calls, lambda: other.use_artifact("a:latest"), lambda: other.expect(2)):
    try: call()
    except RuntimeError as error: print(error)
other.progress(); other.flush(1)
ledger = other.finish()
print(ledger.reports, ledger.rows, ledger.lost, ledger.ok)
print(ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0] == "0", done.stderr
    assert "is finished" in lines[1]
    assert all("Ray is not running" in line for line in lines[2:6])
    assert lines[6:] == ["100 100 0 True", "False"]  # no call has started another Ray


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("gets_room", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_full_disk_is_told_once_holds_nobody_up_for_long_and_the_ledger_says_what_is_lost(ray_here, disk, gets_room):
    """That of the run's folder; what is logged meanwhile waits in the temporary folder."""
    if gets_room:
        (other := disk / "other").write_bytes(bytes(600_000))
    made = WandbRun("p", "n", mode="offline", dir=disk, settings=dict(finish_timeout=60 if gets_room else 3))
    for step in range(5_000):
        made.log({f"key_{i}": float(i) for i in range(11)}, step)
    if gets_room:
        assert "disk is full" in wait_for(lambda: made.progress()[0].warnings)[0]
        other.unlink()
        subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
    ledger = made.finish()
    told = [warning for warning in ledger.warnings if "disk is full" in warning]
    assert len(told) == 1 or (gets_room and ledger.restarts)  # an actor that dies now can't write it down
    rows = {row["_step"] for path in ledger.paths for row in Log(path).rows}
    assert len(rows) == ledger.rows == ledger.reports - ledger.lost
    assert ledger.ok == gets_room
    if gets_room:
        assert ledger.rows == 5_000
    else:
        assert ledger.lost > 0
        assert ledger.reports == 5_000 or ledger.unheard
    assert not list(disk.glob("wandb/.*state*"))


@pytest.mark.slow
def test_a_run_is_resumed_under_its_id(run):
    for life in range(2):
        made = run(id="again", resume="allow", pipeline=TrainingPipelineActor)
        for step in range(10 * life, 10 * life + 10):
            made.log({"tokens": 5}, step)
        report = made.finish()
        assert (report.rows, report.lost) == (10, 0)
        time.sleep(1.1)  # W&B names folders by the second
    rows = [row for path in folders(Path(made.path).parent.parent) for row in Log(path).rows]
    assert [row["step"] for row in rows] == list(range(20))
    assert [row["tokens_total"] for row in rows] == list(range(5, 101, 5))


@pytest.mark.slow
def test_artifact_files_are_below_the_run_and_survive_the_loss_of_their_source(run, tmp_path):
    source = tmp_path / "weights.bin"
    source.write_bytes(b"weights")
    made = run()
    made.log_artifact("checkpoint", "model", source, metadata={"step": 1}, aliases=["best"])
    source.unlink()
    made.finish()
    [artifact] = Log(made.path).of("artifact")
    [entry] = artifact["manifest"]["contents"]
    assert Path(entry["local_path"]).read_bytes() == b"weights"
    assert Path(entry["local_path"]).is_relative_to(made.path)
    assert "best" in artifact["aliases"]
