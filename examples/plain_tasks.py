"""Sixteen plain tasks for each step: the row is made when they have ended.

    uv run python -m examples.plain_tasks

A task that Ray retries is not counted twice: each attempt has a row of its own.
"""

from common import InferencePipelineActor, WandbRun

import ray


@ray.remote(num_cpus=0)
def roll_out(run: WandbRun, step: int, prompt: int) -> None:
    run.log({"reward": [(prompt + step) % 2], "rollouts": 1}, step)


def main() -> None:
    with WandbRun("recipes", "plain-tasks", pipeline=InferencePipelineActor, workers=16, mode="offline") as run:
        for step in range(3):
            ray.get([roll_out.remote(run, step, prompt) for prompt in range(16)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
