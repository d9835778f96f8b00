"""Thirty lines of plain Ray and W&B: an actor owns the run, and the workers call it. For a start that may be enough.

    uv run python -m examples.by_hand

What these lines lose, and `tests/test_recipes.py` shows it:
- If the logging actor or its machine is killed, wandb's file of the run is empty for up to 15 s, and what was on its
  way is gone. Nobody is told.
- W&B drops a row whose step is lower than that of the row before. Two workers, or a restart from a checkpoint, do that.
- Each report is a row of its own. The mean of them, which the page draws, is a mean of means: wrong where the workers
  have batches of unequal size.
"""

import os

import ray
import wandb


@ray.remote(num_cpus=0)
class Logger:
    def __init__(self, folder: str):
        self.run = wandb.init(project="recipes", name="by-hand", mode="offline", dir=folder, settings={"silent": True})

    def log(self, metrics: dict, step: int) -> None:
        self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()


@ray.remote(num_cpus=0)
def train(logger: ray.actor.ActorHandle, rank: int) -> None:
    for step in range(10):
        ray.get(logger.log.remote({"loss": 1 / (step + 1), "tokens": 100 * (rank + 1)}, step))


def main() -> None:
    logger = Logger.remote(os.getcwd())
    ray.get([train.remote(logger, rank) for rank in range(2)])
    ray.get(logger.finish.remote())


if __name__ == "__main__":
    ray.init()
    main()
