"""What ties an experiment together? Job types, a group, tags and artifacts, all at once.

    pipeline      project              run name           job type      group    uses          logs
    training      rl-agent-extended    training-<ID>      training      <ID>                   checkpoint:v0, v1, …
    inference     rl-agent-extended    inference-<ID>     inference     <ID>     checkpoint    trajectories:v0, v1, …
    evaluation    rl-agent-extended    evaluation-<ID>    evaluation    <ID>     checkpoint

Choose it when runs, weights, rollouts and scores must be traceable to each other. Filter by job type or by tag
(`demo4`, `seed-N`), group by group, and follow a score or a rollout to the checkpoint that it came from (aliases
`latest`, `step-N`, `best`). An evaluation is logged at the training step of its checkpoint, so that its curve lies over
training's; training doesn't wait for it. It costs the most configuration.

    uv run python demo4_extensions.py --steps 40 --experiment my-fourth
"""

import io
import sys
import time

import common
from common import InferencePipelineActor, PipelineActor, Reduction, TrainingPipelineActor, WandbRun, pipeline_actor
from session import Args, paced, parse_args, ray_session, run_to_end

import numpy as np
import ray


@pipeline_actor
class EvaluationPipelineActor(PipelineActor):
    """Pipeline of the evaluations. Bool arrays, one outcome for each problem, need no rule: a row has the fraction."""

    prefix = "evaluation/"
    job_type = "evaluation"
    reduction = Reduction(largest=("checkpoint_step",), statistics={"response_length": ("mean",)})


def strategy(args: Args) -> tuple[WandbRun, WandbRun, WandbRun]:
    """One project and one group; job types and tags tell the runs apart."""

    def run(job_type: str, pipeline: ray.actor.ActorClass, workers: int) -> WandbRun:
        name, tags = (
            f"{job_type}-{args.experiment}",
            ["demo4", f"seed-{args.seed}", f"experiment-{args.experiment}"[:64]],
        )
        ties = dict(job_type=job_type, group=args.experiment, tags=tags, id=f"demo4-{name}")
        return WandbRun("rl-agent-extended", name, pipeline=pipeline, workers=workers, **ties, **args.init)

    training = run("training", TrainingPipelineActor, args.training_workers)
    inference = run("inference", InferencePipelineActor, args.inference_workers)
    return training, inference, run("evaluation", EvaluationPipelineActor, workers=1)


@ray.remote(scheduling_strategy="SPREAD")
class TrainingWorker:
    """Stands for a rank of a trainer. Rank 0 saves a checkpoint now and then, and has it evaluated."""

    def work(self, run: WandbRun, args: Args, rank: int, evaluator: ray.actor.ActorHandle) -> None:
        rng, best, evaluations = np.random.default_rng([args.seed, 0, rank]), -np.inf, []
        for step in paced(args):
            metrics = common.generate_training_metrics(step, rng)
            if rank == 0 and step % common.CHECKPOINT_EVERY == 0:
                score = float(metrics["explained_variance"])
                log_checkpoint(run, step, score, score > best)
                best = max(best, score)
                evaluations.append(evaluator.evaluate.remote(step))  # doesn't wait for it
            run.log(metrics, step, commit=True, label=f"rank {rank}")
        if evaluations:  # Ray drops calls that are under way when the actor ends that made them
            ray.wait(evaluations, num_returns=len(evaluations))


def log_checkpoint(run: WandbRun, step: int, score: float, is_best: bool) -> None:
    """All checkpoints are versions of one artifact."""
    weights, aliases = io.BytesIO(), ["latest", f"step-{step}", *["best"] * is_best]
    np.save(weights, np.full((64, 64), step, dtype=np.float32))
    metadata = {"step": step, "explained_variance": score}
    run.log_artifact("checkpoint", "model", {"weights.npy": weights.getvalue()}, metadata=metadata, aliases=aliases)


@ray.remote(scheduling_strategy="SPREAD")
class EvaluationWorker:
    """Stands for an evaluation job, which sleeps until there is a checkpoint."""

    def __init__(self, run: WandbRun, args: Args):
        self.run, self.args, self.rng = run, args, np.random.default_rng([args.seed, 2])

    def evaluate(self, step: int) -> None:
        """Evaluates the checkpoint of a training step."""
        time.sleep(self.args.step_seconds)
        self.run.use_artifact(f"checkpoint:step-{step}")
        self.run.log(common.generate_evaluation_metrics(step, self.rng), step, commit=True)

    def finished(self, *trainers: None) -> None:
        """Returns when the trainers have ended, and all is evaluated that they have asked for."""


@ray.remote(scheduling_strategy="SPREAD")
class InferenceWorker:
    """Stands for an inference engine. Engine 0 logs rollouts to be read."""

    def work(self, run: WandbRun, args: Args, rank: int) -> None:
        rng = np.random.default_rng([args.seed, 1, rank])
        for step in paced(args):
            metrics = common.generate_inference_metrics(step, rng, rank)
            if rank == 0 and step % common.CHECKPOINT_EVERY == 0:
                log_rollouts(run, step, metrics, np.random.default_rng([args.seed, step]))
            run.log(metrics, step, label=f"engine {rank}")


COLUMNS = ["step", "policy_version", "source", "prompt", "response", "reward", "length", "truncated"]


def log_rollouts(run: WandbRun, step: int, metrics: common.Metrics, rng: np.random.Generator) -> None:
    """Logs what is worth reading of a batch: the best, the worst and three other rollouts.

    They become a version of an artifact, and the next rows of a table on the run's page, which shows the last 100 of
    such increments; the artifacts have them all.
    """
    import wandb  # here, in the one worker that needs it

    worst, *others, best = np.argsort(metrics["reward"])
    prompts = rng.integers(3, 20, (4, 3)).tolist()  # the numbers in them; one for each group
    chosen = [best, worst, *rng.choice(others, 3, replace=False)]
    rows = [[step, metrics["policy_version"], *rollout(i, metrics, *prompts[i // common.GROUP])] for i in chosen]
    run.log({"rollouts_table": wandb.Table(COLUMNS, rows, log_mode="INCREMENTAL")}, step)

    checkpoint, aliases = f"checkpoint:step-{metrics['policy_version']}", ["latest", f"step-{step}"]
    run.use_artifact(checkpoint)
    files, metadata = {"rollouts": wandb.Table(COLUMNS, rows)}, {"step": step, "checkpoint": checkpoint}
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
        evaluator = EvaluationWorker.remote(evaluation, args)
        ranks, engines = range(args.training_workers), range(args.inference_workers)
        trainers = [TrainingWorker.remote().work.remote(training, args, rank, evaluator) for rank in ranks]
        rollouts = [InferenceWorker.remote().work.remote(inference, args, rank) for rank in engines]
        runs = dict(training=(training, trainers), inference=(inference, rollouts))
        return run_to_end(args, **runs, evaluation=(evaluation, [evaluator.finished.remote(*trainers)]))


if __name__ == "__main__":
    sys.exit(main())
