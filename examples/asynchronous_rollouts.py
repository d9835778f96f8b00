"""Rollout workers that share no step: each takes the newest policy when it is ready. The policy's version is the step.

uv run python -m examples.asynchronous_rollouts
"""

import itertools
import time

from common import InferencePipelineActor, WandbRun

import ray


@ray.remote(num_cpus=0)
class Policy:
    versions = itertools.count()

    def newest(self) -> int:
        return next(self.versions) // 4  # it learns meanwhile


@ray.remote(num_cpus=0)
def roll_out(run: WandbRun, policy: ray.actor.ActorHandle, engine: int) -> None:
    for _ in range(10):
        version = ray.get(policy.newest.remote())
        time.sleep(0.02 * (1 + engine))
        # A version's batches become one row, a minute later at most if not all workers have played it.
        run.log({"reward": [0.1 * version, 0.2 * version], "policy_version": version}, version)


def main() -> None:
    with WandbRun("recipes", "asynchronous", pipeline=InferencePipelineActor, workers=2, mode="offline") as run:
        policy = Policy.remote()
        ray.get([roll_out.remote(run, policy, engine) for engine in range(2)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
