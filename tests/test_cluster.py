"""A real cluster of two nodes on this machine: where things run, and what is left when one of them dies."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import DEMOS, ROOT, Log, folders, no_account, read_rows, short_folder, wait_for
from wandb_server import KEY, Server

pytestmark = pytest.mark.xdist_group("two nodes")  # in one process, for they share what takes long

CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
nodes = cluster.head_node, cluster.add_node(num_cpus=2, resources={"second": 1})
print(json.dumps([cluster.address, *(node.all_processes["raylet"][0].process.pid for node in nodes)]), flush=True)
sys.stdin.read()
cluster.shutdown()
"""

JOIN = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from common import WandbRun
import ray
both = [{str(ROOT / "common.py")!r}, {str(ROOT / "backbone")!r}]
ray.init(sys.argv[1], log_to_driver=False, logging_level="error", runtime_env=dict(py_modules=both))
"""


class Nodes(NamedTuple):
    address: str
    head: int  # the raylet's process
    second: int
    environment: dict[str, str]  # of a user whose Ray asks for a token


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Nodes]:
    """In a process of its own, because a process has one token."""
    home = tmp_path_factory.mktemp("home")
    (home / "token").write_text("0123456789abcdef" * 4)
    environment = no_account(home) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "token")}
    with short_folder() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            env=environment | {"RAY_TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        yield Nodes(*json.loads(process.stdout.readline()), environment)
        process.communicate(timeout=60)


def begin(cluster: Nodes, program: str, folder: Path, **variables: str) -> subprocess.Popen:
    """A driver that does this on the cluster, in `folder`."""
    command, pipe = [sys.executable, "-c", JOIN + program, cluster.address], subprocess.PIPE
    where = dict(cwd=folder, env=cluster.environment | variables)
    return subprocess.Popen(command, **where, stdout=pipe, stderr=pipe, text=True)


def actors(raylet: int) -> dict[int, str]:
    """What a node's raylet has started: pid -> class."""
    found = {}
    for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split():
        if title := re.match(r"ray::(\w+(Worker|Actor))\b", Path(f"/proc/{pid}/cmdline").read_text()):
            found[int(pid)] = title[1]
    return found


@pytest.mark.parametrize("where", ["netrc", pytest.param("environment", marks=pytest.mark.slow)])
def test_the_users_login_is_found_by_the_actors_of_a_cluster_that_was_started_without_it(cluster, tmp_path, where):
    server = Server()
    program = "with WandbRun('p', id='r', mode='online') as run: run.log({'a': 1.0}, 5)"
    netrc = Path(cluster.environment["HOME"], ".netrc")
    try:
        variables = server.environment
        if where == "netrc":
            del variables["WANDB_API_KEY"]
            netrc.write_text(f"machine 127.0.0.1:{server.port} login user password {KEY}\n")
            netrc.chmod(0o600)
        driver = begin(cluster, program, tmp_path, **variables)
        assert "Error" not in driver.communicate(timeout=60)[1]
        assert [row["step"] for row in server.rows("r")] == [5]
    finally:
        server.stop()
        netrc.unlink(missing_ok=True)


def test_a_worker_that_is_killed_on_another_node_leaves_all_that_it_has_sent(cluster, tmp_path):
    program = """
@ray.remote(resources={"second": 1}, max_restarts=0)
class Worker:
    def work(self, run):
        for step in range(100):
            run.log({"a": 1.0}, step)
        run.flush()
        os.kill(os.getpid(), signal.SIGKILL)

run = WandbRun("p", mode="offline")
ray.wait([Worker.remote().work.remote(run)])
print()
began = time.monotonic()
ledger = run.finish()
print(ledger.reports, ledger.rows, ledger.lost, ledger.silent, ledger.ok, ledger.warnings, time.monotonic() - began < 4)
"""
    driver = begin(cluster, program, tmp_path)
    assert driver.communicate(timeout=60)[0].endswith("\n100 100 0 0 True [] True\n")


def test_a_driver_that_is_killed_on_a_cluster_leaves_finished_runs_and_no_actor(cluster, tmp_path):
    program = """
run = WandbRun("p", mode="offline")
for step in range(100):
    run.log({"a": 1.0}, step)
run.flush()
print("READY", flush=True)
time.sleep(600)
"""
    driver = begin(cluster, program, tmp_path)
    assert driver.stdout.readline() == "READY\n"
    assert "TrainingPipelineActor" in actors(cluster.head).values()
    driver.kill()
    driver.communicate()
    [path] = folders(tmp_path)
    wait_for(lambda: Log(path).exit_code is not None)
    log = Log(path)
    assert (len(log.rows), log.exit_code) == (100, 1)
    wait_for(lambda: not list(tmp_path.glob("wandb/.*store*")))
    wait_for(lambda: "TrainingPipelineActor" not in actors(cluster.head).values())


def test_workers_are_on_both_nodes_and_when_one_dies_the_rest_goes_on(cluster, tmp_path):
    """The pipeline actors are on the driver's node, the runs where `--dir` says, and the ledger is right.

    The last test here: it ends the cluster's second node.
    """
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, str(ROOT / DEMOS["demo1"]), "--address", cluster.address, "--experiment", "x"]
    command += ["--mode", "offline", "--dir", str(tmp_path), "--steps", "200", "--step-seconds", "0.04"]
    where, pipe = tmp_path / "elsewhere", subprocess.PIPE
    with subprocess.Popen(command, cwd=where, env=cluster.environment, stdout=pipe, stderr=pipe, text=True) as process:
        wait_for(
            lambda: (
                process.poll() is not None
                or (actors(cluster.second) and len(actors(cluster.head) | actors(cluster.second)) == 6)
            )
        )
        wait_for(lambda: process.poll() is not None or all(list(read_rows(path)) for path in folders(tmp_path)))
        here, there = actors(cluster.head), actors(cluster.second)
        for pid in [*there, cluster.second]:  # all of it, as when a machine is gone
            os.kill(pid, signal.SIGKILL)
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
        assert f"{name}: {len(rows)} rows from {sum(row['workers'] for row in rows)} reports\n" in stdout
        assert log.exit_code == 1
    steps = {step for log in logs for step in (row["step"] for row in log.rows)}
    assert steps == set(range(200))
    assert sum(row["workers"] for log in logs for row in log.rows) >= 200 * (4 - len(there))  # those that were left
