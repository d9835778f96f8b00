"""Nothing that a worker logged is left behind in a process that ends, and what a kill caught is counted."""

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

from common import Ledger, PipelineActor, RunFinishedError, WandbRun, pipeline_actor

import pytest
import ray
from backbone.backlog import Backlog
from conftest import Log, wait_for
from processes import pipeline_process, session

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import it


def tokens(ledger: Ledger) -> int:
    """What the rows say, where each report says one."""
    return sum(row["tokens"] for path in ledger.paths for row in Log(path).rows)


def log_some(made: WandbRun, reports: int, first: int = 0) -> None:
    for step in range(first, first + reports):
        made.log({"tokens": 1}, step)


class Worker:
    """Logs in the ways that people do."""

    def __init__(self, made: WandbRun | None = None):
        self.made = made

    def pid(self) -> int:
        return os.getpid()

    def log(self, made: WandbRun | None, reports: int) -> None:
        log_some(made or self.made, reports)

    def log_and_exit(self, made: WandbRun, reports: int) -> None:
        log_some(made, reports)
        ray.actor.exit_actor()

    def log_in_a_cycle(self, made: WandbRun, reports: int) -> None:
        self.cycle = [made]
        self.cycle.append(self.cycle)
        log_some(made, reports)

    def stop_answering(self, made: WandbRun, reports: int, how: str, file: Path) -> None:
        log_some(made, reports)
        made.flush()
        file.touch()
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:  # in native code that gives no other thread a turn
            ctypes.PyDLL(None).sleep(600)

    def fill_the_outbox(self, made: WandbRun, file: Path) -> None:
        log_some(made, 1)
        made.flush()
        file.touch()  # now the pipeline actor is stopped
        while file.exists():
            time.sleep(0.01)
        wire = made._outbox._wire
        for step in (1, 2, 3):  # each is sent by itself
            log_some(made, 1, first=step)
            while wire.backlog.waiting:
                time.sleep(0.01)
        with made._outbox._changed:  # of these, a batch leaves when all are there; behind it the others wait
            log_some(made, 500, first=4)
        while wire._submitting or not wire.backlog.is_full:
            time.sleep(0.01)
        file.touch()
        time.sleep(600)


def test_tasks_that_are_a_process_each_leave_nothing_behind(run):
    @ray.remote(max_calls=1, max_retries=0)
    def work(made: WandbRun, ends: str) -> None:
        log_some(made, 400)
        if ends == "raises":
            raise ValueError(ends)
        if ends == "exits":
            sys.exit(0)

    made = run(workers=3)
    works = [work.remote(made, ends) for ends in ("returns", "raises", "exits")]
    for each in works:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.get(each)
    ledger = made.finish()
    assert (ledger.reports, ledger.lost, ledger.silent) == (1_200, 0, 0)
    assert tokens(ledger) == 1_200


@pytest.mark.parametrize(
    "kept", [*(pytest.param(how, marks=pytest.mark.slow) for how in ("argument", "cycle")), "self", "exit_actor"]
)
def test_actors_that_go_right_after_they_logged_leave_nothing_behind(run, kept):
    made = run()
    worker = ray.remote(Worker).remote(made if kept == "self" else None)
    calls = {"argument": "log", "self": "log", "exit_actor": "log_and_exit", "cycle": "log_in_a_cycle"}
    work = getattr(worker, calls[kept]).remote(None if kept == "self" else made, 1_200)
    del worker  # the last handle
    ray.wait([work])
    ledger = made.finish()
    assert (ledger.reports, ledger.lost, ledger.silent) == (1_200, 0, 0)
    assert tokens(ledger) == 1_200


def test_what_an_actor_sends_while_its_process_ends_is_waited_for(run):
    """Ray calls an actor dead as soon as its last handle is dropped, while its process may still send what is left."""

    @pipeline_actor
    class Sluggish(PipelineActor):
        def push(self, *arguments):
            time.sleep(0.3)
            return super().push(*arguments)

    made = run(pipeline=Sluggish)
    worker = ray.remote(Worker).remote(made)
    ray.wait([worker.log.remote(None, 500)])
    del worker
    ledger = made.finish()
    assert (ledger.reports, ledger.lost, ledger.silent) == (500, 0, 0)
    assert tokens(ledger) == 500


def test_a_handle_that_the_function_captured_sends_what_a_task_logs_and_starts_no_ray(run):
    """Ray drops the function, and the handle with it, when it has left the process: a call would start another Ray."""
    made, sessions = run(workers=200), session().parent
    before = {*sessions.glob("session_2*")}

    @ray.remote(max_calls=1)
    def work(step: int) -> int:
        made.log({"tokens": 1}, step)
        return os.getpid()

    works = ray.get([work.remote(step) for step in range(3)])
    ledger = made.finish()
    assert (ledger.reports, ledger.lost) == (3, 0)
    assert tokens(ledger) == 3
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in works), seconds=10)
    assert {*sessions.glob("session_2*")} == before


def test_a_with_block_in_a_worker_sends_all_and_does_not_finish_the_run(run):
    @ray.remote
    class Holder:
        def work(self, made: WandbRun) -> int:
            self.made = made
            with made:
                log_some(made, 300)
            return made.progress()[0].reports

    made, holder = run(), Holder.remote()
    assert ray.get(holder.work.remote(made)) == 300
    made.log({"tokens": 1}, 300)
    assert made.finish().reports == 301


def test_a_task_per_step_and_engine_makes_one_row_a_step_at_once(run):
    @ray.remote
    def engine(made: WandbRun, step: int) -> None:
        made.log({"tokens": 1}, step)

    made = run(workers=3)
    for step in range(4):
        ray.get([engine.remote(made, step) for _ in range(3)])
        wait_for(lambda step=step: made.progress()[0].rows == step + 1, seconds=20)
    ledger = made.finish()
    assert (ledger.rows, ledger.partial, ledger.reports) == (4, 0, 12)
    assert [row["workers"] for row in Log(ledger.path).rows] == [3] * 4


def test_finish_does_not_wait_for_tasks_that_log_on_and_on(run):
    @ray.remote
    def work(made: WandbRun) -> int:
        for step in range(200):
            try:
                made.log({"tokens": 1}, step)
            except RunFinishedError:
                return step
            time.sleep(0.1)

    made = run()
    works = work.remote(made)
    wait_for(lambda: made.progress()[0].reports > 3)
    began = time.monotonic()
    ledger = made.finish()
    assert time.monotonic() - began < 10
    assert ledger.reports == tokens(ledger) + ledger.lost
    assert ray.get(works) >= ledger.reports


def test_log_in_a_callback_of_rays_does_not_wait_for_an_answer(run):
    """Which would have to come by that very thread."""

    @ray.remote
    def task() -> None:
        pass

    made = run()
    task.remote().future().add_done_callback(lambda _: log_some(made, 3))
    wait_for(lambda: made.progress()[0].reports >= 2, seconds=20)
    assert made.finish().reports == 3


def test_flush_says_whether_the_reports_were_taken(run):
    @pipeline_actor
    class Refusing(PipelineActor):
        def push(self, *arguments):
            raise MemoryError

    made, other = run(), run(pipeline=Refusing)
    made.log({"tokens": 1}, 0)
    other.log({"tokens": 1}, 0)
    assert made.flush()
    assert not other.flush()
    made.finish()
    other.finish()


def test_a_handle_passed_anew_or_copied_does_not_make_a_worker(run):
    import copy

    @ray.remote
    class Rank:
        def report(self, made: WandbRun, step: int) -> None:
            copy.deepcopy(made).log({"tokens": 1}, step)
            made.log({"value_loss": 0.5}, step)

    made, ranks = run(workers=2), [Rank.remote() for _ in range(2)]
    for step in range(5):
        ray.get([rank.report.remote(made, step) for rank in ranks])
    ledger = made.finish()
    assert [(row["tokens"], row["workers"]) for row in Log(ledger.path).rows] == [(2, 2)] * 5
    assert ledger.warnings == []


def test_reports_that_a_sigkill_caught_in_the_outbox_are_counted_as_lost(run, tmp_path):
    made, worker, file = run(workers=1), ray.remote(Worker).remote(), tmp_path / "full"
    pid = ray.get(worker.pid.remote())
    work = worker.fill_the_outbox.remote(made, file)
    wait_for(file.exists)
    actor = pipeline_process(made)
    os.kill(actor, signal.SIGSTOP)
    file.unlink()
    wait_for(file.exists)
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)  # while it gets no answer, which would let go what waits
    os.kill(actor, signal.SIGCONT)
    ray.wait([work])
    ledger = made.finish()
    assert (ledger.reports, ledger.lost) == (504, 500 - Backlog.BATCH)  # as the last batch that left has said
    assert ledger.reports == tokens(ledger) + ledger.lost
    assert not ledger.silent


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.slow), "busy"])
def test_a_process_that_does_not_answer_at_the_end_is_no_success(run, how, tmp_path):
    made, worker = run(), ray.remote(Worker).remote()
    pid = ray.get(worker.pid.remote())
    worker.stop_answering.remote(made, 40, how, file := tmp_path / "stops now")
    wait_for(file.exists)
    time.sleep(0.5)
    ledger = made.finish()
    os.kill(pid, signal.SIGKILL)
    assert (ledger.reports, ledger.lost, ledger.silent, ledger.ok) == (40, 0, 1, False)
    assert [w for w in ledger.warnings if f"process {pid} on node" in w and "of 40 at least" in w]


def test_log_in_a_forked_process_raises_and_names_the_fork(run):
    made = run()
    made.log({"tokens": 1}, 0)
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            made.log({"tokens": 1}, 1)
        except RuntimeError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert f"fork of process {os.getpid()}" in os.read(read, 1000).decode()
    assert made.finish().reports == 1


def test_the_collector_may_find_a_handle_in_any_thread(run):
    """A handle in a cycle is dropped while Ray's own threads and the outbox's run Python."""

    @ray.remote
    class Careless:
        def work(self, made: WandbRun) -> float:
            gc.set_threshold(5, 2, 2)
            slowest = 0.0
            for step in range(200):
                cycle = [pickle_copy(made)]
                cycle.append(cycle)
                cycle[0].log({"tokens": 1}, step)
                del cycle
                began = time.monotonic()
                ray.get(ray.put(step))
                slowest = max(slowest, time.monotonic() - began)
            return slowest

    made = run()
    assert ray.get(Careless.remote().work.remote(made)) < 2
    ledger = made.finish()
    assert (ledger.reports, ledger.lost) == (200, 0)


def pickle_copy(made: WandbRun) -> WandbRun:
    import copy

    return copy.copy(made)


def test_threads_of_a_task_are_the_task(run):
    @ray.remote
    def work(made: WandbRun) -> None:
        threads = [threading.Thread(target=made.log, args=({"tokens": 1}, step)) for step in (0, 0, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    made = run(workers=2)
    ray.get([work.remote(made) for _ in range(2)])
    ledger = made.finish()
    [row] = Log(ledger.path).rows
    assert (row["tokens"], row["workers"]) == (6, 2)


def test_an_actor_that_logs_on_its_event_loop_is_not_held_up(run):
    @ray.remote
    class Engine:
        def __init__(self) -> None:
            self.ticks = 0

        async def tick(self) -> int:
            while self.ticks < 10**6:
                self.ticks += 1
                await asyncio.sleep(0.01)

        async def rollout(self, made: WandbRun) -> tuple[int, int]:
            before = self.ticks
            for step in range(50):
                made.log({"tokens": 1}, step)
                await asyncio.sleep(0.01)
            return before, self.ticks

    made, engine = run(), Engine.remote()
    engine.tick.remote()
    before, after = ray.get(engine.rollout.remote(made))
    assert after - before > 25
    ray.kill(engine)
    assert made.finish().lost == 0


def test_what_comes_while_the_actor_restarts_is_in_order_and_whole(run):
    """Steps in two calls, flat out, from two workers; many batches are under way when the actor is killed."""

    @ray.remote
    class Rank:
        def work(self, made: WandbRun, steps: int) -> None:
            for step in range(steps):
                made.log({"tokens": 1}, step)
                made.log({"loss": float(step)}, step)

    made, ranks = run(workers=2), [Rank.remote() for _ in range(2)]
    works = [rank.work.remote(made, 2_000) for rank in ranks]
    for killed in range(2):
        wait_for(lambda n=killed: made.progress()[0].rows > 500 * (n + 1))
        os.kill(pipeline_process(made), signal.SIGKILL)
    ray.get(works)
    ledger = made.finish()
    rows = {row["_step"]: row for path in ledger.paths for row in Log(path).rows}
    assert (ledger.reports, ledger.lost, ledger.ok) == (8_000, 0, True)
    assert ledger.restarts >= 1
    by_step = sorted((row["step"], row["tokens"], row["loss"], row["workers"]) for row in rows.values())
    if ledger.rows == 2_000:  # neither ran a step ahead of a row of the other's
        assert by_step == [(step, 2, step, 2) for step in range(2_000)]
    assert sum(row["tokens"] for row in rows.values()) == 4_000


def test_copies_in_a_dataclass_travel(run):
    import dataclasses

    @dataclasses.dataclass
    class Config:
        run: WandbRun

    @ray.remote
    def work(config: Config) -> None:
        config.run.log({"tokens": 1}, 0)

    made = run()
    ray.get(work.remote(Config(made)))
    assert made.finish().reports == 1


def test_what_async_actors_have_just_logged_for_the_first_time_is_in_rows(run):
    """Their first `log` doesn't wait until the pipeline actor knows of them."""

    @ray.remote
    class Engine:
        async def log(self, made: WandbRun) -> None:
            made.log({"tokens": 1}, 0)

        async def own(self, folder: Path) -> Ledger:
            made = WandbRun("p", "own", mode="offline", dir=folder)
            made.log({"tokens": 1}, 0)
            return made.finish()

    engines = [Engine.remote() for _ in range(2)]
    ray.get([engine.__ray_ready__.remote() for engine in engines])
    for _ in range(2):
        made = run(workers=2)
        ray.get([engine.log.remote(made) for engine in engines])
        ledger = made.finish()
        assert (ledger.reports, ledger.rows, ledger.lost) == (2, 1, 0)
    own = ray.get(engines[0].own.remote(ledger.path.parent.parent))
    assert (own.reports, own.rows, own.lost) == (1, 1, 0)


def test_no_process_crashes_in_native_code(ray_here):
    """Runs behind the tests above, which end dozens of processes that log."""
    found = wait_for(lambda: list(session().glob("logs/worker-*.err")))
    assert not [path for path in found if "SIGSEGV" in path.read_text(errors="replace")]
