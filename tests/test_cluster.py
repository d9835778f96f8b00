"""A real cluster of two nodes, each with a temporary folder of its own: what is logged on the second is brought."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DEMOS, MODULES, ROOT, Log, folders, no_account, read_rows, short_folder, wait_for
from processes import below
from wandb_server import KEY, Server

pytestmark = pytest.mark.xdist_group("two nodes")  # in one process, for they share what takes long

HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
print(cluster.address, cluster.head_node.all_processes["raylet"][0].process.pid, flush=True)
sys.stdin.read()
cluster.shutdown()
"""

# A temporary folder of its own: else a node would take the run's private folder for its own one.
OWN_TMP = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.getuid() else []), "sh", "-c"]
OWN_TMP += ['mount -t tmpfs tmpfs "$TMPDIR" && exec "$@"', "sh"]

JOIN = f"""
import json, os, pickle, signal, subprocess, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from backbone import relay
from common import PipelineActor, WandbRun, pipeline_actor
import ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
there = dict(num_cpus=0, resources={{sys.argv[2]: 0.01}})
here = dict(num_cpus=0, resources={{"node:__internal_head__": 0.01}})

@pipeline_actor
class Hasty(PipelineActor):
    def __init__(self, folder):
        relay.Relay.__ray_metadata__.modified_class.IDLE = 2.0
        super().__init__(folder)

@pipeline_actor
class Impatient(PipelineActor):
    def __init__(self, folder):
        relay.Relays.PATIENCE = 2.0
        super().__init__(folder)

@ray.remote
class Worker:
    def log(self, run, steps, first=0):
        for step in range(first, first + steps):
            run.log({{"tokens": 1}}, step)

    def log_and_die(self, run, steps, first=0):
        self.log(run, steps, first)
        os.kill(os.getpid(), signal.SIGKILL)

    def flush(self, run):
        run.log({{"tokens": 1}}, 10**6)
        return run.flush(), run.progress()[0].reports

    def log_in_a_child(self, run, step):
        program = "import pickle, sys; pickle.load(sys.stdin.buffer).log({{'tokens': 1}}, int(sys.argv[1]))"
        child = [sys.executable, "-c", program, str(step)]
        content = run if isinstance(run, bytes) else pickle.dumps(run)
        variables = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        done = subprocess.run(child, input=content, env=variables, capture_output=True)
        return done.returncode, done.stderr.decode()

def say(what=0):
    print("SAYS", json.dumps(what), flush=True)

def show(ledger):
    say([ledger.reports, ledger.rows, ledger.lost, ledger.ok, ledger.unheard])

"""


class Node:
    """A further one, with a temporary folder of its own."""

    def __init__(self, address: str, name: str, environment: dict[str, str]):
        self.name, self._temporary = name, environment["TMPDIR"].lstrip("/")
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", address, "--num-cpus", "2"]
        start += ["--resources", json.dumps({name: 1}), "--block", "--disable-usage-stats"]
        start += ["--min-worker-port", "0", "--max-worker-port", "0"]
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([*OWN_TMP, *start], env=environment, **quiet)
        [self.raylet] = wait_for(lambda: below(self.process.pid, "raylet/raylet"))

    def relays(self) -> list[int]:
        return below(self.raylet, "ray::Relay")

    def private_folders(self) -> list[Path]:
        return [*Path(f"/proc/{self.raylet}/root", self._temporary).glob("wandb-run-*")]

    def die(self) -> None:
        """All of it at once, as when a machine is gone."""
        for pid in [self.raylet, *below(self.process.pid, "")]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Nodes:
    """address: of the cluster. environment: of a user whose Ray asks for a token."""

    def __init__(self, address: str, head: int, environment: dict[str, str]):
        self.address, self.head, self.environment = address, head, environment
        self.nodes: list[Node] = []
        self.second = self.add("second")

    def add(self, name: str) -> Node:
        self.nodes.append(Node(self.address, name, self.environment))
        return self.nodes[-1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Nodes]:
    """In processes of its own, because a process has one token."""
    environment = no_account(tmp_path_factory.mktemp("home")) | {"PYTHONPATH": MODULES}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    with short_folder() as folder:
        environment |= {"RAY_TMPDIR": folder, "TMPDIR": folder}
        may = (
            shutil.which("unshare")
            and not subprocess.run([*OWN_TMP, "true"], env=environment, capture_output=True).returncode
        )
        if not may:
            pytest.skip("needs the right to give a node a temporary folder of its own: unshare --mount")
        pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        head = subprocess.Popen([sys.executable, "-c", HEAD], env=environment, text=True, **pipe)
        address, raylet = head.stdout.readline().split()
        nodes = Nodes(address, int(raylet), environment)
        yield nodes
        for node in nodes.nodes:
            node.die()
        head.communicate(timeout=60)


@pytest.fixture
def begin(cluster, tmp_path, started) -> Callable[..., subprocess.Popen]:
    """begin("run = WandbRun('p')"): a driver that does this on the cluster, in tmp_path."""

    def begin(program: str, node: Node = cluster.second, **variables: str) -> subprocess.Popen:
        command, pipe = [sys.executable, "-c", JOIN + program, cluster.address, node.name], subprocess.PIPE
        where = dict(cwd=tmp_path, env=cluster.environment | variables, text=True)
        started.append(subprocess.Popen(command, **where, stdin=pipe, stdout=pipe, stderr=pipe))
        return started[-1]

    return begin


def told(process: subprocess.Popen):
    """What a driver says next. Ray says things between."""
    said = iter(process.stdout.readline, "")
    line = next((line for line in said if line.startswith("SAYS ")), None)
    assert line, process.communicate()[1]
    return json.loads(line.removeprefix("SAYS "))


def go_on(process: subprocess.Popen) -> None:
    process.stdin.write("go on\n")
    process.stdin.flush()


def tokens(folder: Path) -> int:
    return sum(row["tokens"] for path in folders(folder) for row in Log(path).rows)


def actors(raylet: int) -> dict[int, str]:
    """What a node's raylet has started: pid -> class."""
    found = {}
    for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split():
        if title := re.match(r"ray::(\w+(Worker|Actor))\b", Path(f"/proc/{pid}/cmdline").read_text()):
            found[int(pid)] = title[1]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("where", ["netrc", "environment"])
def test_the_users_login_is_found_by_the_actors_of_a_cluster_that_was_started_without_it(cluster, begin, where):
    server = Server()
    program = "with WandbRun('p', id='r', mode='online') as run: run.log({'a': 1.0}, 5)"
    netrc = Path(cluster.environment["HOME"], ".netrc")
    try:
        variables = server.environment
        if where == "netrc":
            del variables["WANDB_API_KEY"]
            netrc.write_text(f"machine 127.0.0.1:{server.port} login user password {KEY}\n")
            netrc.chmod(0o600)
        assert "Error" not in begin(program, **variables).communicate(timeout=60)[1]
        assert [row["step"] for row in server.rows("r")] == [5]
    finally:
        server.stop()
        netrc.unlink(missing_ok=True)


def test_what_is_logged_on_both_nodes_is_in_rows_whatever_logs_it_and_however_it_ends(cluster, begin, tmp_path):
    """Actors, one of them killed right after it logged, tasks that are a process each, and children without Ray."""
    driver = begin("""
run = WandbRun("p", mode="offline", workers=2)
workers = [Worker.options(**where).remote() for where in (here, there)]
ray.get([worker.log.remote(run, 300) for worker in workers])
ray.wait([Worker.options(**there, max_restarts=0).remote().log_and_die.remote(run, 100, 1000)])

@ray.remote(max_calls=1, max_retries=0)
def task(run, first):
    for step in range(first, first + 50):
        run.log({"tokens": 1}, step)

ray.get([task.options(**where).remote(run, 2000 + 100 * i) for i, where in enumerate((here, there))])
children = ray.get([worker.log_in_a_child.remote(run, 10**5 + i) for i, worker in enumerate(workers)])
say([code for code, _ in children])
show(run.finish())
""")
    assert told(driver) == [0] * 2
    reports, _, lost, ok, unheard = told(driver)
    assert (reports, lost, ok, unheard) == (802, 0, True, [])
    assert tokens(tmp_path) == 802
    rows = [row for path in folders(tmp_path) for row in Log(path).rows]
    assert [row["workers"] for row in rows if row["step"] < 300] == [2] * 300
    wait_for(lambda: not cluster.second.private_folders())  # nothing is left there


@pytest.mark.slow
def test_flush_waits_until_what_was_logged_has_left_the_node(begin):
    driver = begin("""
run = WandbRun("p", mode="offline")
worker = Worker.options(**there).remote()
say(ray.get([worker.flush.remote(run) for _ in range(3)]))
run.finish()
""")
    assert told(driver) == [[True, 1], [True, 2], [True, 3]]


@pytest.mark.slow
def test_a_process_without_ray_whose_parent_has_never_had_the_handle_is_told_what_to_do(begin):
    driver = begin("""
run = WandbRun("p", mode="offline")
worker = Worker.options(**there).remote()
say(ray.get(worker.log_in_a_child.remote(pickle.dumps(run), 0)))
show(run.finish())
""")
    code, error = told(driver)
    assert code == 1
    assert "RunFinishedError: run '" in error
    assert "nobody has told it of this process: log, or pickle the handle, in the Ray worker that started" in error
    assert told(driver) == [0, 0, 0, True, []]


@pytest.mark.slow
def test_a_relay_goes_when_nobody_logs_and_comes_back_when_somebody_does(cluster, begin, tmp_path):
    """Nodes must get free for the autoscaler, while an idle process of Ray's stays."""
    driver = begin("""
run = WandbRun("p", mode="offline", pipeline=Hasty)

@ray.remote
def task(run, first):
    for step in range(first, first + 100):
        run.log({"tokens": 1}, step)

@ray.remote
def late(run):
    try:
        run.log({"tokens": 1}, 10**6)
    except RuntimeError as error:
        return type(error).__name__

for first in (0, 100):
    ray.get(task.options(**there).remote(run, first))
    say()
    input()
show(run.finish())
say(ray.get([late.options(**there).remote(run) for _ in range(3)]))
""")
    for _ in range(2):
        told(driver)
        wait_for(cluster.second.relays)
        wait_for(lambda: not cluster.second.relays())
        go_on(driver)
    assert told(driver) == [200, 200, 0, True, []]
    assert told(driver) == ["RunFinishedError"] * 3
    assert tokens(tmp_path) == 200
    wait_for(lambda: not cluster.second.private_folders())


@pytest.mark.slow
def test_workers_of_one_node_may_have_temporary_folders_of_their_own_and_a_fork_may_be_silent(cluster, begin, tmp_path):
    """While the relay stays: no other could tell the run of the fork."""
    driver = begin("""
class Forking(Worker.__ray_metadata__.modified_class):
    def log(self, run, steps, first=0):
        super().log(run, 1, first)
        if not os.fork():
            super().log(run, 1, first + 1)
            time.sleep(4)
            super().log(run, steps - 2, first + 2)
            os._exit(0)
        os.wait()

run = WandbRun("p", mode="offline", pipeline=Hasty)
own = dict(env_vars=dict(TMPDIR=os.path.join(os.environ["TMPDIR"], "of-its-own")))
os.makedirs(own["env_vars"]["TMPDIR"], exist_ok=True)

@ray.remote
def make(folder):
    os.makedirs(folder, exist_ok=True)

ray.get(make.options(**there).remote(own["env_vars"]["TMPDIR"]))
workers = [Worker.options(**there).remote(), Worker.options(**there, runtime_env=own).remote()]
workers.append(ray.remote(Forking).options(**there).remote())
ray.get([worker.log.remote(run, 100, 100 * i) for i, worker in enumerate(workers)])
show(run.finish())
""")
    assert told(driver) == [300, 300, 0, True, []]
    assert tokens(tmp_path) == 300


@pytest.mark.slow
def test_whoever_kills_a_relay_costs_no_report(cluster, begin, tmp_path):
    """While workers log, and when the run is being finished."""
    driver = begin("""
run = WandbRun("p", mode="offline", workers=2)
workers = [Worker.options(**there).remote() for _ in range(2)]
working = [worker.log.remote(run, 5_000) for worker in workers]
say()
ray.get(working)
say()
input()
show(run.finish())
""")
    told(driver)
    for _ in range(2):
        [pid] = wait_for(cluster.second.relays)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: pid not in cluster.second.relays())
    told(driver)
    [pid] = wait_for(cluster.second.relays)
    os.kill(pid, signal.SIGSTOP)
    go_on(driver)
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(1)  # it is waiting for that one
    os.kill(pid, signal.SIGKILL)
    reports, _, lost, ok, unheard = told(driver)
    assert (reports, lost, ok, unheard) == (10_000, 0, True, [])
    assert tokens(tmp_path) == 10_000


@pytest.mark.slow
def test_a_node_that_does_not_answer_is_named_and_finish_does_not_wait_for_ever(cluster, begin, tmp_path):
    driver = begin("""
run = WandbRun("p", mode="offline", pipeline=Impatient)
worker = Worker.options(**there).remote()
ray.get(worker.log.remote(run, 100))
say([node["NodeID"][:6] for node in ray.nodes() if sys.argv[2] in node["Resources"]])
input()
ray.get(Worker.options(**here).remote().log.remote(run, 100, 100))
show(run.finish())
""")
    [node] = told(driver)
    [pid] = wait_for(cluster.second.relays)
    wait_for(lambda: sum(len(read_rows(path)) for path in folders(tmp_path)) >= 99)
    os.kill(pid, signal.SIGSTOP)
    go_on(driver)
    try:
        assert told(driver) == [200, 200, 0, False, [f"node {node}: it did not answer within 2 s"]]
    finally:
        os.kill(pid, signal.SIGKILL)
    assert tokens(tmp_path) == 200


@pytest.mark.slow
def test_a_node_that_the_actor_has_not_heard_of_before_it_was_killed_for_good_is_named(begin):
    driver = begin("""
run = WandbRun("p", mode="offline")
worker = Worker.options(**there).remote()
ray.get(worker.__ray_ready__.remote())
ray.kill(run._owned.actor)
ray.get(worker.log.remote(run, 100))
say([node["NodeID"][:6] for node in ray.nodes() if sys.argv[2] in node["Resources"]])
show(run.finish())
""")
    [node] = told(driver)
    reports, _, _, ok, unheard = told(driver)
    assert (reports, ok, unheard) == (0, False, [f"node {node}: what was logged there at last"])


@pytest.mark.slow
def test_a_node_that_dies_is_named_and_what_it_had_brought_is_in_rows(cluster, begin, tmp_path):
    third = cluster.add("third")
    driver = begin(
        """
while not any(sys.argv[2] in node["Resources"] for node in ray.nodes()):
    time.sleep(0.1)
run = WandbRun("p", mode="offline", workers=2)
workers = [Worker.options(**where).remote() for where in (here, there)]
ray.get([worker.log.remote(run, 100) for worker in workers])
ray.get(workers[1].flush.remote(run))
say([node["NodeID"][:6] for node in ray.nodes() if sys.argv[2] in node["Resources"]])
input()
ray.get(workers[0].log.remote(run, 100, 100))
show(run.finish())
""",
        third,
    )
    [node] = told(driver)
    third.die()
    go_on(driver)
    *account, unheard = told(driver)
    assert account == [301, 201, 0, False]
    assert len(unheard) == 1
    assert unheard[0].startswith(f"node {node}: ")  # what Ray says of it, or that it does not answer
    assert tokens(tmp_path) == 301


@pytest.mark.slow
def test_a_driver_that_is_killed_on_a_cluster_leaves_finished_runs_and_no_actor_and_no_files(cluster, begin, tmp_path):
    before = {*cluster.second.private_folders()}  # of a test above, in which that node was not heard any more
    driver = begin("""
run = WandbRun("p", mode="offline")
ray.get([Worker.options(**where).remote().log.remote(run, 100, first) for where, first in ((here, 0), (there, 100))])
say()
time.sleep(600)
""")
    told(driver)
    assert "TrainingPipelineActor" in actors(cluster.head).values()
    driver.kill()
    driver.communicate()
    wait_for(lambda: "TrainingPipelineActor" not in actors(cluster.head).values())
    wait_for(lambda: not list(tmp_path.glob("wandb/.*state*")))  # the system's list of children may lack some
    [path] = folders(tmp_path)
    log = Log(path)
    assert ({row["step"] for row in log.rows}, log.exit_code) == ({*range(200)}, 1)
    wait_for(lambda: not cluster.second.relays() and before.issuperset(cluster.second.private_folders()))


@pytest.mark.slow
def test_a_demo_s_workers_are_on_both_nodes_and_when_one_dies_the_rest_goes_on(cluster, tmp_path):
    """The pipeline actors are on the driver's node, the runs where `--dir` says, and the ledger is right.

    The last test here: it ends the cluster's second node.
    """
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, str(ROOT / DEMOS["demo1"]), "--address", cluster.address, "--experiment", "x"]
    command += ["--mode", "offline", "--dir", str(tmp_path), "--steps", "300", "--step-seconds", "0.04"]
    where, pipe = tmp_path / "elsewhere", subprocess.PIPE
    with subprocess.Popen(command, cwd=where, env=cluster.environment, stdout=pipe, stderr=pipe, text=True) as process:
        second = cluster.second.raylet
        wait_for(
            lambda: process.poll() is not None or (actors(second) and len(actors(cluster.head) | actors(second)) == 6)
        )
        wait_for(lambda: process.poll() is not None or all(list(read_rows(path)) for path in folders(tmp_path)))
        here, there = actors(cluster.head), actors(second)
        cluster.second.die()
        stdout, stderr = process.communicate(timeout=120)

    print(stdout, stderr[-3000:])
    pipelines = {"TrainingPipelineActor", "InferencePipelineActor"}
    assert set(here.values()) > pipelines, stdout + stderr
    assert there
    assert not pipelines & set(there.values())
    assert process.returncode == 1
    assert stderr.count("its process died") == len(there)
    logs = [Log(path) for path in folders(tmp_path)]
    for log in logs:
        rows, name = log.rows, log.run["display_name"]
        reports = sum(row["workers"] for row in rows)
        assert re.search(
            rf"^{name}: {len(rows)} rows from {reports} reports, 0 lost(, 1 not heard)?$", stdout, re.MULTILINE
        )
        assert log.exit_code == 1
    assert "not heard" in stdout
    steps = {step for log in logs for step in (row["step"] for row in log.rows)}
    assert steps == set(range(300))
    assert sum(row["workers"] for log in logs for row in log.rows) >= 300 * (4 - len(there))  # those that were left
