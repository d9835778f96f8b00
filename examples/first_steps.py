"""Eight trainers log a loss that is weighted by their tokens, and the tokens themselves.

    uv run python -m examples.first_steps

README shows this file as a diff: the lines marked `# W&B` were added to a plain Ray program.
"""

from common import PipelineActor, Reduction, WandbRun, pipeline_actor  # W&B

import numpy as np
import ray


@pipeline_actor  # W&B
class Training(PipelineActor):  # W&B
    reduction = Reduction(weights={"loss": "tokens"}, sums=("tokens",), totals=("tokens",))  # W&B


@ray.remote(num_cpus=0)
def train(rank: int, config: dict) -> None:
    rng = np.random.default_rng(rank)
    for step in range(config["steps"]):
        loss, tokens = 1 / (step + 1), int(rng.integers(3_000, 5_000))
        config["run"].log({"loss": loss, "tokens": tokens}, step)  # W&B


def main() -> None:
    config = {"lr": 1e-6, "steps": 20}
    run = config["run"] = WandbRun("recipes", "first-steps", pipeline=Training, workers=8, mode="offline")  # W&B
    ray.get([train.remote(rank, config) for rank in range(8)])
    print(run.finish())  # W&B


if __name__ == "__main__":
    ray.init()
    main()
