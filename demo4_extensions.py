"""What ties an experiment together? Job types, a group, tags and artifacts, all at once.

    pipeline    project              run name          job type     group    artifacts
    training    rl-agent-extended    training-<ID>     training     <ID>     checkpoint:v0, v1, … (latest, step-N, best)
    inference   rl-agent-extended    inference-<ID>    inference    <ID>     trajectories:v0, v1, … (a table each)

Choose it when runs, weights and rollouts must be traceable to each other. Filter by job type or by tag (`demo4`,
`seed-N`), group by group, and follow an inference run to the checkpoints it rolled out with. Both pipelines log
`e2e/speed` and `e2e/latency_ms`, so they compare with each other and with demo 2's projects. It costs the most
configuration.

    uv run python demo4_extensions.py --steps 40 --experiment my-fourth
"""

import io
import sys

from common import (
    CHECKPOINT_EVERY,
    Args,
    InferencePipelineActor,
    Metrics,
    TrainingPipelineActor,
    WandbRun,
    parse_args,
    ray_session,
    run_pipelines,
)

import numpy as np


def strategy(args: Args) -> tuple[WandbRun, WandbRun]:
    """One project and one group; job types and tags tell the runs apart."""
    together = {"group": args.experiment, "tags": ["demo4", f"seed-{args.seed}", f"experiment-{args.experiment}"[:64]]}
    training = WandbRun(
        "rl-agent-extended",
        f"training-{args.experiment}",
        pipeline=TrainingPipelineActor,
        workers=args.training_workers,
        id=f"demo4-training-{args.experiment}",
        job_type="training",
        **together,
        **args.init,
    )
    inference = WandbRun(
        "rl-agent-extended",
        f"inference-{args.experiment}",
        pipeline=InferencePipelineActor,
        workers=args.inference_workers,
        id=f"demo4-inference-{args.experiment}",
        job_type="inference",
        **together,
        **args.init,
    )
    return training, inference


class Checkpoints:
    """Logs a checkpoint every `CHECKPOINT_EVERY` steps, all as versions of one artifact."""

    def __init__(self) -> None:
        self.best = -np.inf

    def __call__(self, run: WandbRun, step: int, metrics: Metrics) -> None:
        if step % CHECKPOINT_EVERY:
            return
        aliases = ["latest", f"step-{step}"]
        score = float(metrics["explained_variance"])
        if score > self.best:
            self.best = score
            aliases.append("best")
        weights = io.BytesIO()
        np.save(weights, np.full((64, 64), step, dtype=np.float32))
        metadata = {"step": step, "explained_variance": score}
        run.log_artifact("checkpoint", "model", {"weights.npy": weights.getvalue()}, metadata=metadata, aliases=aliases)


def log_trajectories(run: WandbRun, step: int, metrics: Metrics) -> None:
    """Logs a table of this batch's rollouts, each time there is a new checkpoint, and says which one made them."""
    if step % CHECKPOINT_EVERY:
        return
    import wandb  # here, in the one worker that needs it

    checkpoint = f"checkpoint:step-{metrics['policy_version']}"
    run.use_artifact(checkpoint)
    rollouts = zip(metrics["reward"], metrics["response_length"], metrics["success_rate"], strict=True)
    rows = [[step, i, float(r), int(length), bool(success)] for i, (r, length, success) in enumerate(rollouts)]
    table = wandb.Table(columns=["step", "rollout", "reward", "response_length", "success"], data=rows)
    metadata = {"step": step, "checkpoint": checkpoint}
    run.log_artifact(
        "trajectories", "rollouts", {"rollouts": table}, metadata=metadata, aliases=["latest", f"step-{step}"]
    )


def main() -> int:
    args = parse_args(__doc__)
    with ray_session(args):
        training, inference = strategy(args)
        hooks = {"after_training_step": Checkpoints(), "after_inference_step": log_trajectories}
        return run_pipelines(args, training, inference, **hooks)


if __name__ == "__main__":
    sys.exit(main())
