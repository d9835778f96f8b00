"""With an account: the real client against a W&B server on loopback that works, fails, stalls or goes away."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import ray
from conftest import ONE_EACH, Log, folders, read_rows, short_folder, wait_for
from processes import below, pipeline_process
from wandb_server import KEY, Server


def steps(rows: list[dict]) -> list[int]:
    return [row["step"] for row in rows]


def sync(command: str, directory: Path, environment: dict[str, str]) -> None:
    """Does what the demo told its user to do."""
    subprocess.run(shlex.split(command), cwd=directory, env=environment, check=True, capture_output=True, timeout=60)


def printed(stdout: str, what: str) -> str:
    return next(line.partition(":")[2].strip() for line in stdout.splitlines() if line.startswith(what))


@pytest.mark.parametrize("where", ["environment", pytest.param("netrc", marks=pytest.mark.slow)])
def test_a_login_makes_a_demo_run_online_and_its_key_is_written_nowhere(start, tmp_path, environment, server, where):
    with short_folder() as scratch:
        variables = server.environment | {"TMPDIR": scratch, "RAY_TMPDIR": scratch}
        if where == "netrc":
            del variables["WANDB_API_KEY"]
            netrc = Path(environment["HOME"], ".netrc")
            netrc.write_text(f"machine 127.0.0.1:{server.port} login user password {KEY}\n")
            netrc.chmod(0o600)
        process, arguments = start("demo1", "--steps", "20", *ONE_EACH, **variables), set()
        while process.poll() is None:
            for pid in below(process.pid, ""):
                with contextlib.suppress(OSError):
                    arguments.add(Path(f"/proc/{pid}/cmdline").read_text())
            time.sleep(0.5)
        stdout, stderr = process.communicate()
        assert (process.returncode, stderr) == (0, "")
        assert "http://127.0.0.1" in stdout
        assert "Upload" not in stdout
        for pipeline in ("training", "inference"):
            run = server.runs[f"demo1-{pipeline}-x"]
            assert (run["name"], run["exit_code"]) == (f"{pipeline}-x", 0)
            assert steps(server.rows(f"demo1-{pipeline}-x")) == list(range(20))
        assert any("PipelineActor" in line for line in arguments)
        assert not [line for line in arguments if KEY in line]
        places = [path for folder in (scratch, tmp_path) for path in Path(folder).rglob("*")]
        files = [path for path in places if path.is_file() and path.name != ".netrc"]
        assert any("raylet" in path.name for path in files)
        assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_wrong_key_is_told_in_one_line(run_demo, server):
    done = run_demo("demo1", **server.environment | {"WANDB_API_KEY": "k" * 40})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "API key" in done.stderr


@pytest.mark.slow
def test_without_its_server_a_run_starts_offline_within_30_seconds(start, tmp_path, server):
    server.stop()
    began = time.monotonic()
    process = start("demo3", "--one-run", "--steps", "5", **server.environment)
    wait_for(lambda: folders(tmp_path) and "offline" in folders(tmp_path)[-1].name, seconds=45)
    assert time.monotonic() - began < 30 + 10  # of which Ray takes some
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert stderr.count("does not answer") == 1, stderr
    offline = [path for path in folders(tmp_path) if path.name.startswith("offline")]
    assert len(Log(offline[0]).rows) == 10
    assert offline[0].name in printed(stdout, "Upload")


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [403, "stall", "gone"])
def test_what_a_server_refuses_or_misses_is_on_disk_with_the_command_that_brings_it_up(
    run_demo, start, tmp_path, environment, server, trouble
):
    arguments = ("--one-run", "--steps", "60", "--finish-timeout", "4")
    server.fail = trouble if trouble != "gone" else None
    process = start("demo3", *arguments, **server.environment)
    if trouble == "gone":
        wait_for(lambda: server.runs)
        wait_for(lambda: folders(tmp_path))
        server.stop()
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "W&B server refused" in stderr if trouble == 403 else "did not end within" in stderr
    assert not re.search(r"[1-9]\d* (\w+ )?lost", stdout)
    [path] = folders(tmp_path)
    assert len(Log(path).rows) == 120
    repaired = Server(server.port if trouble == "gone" else 0)
    variables = environment | repaired.environment
    command = printed(stdout, "Upload")
    assert "--no-skip-online" in command
    sync(command, Path.cwd(), variables)
    rows = repaired.rows("demo3-both-x")
    repaired.stop()
    for prefix in ("training", "inference"):
        assert sorted(row[f"{prefix}/step"] for row in rows if f"{prefix}/step" in row) == list(range(60))


@pytest.mark.slow
def test_artifacts_that_find_no_server_are_counted_hold_nothing_up_and_their_files_stay(start, tmp_path, server):
    process = start("demo4", "--steps", "60", "--finish-timeout", "6", **server.environment)
    wait_for(lambda: len(folders(tmp_path)) == 3)
    wait_for(lambda: all(list(read_rows(path)) for path in folders(tmp_path)))
    server.stop()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stderr.count("artifacts were not logged or used") == 3
    lost = [int(n) for n in re.findall(r"rows from \d+ reports.* (\d+) artifacts lost", stdout)]
    assert len(lost) == 3
    assert lost[0] >= 5  # of 6 checkpoints: the first may have found the server
    for path in folders(tmp_path):
        log = Log(path)
        assert steps(log.rows) == list(range(0, 60, 10 if log.run["job_type"] == "evaluation" else 1))
        kept = [*path.glob("artifacts/*/weights.npy")]
        assert len(kept) == (6 if log.run["job_type"] == "training" else 0)


@pytest.mark.slow
def test_an_experiment_s_runs_go_on_when_it_is_started_again(run_demo, server):
    for _ in range(2):
        assert run_demo("demo1", "--steps", "5", **server.environment).returncode == 0
    assert steps(server.rows("demo1-training-x")) == list(range(5)) * 2
    totals = [row["tokens_total"] for row in server.rows("demo1-training-x")]
    assert totals == sorted(totals)


@pytest.mark.slow
def test_a_pipeline_actor_that_is_killed_goes_on_with_the_server_s_rows(start, server):
    often = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # seconds, instead of 15
    process = start("demo1", "--steps", "100", **server.environment | often)
    wait_for(lambda: "demo1-training-x" in server.runs and server.rows("demo1-training-x"))
    subprocess.run(["kill", "-KILL", str(below(process.pid, "ray::TrainingPipelineActor")[0])], check=True)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0, stdout
    rows = server.rows("demo1-training-x")
    assert [row["_step"] for row in rows] == steps(rows) == list(range(100))
    assert "restarts" in stdout


def test_a_key_is_not_listed_by_ray(drive, server):
    """Neither in the runtime environment nor in what GCS, where Ray's state API gets it, tells of actors and jobs."""
    program = """
from ray._private import state
with run(mode="online") as made:
    print(made._owned.actor._actor_id.hex(), state.actors(), state.jobs(), state.workers())
    print(ray.get_runtime_context().runtime_env)
"""
    done = drive(program, **server.environment)
    assert done.stdout.count(done.stdout.split()[0]) > 1, done.stderr[-2000:]
    assert KEY not in done.stdout + done.stderr


def test_what_was_edited_in_the_app_stays_when_the_actor_restarts_and_when_the_run_is_recovered(
    run, server, monkeypatch
):
    for name, value in (server.environment | {"WANDB_TAGS": "environment"}).items():
        monkeypatch.setenv(name, value)
    made = run(id="r", mode="online", name="first", notes="first", settings={"run_notes": "settings"})
    made.log({"a": 1.0}, 0)
    app, edited = server.runs["r"], dict(name="edited", tags=["edited"], notes="edited")
    assert [app[key] for key in edited] == ["first", ["environment"], "first"]
    app |= edited
    os.kill(pipeline_process(made), signal.SIGKILL)
    wait_for(lambda: made.progress()[0].restarts == 1)
    made.log({"a": 2.0}, 1)
    assert {key: app[key] for key in edited} == edited
    ray.kill(made._owned.actor)
    ledger = made.finish()
    assert (ledger.ok, ledger.restarts, [row["a"] for row in server.rows("r")]) == (True, 1, [1.0, 2.0])
    assert ledger.warnings == ["the pipeline actor is gone; the run was finished without it"]
    assert {key: app[key] for key in edited} == edited
