"""Percentiles over all workers: each logs its samples, and the row has the statistics of all of them together.

    uv run python -m examples.samples_and_percentiles

The mean of the workers' p99 is no p99. A list or array is taken for samples; a list of bools for outcomes.
"""

from common import PipelineActor, Reduction, WandbRun, pipeline_actor

import numpy as np
import ray


@pipeline_actor
class Serving(PipelineActor):
    reduction = Reduction(statistics={"latency_ms": ("mean", "p50", "p99", "histogram")})


@ray.remote(num_cpus=0)
def serve(run: WandbRun, engine: int) -> None:
    rng = np.random.default_rng(engine)
    for batch in range(5):
        run.log({"latency_ms": rng.lognormal(7, 0.5, 64), "truncated": rng.random(64) < 0.1}, step=batch)


def main() -> None:
    with WandbRun("recipes", "samples-and-percentiles", pipeline=Serving, workers=4, mode="offline") as run:
        ray.get([serve.remote(run, engine) for engine in range(4)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
