"""A trial of a sweep: training and inference in one run, so that the agent's run has the objective.

    wandb sweep examples/sweep.yaml && wandb agent ENTITY/PROJECT/SWEEP

Under `wandb agent` the first run without an `id=` is the trial's. `run.config` has what the sweep has chosen, and the
rollouts' reward is in the same run, by `share=`. Without an agent it is a run like any other.
"""

from common import InferencePipelineActor, TrainingPipelineActor, WandbRun

import ray


@ray.remote(num_cpus=0)
def train(run: WandbRun, rollouts: WandbRun, lr: float) -> None:
    for step in range(10):
        run.log({"loss": 1 / (step + 1), "tokens": 4096}, step)
        rollouts.log({"reward": [lr * step, 2 * lr * step]}, step)  # inference/reward/mean, the sweep's objective


def main() -> None:
    with WandbRun("recipes", pipeline=TrainingPipelineActor, prefix="training/", config={"lr": 0.01}) as run:
        rollouts = WandbRun("recipes", pipeline=InferencePipelineActor, prefix="inference/", share=run)
        ray.get(train.remote(run, rollouts, run.config["lr"]))
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
