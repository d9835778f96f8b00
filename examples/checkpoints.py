"""Checkpoints as versions of an artifact, logged by a worker.

    uv run python -m examples.checkpoints

Another job says which of them it has used.
"""

import tempfile
from pathlib import Path

from common import InferencePipelineActor, WandbRun

import ray


@ray.remote(num_cpus=0)
def train(run: WandbRun) -> None:
    for step in range(20):
        run.log({"loss": 1 / (step + 1), "tokens": 4096}, step)
        if step % 10 == 0:
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "weights.bin").write_bytes(bytes([step]) * 1000)
                # It returns when the files are copied, so the folder may go.
                run.log_artifact("checkpoint", "model", folder, metadata={"step": step}, aliases=[f"step-{step}"])


def main() -> None:
    with WandbRun("recipes", "training", group="checkpoints", mode="offline") as training:
        ray.get(train.remote(training))
    with WandbRun(
        "recipes", "serving", group="checkpoints", pipeline=InferencePipelineActor, mode="offline"
    ) as serving:
        serving.use_artifact("checkpoint:step-10")  # online this is lineage; its files: wandb.Api().artifact(…)
        serving.log({"requests/running": 1}, 0)
    print(training.finish(), serving.finish(), sep="\n")


if __name__ == "__main__":
    ray.init()
    main()
