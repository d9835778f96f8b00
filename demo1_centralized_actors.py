"""Who owns a W&B run? Each pipeline has one Ray actor that does; the workers push their metrics to it.

    pipeline    project             run name          keys
    training    rl-training-demo    training-<ID>     loss, grads/grad_norm_0, e2e/speed, …
    inference   rl-inference-demo   inference-<ID>    reward/mean, e2e/speed, …

Choose it when training and inference are looked at by different people, or have nothing to be compared. Whoever wants
both on one page needs a Report, and finds what belongs together by the experiment in the names and configs.

    uv run python demo1_centralized_actors.py --steps 20 --experiment my-first
"""

import sys

from common import InferencePipelineActor, TrainingPipelineActor, WandbRun
from session import Args, InferenceWorker, TrainingWorker, parse_args, ray_session, run_to_end


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


def main() -> int:
    args = parse_args(__doc__)
    with ray_session(args):
        training, inference = strategy(args)
        workers = [TrainingWorker.remote(training, args, rank) for rank in range(args.training_workers)]
        workers += [InferenceWorker.remote(inference, args, rank) for rank in range(args.inference_workers)]
        return run_to_end(args, workers, training, inference)


if __name__ == "__main__":
    sys.exit(main())
