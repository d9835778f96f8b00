"""Who waits for whom: Ray's own timeline of tasks and actors as an artifact of the run, to be opened in Perfetto.

    uv run python -m examples.timeline

Open `timeline.json` at ui.perfetto.dev, or at chrome://tracing.
"""

import tempfile
import time
from pathlib import Path

from common import WandbRun

import ray


@ray.remote(num_cpus=0)
def train(run: WandbRun, rank: int) -> None:
    for step in range(5):
        time.sleep(0.02 * (1 + rank))
        run.log({"value_loss": 1 / (step + 1)}, step)


def main() -> None:
    with WandbRun("recipes", "timeline", workers=2, mode="offline") as run:
        ray.get([train.remote(run, rank) for rank in range(2)])
        with tempfile.TemporaryDirectory() as folder:
            ray.timeline(Path(folder, "timeline.json"))
            run.log_artifact("timeline", "profile", Path(folder, "timeline.json"))
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
