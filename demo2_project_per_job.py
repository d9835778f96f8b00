"""Which project does a run go to? The project says what kind of job it was; equal names make kinds comparable.

    pipeline    project           run name          keys
    training    rl-agent          training-<ID>     loss, e2e/speed, e2e/latency_ms/mean, …
    inference   inference-only    inference-<ID>    reward/mean, e2e/speed, e2e/latency_ms/mean, …

Choose it when the same kind of job runs in many experiments: all inference runs, whatever trained the model, lie side
by side. `e2e/speed` and `e2e/latency_ms` mean the same in both projects, so a Report can put them on one chart; that
Report has to be made, and the link from an inference run to its training run is only in its config.

    uv run python demo2_project_per_job.py --steps 20 --experiment my-second
"""

import sys

import common
from common import InferencePipelineActor, TrainingPipelineActor, WandbRun
from session import Args, paced, parse_args, ray_session, run_to_end

import numpy as np
import ray


def strategy(args: Args) -> tuple[WandbRun, WandbRun]:
    """A project for each kind of job; the inference run names the training run whose weights it serves."""
    training = WandbRun(
        "rl-agent",
        f"training-{args.experiment}",
        pipeline=TrainingPipelineActor,
        workers=args.training_workers,
        id=f"demo2-training-{args.experiment}",
        **args.init,
    )
    trained_by = {"training_project": training.project, "training_run": training.id}
    inference = WandbRun(
        "inference-only",
        f"inference-{args.experiment}",
        pipeline=InferencePipelineActor,
        workers=args.inference_workers,
        id=f"demo2-inference-{args.experiment}",
        **args.init | {"config": args.init["config"] | trained_by},
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
