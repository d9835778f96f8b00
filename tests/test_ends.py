"""What `log` has returned is in a row, however its process ends and whatever comes in between, on the run's node."""

import asyncio
import contextlib
import copy
import ctypes
import dataclasses
import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import Ledger, RunFinishedError, WandbRun

import pytest
import ray
from conftest import Log, wait_for
from processes import session

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import it


def tokens(ledger: Ledger) -> int:
    """What the rows say, where each report says one."""
    return sum(row["tokens"] for path in ledger.paths for row in Log(path).rows)


def log_some(made: WandbRun, reports: int, first: int = 0) -> None:
    for step in range(first, first + reports):
        made.log({"tokens": 1}, step)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


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

    def log_and_die(self, made: WandbRun, reports: int, how: str) -> None:
        log_some(made, reports)
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)

    def log_and_wait(self, made: WandbRun, reports: int, file: Path) -> None:
        log_some(made, reports)
        file.touch()
        time.sleep(600)

    def stop_answering(self, made: WandbRun, reports: int, how: str, file: Path) -> None:
        log_some(made, reports)
        file.touch()
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:  # in native code that gives no other thread a turn
            ctypes.PyDLL(None).sleep(600)


# The process ends


def test_tasks_that_are_a_process_each_lose_nothing_and_leave_nothing_behind(run):
    @ray.remote(max_calls=1, max_retries=0)
    def work(made: WandbRun, ends: str) -> None:
        log_some(made, 400)
        if ends == "raises":
            raise ValueError(ends)
        if ends == "exits":
            sys.exit(0)

    made = run(workers=3)
    outboxes = made._address.folder / "outboxes"
    before = {*outboxes.glob("*.page")}
    works = [work.remote(made, ends) for ends in ("returns", "raises", "exits")]
    for each in works:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.get(each)
    wait_for(lambda: {*outboxes.glob("*.page")} == before)
    ledger = made.finish()
    assert (ledger.reports, ledger.lost, ledger.ok) == (1_200, 0, True)
    assert tokens(ledger) == 1_200
    assert not made._address.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["argument", "cycle", "self", "exit_actor"])
def test_actors_that_go_right_after_they_logged_lose_nothing(run, kept):
    made = run()
    worker = ray.remote(Worker).remote(made if kept == "self" else None)
    calls = {"argument": "log", "self": "log", "exit_actor": "log_and_exit", "cycle": "log_in_a_cycle"}
    work = getattr(worker, calls[kept]).remote(None if kept == "self" else made, 1_200)
    del worker  # the last handle
    ray.wait([work])
    ledger = made.finish()
    assert (ledger.reports, ledger.lost, ledger.ok) == (1_200, 0, True)
    assert tokens(ledger) == 1_200


def test_actors_that_are_killed_right_after_they_logged_lose_nothing(run, tmp_path):
    made, file = run(workers=3), tmp_path / "logged"
    workers = [ray.remote(Worker).remote() for _ in range(3)]
    works = [
        worker.log_and_die.remote(made, 300, how) for worker, how in zip(workers, ("SIGKILL", "_exit"), strict=False)
    ]
    workers[2].log_and_wait.remote(made, 300, file)
    wait_for(file.exists, every=0.01)
    ray.kill(workers[2])
    ray.wait(works, num_returns=2)
    ledger = made.finish()
    assert (ledger.reports, ledger.lost, ledger.ok) == (900, 0, True)
    assert tokens(ledger) == 900


def test_a_task_that_is_cancelled_in_the_middle_of_log_loses_nothing_and_the_next_one_in_its_process_goes_on(
    run, tmp_path
):
    @ray.remote(max_retries=0)
    def work(made: WandbRun, file: Path | None) -> None:
        first, step = 10**6 * (file is None), -1
        try:
            for step in range(first, first + (10**6 if file else 100)):
                made.log({"tokens": 1}, step)
                if step == 2_000:
                    file.touch()
        finally:
            (tmp_path / f"{os.getpid()}-{first}").write_text(str(step))  # this one's `log` may not have returned

    made, file = run(), tmp_path / "logs"
    works = work.remote(made, file)
    wait_for(file.exists, every=0.01)
    ray.cancel(works)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(works)
    [told] = tmp_path.glob("*-0")
    wait_for(lambda: ray.get(work.remote(made, None)) or (tmp_path / told.name.replace("-0", "-1000000")).exists())
    ledger = made.finish()
    steps = {row["step"] for row in Log(ledger.path).rows}
    assert steps >= {*range(int(told.read_text())), *range(10**6, 10**6 + 100)}
    assert (ledger.lost, ledger.ok) == (0, True)


@pytest.mark.slow
def test_time_outs_out_of_a_signal_handler_of_a_task_lose_nothing(run):
    """As verifiers of rewards have them."""

    @ray.remote
    def work(made: WandbRun) -> int:
        def handler(*_) -> None:
            raise TimeoutError

        before, returned, times = signal.signal(signal.SIGALRM, handler), 0, 0
        while times < 200:
            try:
                # Again after a second: what is raised in a callback of Python's collector gets nowhere.
                signal.setitimer(signal.ITIMER_REAL, 0.001 * (times % 7 + 1) / 7, 1.0)
                while True:
                    made.log({"tokens": 1}, returned)
                    returned += 1
            except TimeoutError:
                times += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        return returned

    made = run()
    returned = ray.get(work.remote(made))
    ledger = made.finish()
    steps = [row["step"] for row in Log(ledger.path).rows]
    assert {*steps} >= {*range(returned)}
    assert returned <= ledger.reports <= returned + 200  # and some that were interrupted behind their last instruction
    assert (ledger.lost, ledger.ok) == (0, True)


def test_a_task_and_its_retry_share_no_row(run, tmp_path):
    @ray.remote(max_retries=1)
    def work(made: WandbRun, told: Path | None) -> None:
        for step in range(20):
            made.log({"tokens": 100 if told else 1}, step)
            if told and step == 9 and not told.exists():
                told.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    made = run(workers=2)
    ray.get([work.remote(made, None), work.remote(made, tmp_path / "died")])
    ledger = made.finish()
    rows = Log(ledger.path).rows
    assert {row["tokens"] for row in rows} <= {1, 100, 101}
    assert sum(row["tokens"] for row in rows) == 20 + 30 * 100
    assert max(row["workers"] for row in rows) == 2
    assert (ledger.lost, ledger.ok) == (0, True)


def test_a_task_and_its_retry_in_the_same_process_share_no_row(run, tmp_path):
    """Its function has the handle, so no attempt lets it go."""
    made, told = run(workers=1), tmp_path / "failed"

    @ray.remote(max_retries=1, retry_exceptions=True)
    def work() -> None:
        made.log({"tokens": 1}, 5)
        if not told.exists():
            told.touch()
            raise RuntimeError("again")

    ray.get(work.remote())
    assert [row["tokens"] for row in Log(made.finish().path).rows] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "busy"])
def test_a_process_that_does_not_answer_at_the_end_has_logged_what_it_has_logged(run, how, tmp_path):
    made, worker = run(), ray.remote(Worker).remote()
    pid = ray.get(worker.pid.remote())
    worker.stop_answering.remote(made, 40, how, file := tmp_path / "stops now")
    wait_for(file.exists)
    ledger = made.finish()
    os.kill(pid, signal.SIGKILL)
    assert (ledger.reports, ledger.lost, ledger.ok) == (40, 0, True)


# Processes without Ray


def log_in_children(made: WandbRun, step: int) -> list[int]:
    """Logs here and in children of the kinds that people have; their exit codes."""
    import multiprocessing

    made.log({"tokens": 1}, step)
    program = "import pickle, sys; pickle.load(sys.stdin.buffer).log({'tokens': 1}, int(sys.argv[1]))"
    command = [sys.executable, "-c", f"{program}; import ray; assert not ray.is_initialized()", str(step)]
    codes = [subprocess.run(command, input=pickle.dumps(made), env=os.environ).returncode]
    for way in ("spawn", "fork"):
        child = multiprocessing.get_context(way).Process(target=made.log, args=({"tokens": 1}, step))
        child.start()
        child.join()
        codes.append(child.exitcode)
    return codes


def test_children_of_actors_and_tasks_log_without_a_ray_of_their_own_and_count_as_their_parent(run):
    class Parent:
        def work(self, made: WandbRun, step: int) -> list[int]:
            return log_in_children(made, step)

    made, sessions = run(workers=2), session().parent
    before = {*sessions.glob("session_2*")}
    actor, task, alone = ray.remote(Parent).remote(), ray.remote(log_in_children), ray.remote(log_some)
    for step, parent in enumerate((actor.work, task)):
        assert ray.get([parent.remote(made, step), alone.remote(made, 1, step)]) == [[0, 0, 0], None]
    ledger = made.finish()
    assert [(row["tokens"], row["workers"]) for row in Log(ledger.path).rows] == [(5, 2), (5, 2)]
    assert (ledger.partial, ledger.warnings, ledger.ok) == (0, [], True)
    assert {*sessions.glob("session_2*")} == before


def test_a_fork_of_the_driver_logs_too(run):
    made = run()
    made.log({"tokens": 1}, 0)
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            log_some(made, 100, first=1)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    ledger = made.finish()
    assert (ledger.reports, tokens(ledger), ledger.ok) == (101, 101, True)


def test_a_fork_of_the_driver_does_not_own_its_runs(run):
    made = run()
    made.log({"tokens": 1}, 0)
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            with made:
                made.log({"tokens": 1}, 1)
            with pytest.raises(RuntimeError, match="can only be finished by its owner"):
                made.finish()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    made.log({"tokens": 1}, 2)
    ledger = made.finish()
    assert (ledger.reports, tokens(ledger), ledger.ok) == (3, 3, True)


@pytest.mark.slow
def test_a_handle_that_the_function_captured_logs_and_starts_no_ray(run):
    """Ray drops the function, and the handle with it, when it has left the process: a call would start another Ray."""
    made, sessions = run(workers=200), session().parent
    before = {*sessions.glob("session_2*")}

    @ray.remote(max_calls=1)
    def work(step: int) -> int:
        made.log({"tokens": 1}, step)
        return os.getpid()

    works = ray.get([work.remote(step) for step in range(3)])
    wait_for(lambda: not any(alive(pid) for pid in works))
    ledger = made.finish()
    assert (ledger.reports, ledger.lost) == (3, 0)
    assert tokens(ledger) == 3
    assert {*sessions.glob("session_2*")} == before


# Wherever `log` is called


def test_log_may_be_called_in_any_thread_a_callback_of_rays_a_destructor_and_a_signal_handler(run):
    @ray.remote
    def task() -> None:
        pass

    @ray.remote
    class Everywhere:
        def work(self, made: WandbRun) -> None:
            called: list[int] = []

            def log(step: int) -> None:
                made.log({"tokens": 1}, step)
                called.append(step)

            class Logs:
                def __del__(self) -> None:
                    log(1)

            Logs()
            signal.signal(signal.SIGALRM, lambda *_: log(2))
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            (thread := threading.Thread(target=log, args=(3,))).start()
            task.remote().future().add_done_callback(lambda _: log(4))
            thread.join()
            while len(called) < 4:
                time.sleep(0.01)

    made = run()
    ray.get(Everywhere.remote().work.remote(made))
    ledger = made.finish()
    assert sorted(row["step"] for row in Log(ledger.path).rows) == [1, 2, 3, 4]
    assert (ledger.reports, ledger.ok) == (4, True)


def test_async_actors_log_on_their_event_loop_and_may_have_runs_of_their_own(run):
    @ray.remote
    class Engine:
        async def log(self, made: WandbRun) -> None:
            await asyncio.gather(*(self._rollout(made, step) for step in range(20)))

        async def _rollout(self, made: WandbRun, step: int) -> None:
            await asyncio.sleep(0.001 * step)
            made.log({"tokens": 1}, step)

        async def own(self, folder: Path) -> Ledger:
            made = WandbRun("p", "own", mode="offline", dir=folder)
            made.log({"tokens": 1}, 0)
            return made.finish()

    engines = [Engine.remote() for _ in range(2)]
    made = run(workers=2)
    ray.get([engine.log.remote(made) for engine in engines])
    ledger = made.finish()
    assert (ledger.reports, tokens(ledger), ledger.ok) == (40, 40, True)
    own = ray.get(engines[0].own.remote(ledger.path.parent.parent))
    assert (own.reports, own.rows, own.ok) == (1, 1, True)


@pytest.mark.slow
def test_the_collector_may_find_a_handle_in_any_thread(run):
    """A handle in a cycle is dropped while Ray's own threads run Python."""

    @ray.remote
    class Careless:
        def work(self, made: WandbRun) -> None:
            gc.set_threshold(5, 2, 2)
            for step in range(200):
                cycle = [copy.copy(made)]
                cycle.append(cycle)
                cycle[0].log({"tokens": 1}, step)
                del cycle
                ray.get(ray.put(step))

    made = run()
    ray.get(Careless.remote().work.remote(made))
    ledger = made.finish()
    assert (ledger.reports, ledger.lost) == (200, 0)


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


@pytest.mark.slow
def test_a_handle_passed_anew_or_copied_does_not_make_a_worker(run):
    @dataclasses.dataclass
    class Config:
        run: WandbRun

    @ray.remote
    class Rank:
        def report(self, config: Config, step: int) -> None:
            copy.deepcopy(config.run).log({"tokens": 1}, step)
            config.run.log({"value_loss": 0.5}, step)

    made, ranks = run(workers=2), [Rank.remote() for _ in range(2)]
    for step in range(5):
        ray.get([rank.report.remote(Config(made), step) for rank in ranks])
    ledger = made.finish()
    assert [(row["tokens"], row["workers"]) for row in Log(ledger.path).rows] == [(2, 2)] * 5
    assert ledger.warnings == []


# Until the run is finished


@pytest.mark.slow
def test_a_with_block_in_a_worker_does_not_finish_the_run(run):
    @ray.remote
    class Holder:
        def work(self, made: WandbRun) -> None:
            with made:
                log_some(made, 300)

    made, holder = run(), Holder.remote()
    ray.get(holder.work.remote(made))
    made.log({"tokens": 1}, 300)
    assert made.finish().reports == 301


def test_a_task_per_step_and_engine_makes_one_row_a_step_at_once(run):
    @ray.remote
    def engine(made: WandbRun, step: int) -> None:
        made.log({"tokens": 1}, step)

    made = run(workers=3)
    for step in range(4):
        ray.get([engine.remote(made, step) for _ in range(3)])
        wait_for(lambda step=step: made.progress()[0].rows == step + 1)
    ledger = made.finish()
    assert (ledger.rows, ledger.partial, ledger.reports) == (4, 0, 12)
    assert [row["workers"] for row in Log(ledger.path).rows] == [3] * 4


def test_finish_does_not_wait_for_those_who_log_on_and_on_and_they_are_told(run, tmp_path):
    @ray.remote
    def work(made: WandbRun) -> int:
        for step in range(10**6):
            try:
                made.log({"tokens": 1}, step)
                (tmp_path / str(os.getpid())).touch()
                time.sleep(0.001)
            except RunFinishedError:
                return step
        return -1

    made = run()
    works = [work.remote(made) for _ in range(2)]
    wait_for(lambda: len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == 2)
    ledger = made.finish()
    returned = ray.get(works)
    assert sum(returned) <= ledger.reports <= sum(returned) + 2  # each may have been told of its last one
    assert min(returned) > 0
    assert (tokens(ledger), ledger.lost) == (ledger.reports, 0)


def test_a_view_is_finished_while_others_log_on_and_on(run, tmp_path):
    @ray.remote
    def work(made: WandbRun) -> None:
        for i in itertools.count():
            made.log({"tokens": 1}, 0)  # which makes one row, and so the actor little work
            if i == 100:
                (tmp_path / "logs").touch()
            if i % 100 == 0 and (tmp_path / "stops").exists():
                break

    made = run(settings=dict(finish_timeout=0))  # no limit
    view = WandbRun("p", share=made, prefix="eval/")
    view.log({"accuracy": 0.5}, 7)
    working = work.remote(made)
    wait_for((tmp_path / "logs").exists)
    with ThreadPoolExecutor(1) as pool:
        finishing = pool.submit(view.finish)
        try:
            account = finishing.result(timeout=60)
        finally:
            (tmp_path / "stops").touch()
    assert (account.reports, account.rows) == (1, 1)
    ray.get(working)
    assert made.finish().ok


def test_a_worker_with_a_temporary_folder_of_its_own_is_named(run, tmp_path):
    """As in a container, here on the run's own node: nobody else sees its outbox."""
    (own := tmp_path / "own").mkdir()

    @ray.remote(runtime_env=dict(env_vars={"OF_ITS_OWN": "1"}))  # a process that nobody else uses
    def work(made: WandbRun) -> int:
        is_alone = ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
        hide = f"mount --make-rprivate / && mount -t tmpfs tmpfs {own} && mount -t tmpfs tmpfs {made._address.folder}"
        if not is_alone or subprocess.run(["sh", "-c", hide], capture_output=True).returncode:
            return 0
        tempfile.tempdir = str(own)
        for step in range(10):
            made.log({"tokens": 1}, step)
        return 10

    made = run()
    made.log({"tokens": 1}, 0, commit=True)
    if not ray.get(work.remote(made)):
        pytest.skip("needs the right to mount")
    ledger = made.finish()
    assert (ledger.reports, ledger.ok) == (1, False)
    [unheard] = ledger.unheard
    assert "a container with a temporary folder of its own?" in unheard


def test_no_process_crashes_in_native_code(ray_here):
    """Runs behind the tests above, which end dozens of processes that log."""
    found = wait_for(lambda: list(session().glob("logs/worker-*.err")))
    assert not [path for path in found if "SIGSEGV" in path.read_text(errors="replace")]
