"""An engine that starts processes of its own, as vLLM does. They are in no Ray, and log with the handle all the same.

    uv run python -m examples.child_processes

A child counts as the worker that started it, so `workers=` is the number of engines.
"""

import multiprocessing

from common import InferencePipelineActor, WandbRun

import ray


def serve(run: WandbRun, engine: int) -> None:
    for batch in range(5):
        run.log({"requests/running": 10 * engine + batch}, batch)


@ray.remote(num_cpus=0)
class Engine:
    def run(self, run: WandbRun, engine: int) -> None:
        child = multiprocessing.get_context("spawn").Process(target=serve, args=(run, engine))
        child.start()
        child.join()


def main() -> None:
    with WandbRun("recipes", "children", pipeline=InferencePipelineActor, workers=2, mode="offline") as run:
        engines = [Engine.remote() for _ in range(2)]
        ray.get([engine.run.remote(run, i) for i, engine in enumerate(engines)])
    print(run.finish())


if __name__ == "__main__":
    ray.init()
    main()
