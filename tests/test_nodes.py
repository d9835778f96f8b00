"""The nodes' CPU, memory and GPUs in a run's system metrics, where the nodes export them."""

import os
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from backbone import nodes, transaction_log, wandb_internals
from backbone.nodes import METRICS

import pytest
import wandb
from conftest import ROOT, Log, folders, short_folder, wait_for

pytestmark = pytest.mark.xdist_group("nodes")  # in one process, for they share what takes long

# Runs on a cluster of two nodes, which last until they have system metrics of the endpoints that they read.
RUNS = """
import os, sys, time
from backbone import nodes, transaction_log
from common import WandbRun
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
found, _ = nodes.node_metrics()
print(*found)

def start(name, **settings):
    settings |= dict(x_stats_sampling_interval=0.5)
    return WandbRun("nodes", name, mode="offline", dir=sys.argv[1], settings=settings)

def keys(run):
    return [item.key for record in transaction_log.records(run.path) for item in record.stats.item]

def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)

def record(run, expected):
    wait_for(lambda: {key.split(".")[1] for key in keys(run) if key.startswith("openmetrics.")} >= expected)

with start("default") as run:
    record(run, set(found))
mine = {"mine": next(iter(found.values()))}
own = dict(x_stats_open_metrics_endpoints=mine, x_stats_open_metrics_filters=["ray_node_cpu_count"])
with start("argument", **own) as run:
    record(run, {"mine"})
os.environ["WANDB__STATS_OPEN_METRICS_ENDPOINTS"] = str(mine).replace("'", '"')
os.environ["WANDB__STATS_OPEN_METRICS_FILTERS"] = '["ray_node_mem_total"]'
with start("environment") as run:
    record(run, {"mine"})
ray.shutdown()
cluster.shutdown()
"""


def system_metrics(log: Log) -> set[str]:
    """Those that were read from an endpoint, as `endpoint.metric`."""
    keys = {key for stats in log.of("stats") for key in stats["item"]}
    return {".".join(key.split(".")[1:3]) for key in keys if key.startswith("openmetrics.")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> tuple[list[str], dict[str, set[str]]]:
    """Names of the nodes, and the system metrics by run.

    `ray[default]` comes into an environment of its own: with it every Ray of the other tests would start its agents.
    """
    directory = tmp_path_factory.mktemp("nodes")
    uv = [os.environ.get("UV", "uv"), "run", "--isolated", "--no-default-groups", "--group", "nodes"]
    command = [*uv, "python", "-c", RUNS, str(directory)]
    with short_folder() as folder:
        own = os.environ | {"RAY_TMPDIR": folder}
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [Log(path) for path in folders(directory)]
    return done.stdout.split(), {log.run["display_name"]: system_metrics(log) for log in logs}


@pytest.mark.slow
def test_a_run_records_cpu_and_memory_of_every_node_under_its_hosts_name(cluster):
    found, recorded = cluster
    assert len(set(found)) == 2
    assert all(re.fullmatch(rf"{os.uname().nodename.partition('.')[0]}-[0-9a-f]{{6}}", node) for node in found)
    metrics = ("ray_node_cpu_utilization", "ray_node_mem_used")
    every = {f"{node}.{metric}" for node in found for metric in metrics}
    assert recorded["default"] == every


@pytest.mark.slow
def test_endpoints_and_filters_of_the_users_own_stay_as_they_are(cluster):
    _, recorded = cluster
    assert recorded["argument"] == {"mine.ray_node_cpu_count"}
    assert {metric.partition("_total")[0] for metric in recorded["environment"]} == {"mine.ray_node_mem"}


class Exporter(BaseHTTPRequestHandler):
    """A node's agent, as far as wandb-core asks it."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        for metric in ("ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_disk_free"):
            self.wfile.write(f'# TYPE {metric} gauge\n{metric}{{ip="1"}} 12\n'.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_what_a_node_exports_is_in_the_runs_system_metrics(tmp_path):
    """As a real cluster's nodes do in the slow tests above."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Exporter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = {"node-1": f"http://127.0.0.1:{server.server_port}"}
        quick = dict(silent=True, x_stats_sampling_interval=0.5, x_transaction_log_flush_interval=0.5)
        settings = wandb.Settings(**wandb_internals.with_endpoints(quick, found, [METRICS]))
        run = wandb.init(dir=tmp_path, mode="offline", reinit="create_new", settings=settings)
        wait_for(lambda: any(record.HasField("stats") for record in transaction_log.records(Path(run.sync_dir))))
        run.finish()
        server.shutdown()
    expected = {f"node-1.{metric}" for metric in ("ray_node_cpu_utilization", "ray_node_mem_used")}
    assert system_metrics(Log(folders(tmp_path)[0])) == expected


def test_who_sets_endpoints_or_filters_has_those(monkeypatch):
    found, own, filters = {"node-1": "http://n:1"}, "x_stats_open_metrics_endpoints", "x_stats_open_metrics_filters"
    assert wandb_internals.with_endpoints({own: {"mine": "u"}}, found, ["m"]) == {own: {"mine": "u"}}
    assert wandb_internals.with_endpoints({filters: ["f"]}, found, ["m"]) == {own: found, filters: ["f"]}
    monkeypatch.setenv("WANDB_X_STATS_OPEN_METRICS_FILTERS", '["f"]')
    assert wandb_internals.with_endpoints({}, found, ["m"]) == {own: found}
    monkeypatch.setenv("WANDB__STATS_OPEN_METRICS_ENDPOINTS", "{}")
    assert wandb_internals.with_endpoints({}, found, ["m"]) == {}


def test_a_cluster_that_exports_nothing_changes_no_setting(ray_here):
    assert [node["MetricsExportPort"] for node in ray_here.nodes()] == [-1]
    assert wandb_internals.with_endpoints({"silent": True}, *nodes.node_metrics()) == {"silent": True}
