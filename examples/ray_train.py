"""Ray Train's DDP learns XOR on two ranks. One rank is killed, and both go on from the last checkpoint.

    uv run --with "ray[train]~=2.60.0" --with torch python -m examples.ray_train

The lines marked `# W&B` were added to the plain example: a run, its way to the ranks, and what a rank logs of a step.
Ray Train starts both ranks again, from the last checkpoint that it had registered by then. Each step since that has two
rows, one of each attempt.
"""

import os
import signal
import tempfile

from common import WandbRun  # W&B

import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_model

STEPS, SAVE_EVERY, KILLED_AT = 150, 25, 60


def train_on_rank(config: dict) -> None:
    run = config["run"]  # W&B
    rank, checkpoint, first = train.get_context().get_world_rank(), train.get_checkpoint(), 0
    model = prepare_model(torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if checkpoint:
        with checkpoint.as_directory() as folder:
            first, weights, moments = torch.load(f"{folder}/state.pt")
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    for step in range(first, STEPS):
        if step == KILLED_AT and rank == 1 and not checkpoint:
            os.kill(os.getpid(), signal.SIGKILL)
        points = torch.randn(256, 2)
        labels = (points.prod(dim=1) > 0).long()
        logits = model(points)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log({"cross_entropy": loss, "accuracy": logits.argmax(dim=1) == labels}, step)  # W&B
        if (step + 1) % SAVE_EVERY == 0:
            with tempfile.TemporaryDirectory() as folder:
                torch.save((step + 1, model.state_dict(), optimizer.state_dict()), f"{folder}/state.pt")
                train.report({}, checkpoint=None if rank else train.Checkpoint.from_directory(folder))


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    run = WandbRun("xor", "ddp", workers=2, mode="offline")  # W&B
    TorchTrainer(
        train_on_rank,
        train_loop_config={"run": run},  # W&B
        scaling_config=train.ScalingConfig(num_workers=2),
        run_config=train.RunConfig(failure_config=train.FailureConfig(max_failures=1)),
    ).fit()
    print(run.finish())  # W&B
