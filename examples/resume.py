"""A run that goes on after a preemption: the same id, `resume="allow"`, and the step of the last checkpoint.

    uv run python -m examples.resume

Steps since the checkpoint come again, and each attempt has rows of its own. Offline there is a second folder then; give
both to `wandb sync`, the older first. On another machine this needs an online run, or `dir=` on a shared disk.
"""

from common import TrainingPipelineActor, WandbRun

import ray


@ray.remote(num_cpus=0)
def train(run: WandbRun, first: int, last: int) -> None:
    for step in range(first, last):
        run.log({"loss": 1 / (step + 1), "tokens": 1000}, step)  # tokens_total goes on, too


def job(first: int, last: int) -> None:
    with WandbRun(
        "recipes", "resumed", pipeline=TrainingPipelineActor, id="resumed-1", resume="allow", mode="offline"
    ) as run:
        ray.get(train.remote(run, first, last))
    print(run.finish())


def main() -> None:
    job(0, 15)  # is preempted at step 15; its last checkpoint is that of step 10
    job(10, 20)


if __name__ == "__main__":
    ray.init()
    main()
