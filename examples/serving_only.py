"""Inference without training: one run, in the project for this kind of job.

    uv run python -m examples.serving_only

Its config names what it serves.
"""

import common
from common import InferencePipelineActor, WandbRun

import numpy as np
import ray


@ray.remote(num_cpus=0)
def serve(run: WandbRun, engine: int) -> None:
    rng = np.random.default_rng(engine)
    for batch in range(5):
        run.log(common.generate_inference_metrics(batch, rng, engine), batch, label=f"engine {engine}")


def main() -> None:
    config = {"training_project": "rl-agent", "training_run": "demo2-training-7", "checkpoint": "checkpoint:step-10"}
    with WandbRun(
        "inference-only", "serving", pipeline=InferencePipelineActor, workers=2, config=config, mode="offline"
    ) as run:
        ray.get([serve.remote(run, engine) for engine in range(2)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
