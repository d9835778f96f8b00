"""Rewards by data source: a key for each source, and one rule for all of them.

    uv run python -m examples.per_source

A batch may lack some sources.
"""

from common import PipelineActor, Reduction, WandbRun, pipeline_actor

import numpy as np
import ray


@pipeline_actor
class Rollouts(PipelineActor):
    reduction = Reduction(statistics={"reward/*": ("mean", "p90"), "reward": ("mean", "min", "max")})


@ray.remote(num_cpus=0)
def roll_out(run: WandbRun, engine: int) -> None:
    rng = np.random.default_rng(engine)
    for batch in range(5):
        rewards = {"gsm8k": rng.random(8), "code": rng.random(4)}
        if engine == 0:
            rewards["math"] = rng.random(2)
        run.log({"reward": np.concatenate([*rewards.values()])}, batch)
        run.log({f"reward/{source}": samples for source, samples in rewards.items()}, batch)


def main() -> None:
    with WandbRun("recipes", "per-source", pipeline=Rollouts, workers=2, mode="offline") as run:
        ray.get([roll_out.remote(run, engine) for engine in range(2)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
