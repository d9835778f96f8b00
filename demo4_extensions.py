"""What ties an experiment together? Job types, a group, tags and artifacts, all at once.

    pipeline      project              run name           job type      group    uses          logs
    training      rl-agent-extended    training-<ID>      training      <ID>                   checkpoint:v0, v1, …
    inference     rl-agent-extended    inference-<ID>     inference     <ID>     checkpoint    trajectories:v0, v1, …
    evaluation    rl-agent-extended    evaluation-<ID>    evaluation    <ID>     checkpoint

Choose it when runs, weights, rollouts and scores must be traceable to each other. Filter by job type or by tag
(`demo4`, `seed-N`), group by group, and follow a score or a rollout to the checkpoint that it came from (aliases
`latest`, `step-N`, `best`). Rollouts can be read: `trajectories` has a table for each checkpoint, and the page of the
inference run one that grows. Evaluation has its own axis, and training doesn't wait for it. It costs the most
configuration.

    uv run python demo4_extensions.py --steps 40 --experiment my-fourth
"""

import io
import sys

import common
from common import InferencePipelineActor, PipelineActor, Reduction, TrainingPipelineActor, WandbRun, pipeline_actor
from session import Args, EvaluationWorker, InferenceWorker, TrainingWorker, parse_args, ray_session, run_to_end

import numpy as np
import ray


@pipeline_actor
class EvaluationPipelineActor(PipelineActor):
    """Pipeline of the evaluations.

    `gsm8k/accuracy`, `gsm8k/pass@4`, … need no rule: of bool arrays, here one outcome for each problem, a row has the
    fraction over all workers.
    """

    prefix = "evaluation/"
    job_type = "evaluation"
    reduction = Reduction(largest=("checkpoint_step",), statistics={"response_length": ("mean",)})


def strategy(args: Args) -> tuple[WandbRun, WandbRun, WandbRun]:
    """One project and one group; job types and tags tell the runs apart."""

    def run(job_type: str, pipeline: ray.actor.ActorClass, workers: int) -> WandbRun:
        return WandbRun(
            "rl-agent-extended",
            f"{job_type}-{args.experiment}",
            pipeline=pipeline,
            workers=workers,
            id=f"demo4-{job_type}-{args.experiment}",
            job_type=job_type,
            group=args.experiment,
            tags=["demo4", f"seed-{args.seed}", f"experiment-{args.experiment}"[:64]],
            **args.init,
        )

    training = run("training", TrainingPipelineActor, args.training_workers)
    inference = run("inference", InferencePipelineActor, args.inference_workers)
    return training, inference, run("evaluation", EvaluationPipelineActor, workers=1)


class Checkpoints:
    """Logs a checkpoint every `CHECKPOINT_EVERY` steps, all as versions of one artifact, and has it evaluated."""

    def __init__(self, evaluator: ray.actor.ActorHandle) -> None:
        self.evaluator, self.best = evaluator, -np.inf

    def __call__(self, run: WandbRun, step: int, metrics: common.Metrics) -> None:
        if step % common.CHECKPOINT_EVERY:
            return
        aliases, score = ["latest", f"step-{step}"], float(metrics["explained_variance"])
        if score > self.best:
            self.best = score
            aliases.append("best")
        weights = io.BytesIO()
        np.save(weights, np.full((64, 64), step, dtype=np.float32))
        metadata = {"step": step, "explained_variance": score}
        run.log_artifact("checkpoint", "model", {"weights.npy": weights.getvalue()}, metadata=metadata, aliases=aliases)
        self.evaluator.evaluate.remote(step)  # doesn't wait for it


def use_checkpoint(run: WandbRun, step: int, metrics: common.Metrics) -> None:
    """Says which checkpoint is evaluated."""
    run.use_artifact(f"checkpoint:step-{metrics['checkpoint_step']}")


COLUMNS = ["step", "policy_version", "source", "prompt", "response", "reward", "length", "truncated"]


def log_rollouts(run: WandbRun, step: int, metrics: common.Metrics) -> None:
    """Logs what is worth reading of the first batch of each checkpoint: the best, the worst and three other rollouts.

    They become a version of an artifact, and the next rows of the table on the run's page.
    """
    if step % common.CHECKPOINT_EVERY:
        return
    import wandb  # here, in the one worker that needs it

    worst, *others, best = np.argsort(metrics["reward"])
    rng = np.random.default_rng([run.config["seed"], step])
    prompts = rng.integers(3, 20, (4, 3)).tolist()  # the numbers in them; one for each group
    chosen = [best, worst, *rng.choice(others, 3, replace=False)]
    rows = [[step, metrics["policy_version"], *rollout(i, metrics, *prompts[i // common.GROUP])] for i in chosen]
    run.log({"rollouts_table": wandb.Table(COLUMNS, rows, log_mode="INCREMENTAL")}, step)

    checkpoint = f"checkpoint:step-{metrics['policy_version']}"
    run.use_artifact(checkpoint)
    files, metadata = {"rollouts": wandb.Table(COLUMNS, rows)}, {"step": step, "checkpoint": checkpoint}
    aliases = ["latest", f"step-{step}"]
    run.log_artifact("trajectories", "rollouts", files, metadata=metadata, aliases=aliases)


def rollout(i: int, metrics: common.Metrics, a: int, b: int, c: int) -> list:
    """Source, prompt, response, reward, length and whether it was cut; with made-up words that fit the reward."""
    solved, truncated = metrics["success_rate"][i], bool(metrics["truncated_fraction"][i])
    source = "gsm8k" if i < len(metrics["reward/gsm8k"]) else "code"
    if source == "gsm8k":
        prompt = f"A shop has {a} boxes of {b} pens and sells {c} pens. How many are left?"
        lines = [f"The boxes hold {a} * {b} = {a * b} pens.", "…", f"#### {a * b - c if solved else a * b + c}"]
    else:
        prompt = f"Write f(n), the sum of the multiples of {a} below n."
        lines = ["def f(n):", f"    return sum(range(0, {'n' if solved else 'n + 1'}, {a}))"]
    response = "\n".join(lines[:-1] if truncated else lines)
    return [source, prompt, response, float(metrics["reward"][i]), int(metrics["response_length"][i]), truncated]


def main() -> int:
    args = parse_args(__doc__)
    with ray_session(args):
        training, inference, evaluation = strategy(args)
        evaluator = EvaluationWorker.remote(evaluation, args, use_checkpoint)
        checkpoints = Checkpoints(evaluator)
        workers = [TrainingWorker.remote(training, args, rank, checkpoints) for rank in range(args.training_workers)]
        workers += [
            InferenceWorker.remote(inference, args, rank, log_rollouts) for rank in range(args.inference_workers)
        ]
        return run_to_end(args, [*workers, evaluator], training, inference, evaluation)


if __name__ == "__main__":
    sys.exit(main())
