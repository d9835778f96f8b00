"""Thirty lines of plain Ray and W&B: an actor owns the run, and the workers call it. For a start that may be enough.

    uv run python -m examples.by_hand

They lose the last 15 s when the actor is killed, rows whose step goes back, and of a step all reports but the last.
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
        wandb.teardown()  # finishes the run, and returns when all is written


@ray.remote(num_cpus=0)
def train(logger: ray.actor.ActorHandle, rank: int) -> None:
    for step in range(10):
        ray.get(logger.log.remote({"loss": (rank + 1) / (step + 1), "tokens": 100 * (rank + 1)}, step))


def main() -> None:
    logger = Logger.remote(os.getcwd())
    ray.get([train.remote(logger, rank) for rank in range(2)])
    ray.get(logger.finish.remote())


if __name__ == "__main__":
    ray.init()
    main()
