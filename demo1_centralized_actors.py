"""Who owns a W&B run? Each pipeline has one Ray actor that does; the workers push their metrics to it.

    pipeline    project             run name          keys
    training    rl-training-demo    training-<ID>     loss, grads/grad_norm_0, e2e/speed, …
    inference   rl-inference-demo   inference-<ID>    reward/mean, e2e/speed, …

Read this one first. To choose between the layouts, compare demos 2 and 3: here a training run and an inference run are
in projects of their own, and only the experiment in their names says that they belong together.

    uv run python demo1_centralized_actors.py --steps 20 --experiment my-first
"""

import sys

import common
from common import InferencePipelineActor, TrainingPipelineActor, WandbRun
from session import Args, paced, parse_args, ray_session, run_to_end

import numpy as np
import ray


def strategy(args: Args) -> tuple[WandbRun, WandbRun]:
    """A project and a run for each pipeline, under bare keys."""
    training = WandbRun(
        "rl-training-demo",
        f"training-{args.experiment}",
        pipeline=TrainingPipelineActor,
        workers=args.training_workers,
        id=f"demo1-training-{args.experiment}",
        **args.init,
    )
    inference = WandbRun(
        "rl-inference-demo",
        f"inference-{args.experiment}",
        pipeline=InferencePipelineActor,
        workers=args.inference_workers,
        id=f"demo1-inference-{args.experiment}",
        **args.init,
    )
    return training, inference


@ray.remote(scheduling_strategy="SPREAD")
class TrainingWorker:
    """Stands for a rank of a trainer."""

    def work(self, run: WandbRun, args: Args, rank: int) -> None:
        rng = np.random.default_rng([args.seed, 0, rank])
        for step in paced(args):
            run.log(common.generate_training_metrics(step, rng), step, label=f"rank {rank}")


@ray.remote(scheduling_strategy="SPREAD")
class InferenceWorker:
    """Stands for an inference engine, which has a clock of its own."""

    def work(self, run: WandbRun, args: Args, rank: int) -> None:
        rng = np.random.default_rng([args.seed, 1, rank])
        for step in paced(args):
            run.log(common.generate_inference_metrics(step, rng, rank), step, label=f"engine {rank}")


def main() -> int:
    args = parse_args(__doc__)
    with ray_session(args):
        training, inference = strategy(args)
        trainers = [TrainingWorker.remote().work.remote(training, args, i) for i in range(args.training_workers)]
        engines = [InferenceWorker.remote().work.remote(inference, args, i) for i in range(args.inference_workers)]
        return run_to_end(args, training=(training, trainers), inference=(inference, engines))


if __name__ == "__main__":
    sys.exit(main())
