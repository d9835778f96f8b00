"""What W&B users expect to happen in their process and environment happens, though another process owns the run."""

import contextlib
import enum
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from arguments import parse_args
from backbone import exits, recover
from common import PipelineActor, WandbRun, pipeline_actor

import pytest
import wandb
from conftest import Log, each_log
from processes import below, parent, pipeline_process
from wandb_server import KEY


@pytest.fixture
def run(run_at_home) -> Callable[..., WandbRun]:
    return run_at_home


def test_a_letter_of_an_earlier_version_is_told_in_one_line_and_hinders_no_other_recovery(tmp_path, monkeypatch):
    (folder := tmp_path / "wandb-run-old").mkdir(0o700)
    (folder / "letter").touch(0o600)
    (folder / "letter").write_bytes(b"cbackbone.files\nNoLongerThere\n.")
    with pytest.raises(OSError, match="letter can't be read: Can't get attribute 'NoLongerThere'"):
        recover.recover(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert recover.abandoned() == [folder]  # so that it is told


# Environment


def test_the_environment_says_what_the_code_does_not(run, tmp_path, monkeypatch):
    said = {"RUN_ID": "mine", "NAME": "my name", "RUN_GROUP": "g", "JOB_TYPE": "j", "TAGS": "a,b", "MODE": "offline"}
    said |= {"INIT_TIMEOUT": "33", "CONSOLE": "wrap", "RESUME": "allow", "DIR": str(tmp_path / "elsewhere")}
    for name, value in said.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with run(mode=None) as made:
        assert (made.id, made.name, made.mode) == ("mine", "my name", "offline")
    log = Log(made.path)
    assert made.path.parent == tmp_path / "elsewhere" / "wandb"
    assert [log.run[key] for key in ("run_id", "display_name", "run_group", "job_type", "tags")] == [
        *("mine", "my name", "g", "j", ["a", "b"])
    ]
    assert "33.0 second timeout" in (made.path / "logs" / "debug.log").read_text()
    assert "wrap" in (made.path / "logs" / "debug.log").read_text()


@pytest.mark.parametrize("kind", [pytest.param(dict, marks=pytest.mark.slow), wandb.Settings])
def test_the_code_s_word_counts_more_than_the_environment_s(run, tmp_path, monkeypatch, kind):
    for name in ("RUN_ID", "NAME", "JOB_TYPE", "RUN_GROUP"):
        monkeypatch.setenv(f"WANDB_{name}", "environment")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "environment"))
    settings = kind(run_id="code", run_name="code", run_job_type="code", root_dir=str(tmp_path / "code"))
    with run(group="code", settings=settings) as made:
        assert (made.id, made.name) == ("code", "code")
    recorded = Log(made.path).run
    assert (recorded["job_type"], recorded["run_group"]) == ("code", "code")
    assert made.path.parent == tmp_path / "code" / "wandb"


@pytest.mark.slow
def test_resume_in_the_environment_goes_on_with_the_totals(run, monkeypatch):
    monkeypatch.setenv("WANDB_RESUME", "allow")
    for total in (5, 10):
        with run(id="again") as made:
            made.log({"tokens": 5}, total)
            made.finish()
        assert Log(made.path).rows[0]["tokens_total"] == total


@pytest.mark.slow
def test_finish_waits_as_long_as_the_environment_says_for_the_rows_where_there_are_no_artifacts(
    run, server, monkeypatch
):
    for name, value in (server.environment | {"WANDB_FINISH_TIMEOUT": "4"}).items():
        monkeypatch.setenv(name, value)
    server.fail = "stall"
    made = run(mode="online")
    made.log({"a": 1.0}, 0)
    began = time.monotonic()
    assert "the upload did not end within 4 s" in made.finish().warnings
    assert time.monotonic() - began >= 4


@pytest.mark.slow
def test_a_finish_timeout_of_0_is_no_limit(run, server, monkeypatch):
    for name, value in (server.environment | {"WANDB_FINISH_TIMEOUT": "0"}).items():
        monkeypatch.setenv(name, value)
    with run(mode="online") as made:
        made.log({"a": 1.0}, 0)
    ledger = made.finish()
    assert (ledger.ok, ledger.uploaded, ledger.warnings) == (True, True, [])


@pytest.mark.slow
def test_artifacts_that_find_no_server_are_counted_hold_nothing_up_and_their_files_stay(run, server, monkeypatch):
    for name, value in (server.environment | {"WANDB_FINISH_TIMEOUT": "4"}).items():
        monkeypatch.setenv(name, value)
    made = run(mode="online")
    server.stop()
    for step in range(3):
        made.log_artifact("checkpoint", "model", {"weights.bin": b"w"})
        made.log({"a": 1.0}, step, commit=True)
    ledger = made.finish()
    assert (ledger.rows, ledger.lost, ledger.lost_artifacts, ledger.uploaded, ledger.ok) == (3, 0, 3, False, False)
    assert [warning for warning in ledger.warnings if warning.startswith("3 artifacts were not logged or used")]
    assert len([*made.path.glob("artifacts/*/weights.bin")]) == 3


def test_a_wrong_key_is_told_in_one_line(run, server, monkeypatch, tmp_path):
    for name, value in (server.environment | {"WANDB_API_KEY": "k" * 40}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"can't start: .*API key.*; run `wandb login`") as error:
        run(mode="online")
    assert "\n" not in str(error.value)
    assert not [*tmp_path.glob("wandb/.*.state")]


@pytest.mark.slow
def test_an_id_in_the_environment_is_for_one_run(run, monkeypatch, caplog):
    """The first that has no id of its own, and another one when the environment has another id."""
    monkeypatch.setenv("WANDB_RUN_ID", "a")
    with run(id="own") as own, run() as first, run() as second:
        assert (own.id, first.id) == ("own", "a")
        assert len({made.id for made in (own, first, second)}) == 3
    monkeypatch.setenv("WANDB_RUN_ID", "b")
    with run() as third:
        assert third.id == "b"
    assert caplog.text.count("stays outside WANDB_RUN_ID=a, which is for one run") == 2


@pytest.mark.slow
def test_a_task_of_the_drivers_does_not_take_its_id_again(run, ray_here, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "taken")

    @ray_here.remote(runtime_env={"env_vars": {"WANDB_RUN_ID": "taken"}})
    def task(folder: Path) -> str:
        with WandbRun("p", mode="offline", dir=folder) as made:
            return made.id

    with run() as made:
        assert made.id == "taken"
        assert ray_here.get(task.remote(Path.cwd())) != made.id


def test_a_demo_s_flags_begin_as_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "7")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as ray_of_some_kind:
        address = f"[::1]:{ray_of_some_kind.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        args = parse_args("", ["--mode", "offline"])
    assert (args.dir, args.finish_timeout, args.address) == (tmp_path / "mine", 7, address)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    args = parse_args("", ["--mode", "offline", "--dir", str(tmp_path), "--finish-timeout", "8"])
    assert (args.dir, args.finish_timeout, args.address) == (tmp_path, 8, None)


@pytest.mark.slow
def test_a_cluster_of_another_shell_gets_what_wandb_needs_and_adds_nothing(drive, tmp_path, server):
    """Here the server is behind a proxy."""
    network = {"HTTP_PROXY": f"http://127.0.0.1:{server.port}", "SSL_CERT_FILE": "/mine", "REQUESTS_CA_BUNDLE": "/mine"}
    done = drive(
        """
@pipeline_actor
class Telltale(PipelineActor):
    def progress(self, prefix):
        return dict(os.environ)

with run(mode="online", pipeline=Telltale) as made:
    print(json.dumps([made.id, ray.get(made._owned.actor.progress.remote(""))]))
""",
        **server.environment | {"WANDB_BASE_URL": "http://wandb.invalid"} | network,
    )
    assert done.returncode == 0, done.stderr
    id_, seen = json.loads(done.stdout)
    assert network.items() <= seen.items()
    assert not {name for name in seen if name in ("WANDB_RUN_GROUP", "WANDB_MODE", "WANDB_RUN_ID")}
    assert len(server.rows(id_)) == 1
    [log] = each_log(tmp_path)
    assert "run_group" not in log.run


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_where_wandb_offline_was_typed_nothing_is_sent(drive, tmp_path, environment, server, mode):
    netrc = Path(environment["HOME"], ".netrc")
    netrc.write_text(f"machine 127.0.0.1:{server.port} login user password {KEY}\n")
    netrc.chmod(0o600)
    base = {"WANDB_BASE_URL": server.environment["WANDB_BASE_URL"]}
    subprocess.run([sys.executable, "-m", "wandb", mode], cwd=tmp_path, env=environment | base, check=True)
    done = drive("from arguments import parse_args\nprint(run(mode=None).mode, parse_args('', []).mode)", **base)
    assert done.stdout.split() == [mode, mode], done.stderr
    assert len(server.runs) == (mode == "online")


def test_trials_of_a_sweep_get_its_ids_and_config_and_a_second_run_stays_outside(drive, server):
    """By `wandb.agent`, which runs them in a thread of one process."""
    server.trials = [{"run_id": f"trial{i}", "args": {"lr": {"value": i}}} for i in range(2)]
    done = drive(
        """
from backbone import wandb_internals
import wandb

def trial():
    with run(mode="online") as one:
        print(json.dumps([one.id, one.config, wandb_internals.agent_is_running()]))
        if one.id == "trial0":
            with run(mode="online", config={"lr": 7}) as other:
                print(json.dumps([other.id, other.config, True]))

wandb.agent("sweep", trial, entity="e", project="p", count=2)
""",
        **server.environment,
    )
    assert done.returncode == 0, done.stderr
    trials = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    (first, *told), (other, *outside), (second, *more) = trials
    assert (first, second, other in server.runs) == ("trial0", "trial1", True)
    assert (told, outside, more) == ([{"lr": 0}, True], [{"lr": 7}, True], [{"lr": 1}, True])
    assert len(server.runs) == 3
    assert {run["exit_code"] for run in server.runs.values()} == {0}
    assert all(len(server.rows(id_)) == 1 for id_ in server.runs)
    assert done.stderr.count("stays outside the sweep") == 1


@pytest.mark.slow
def test_a_report_that_the_actor_can_not_read_is_lost_alone(drive, tmp_path):
    """A class of the user's own script, which the actor has never seen."""
    done = drive(
        """
from ray._private import state
import wandb

class Mine(wandb.Histogram):
    pass

made = WandbRun("p", mode="offline")
for step in range(10):
    made.log({"a": Mine([1.0]) if step == 4 else 1.0}, step)
    if step == 6:
        os.kill(state.actors(made._owned.actor._actor_id.hex())["Pid"], signal.SIGKILL)
ledger = made.finish()
print("", ledger.reports, ledger.rows, ledger.lost, ledger.restarts, ledger.ok, *ledger.warnings, sep="\\n")
"""
    )
    *_, reports, rows, lost, restarts, ok, why, how_many = done.stdout.splitlines()
    assert (reports, rows, lost, restarts, ok) == ("10", "9", "1", "1", "False"), done.stdout + done.stderr
    assert "can't read a report" in why
    assert "Mine" in why
    assert how_many == "1 reports are in no row"
    assert sorted(row["step"] for log in each_log(tmp_path) for row in log.rows) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.slow
def test_a_driver_may_be_a_fork_of_a_process_without_ray(drive, tmp_path):
    done = drive(
        """
import os, sys
from common import WandbRun
import ray
from backbone import process
name = process._name
if child := os.fork():
    os._exit(os.waitpid(child, 0)[1])
assert process._name != name  # so that many forks are many workers
ray.init(os.environ["CLUSTER"], log_to_driver=False, logging_level="error")
with WandbRun("p", mode="offline") as run:
    run.log({"a": 1.0}, 0)
print(run.finish().rows)
""",
        before="",
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


# What is recorded


@pytest.mark.slow
def test_config_may_change_on_resume_and_hold_the_users_own_objects(run):
    class Loss(enum.Enum):  # no other process can import it
        MSE = 1

    for rate in (1, 2):
        with run(id="again", resume="allow", config={"lr": rate, "loss": Loss.MSE}) as made:
            assert made.config == {"lr": rate, "loss": "MSE"}
            made.log({"a": 1.0}, rate)
    assert [log.config["lr"] for log in each_log(Path.cwd())] == [1, 2]


@pytest.mark.slow
def test_the_users_repository_is_recorded_wherever_the_runs_are(run, tmp_path, monkeypatch):
    def repository(name: str) -> str:
        git = ["git", "-C", str(tmp_path / name), "-c", "user.name=u", "-c", "user.email=u@v"]
        subprocess.run(["git", "init", "-q", str(tmp_path / name)], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", name], check=True)
        subprocess.run([*git, "remote", "add", "origin", f"https://git.invalid/{name}.git"], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    commit, _ = repository("mine"), repository("of-the-runs")
    (tmp_path / "mine" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "mine" / "below")
    with run(dir=tmp_path / "of-the-runs") as made:
        pass
    [recorded] = [found["git"] for found in Log(made.path).of("environment") if "git" in found]
    assert (recorded["commit"], recorded["remote_url"]) == (commit, "https://git.invalid/mine.git")


@pytest.mark.slow
@pytest.mark.parametrize("console", ["off", "wrap"])
def test_the_logs_of_a_run_hold_its_warnings_and_with_console_wrap_what_the_actor_prints(run, console):
    @pipeline_actor
    class Loud(PipelineActor):
        def progress(self, prefix):
            print("an actor's own line")
            return super().progress(prefix)

    with run(pipeline=Loud, settings={"console": console}) as made:
        made.log({"which": "one"}, 0)
        made.log({"which": "another"}, 0)
        made.progress()
        assert made.finish().warnings == ["'which' differs between workers: one of them is kept"]
    log = Log(made.path)
    assert "'which' differs" in json.dumps(log.of("output_logger"))
    assert ("an actor's own line" in json.dumps(log.of("output_raw"))) == (console == "wrap")


@pytest.mark.slow
def test_a_key_of_the_environment_is_not_in_the_memory_of_rays_control_plane(run, monkeypatch):
    key = "k3y" + "0123456789abcdef" * 3
    monkeypatch.setenv("WANDB_API_KEY", key)  # behind the start of Ray, whose processes would else inherit it
    made = run()
    made.log({"a": 1.0}, 0)
    [gcs] = below(parent(parent(pipeline_process(made))), "gcs_server")  # of the process that started the raylet
    memory = b"".join(regions(gcs))
    assert made._address.folder.name.encode() in memory  # an argument of its constructor
    assert key.encode() not in memory
    assert made.finish().ok


def regions(pid: int):
    """The readable memory of a process."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
        for start, end, _ in re.findall(r"^(\w+)-(\w+) (rw\S*)", maps.read(), re.MULTILINE):
            with contextlib.suppress(OSError, OverflowError):
                memory.seek(int(start, 16))
                yield memory.read(int(end, 16) - int(start, 16))


@pytest.mark.slow
def test_each_of_the_runs_that_are_left_is_finished_as_far_as_it_can_be(run, caplog):
    broken, sound = run(name="broken"), run(name="sound")
    sound.log({"a": 1.0}, 0)
    address, broken._address = broken._address, None
    exits.unfinished.finish()
    assert "run broken could not be finished" in caplog.text
    assert Log(sound.path).exit_code == 0
    assert (sound.finish().rows, sound.finish().ok) == (1, True)
    broken._address = address
    broken.finish()


def test_the_reason_why_a_run_could_not_be_finished_is_found_among_what_others_say(tmp_path):
    said = f"wandb: a line\n{tmp_path}: database or disk is full\n--- Logging error ---\nArguments: ()\n".encode()
    assert recover.reason(said, tmp_path) == f"{tmp_path}: database or disk is full"
    assert recover.reason(b"Killed\n", tmp_path) == "Killed"
    assert recover.reason(b"", tmp_path) == ""


def test_where_the_working_directory_is_gone_that_is_said_before_anything_starts(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError, match=r"the working directory is gone: call os\.chdir"):
        run()
