"""What W&B users expect to happen in their process and environment happens, though another process owns the run."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from common import PipelineActor, WandbRun, pipeline_actor

import pytest
import wandb
from conftest import ROOT, Log, folders, no_account, wait_for
from ray._private import state
from wandb_server import Server

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=8, include_dashboard=False))
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""

PROGRAM = """
import os, sys, time
from common import WandbRun, InferencePipelineActor
import ray
join = dict(log_to_driver=False, logging_level="error")
ray.init(os.environ["CLUSTER"], **join)

def run(**options):
    made = WandbRun("p", **{"mode": "offline"} | options)
    made.log({"a": 1.0}, 0)
    return made

"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """The address of a Ray that was started from a shell which is not the user's."""
    theirs = {"WANDB_RUN_GROUP": "the raylet's", "WANDB_MODE": "disabled", "WANDB_RUN_ID": "theirs"}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # short: it holds sockets
        environment = no_account(tmp_path_factory.mktemp("home")) | theirs
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            env=environment | {"RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        yield process.stdout.readline().strip()
        process.communicate(timeout=60)


@pytest.fixture
def begin(cluster, tmp_path, environment) -> Iterator[Callable[..., subprocess.Popen]]:
    """begin("run()"): a driver that does this; its runs are below tmp_path."""
    started = []

    def begin(program: str, **variables: str) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(PROGRAM + program)
        variables = environment | {"CLUSTER": cluster, "PYTHONPATH": str(ROOT)} | variables
        command, pipe = [sys.executable, "program.py"], subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def drive(begin) -> Callable[..., subprocess.CompletedProcess]:
    """drive("run()"): a driver that has done this."""

    def drive(program: str, **variables: str) -> subprocess.CompletedProcess:
        process = begin(program, **variables)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return drive


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def logs(directory: Path) -> list[Log]:
    return [Log(path) for path in folders(directory)]


def summary(log: Log) -> dict:
    return {key: value for update in log.of("summary") for key, value in update.get("update", {}).items()}


# Exits


@pytest.mark.parametrize(
    ("end", "status", "exit_code", "failure"),
    [
        ("", 0, 0, None),
        ("sys.exit()", 0, 0, None),
        ("sys.exit(3)", 3, 3, "SystemExit: 3"),
        ("sys.exit('no GPU')", 1, 1, "SystemExit: no GPU"),
        ("raise ValueError('no GPU')", 1, 1, "ValueError: no GPU"),
    ],
)
@pytest.mark.parametrize("within", [True, False])
def test_a_run_ends_as_its_driver(drive, tmp_path, end, status, exit_code, failure, within):
    done = drive(f"with run():\n    {end or 'pass'}" if within else f"run()\n{end}")
    assert done.returncode == status, done.stderr
    [log] = logs(tmp_path)
    assert (log.exit_code, summary(log).get("failure"), len(log.rows)) == (exit_code, failure, 1)


def test_stop_run_interrupts_a_demo_as_ctrl_c_does(start, server, tmp_path):
    often = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # seconds, instead of 15
    process = start("demo1", "--steps", "2000", **server.environment | often)
    wait_for(lambda: server.runs.get("demo1-inference-x", {}).get("rows"))
    server.stopped = {"demo1-inference-x"}  # one of the experiment's, maybe not the one whose rows one looks at
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "")
    assert server.runs["demo1-inference-x"]["exit_code"] == 255  # which W&B shows as killed
    assert server.runs["demo1-training-x"]["exit_code"] == 1
    for log in logs(tmp_path):
        assert f"{len(log.rows)} rows from" in stdout


@pytest.fixture
def run(ray_here, tmp_path, monkeypatch) -> Callable[..., WandbRun]:
    """run(): a run of a user who works in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda **options: WandbRun("p", **{"mode": "offline"} | options)


def test_hooks_are_given_back_and_bear_those_of_others(run):
    """Also when others have put theirs on top in between, as `wandb.init` does in the user's process."""
    ours = sys.exit, sys.excepthook
    with run():
        hooked = sys.exit
        assert sys.exit is not ours[0]
        assert sys.excepthook is not ours[1]
    assert (sys.exit, sys.excepthook) == ours
    try:
        with run():
            sys.exit = functools.partial(sys.exit)  # somebody's
        with pytest.raises(SystemExit, match="3"), run() as made:
            sys.exit(3)
    finally:
        sys.exit = ours[0]
    assert hooked is not ours[0]
    assert Log(made.path).exit_code == 3


def test_a_stop_function_of_the_users_stays_in_the_driver(run, server, monkeypatch):
    for name, value in (server.environment | {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}).items():
        monkeypatch.setenv(name, value)
    stopped = threading.Event()  # which can't be pickled
    with run(mode="online", settings={"stop_fn": stopped.set}) as made:
        server.stopped = {made.id}
        made.log({"a": 1.0}, 0)
        assert stopped.wait(60)
    assert server.runs[made.id]["exit_code"] == 0  # it did not end the driver


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


@pytest.mark.parametrize("kind", ["arguments", "settings", "Settings"])
def test_the_code_s_word_counts_more_than_the_environment_s(run, tmp_path, monkeypatch, kind):
    for name in ("RUN_ID", "NAME", "JOB_TYPE"):
        monkeypatch.setenv(f"WANDB_{name}", "environment")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "environment"))
    settings = dict(run_id=f"code-{kind}", run_name="code", run_job_type="code", root_dir=str(tmp_path / "code"))
    said = dict(settings=settings if kind == "settings" else wandb.Settings(**settings))
    if kind == "arguments":
        said = dict(id=f"code-{kind}", name="code", job_type="code", dir=tmp_path / "code")
    with run(**said) as made:
        assert (made.id, made.name) == (f"code-{kind}", "code")
    assert Log(made.path).run["job_type"] == "code"
    assert made.path.parent == tmp_path / "code" / "wandb"


def test_finish_waits_as_long_as_the_environment_says(run, server, monkeypatch):
    for name, value in (server.environment | {"WANDB_FINISH_TIMEOUT": "4"}).items():
        monkeypatch.setenv(name, value)
    server.fail = "stall"
    made = run(mode="online")
    made.log({"a": 1.0}, 0)
    assert "the upload did not end within 2 s" in made.finish().warnings  # and 2 s for artifacts


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


def test_a_task_of_the_drivers_does_not_take_its_id_again(run, ray_here, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "the driver's")

    @ray_here.remote(runtime_env={"env_vars": {"WANDB_RUN_ID": "the driver's"}})
    def task(folder: Path) -> str:
        with WandbRun("p", mode="offline", dir=folder) as made:
            return made.id

    with run() as made:
        assert made.id == "the driver's"
        assert ray_here.get(task.remote(Path.cwd())) != made.id


@pytest.mark.parametrize(
    ("init", "variable", "why"),
    [
        (dict(sync_tensorboard=True), "", "sync_tensorboard"),
        (dict(settings={"sync_tensorboard": True}), "", "sync_tensorboard"),
        (dict(), "SYNC_TENSORBOARD=true", "sync_tensorboard"),
        (dict(mode="shared"), "", "shared"),
        (dict(settings=wandb.Settings(mode="shared")), "", "shared"),
        (dict(), "MODE=shared", "shared"),
        (dict(resume_from="a?_step=80"), "", "resume_from"),
        (dict(settings={"resume_from": "a?_step=80"}), "", "resume_from"),
        (dict(), "RESUME_FROM=a?_step=80", "resume_from"),
        (dict(fork_from="a?_step=80"), "", "fork_from"),
        (dict(resume=True), "", "resume"),
        (dict(), "RESUME=auto", "resume"),
    ],
)
def test_what_can_not_go_with_numbered_rows_is_refused_in_one_line(run, monkeypatch, tmp_path, init, variable, why):
    if variable:
        monkeypatch.setenv(*f"WANDB_{variable}".split("=", 1))
    with pytest.raises(ValueError, match=why) as error:
        run(**dict(mode=None) | init)
    assert "\n" not in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_a_refusal_is_only_of_what_is_asked_for(run, monkeypatch):
    monkeypatch.setenv("WANDB_SYNC_TENSORBOARD", "false")
    monkeypatch.setenv("WANDB_MODE", "shared")
    with run(mode="offline", sync_tensorboard=False) as made:
        assert made.mode == "offline"


# What is recorded


def test_config_may_change_on_resume(run):
    for rate in (1, 2):
        with run(id="again", resume="allow", config={"lr": rate, "seed": 7}) as made:
            assert made.config == {"lr": rate, "seed": 7}
            made.log({"a": 1.0}, rate)
    assert [log.config["lr"] for log in logs(Path.cwd())] == [1, 2]


def test_the_users_repository_is_recorded_wherever_the_runs_are(run, tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    git = ["git", "-C", str(repository), "-c", "user.name=u", "-c", "user.email=u@v"]
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://git.invalid/mine.git"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (repository / "below").mkdir()
    monkeypatch.chdir(repository / "below")
    with run(dir=tmp_path / "elsewhere") as made:
        pass
    [recorded] = [found["git"] for found in Log(made.path).of("environment") if "git" in found]
    assert (recorded["commit"], recorded["remote_url"]) == (head, "https://git.invalid/mine.git")


def test_the_logs_of_a_run_hold_its_warnings_and_with_console_wrap_what_the_actor_prints(run):
    @pipeline_actor
    class Loud(PipelineActor):
        def push(self, *arguments):
            print("an actor's own line")
            return super().push(*arguments)

    for console in ("off", "wrap"):
        with run(pipeline=Loud, settings={"console": console}) as made:
            made.log({"which": "one"}, 0)
            made.log({"which": "another"}, 0)
            assert not made.finish().warnings == []
        text = json.dumps(Log(made.path).records)
        assert "an actor's own line" in text if console == "wrap" else "an actor's own line" not in text
        assert "which" in json.dumps(Log(made.path).of("output_raw") + Log(made.path).of("output"))


# Async actors


def test_the_first_log_of_an_async_actor_does_not_hold_its_event_loop(run, ray_here):
    @ray_here.remote
    class Engine:
        async def generate(self, made: WandbRun) -> None:
            made.log({"a": 1.0}, 0)

        async def health(self) -> str:
            return "ok"

    with run() as made:
        engine = Engine.remote()
        ray_here.get(engine.health.remote())
        pipeline = state.actors(made._actor._actor_id.hex())["Pid"]
        os.kill(pipeline, signal.SIGSTOP)  # it answers nothing
        try:
            generated = engine.generate.remote(made)
            assert ray_here.get(engine.health.remote(), timeout=30) == "ok"
            ray_here.get(generated, timeout=30)
        finally:
            os.kill(pipeline, signal.SIGCONT)
    assert len(Log(made.path).rows) == 1
