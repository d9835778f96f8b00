"""A run ends as its owner's process does, however that ends."""

import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable

import session
from arguments import parse_args
from backbone import exits
from common import WandbRun

import pytest
from conftest import Log, each_log, wait_for
from processes import pipeline_process

# The handler first: where the tests run in the background of a shell, processes ignore the signal.
INTERRUPT = "signal.signal(signal.SIGINT, signal.default_int_handler); signal.raise_signal(signal.SIGINT)"


@pytest.fixture
def run(run_at_home) -> Callable[..., WandbRun]:
    return run_at_home


@pytest.mark.parametrize(
    ("end", "exit_code", "failure"),
    [
        (SystemExit(0), 0, None),
        (SystemExit(None), 0, None),
        (SystemExit(3), 3, "SystemExit: 3"),
        (SystemExit("no GPU"), 1, "SystemExit: no GPU"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
        (ValueError("no GPU"), 1, "ValueError: no GPU"),
    ],
)
def test_each_exception_is_the_exit_code_of_the_process_that_it_ends(end, exit_code, failure):
    assert exits.how_it_ends(end) == (exit_code, failure)


@pytest.mark.parametrize(
    ("end", "exit_code", "failure"),
    [
        (SystemExit(3), 3, "SystemExit: 3"),
        pytest.param(KeyboardInterrupt(), 1, "KeyboardInterrupt", marks=pytest.mark.slow),
    ],
)
def test_a_with_block_ends_as_a_process_with_that_exception_would(run, end, exit_code, failure):
    with pytest.raises(type(end)), run() as made:
        raise end
    log = Log(made.path)
    assert (log.exit_code, log.summary.get("failure")) == (exit_code, failure)


@pytest.mark.parametrize(
    ("end", "status", "exit_code", "failure"),
    [
        pytest.param("sys.exit(3)", 3, 3, "SystemExit: 3", marks=pytest.mark.slow),
        pytest.param("raise ValueError('no GPU')", 1, 1, "ValueError: no GPU", marks=pytest.mark.slow),
        pytest.param(INTERRUPT, 1, 255, "KeyboardInterrupt", marks=pytest.mark.slow),
        ("ray.shutdown()\nsys.exit(3)", 3, 3, "SystemExit: 3"),  # the actor lives on, and nobody can call it
    ],
)
def test_without_finish_a_run_ends_as_its_driver(drive, tmp_path, end, status, exit_code, failure):
    done = drive(f"run()\n{end}")
    assert done.returncode == status, done.stderr
    wait_for(lambda: not [*tmp_path.glob("wandb/.*.state")])
    [log] = each_log(tmp_path)
    assert (log.exit_code, log.summary.get("failure"), len(log.rows)) == (exit_code, failure, 1)


@pytest.mark.slow
def test_only_what_happened_to_a_run_counts(drive, tmp_path):
    """Not an error of a notebook's cell, nor what was before it; also those are finished whose Ray was shut down."""
    program = """
import os, sys
from common import WandbRun
import ray

def run(name):
    made = WandbRun("p", name, mode="offline")
    made.log({"a": 1.0}, 0)
    return made

quiet = dict(log_to_driver=False, logging_level="error")
ray.init("local", include_dashboard=False, **quiet)
mended, left, failed = run("mended"), run("left"), run("failed")
try:
    1 / 0
except ZeroDivisionError:
    sys.last_type, sys.last_value, sys.last_traceback = sys.exc_info()  # as a notebook does
mended.finish()
failed.finish(2, failure="as I say")
ray.shutdown()
ray.init(os.environ["CLUSTER"], **quiet)
before = run("before")
try:
    1 / 0
except ZeroDivisionError:
    sys.excepthook(*sys.exc_info())  # as Python's own prompt does
after = run("after")
"""
    done = drive(program, before="")
    assert done.returncode == 0, done.stderr
    ended = {log.run["display_name"]: (log.exit_code, log.summary.get("failure")) for log in each_log(tmp_path)}
    error = "ZeroDivisionError: division by zero"
    assert ended == {
        "mended": (0, None), "left": (1, error), "failed": (2, "as I say"), "before": (1, error), "after": (0, None),
    }  # fmt: skip
    for log in each_log(tmp_path):
        assert log.of("environment")[0]["program"].endswith("program.py")


@pytest.mark.slow
def test_a_run_that_a_worker_of_rays_left_ends_as_that_worker(drive, tmp_path):
    done = drive(
        """
@ray.remote
class Owner:
    def make(self, name):
        self.run = run(name=name, dir=folder)
        return os.getpid()

@ray.remote(max_calls=1)  # its process ends, as those with a GPU
def task(name):
    run(name=name, dir=folder)

folder = os.getcwd()
dropped, killed = Owner.remote(), Owner.remote()
pids = ray.get([dropped.make.remote("dropped"), killed.make.remote("killed")])
os.kill(pids[1], signal.SIGKILL)
del dropped
ray.get(task.remote("task"))
while [name for name in os.listdir("wandb") if name.endswith(".state")]:
    time.sleep(0.1)
alive = Owner.remote()
ray.get(alive.make.remote("alive"))
""",
        "--lr",
        "3",
    )
    assert done.returncode == 0, done.stderr
    wait_for(lambda: not [*tmp_path.glob("wandb/.*.state")])
    found = {log.run["display_name"]: log for log in each_log(tmp_path)}
    assert {name: log.exit_code for name, log in found.items()} == {
        "dropped": 0, "killed": 1, "task": 0, "alive": 0,
    }  # fmt: skip
    for log in found.values():
        environment = log.of("environment")[0]
        assert (environment["program"].rpartition("/")[2], environment["args"]) == ("program.py", ["--lr", "3"])
        assert len(log.rows) == 1


@pytest.mark.slow
def test_a_session_gives_signal_handlers_back_and_its_runs_tell_what_failed(drive, tmp_path):
    done = drive(
        """
import os, signal
from arguments import parse_args
from backbone import exits
from session import ray_session, run_to_end
from common import WandbRun
import ray

@ray.remote
class TrainingWorker:
    def work(self):
        raise MemoryError("of the GPU")

def mine(*_):
    pass

signal.signal(signal.SIGTERM, mine)
before = signal.getsignal(signal.SIGINT)
with ray_session(args := parse_args("", ["--address", os.environ["CLUSTER"]])):
    assert signal.getsignal(signal.SIGTERM) is not mine
    run = WandbRun("p", "n", **args.init)
    assert run_to_end(args, training=(run, [TrainingWorker.remote().work.remote()])) == 1
assert signal.getsignal(signal.SIGTERM) is mine
assert signal.getsignal(signal.SIGINT) is before
""",
        before="",
    )
    assert done.returncode == 0, done.stderr
    [log] = each_log(tmp_path)
    assert (log.exit_code, log.summary["failure"]) == (1, "training worker 0 failed: MemoryError: of the GPU")
    said = "".join(output["line"] for output in log.of("output_logger"))
    assert "TrainingWorker.work()" in said  # the worker's traceback
    assert "\x1b" not in said


OFTEN = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # seconds, instead of 15


@pytest.mark.slow
def test_a_run_whose_neighbour_can_not_start_has_failed(drive, tmp_path):
    done = drive(
        """
import os
from common import WandbRun
from session import parse_args, ray_session
args = parse_args("", ["--address", os.environ["CLUSTER"], "--mode", "offline"])
with ray_session(args):
    WandbRun("p", "n", **args.init)
    WandbRun("", "m", **args.init)
""",
        before="",
    )
    assert (done.returncode, done.stderr) == (1, "ValueError: project must be a name, not ''\n")
    [log] = each_log(tmp_path)
    assert log.exit_code == 1


def test_stop_run_interrupts_the_driver_as_ctrl_c_does(begin, server):
    driver = begin(
        """
signal.signal(signal.SIGINT, signal.default_int_handler)
run(id="r", mode="online").log({"a": 1.0}, 1, commit=True)
time.sleep(600)
""",
        **server.environment | OFTEN,
    )
    wait_for(lambda: server.runs.get("r", {}).get("rows"))
    server.stopped = {"r"}
    stderr = driver.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in stderr
    assert server.runs["r"]["exit_code"] == 255  # which W&B shows as killed
    assert len(server.rows("r")) == 2


@pytest.mark.slow
def test_stop_run_interrupts_a_demo_as_ctrl_c_does(start, server, tmp_path):
    process = start("demo1", "--steps", "2000", **server.environment | OFTEN)
    wait_for(lambda: server.runs.get("demo1-inference-x", {}).get("rows"))
    server.stopped = {"demo1-inference-x"}  # one of the experiment's, maybe not the one whose rows one looks at
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "")
    assert server.runs["demo1-inference-x"]["exit_code"] == 255  # which W&B shows as killed
    assert server.runs["demo1-training-x"]["exit_code"] == 1
    for log in each_log(tmp_path):
        assert f"{len(log.rows)} rows from" in stdout


def test_a_signal_while_ray_starts_interrupts_behind_that():
    signals, reached = session._Signals(), []
    try:
        with pytest.raises(KeyboardInterrupt), signals.held():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the end of it")
        assert (reached, signals.status) == (["the end of it"], 130)
    finally:
        signals.give_back()


def test_a_demo_has_a_live_bar_for_each_pipeline_on_a_terminal(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    made, terminal = run(), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bars = session._Bars(parse_args("", ["--mode", "offline", "--steps", "12"]), {"training": made})
    for step in range(3):
        made.log({"loss": 0.25}, step, commit=True)
    wait_for(lambda: made.progress()[0].rows == 3)
    bars.update()
    assert re.search(r"training +#+.* 3/12 steps, loss 0\.250", terminal.getvalue())
    made.finish()
    bars.close()


@pytest.mark.slow
def test_a_hook_that_somebody_has_replaced_is_put_in_place_for_the_next_run(run, monkeypatch):
    with run():
        pass
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)  # as rich.traceback.install does
    made = run()
    sys.excepthook(ValueError, ValueError("boom"), None)
    exits.unfinished.finish()
    log = Log(made.path)
    assert (log.exit_code, log.summary["failure"]) == (1, "ValueError: boom")


@pytest.mark.slow
def test_hooks_bear_those_of_others(run):
    """Others put theirs on top in between, as `wandb.init` does in the user's process."""
    ours = sys.exit
    try:
        with run():
            sys.exit = functools.partial(sys.exit)  # somebody's
        with pytest.raises(SystemExit, match="3"), run() as made:
            sys.exit(3)
    finally:
        sys.exit = ours
    assert Log(made.path).exit_code == 3


@pytest.mark.slow
def test_a_stop_function_of_the_users_is_called_once_in_the_driver_also_after_the_actor_has_restarted(
    run, server, monkeypatch
):
    for name, value in (server.environment | OFTEN).items():
        monkeypatch.setenv(name, value)
    stopped, asked = threading.Event(), []  # an Event can't be pickled

    def stop() -> None:
        asked.append(made.progress()[0])  # the answer comes by another thread
        stopped.set()

    def restart(times: int) -> None:
        os.kill(pipeline_process(made), signal.SIGKILL)
        wait_for(lambda: made.progress()[0].restarts == times)

    made = run(mode="online", settings={"stop_fn": stop})
    restart(1)
    server.stopped = {made.id}
    assert stopped.wait(60)
    restart(2)
    made.log({"a": 1.0}, 0)
    assert made.finish(1).ok
    assert [ledger.restarts for ledger in asked] == [1]
    assert server.runs[made.id]["exit_code"] == exits.INTERRUPTED


def test_what_a_signal_handler_raises_while_a_run_starts_ends_the_run_as_the_process(drive, tmp_path):
    done = drive("""
import glob, threading
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
def terminate():
    while not glob.glob("wandb/offline-run-*"):  # where its actor is in the middle of the start
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=terminate).start()
WandbRun("p", mode="offline")
print("it has started")
""")
    assert (done.returncode, done.stdout) == (143, ""), done.stderr
    [log] = each_log(tmp_path)
    assert log.exit_code == 143
    assert not list(tmp_path.glob("wandb/.*state*"))
