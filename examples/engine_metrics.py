"""What an engine exports at its `/metrics` (vLLM, SGLang) among the run's system metrics.

    uv run python -m examples.engine_metrics HOST:8000

wandb reads such pages itself. The metrics of the cluster's nodes stay beside it where `ray[default]` is installed.
"""

import sys
import time

from common import InferencePipelineActor, WandbRun, node_metrics

import ray

WANTED = r"^vllm\..*(kv_cache_usage|num_requests)"  # by default all that there is, which can be much


def main(address: str, seconds: float = 60.0) -> None:
    endpoints, filters = node_metrics()
    settings = {
        "x_stats_open_metrics_endpoints": endpoints | {"vllm": f"http://{address}/metrics"},
        "x_stats_open_metrics_filters": [*filters, WANTED],
    }
    with WandbRun("recipes", "engine", pipeline=InferencePipelineActor, mode="offline", settings=settings) as run:
        run.log({"requests/running": 0}, 0)
        time.sleep(seconds)  # your engine serves
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main(*sys.argv[1:2])
