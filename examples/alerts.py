"""An alert from whichever worker sees the trouble, by W&B's own `run.alert`: by mail or Slack, as your settings say.

    uv run python -m examples.alerts

All ranks see it here. One alert of a title goes out in a minute, however many say it.
"""

from common import WandbRun

import ray


@ray.remote(num_cpus=0)
def train(run: WandbRun, rank: int) -> None:
    for step in range(10):
        reward = 0.7 if step < 5 else 0.1
        run.log({"reward": [reward]}, step)
        if reward < 0.2:
            run.alert("reward collapsed", f"{reward} at step {step}, says rank {rank}", level="WARN")


def main() -> None:
    with WandbRun("recipes", "alerts", workers=4, mode="offline") as run:
        ray.get([train.remote(run, rank) for rank in range(4)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
