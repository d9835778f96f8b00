"""What the tests share: demos run as their users run them, and what they logged read back from the transaction log."""

import fcntl
import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else a demo's ten processes compile all they import
# A shell's background jobs ignore SIGINT, and Ray's workers would inherit that: no task could be cancelled.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(ROOT))

import backbone  # noqa: F401 - before ray

import pytest
import ray
from hypothesis import settings
from wandb.util import get_core_path
from wandb_server import Server

# The same examples each time, however slow the machine is: a change is judged by what it changes.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")

DEMOS = {
    "demo1": "demo1_centralized_actors.py",
    "demo2": "demo2_project_per_job.py",
    "demo3": "demo3_hierarchical_metrics.py",
    "demo4": "demo4_extensions.py",
}


ONE_EACH = ("--training-workers", "1", "--inference-workers", "1")  # where more workers show no more
# How demos are run whose runs are read: 2 as by a user who has set the mode, and is in a hurry; 1 as it comes.
READ_AS = {"demo2": ("--step-seconds", "0"), "demo3": ONE_EACH, "demo4": ONE_EACH}
SET_BEFORE = {"demo2": {"WANDB_MODE": "offline"}}

LONG = ("faults", "owner", "ends", "takeover", "exits", "online", "demos", "cluster", "writer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, the rest fills up what is left of the processes' time.

    One test of each file in turn: those that wait, and those that compute, are in the same files.
    """
    turns = Counter()

    def place(item: pytest.Item) -> tuple[bool, int]:
        turns[item.path] += 1
        return item.path.stem.removeprefix("test_") not in LONG, turns[item.path]

    items.sort(key=place)


class Log:
    """The records of a run folder's transaction log, by `wandb leet inspect --json`."""

    def __init__(self, path: Path):
        self.path, deadline = path, time.monotonic() + 3
        self.records = records(path)
        of_run = folders(path.parent.parent, next(path.glob("*.wandb")).name)
        # Who finishes it may still be at it; an earlier folder of the run is that of a dead process.
        while path == of_run[-1] and not self.of("exit") and time.monotonic() < deadline:
            time.sleep(0.2)
            self.records = records(path)

    def of(self, kind: str) -> list[dict]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def run(self) -> dict:
        return self.of("run")[0]

    @property
    def config(self) -> dict:
        config = {}
        for update in [self.run.get("config", {}), *self.of("config")]:
            config |= update.get("update", {})
        return config

    @property
    def summary(self) -> dict:
        return {key: value for update in self.of("summary") for key, value in update.get("update", {}).items()}

    @property
    def rows(self) -> list[dict]:
        return [history["item"] for history in self.of("history")]

    @property
    def keys(self) -> set[str]:
        return {key for row in self.rows for key in row if not key.startswith("_")}

    @property
    def exit_code(self) -> int | None:
        exits = self.of("exit")
        return exits[-1].get("exit_code", 0) if exits else None


def records(path: Path) -> list[dict]:
    return _records(path, sum(log.stat().st_size for log in path.glob("*.wandb")))


@functools.cache
def _records(path: Path, size: int) -> list[dict]:
    """As long as the log has not grown, it says the same."""
    return [json.loads(line) for line in inspect(path, check=True)]


def read_rows(path: Path) -> list[dict]:
    """The rows of a run that may be going on."""
    return [json.loads(line)["history"]["item"] for line in inspect(path) if '"type":"history"' in line[:60]]


def inspect(path: Path, check: bool = False) -> list[str]:
    """What `wandb leet inspect --json` prints, by its binary: the command in front of it takes a second to start."""
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"]
    command += [*map(str, path.glob("*.wandb")), str(path.parent)]
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout.splitlines()


def folders(directory: Path, log: str = "") -> list[Path]:
    """Run folders below a demo's --dir, oldest first. log: only those with a transaction log of this name."""
    found = [path for path in (directory / "wandb").glob("*run-*") if not log or (path / log).exists()]
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def each_log(directory: Path) -> list[Log]:
    return [Log(path) for path in folders(directory)]


def logs(directory: Path) -> dict[str, Log]:
    """Transaction logs by run name."""
    return {log.run["display_name"]: log for log in each_log(directory)}


# What a new shell has, and nothing of W&B or Ray: also not what Ray sets when it starts in this process. A folder for
# Ray comes in below.
SHELL = {name: value for name, value in os.environ.items() if not re.match("_?WANDB_|RAY_|NETRC$", name)}
BUSY = {  # on a machine that has more to do than it can
    "OPENBLAS_NUM_THREADS": "1",  # starting more takes a tenth of the start of each process
    "RAY_worker_niceness": "0",  # else pytest's own processes go before the actors
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "1",  # else Ray looks for new log files ten times a second
    "PYTHONPATH": str(ROOT / "tests/quick"),  # else a process that has imported wandb takes 0.1 s more to end
}
MODULES = os.pathsep.join([BUSY["PYTHONPATH"], str(ROOT)])
SHELL |= BUSY
os.environ.update(BUSY)


def no_account(home: Path) -> dict[str, str]:
    """The environment of a user without an account, with an empty home folder."""
    return SHELL | {"HOME": str(home)}


def short_folder() -> tempfile.TemporaryDirectory:
    """For Ray's sockets, whose paths must not be long."""
    return tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)


@pytest.fixture(scope="session", autouse=True)
def stranger(tmp_path_factory):
    """No test finds the account, W&B settings or Ray of who runs it."""
    empty = tmp_path_factory.mktemp("empty")
    with short_folder() as folder, pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - SHELL - {"RAY_ENABLE_UV_RUN_RUNTIME_ENV"}:
            patch.delenv(name)
        patch.setitem(SHELL, "RAY_TMPDIR", folder)  # a driver without an address goes to the cluster that is noted here
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("NETRC", str(empty / "netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(empty))
        patch.chdir(empty)  # wandb looks for settings here
        patch.setenv("PYTHONPATH", MODULES)  # so that the workers of a Ray that is started from here find the modules
        yield


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir()
    return no_account(home) | {"PYTHONPATH": MODULES}  # for programs that are no file beside the modules


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str], started: list[subprocess.Popen]):
    """start("demo1", "--steps", "5"): the demo as a process of its own, its runs below tmp_path."""

    def start(demo: str, *arguments: str, **variables: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / DEMOS[demo]), "--dir", str(tmp_path), "--experiment", "x", *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment | variables)
        started.append(process)
        return process

    return start


@pytest.fixture
def run_demo(start):
    """Runs a demo to its end and returns it, with its output."""

    def run_demo(demo: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        process = start(demo, *arguments, **variables)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run_demo


STEPS = 12


@pytest.fixture(scope="session")
def everybodys(tmp_path_factory) -> Path:
    """A folder that all processes of the test run share."""
    mine = tmp_path_factory.getbasetemp()
    return mine.parent if mine.name.startswith("popen-") else mine


def once(path: Path, make: Callable[[], object]) -> object:
    """make(), called once for all processes of the test run; its value is kept in the file."""
    with open(path, "a+b") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        kept.seek(0)
        if not kept.read(1):
            pickle.dump(make(), kept)
            kept.flush()
        kept.seek(0)
        return pickle.load(kept)


@pytest.fixture(scope="session")
def ran(everybodys) -> Callable[..., tuple[subprocess.CompletedProcess, Path]]:
    """ran("demo1", ...): a demo's process and its folder, for the tests that only read.

    Each command line runs once.
    """

    def ran(demo: str, *arguments: str) -> tuple[subprocess.CompletedProcess, Path]:
        directory = everybodys / "".join([demo, *arguments])
        directory.mkdir(exist_ok=True)
        done = once(Path(f"{directory}.done"), lambda: _run(demo, *arguments, directory=directory))
        return done, directory

    return ran


def _run(demo: str, *arguments: str, directory: Path) -> subprocess.CompletedProcess:
    home = Path(f"{directory}.home")
    home.mkdir()
    command = [sys.executable, str(ROOT / DEMOS[demo]), "--experiment", "exp", "--steps", str(STEPS)]
    command += [*READ_AS.get(demo, ()), *arguments]
    where = dict(cwd=directory, env=no_account(home) | SET_BEFORE.get(demo, {}))
    return subprocess.run(command, **where, capture_output=True, text=True, timeout=120)


def wait_for(condition, seconds: float = 60.0, every: float = 0.2):
    """The first true value of condition(), or a failure."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {condition}")


@pytest.fixture(scope="session")
def ray_here(foreign):
    """This process as a driver of that Ray, for all tests that use `WandbRun` directly."""
    import common  # sets what Ray reads when it is imported

    assert common
    ray.init(foreign, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture
def run(ray_here, tmp_path) -> Callable:
    """run(...): a WandbRun with its files below tmp_path."""
    from common import WandbRun

    def run(**options) -> WandbRun:
        return WandbRun("p", **{"name": "n", "mode": "offline", "dir": tmp_path} | options)

    return run


@pytest.fixture
def run_at_home(ray_here, tmp_path, monkeypatch) -> Callable:
    """run_at_home(...): a WandbRun of a user who works in tmp_path, and says no more than that."""
    from common import WandbRun

    monkeypatch.chdir(tmp_path)
    return lambda **options: WandbRun("p", **{"mode": "offline"} | options)


@pytest.fixture
def opened(tmp_path, monkeypatch) -> Iterator[Callable]:
    """opened(...): what a pipeline actor opens, without Ray; its files are below tmp_path."""
    from rooms import Opened

    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # which a writer sets for good
    made = []

    def opened(**init) -> Opened:
        made.append(Opened(tmp_path, **init))
        return made[-1]

    yield opened
    for each in made:
        each.writer.run.finish()
        each.state.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture
def busy(start, tmp_path):
    """busy(...): a demo that is in the middle of both its pipelines, and can go on for a minute."""

    from processes import steps_on_disk

    def busy(*arguments: str, demo: str = "demo1", **variables: str) -> subprocess.Popen:
        process = start(demo, "--steps", "600", "--step-seconds", "0.02", "--mode", "offline", *arguments, **variables)
        wait_for(lambda: len(folders(tmp_path)) == 2)
        wait_for(lambda: steps_on_disk(tmp_path, "training") and steps_on_disk(tmp_path, "inference"))
        return process

    return busy


CLUSTER = """
import os, select, sys, tempfile
with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as os.environ["RAY_TMPDIR"]:
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=16, include_dashboard=False))
    print(cluster.address, flush=True)
    select.select([os.pidfd_open(int(sys.argv[1]))], [], [])  # until that process ends
    cluster.shutdown()
"""

JOIN = """
import json, os, signal, sys, time
from arguments import parse_args
from backbone import exits
from common import PipelineActor, WandbRun, pipeline_actor
import ray
ray.init(os.environ["CLUSTER"], log_to_driver=False, logging_level="error")

def run(**options):
    made = WandbRun("p", **{"mode": "offline"} | options)
    made.log({"a": 1.0}, 0)
    return made

"""


@pytest.fixture(scope="session")
def foreign(everybodys, tmp_path_factory) -> str:
    """The address of the one Ray for what needs none of its own; the shell that started it is not the user's."""
    theirs = {"WANDB_RUN_GROUP": "the raylet's", "WANDB_MODE": "disabled", "WANDB_RUN_ID": "theirs"}
    pytest_itself = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()

    def start() -> str:
        environment = no_account(tmp_path_factory.mktemp("home")) | {"PYTHONPATH": MODULES} | theirs
        command = [sys.executable, "-c", CLUSTER, str(pytest_itself)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        return process.stdout.readline().strip()

    address = once(everybodys / "address", start)
    assert address
    return address


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes that don't outlive the test."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def begin(foreign, tmp_path, environment, started) -> Callable[..., subprocess.Popen]:
    """begin("run()"): a driver that does this, on that Ray and in tmp_path."""

    def begin(program: str, *arguments: str, before: str = JOIN, **variables: str) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(before + program)
        variables = environment | {"CLUSTER": foreign} | variables
        command, pipe = [sys.executable, "program.py", *arguments], subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    return begin


@pytest.fixture
def drive(begin) -> Callable[..., subprocess.CompletedProcess]:
    """drive("run()"): such a driver that has ended."""

    def drive(program: str, *arguments: str, **options: str) -> subprocess.CompletedProcess:
        process = begin(program, *arguments, **options)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return drive
