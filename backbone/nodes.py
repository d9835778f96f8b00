"""The nodes of the cluster: whether one lives, and CPU, memory and GPUs of each among the run's system metrics.

wandb reads these from where Ray exports them, on nodes where `ray[default]` is installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray

# In percent, bytes, percent of a GPU and MB of a GPU; all that a node exports would be 220 KB a sample.
METRICS = r"\.ray_node_(cpu_utilization|mem_used|gpus_utilization|gram_used)$"


def node_metrics() -> tuple[dict[str, str], list[str]]:
    """Endpoints and filters of the nodes' metrics, for settings that name others as well.

    Endpoints are where the nodes that are there now export their metrics: name of the host -> URL. Of several nodes
    whose hosts have one name, each has the beginning of its id behind it, as in `ray list nodes`.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"] > 0]
    shared, found = Counter(map(_host, nodes)), {}
    for node in nodes:
        name = _host(node) if shared[_host(node)] == 1 else f"{_host(node)}-{node['NodeID'][:6]}"
        address = node["NodeManagerAddress"]
        found[name] = f"http://{f'[{address}]' if ':' in address else address}:{node['MetricsExportPort']}/metrics"
    return found, [METRICS]


def is_alive(node: str) -> bool:
    """Whether Ray says so of the node of this name."""
    return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())


def _host(node: Mapping[str, Any]) -> str:
    return node["NodeManagerHostname"].partition(".")[0]  # a dot ends the endpoint's name in the metric's
