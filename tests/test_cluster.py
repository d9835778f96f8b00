"""A real cluster of two nodes on this machine: where things run, and what is left when one of them dies."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from conftest import DEMOS, ROOT, Log, folders, read_rows, wait_for
from wandb_server import KEY, Server


def actors(raylet: int) -> dict[int, str]:
    """What a node's raylet has started: pid -> class."""
    found = {}
    for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split():
        if title := re.match(r"ray::(\w+(Worker|Actor))\b", Path(f"/proc/{pid}/cmdline").read_text()):
            found[int(pid)] = title[1]
    return found


def test_workers_are_on_both_nodes_and_when_one_dies_the_rest_goes_on(cluster, tmp_path, token):
    """The pipeline actors are on the driver's node, the runs where `--dir` says, and the ledger is right."""
    address, head, second = cluster
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, str(ROOT / DEMOS["demo1"]), "--address", address, "--experiment", "x"]
    command += ["--mode", "offline", "--dir", str(tmp_path), "--steps", "200", "--step-seconds", "0.04"]
    where, pipe = tmp_path / "elsewhere", subprocess.PIPE
    with subprocess.Popen(command, cwd=where, env=token, stdout=pipe, stderr=pipe, text=True) as process:
        wait_for(lambda: process.poll() is not None or (actors(second) and len(actors(head) | actors(second)) == 6))
        wait_for(lambda: process.poll() is not None or all(list(read_rows(path)) for path in folders(tmp_path)))
        here, there = actors(head), actors(second)
        for pid in [*there, second]:  # all of it, as when a machine is gone
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


def test_the_users_login_is_found_by_the_actors_of_a_cluster_that_was_started_without_it(cluster, tmp_path, token):
    address, *_ = cluster
    server, command = Server(), [sys.executable, str(ROOT / DEMOS["demo1"]), "--address", address, "--steps", "5"]
    command += ["--dir", str(tmp_path), "--experiment"]
    by_environment = token | server.environment
    by_netrc = token | {"WANDB_BASE_URL": server.environment["WANDB_BASE_URL"]}
    try:
        subprocess.run([*command, "a"], env=by_environment, check=True, capture_output=True, timeout=120)
        netrc = Path(token["HOME"], ".netrc")
        netrc.write_text(f"machine 127.0.0.1:{server.port} login user password {KEY}\n")
        netrc.chmod(0o600)
        subprocess.run([*command, "b"], env=by_netrc, check=True, capture_output=True, timeout=120)
    finally:
        server.stop()
    for run in (f"demo1-{pipeline}-{experiment}" for pipeline in ("training", "inference") for experiment in "ab"):
        assert [row["step"] for row in server.rows(run)] == list(range(5))
