"""Evaluation in the run of training, at its own pace and on an axis of its own: a view of the run, by `share=`.

    uv run python -m examples.evaluation_beside_training

Its step is the training step of the checkpoint, so that its curve lies over training's.
"""

from common import WandbRun

import ray


@ray.remote(num_cpus=0)
class Evaluator:
    def evaluate(self, evaluation: WandbRun, checkpoint: int) -> None:
        evaluation.log({"accuracy": checkpoint / 20}, checkpoint, commit=True)


@ray.remote(num_cpus=0)
def train(run: WandbRun, evaluation: WandbRun, evaluator: ray.actor.ActorHandle) -> list[ray.ObjectRef]:
    scores = []
    for step in range(20):
        run.log({"loss": 1 / (step + 1), "tokens": 4096}, step)
        if step % 10 == 0:
            scores.append(evaluator.evaluate.remote(evaluation, step))  # training doesn't wait for it
    return scores


def main() -> None:
    with WandbRun("recipes", "evaluation-beside-training", mode="offline") as run:
        evaluation = WandbRun("recipes", prefix="eval/", share=run)  # eval/accuracy, over eval/step
        ray.get(ray.get(train.remote(run, evaluation, Evaluator.remote())))
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
