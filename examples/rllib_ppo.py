"""RLlib's PPO learns CartPole. Its env runners log to one W&B run, its learner to another.

    uv run --with "ray[rllib]~=2.60.0" --with torch python -m examples.rllib_ppo

To the plain example were added the two runs, the function that each env runner calls when it has sampled with the line
of the config that names it, and the `log` of what RLlib says of the learner, as it is.
"""

from functools import partial
from typing import Any

from common import InferencePipelineActor, TrainingPipelineActor, WandbRun

import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig

ITERATIONS, ENV_RUNNERS = 12, 2


def log_episodes(run: WandbRun, *, metrics_logger: Any, samples: list, **_: Any) -> None:
    version = int(metrics_logger.peek("weights_seq_no"))  # of the policy that has played
    returns, lengths = [episode.get_return() for episode in samples], [len(episode) for episode in samples]
    run.log({"reward": returns, "episode_length": lengths, "rollouts": len(samples)}, step=version)


def main() -> None:
    torch.set_num_threads(1)  # for a network of this size; the env runners need the other cores
    ray.init(include_dashboard=False, log_to_driver=False)
    init = dict(mode="offline", group="rllib-ppo")
    training = WandbRun("cartpole", "training", pipeline=TrainingPipelineActor, **init)
    rollouts = WandbRun("cartpole", "rollouts", pipeline=InferencePipelineActor, workers=ENV_RUNNERS, **init)
    with training, rollouts:
        config = (
            PPOConfig()
            .environment("CartPole-v1")
            .env_runners(num_env_runners=ENV_RUNNERS, batch_mode="complete_episodes")
            .training(train_batch_size_per_learner=2000, lr=0.0005)
            .callbacks(on_sample_end=partial(log_episodes, rollouts))
        )
        algorithm = config.build_algo()
        for step in range(ITERATIONS):
            result = algorithm.train()
            training.log({"learners": result["learners"], "timers": result["timers"]}, step)
            print(f"iteration {step}: mean return {result['env_runners']['episode_return_mean']:.0f}")
    for ledger in (training.finish(), rollouts.finish()):
        print(f"{ledger.name}: {ledger.rows} rows from {ledger.reports} reports, {ledger.lost} lost: {ledger.path}")


if __name__ == "__main__":
    main()
