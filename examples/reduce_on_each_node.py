"""For thousands of ranks: those of a node give their numbers to one of them, which logs. The row is the same.

    uv run python -m examples.reduce_on_each_node

What the pipeline needs in order to combine the nodes must travel: weights and samples, not only means.
"""

from common import PipelineActor, Reduction, WandbRun, pipeline_actor

import numpy as np
import ray


@pipeline_actor
class Nodes(PipelineActor):
    reduction = Reduction(weights={"loss": "tokens"}, sums=("tokens",), statistics={"reward": ("mean", "p90")})


@ray.remote(num_cpus=0)
def train_on_node(run: WandbRun, node: int) -> None:
    rng = np.random.default_rng(node)
    for step in range(5):
        losses, tokens, rewards = rng.random(8), rng.integers(100, 200, 8), rng.random((8, 4))  # of the node's 8 ranks
        loss = np.average(losses, weights=tokens)
        run.log({"loss": loss, "tokens": int(tokens.sum()), "reward": rewards}, step)


def main() -> None:
    with WandbRun("recipes", "by-node", pipeline=Nodes, workers=2, mode="offline") as run:  # two nodes
        ray.get([train_on_node.remote(run, node) for node in range(2)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
