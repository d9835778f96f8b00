"""How are metrics named? In one project, paths such as `training/loss` become the sections of its dashboard.

    pipeline    project          run name          keys
    training    rl-experiment    training-<ID>     training/loss, training/grads/grad_norm_0, …
    inference   rl-experiment    inference-<ID>    inference/reward/mean, inference/e2e/speed, …

Choose it when one team wants all of an experiment on one page. It costs longer names, and a project in which every
experiment is two runs. `--one-run` puts both pipelines into one run called <ID>, each on its own step axis, as most RL
systems do: fewer runs to keep track of, but one that ends, resumes and fails as a whole.

    uv run python demo3_hierarchical_metrics.py --steps 20 --experiment my-third --one-run
"""

import sys

import common
from common import InferencePipelineActor, TrainingPipelineActor, WandbRun
from session import Args, paced, parse_args, ray_session, run_to_end

import numpy as np
import ray


def strategy(args: Args) -> tuple[WandbRun, WandbRun]:
    """One project; each pipeline's keys begin with its own path, in a run each or both in one."""
    training = WandbRun(
        "rl-experiment",
        args.experiment if args.one_run else f"training-{args.experiment}",
        pipeline=TrainingPipelineActor,
        workers=args.training_workers,
        prefix="training/",
        id=f"demo3-{'both' if args.one_run else 'training'}-{args.experiment}",
        **args.init,
    )
    own_run = {"id": f"demo3-inference-{args.experiment}", **args.init}
    inference = WandbRun(
        "rl-experiment",
        f"inference-{args.experiment}",
        pipeline=InferencePipelineActor,
        workers=args.inference_workers,
        prefix="inference/",
        **{"share": training} if args.one_run else own_run,
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
