"""Six workers log 300 steps each, and kill themselves right after their last call. Nothing that they logged is lost.

    uv run python -m examples.killed_workers

What it prints is the ledger: 300 rows from 1800 reports. That is counted from the run's file on the disk.
"""

import os
import signal
import time

from common import WandbRun

import ray


@ray.remote(num_cpus=0)
class Trainer:
    def train(self, run: WandbRun, rank: int) -> None:
        for step in range(300):
            time.sleep(0.01)
            run.log({"loss": (rank + 1) / (step + 1), "tokens": 4096}, step)
        os.kill(os.getpid(), signal.SIGKILL)  # as the out-of-memory killer does


def main() -> None:
    run = WandbRun("recipes", "killed-workers", workers=6, mode="offline")
    trainers = [Trainer.remote() for _ in range(6)]
    ray.get([trainer.__ray_ready__.remote() for trainer in trainers])  # they begin together
    ray.wait([trainer.train.remote(run, rank) for rank, trainer in enumerate(trainers)], num_returns=6)
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
