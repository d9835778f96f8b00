"""Rollouts to be read, in one table that grows: each step adds the rows of all workers.

    uv run python -m examples.rollouts_to_read

The run's page shows the last 100 increments of such a table. To keep all of them, log an artifact as well.
"""

from common import InferencePipelineActor, WandbRun

import ray


@ray.remote(num_cpus=0)
def roll_out(run: WandbRun, engine: int) -> None:
    import wandb  # in the workers that log tables or media; the others don't need it

    table = wandb.Table(["step", "prompt", "response", "reward"], log_mode="INCREMENTAL")
    for batch in range(5):
        table.add_data(batch, f"What is {batch} + {engine}?", f"{batch + engine}", 1.0)
        run.log({"rollouts_table": table}, batch)  # only what is new is sent


def main() -> None:
    with WandbRun("recipes", "rollouts", pipeline=InferencePipelineActor, workers=2, mode="offline") as run:
        ray.get([roll_out.remote(run, engine) for engine in range(2)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
