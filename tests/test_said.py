"""What workers say besides metrics, and what the pipeline actor knows of them: read back from the run."""

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from datetime import timedelta

from backbone import said as said_by_workers
from backbone.records import SAID
from backbone.reduction import Reduction, reduce_reports
from backbone.said import LogHandler

import numpy as np
import pytest
import ray
import wandb
from conftest import Log, each_log, folders, wait_for
from processes import pipeline_process
from rooms import QUIET, Event


@ray.remote(num_cpus=0)
def say(run, rank: int) -> None:
    import wandb

    run.alert("reward collapsed", f"says rank {rank}", level=wandb.AlertLevel.WARN if rank else "WARN")
    run.update_config({f"rank_{rank}": {"lr": 0.1}})
    run.update_summary({"best_rank": rank})
    handler = run.logging_handler(label=f"rank {rank}")
    handler.emit(logging.makeLogRecord({"msg": "step %d is done", "args": (7,)}))
    run.log({"a": 1.0}, 0)


def alerts(logs: list[Log]) -> list[tuple[str, str]]:
    return [(alert["title"], alert["level"]) for log in logs for alert in log.of("alert")]


def lines(logs: list[Log]) -> str:
    return "".join(output["line"] for log in logs for output in log.of("output_logger"))


def test_alerts_config_summary_and_lines_come_from_any_worker(run, tmp_path):
    made = run(workers=2, config={"lr": 1.0})
    ray.get([say.remote(made, rank) for rank in range(2)])
    assert made.finish().ok
    logs = each_log(tmp_path)
    assert alerts(logs) == [("reward collapsed", "WARN")]  # two ranks have said it
    assert {key: logs[0].config[key] for key in ("lr", "rank_0", "rank_1")} == {
        "lr": 1.0, "rank_0": {"lr": 0.1}, "rank_1": {"lr": 0.1},
    }  # fmt: skip
    assert logs[0].summary["best_rank"] in (0, 1)
    for rank in range(2):
        assert f"rank {rank}: step 7 is done\n" in lines(logs)


def test_a_restart_of_the_actor_forgets_nothing_of_it(run, tmp_path):
    made = run(workers=1)
    ray.get(say.remote(made, 0))
    wait_for(lambda: made.progress()[0].reports == 1)
    os.kill(pipeline_process(made), signal.SIGKILL)
    made.update_summary({"after": 1})
    ledger = made.finish()
    assert (ledger.ok, ledger.restarts) == (True, 1)
    last = Log(folders(tmp_path)[-1])  # what W&B takes in the end
    assert last.config["rank_0"] == {"lr": 0.1}
    assert (last.summary["best_rank"], last.summary["after"]) == (0, 1)


def test_what_w_b_refuses_is_told_and_the_rest_goes_on(opened, tmp_path):
    """It must not end the pipeline actor, which would be told the same again."""
    made = opened()
    made.join()
    made.tell("alert", title="one", wait_duration=60.0, color="red")
    made.tell("alert", title="another", text="x", wait_duration=60.0)
    made.tell("config", lr=0.1)
    made.say(0, {"a": 1.0})
    account = made.finish()[""]
    assert [warning for warning in account.warnings if "refused the alert" in warning]
    assert (account.reports, account.lost, account.lost_values, account.ok) == (1, 0, 1, False)
    [log] = each_log(tmp_path)
    assert alerts([log]) == [("another", "INFO")]
    assert (log.config["lr"], len(log.rows)) == (0.1, 1)


def test_an_alert_goes_out_again_after_its_wait_duration(opened, tmp_path):
    made = opened()
    made.join()
    alert = said_by_workers.alert("t", "x", "INFO", 60.0)
    for wall_time in (0.0, -0.1, 59.0, -3600.0):  # clocks of two nodes differ; and they are set back
        made.run.inbox.said.take("w", 1000 + wall_time, pickle.dumps(("alert", alert)))
    for wall_time in (0.0, 5.0, 11.0):
        another = said_by_workers.alert("another", "x", "INFO", timedelta(seconds=10))
        made.run.inbox.said.take("w", 1000 + wall_time, pickle.dumps(("alert", another)))
    made.say(0, {"a": 1.0})
    made.finish()
    assert [title for title, _ in alerts(each_log(tmp_path))] == ["t", "t", "another", "another"]


def test_what_a_row_has_in_the_summary_is_not_taken_back_by_a_restart(opened, tmp_path):
    first = opened()
    first.join()
    first.tell("summary", best=1, other=2)
    first.say(0, {"best": 7})
    first.abandon()
    second = opened()
    second.finish()
    summary = Log(folders(tmp_path)[-1]).summary
    assert summary["other"] == 2
    assert summary.get("best", 7) == 7


def test_what_can_not_be_said_is_refused_at_the_caller(run):
    made = run()
    with pytest.raises(ValueError, match="level must be INFO, WARN or ERROR, not 'LOUD'"):
        made.alert("t", level="LOUD")
    with pytest.raises(TypeError, match="wait_duration must be seconds or a timedelta, not 'soon'"):
        made.alert("t", wait_duration="soon")
    with pytest.raises((TypeError, ValueError), match="config="):
        made.update_config("no mapping")
    with pytest.raises((TypeError, ValueError), match="summary="):
        made.update_summary("no mapping")
    for value in (ValueError("x"), wandb.Html("x"), np.arange(100.0)):
        with pytest.raises((TypeError, ValueError), match="summary="):
            made.update_summary({"good": 1, "bad": value})
    with pytest.raises((TypeError, ValueError), match="config="):
        made.update_config({"good": 1, "bad": ValueError("x")})
    for label in (3, 0, None, ("node", 3), b"x"):
        with pytest.raises(TypeError, match="label must be a string, not "):
            made.log({"a": 1.0}, 0, label=label)
        with pytest.raises(TypeError, match="label must be a string, not "):
            made.logging_handler(label)
    with pytest.raises(TypeError, match="failure must be a string, not ValueError"):
        made.finish(1, failure=ValueError("x"))
    assert made.finish().ok


def test_a_handler_brings_so_many_lines_a_minute_and_says_how_many_it_has_left_out(monkeypatch):
    brought, now = [], 1000.0
    monkeypatch.setattr(said_by_workers.time, "monotonic", lambda: now)
    logger = logging.Logger("trainer")
    logger.addHandler(LogHandler(brought.append))
    for i in range(LogHandler.LIMIT + 3):
        logger.info("line %d", i)
    assert len(brought) == LogHandler.LIMIT
    now += 61
    logger.info("later " + "x" * 20_000)
    assert brought[LogHandler.LIMIT] == "… 3 more lines"
    assert len(brought[-1]) == LogHandler.LONGEST


def test_log_lines_after_the_end_of_the_run_disturb_nobody(run):
    made = run()
    logger = logging.Logger("trainer")
    logger.addHandler(made.logging_handler())
    made.finish()
    logger.info("late")


# What only the pipeline actor can know


def pipeline_with(how: Reduction) -> ray.actor.ActorClass:
    from common import PipelineActor, pipeline_actor

    class Training(PipelineActor):
        reduction = how

    return pipeline_actor(Training)


@pytest.mark.slow
def test_the_largest_is_named_by_label_or_else_by_its_process(run, tmp_path):
    reduction = Reduction(worst=("time/*",), statistics={"time/samples": ("mean",)})

    @ray.remote(num_cpus=0)
    class Rank:
        def log(self, run, seconds: float, label: str) -> None:
            run.log({"time/step_s": seconds, "time/samples": [seconds, 0.0], "other": 1.0}, 0, label=label)

    made = run(workers=2, pipeline=pipeline_with(reduction))
    ray.get([Rank.remote().log.remote(made, 1.0, "rank 0"), Rank.remote().log.remote(made, 3.0, "")])
    assert made.finish().ok
    [row] = each_log(tmp_path)[0].rows
    assert (row["time/step_s"], row["time/step_s/max"], row["time/samples/max"]) == (2.0, 3.0, 3.0)
    assert row["time/step_s/worst"].startswith("Rank ") and os.uname().nodename in row["time/step_s/worst"]
    assert "other/worst" not in row


def test_nobody_is_the_worst_where_all_is_missing():
    reduction = Reduction(worst=("t",))
    reports = [{"t": float("nan")}, {"t": 2.0}, {"u": 1.0}, {"t": 1.0}]
    assert reduce_reports(reports, reduction, who=["a", "b", "c", "d"])["t/worst"] == "b"
    assert "t/worst" not in reduce_reports([{"t": []}], reduction, who=["a"])
    assert "t/worst" not in reduce_reports([{"t": 1.0}], reduction)


def test_only_numbers_have_a_worst():
    told, reports = [], [{"t/a": "x", "t/b": 1.0, "t/c": wandb.Html("x")}, {"t/a": "x", "t/b": "late"}]
    row = reduce_reports(reports, Reduction(worst=("t/*",)), lambda *what: told.append(what), ["w", "v"])
    assert {key: value for key, value in row.items() if key.endswith("/worst")} == {"t/b/worst": "w"}
    assert row["t/a"] == "x"
    assert [kind for kind, _ in told] == ["differs t/b"]


@pytest.mark.parametrize("how", [dict(worst="t"), dict(best={"t": "mean"}), dict(weights={"a": ["t"]})])
def test_a_rule_that_can_not_be_is_refused(how):
    with pytest.raises((TypeError, ValueError), match="'t'"):
        Reduction(**how)


def test_best_values_are_in_the_summary_over_restarts_and_resumes(opened, tmp_path):
    reduction = Reduction(best={"reward/mean": "max", "loss": "min"})

    def log(made, rewards):
        made.join("training/", reduction)
        for step, reward in rewards.items():
            made.say(step, {"reward/mean": reward, "loss": -reward}, "training/")

    first = opened()
    log(first, {0: 1.0, 1: 5.0})
    first.abandon()
    second = opened()  # as a restarted actor
    log(second, {2: 2.0})
    second.finish()
    summary = Log(folders(tmp_path)[-1]).summary
    assert summary["training/reward/mean"] == {"max": 5.0, "last": 2.0}
    assert summary["training/loss"] == {"min": -5.0, "last": -2.0}
    second.state.remove()

    third = opened(life="third", resume="allow")
    log(third, {3: 3.0})
    third.finish()
    assert Log(folders(tmp_path)[-1]).summary["training/reward/mean"] == {"max": 5.0, "last": 3.0}


def test_the_last_value_of_a_key_that_not_each_row_has_stays_beside_its_best(opened, tmp_path):
    made = opened()
    made.join("", Reduction(best={"eval": "max"}))
    for step, eval in enumerate([2.0, 1.0, None, None]):
        made.say(step, {"loss": 0.1, "eval": eval})
    made.finish()
    assert Log(folders(tmp_path)[-1]).summary["eval"] == {"max": 2.0, "last": 1.0}


# The end


def test_a_preempted_run_is_marked_so(opened, tmp_path):
    made = opened()
    made.join()
    made.say(0, {"a": 1.0})
    made.finish(143)
    log = each_log(tmp_path)[0]
    assert (log.exit_code, len(log.of("preempting"))) == (143, 1)


def test_what_failed_is_a_line_in_the_summary_and_whole_in_the_logs(run, tmp_path):
    with pytest.raises(ZeroDivisionError), run() as made:
        made.log({"a": 1.0}, 0)
        1 / 0  # noqa: B018
    log = each_log(tmp_path)[0]
    assert log.summary["failure"] == "ZeroDivisionError: division by zero"
    assert "Traceback (most recent call last)" in lines([log])
    assert "1 / 0" in lines([log])


def test_a_second_folder_of_a_run_keeps_the_firsts_output(opened):
    assert opened().writer.run.settings.console_multipart is True


def test_the_ledger_is_in_the_runs_folder_and_summary_and_can_be_counted_anew(opened, tmp_path):
    made = opened()
    made.join("a/")
    made.join("b/")
    for step in range(3):
        made.say(step, {"x": 1.0}, "a/")
    made.say(0, {"x": 1.0}, "b/")
    ledgers = made.finish()
    [folder] = folders(tmp_path)
    assert json.loads((folder / "ledger.json").read_text())["a/"]["rows"] == 3
    assert Log(folder).summary["ledger"] == {"reports": 4, "lost": 0}

    def recount() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "backbone.ledger", folder], capture_output=True, text=True)

    done = recount()
    assert (done.returncode, done.stdout.count(" 0 lost")) == (0, 2)
    assert str(ledgers["a/"]) in done.stdout

    [log] = folder.glob("*.wandb")
    content = log.read_bytes()
    middle = content.index(b'"x"' if b'"x"' in content else b"a/x")
    for damaged in (
        content[: len(content) // 2],  # as somebody's disk may do
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        content[:middle] + bytes(50) + content[middle + 50 :],
    ):
        log.write_bytes(damaged)
        done = recount()
        assert (done.returncode, done.stderr) == (1, "")
        assert sum(int(line.split(", ")[1].split()[0]) for line in done.stdout.splitlines() if " lost" in line) > 0
    made.close()
    again = opened(life="later", resume="allow")  # which is not kept from it by the damage
    again.join("a/")
    again.say(3, {"x": 1.0}, "a/")
    assert again.finish()["a/"].ok

    (folder / "ledger.json").write_text('{"a/": {')
    for _ in range(2):
        done = recount()
        assert (done.returncode, done.stdout) == (1, "")
        assert " is no folder of a finished run: " in done.stderr
        assert done.stderr.count("\n") == 1
        (folder / "ledger.json").unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_log_that_is_removed_or_cut_before_the_end_is_lost_and_told(opened, tmp_path, how):
    made = opened()
    made.join()
    for step in range(20):
        made.say(step, {"x": 1.0})
    [folder] = folders(tmp_path)
    wait_for(lambda: (made.run.read(), len(made.writer.logs.numbers) == 20)[1])
    [log] = folder.glob("*.wandb")
    shutil.rmtree(folder) if how == "removed" else os.truncate(log, 100)
    [ledger] = made.finish().values()
    assert (ledger.rows, ledger.lost, ledger.ok) == (0, 20, False)


def test_a_handler_for_all_lines_waits_for_nobody_in_the_middle_of_log():
    """Another thread may have the handler's lock, and wait for the outbox, in which this one warns."""
    said = []
    handler = LogHandler(said.append)
    logging.getLogger().addHandler(handler)
    try:
        handler.acquire()
        warning = threading.Thread(target=logging.getLogger("wandb_run").warning, args=("reports are lost",))
        warning.start()
        warning.join(10)
        assert not warning.is_alive()
    finally:
        handler.release()
        logging.getLogger().removeHandler(handler)
    assert said == []


def test_the_config_of_a_new_life_counts_more_than_that_of_one_that_was_not_finished(opened, tmp_path):
    made = opened()
    made.join()
    made.tell("config", lr=0.1, gpu="h100")
    made.abandon()
    made = opened(life="another", config={"lr": 0.2})
    made.join()
    made.finish()
    log = Log(folders(tmp_path)[-1])
    assert log.config["lr"] == 0.2


def test_an_artifact_that_is_used_at_each_step_is_noted_once(opened):
    made = opened()
    made.join()
    for _ in range(3):
        made.tell("use_artifact", name="checkpoint:latest")
    assert made.state.facts["used_artifacts"] == ["checkpoint:latest"]
    assert made.state.db.execute("SELECT count(*) FROM artifacts").fetchone() == (3,)


def test_what_can_not_be_read_of_what_a_worker_says_is_told_and_the_ledger_is_not_ok(opened):
    made = opened(settings=QUIET | dict(finish_timeout=0))
    made.join()
    made.bring(Event("w", SAID, b"cno_such_module\nThing\n."))
    account = made.finish()[""]
    assert (account.lost, account.ok) == (0, False)
    assert account.warnings == ["reports may be missing of w: No module named 'no_such_module'"]


HALF = "half of a \ud83d"


@pytest.mark.slow
def test_text_that_can_not_be_encoded_is_written_out(run, tmp_path):
    """Such as a tokenizer makes: half of a character."""
    made = run(pipeline=pipeline_with(Reduction(worst=("t",))))
    logger = logging.getLogger("half")
    logger.propagate = False  # pytest-xdist can't encode it
    logger.addHandler(made.logging_handler(label=HALF))
    logger.warning("a %s", HALF)
    made.alert(HALF, HALF)
    for step in range(3):
        made.log({"t": 1.0, "text": HALF}, step, label=HALF)
    ledger = made.finish(1, failure=f"ValueError: {HALF}")
    assert (ledger.ok, ledger.rows, ledger.restarts) == (True, 3, 0)
    log = each_log(tmp_path)[0]
    assert (log.exit_code, log.summary["failure"]) == (1, "ValueError: half of a \\ud83d")
    assert {row["t/worst"] for row in log.rows} == {"half of a \\ud83d"}
    assert [title for title, _ in alerts([log])] == ["half of a \\ud83d"]
