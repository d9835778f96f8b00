"""Rank 0 evaluates at some of the steps that all ranks log.

    uv run python -m examples.evaluation_on_rank_0

The row of such a step has one key more.
"""

from common import WandbRun

import ray


@ray.remote(num_cpus=0)
class Trainer:
    def train(self, run: WandbRun, rank: int) -> None:
        for step in range(10):
            run.log({"loss": 1 / (step + 1), "tokens": 4096}, step)
            if rank == 0 and step % 5 == 0:
                run.log({"eval/accuracy": step / 10}, step)  # the same step, in a second call


def main() -> None:
    with WandbRun("recipes", "evaluation-on-rank-0", workers=2, mode="offline") as run:
        trainers = [Trainer.remote() for _ in range(2)]
        ray.get([trainer.train.remote(run, rank) for rank, trainer in enumerate(trainers)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
