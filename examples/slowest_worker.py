"""The slowest worker, by name.

    uv run python -m examples.slowest_worker

A mean hides one that is sick, and a maximum doesn't say which it is.
"""

from common import PipelineActor, Reduction, WandbRun, pipeline_actor

import ray


@pipeline_actor
class Training(PipelineActor):
    reduction = Reduction(worst=("time/step_s",))  # the row has time/step_s/max and time/step_s/worst


@ray.remote(num_cpus=0)
def train(run: WandbRun, rank: int) -> None:
    for step in range(10):
        seconds = 1.2 if rank == 3 else 1.0
        run.log({"time/step_s": seconds}, step, label=f"rank {rank}")  # without a label: the process and its host


def main() -> None:
    with WandbRun("recipes", "slowest", pipeline=Training, workers=4, mode="offline") as run:
        ray.get([train.remote(run, rank) for rank in range(4)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
