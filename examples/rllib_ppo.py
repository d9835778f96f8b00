"""RLlib's PPO learns CartPole. Its env runners log to one W&B run, its learner to another.

    uv run --with "ray[rllib]~=2.60.0" --with torch python -m examples.rllib_ppo

The lines marked `# W&B` were added to the plain example: two runs, what an env runner logs when it has sampled (its
step is the version of the policy that has played), and what RLlib says of the learner, as it is.
"""

from typing import Any  # W&B

from common import InferencePipelineActor, TrainingPipelineActor, WandbRun  # W&B

import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig


def log_episodes(run: WandbRun, samples: list, metrics_logger: Any, **_: Any) -> None:  # W&B
    run.log({"reward": [e.get_return() for e in samples]}, step=int(metrics_logger.peek("weights_seq_no")))  # W&B


def main() -> None:
    torch.set_num_threads(1)  # enough for so small a network; the env runners need the other cores
    ray.init(include_dashboard=False, log_to_driver=False)
    training = WandbRun("cartpole", "ppo", pipeline=TrainingPipelineActor, mode="offline")  # W&B
    rollouts = WandbRun("cartpole", "rollouts", pipeline=InferencePipelineActor, workers=2, mode="offline")  # W&B
    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=2, batch_mode="complete_episodes")
        .training(train_batch_size_per_learner=2000, num_epochs=10, lr=0.001)
        .callbacks(on_sample_end=lambda **sampled: log_episodes(rollouts, **sampled))  # W&B
    )
    algorithm = config.build_algo()
    for iteration in range(10):
        result = algorithm.train()
        print(f"iteration {iteration}: mean return {result['env_runners']['episode_return_mean']:.0f}")
        training.log({"learners": result["learners"], "timers": result["timers"]}, step=iteration)  # W&B
    print(training.finish(), rollouts.finish(), sep="\n")  # W&B


if __name__ == "__main__":
    main()
