"""Rollout workers that share no step: each takes the newest policy when it is ready. The policy's version is the step.

    uv run python -m examples.asynchronous_rollouts

All batches of a version become one row. A worker that skips a version is no longer waited for when it reports a later
one or ends, but a version that it hasn't reported waits for its turn, up to a minute.
"""

import random
import time

from common import InferencePipelineActor, WandbRun

import ray


@ray.remote(num_cpus=0)
class Policy:
    version = 0

    def learn(self) -> None:
        self.version += 1

    def newest(self) -> int:
        return self.version


@ray.remote(num_cpus=0)
def roll_out(run: WandbRun, policy: ray.actor.ActorHandle) -> None:
    for _ in range(10):
        version = ray.get(policy.newest.remote())
        time.sleep(random.uniform(0, 0.05))
        run.log({"reward": [0.1 * version, 0.2 * version], "policy_version": version}, step=version)


def main() -> None:
    policy = Policy.remote()
    with WandbRun("recipes", "asynchronous", pipeline=InferencePipelineActor, workers=2, mode="offline") as run:
        engines = [roll_out.remote(run, policy) for _ in range(2)]
        while len(ray.wait(engines, num_returns=2, timeout=0.1)[0]) < 2:
            policy.learn.remote()
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
