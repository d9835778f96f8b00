"""What workers say, in the run's Logs: a handler of Python's `logging` brings their lines there, with their label.

    uv run python -m examples.logs

The traceback of what ends the driver's `with` block is there as well.
"""

import logging

from common import WandbRun

import ray


@ray.remote(num_cpus=0)
def train(run: WandbRun, rank: int) -> None:
    logger = logging.getLogger("trainer")
    logger.setLevel(logging.INFO)
    handler = run.logging_handler(label=f"rank {rank}")
    logger.addHandler(handler)
    for step in range(3):
        run.log({"value_loss": 1 / (step + 1)}, step)
        logger.info("step %d is done", step)
    logger.removeHandler(handler)


def main() -> None:
    with WandbRun("recipes", "logs", workers=2, mode="offline") as run:
        ray.get([train.remote(run, rank) for rank in range(2)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
