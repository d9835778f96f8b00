"""Rows become those of a real W&B run, each once: whatever W&B refuses, whoever is killed, online or not.

Without Ray: what these tests open and close is what a restarted actor opens.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from backbone import artifacts, ledger, transaction_log
from backbone import writer as writer_room
from backbone.ledger import Ledger
from backbone.reduction import Reduction
from backbone.run import Run
from backbone.takeover import DEATHS, GivenUpError, open_run

import numpy as np
import pytest
import wandb
from conftest import ROOT, Log, folders, no_account, read_rows, wait_for
from rooms import QUIET, Opened
from wandb.sdk import wandb_setup
from wandb_server import Server


def logged(directory: Path) -> list[dict]:
    """The rows in all folders, in the order in which they would be uploaded."""
    return [row for path in folders(directory) for row in read_rows(path)]


def numbers(rows: list[dict]) -> list[int]:
    return [row["_step"] for row in rows]


# Rows


def test_rows_are_in_the_log_under_their_numbers_with_their_axes(opened, tmp_path):
    made = opened()
    made.join("training/")
    made.join("inference/")
    for step in (5, 6):
        made.say(step, {"loss": 0.5}, "training/")
        made.say(step + 100, {"speed": 9.0}, "inference/")
    accounts = made.finish()
    log = Log(folders(tmp_path)[0])
    assert numbers(log.rows) == [0, 1, 2, 3]
    assert [row.get("training/step") for row in log.rows] == [5, None, 6, None]
    globs = {m["glob_name"]: m["step_metric"] for m in log.of("metric") if m.get("glob_name")}
    assert globs == {"training/*": "training/step", "inference/*": "inference/step"}
    hidden = {m["name"] for m in log.of("metric") if m.get("options", {}).get("hidden")}
    assert hidden == {f"{prefix}/{key}" for prefix in ("training", "inference") for key in ("step", "workers")}
    assert log.exit_code == 0
    assert [(account.prefix, account.rows, account.lost, account.ok) for account in accounts.values()] == [
        ("training/", 2, 0, True),
        ("inference/", 2, 0, True),
    ]


def test_beside_bare_keys_each_key_has_its_axis_by_name(opened, tmp_path):
    """Which of two globs wins is undefined, and `*` fits everything."""
    made = opened()
    made.join("")
    made.join("eval/")
    made.say(0, {"loss": 0.5})
    made.say(0, {"accuracy": 0.5}, "eval/")
    made.say(1, {"accuracy": 0.6, "late": 1.0}, "eval/")
    made.finish()
    log = Log(folders(tmp_path)[0])
    axes = {m.get("glob_name") or m.get("name"): m.get("step_metric") for m in log.of("metric")}
    assert axes["*"] == "step"
    assert axes["eval/accuracy"] == axes["eval/late"] == axes["eval/workers"] == "eval/step"
    assert "eval/*" not in axes


def test_keys_beside_bare_ones_have_their_own_axis_whatever_is_in_their_names(opened, tmp_path):
    """wandb's `define_metric` raises for a `*`, and takes a `.` for nesting; see test_wandb_internals.py."""
    made = opened()
    made.join("")
    made.join("eval/")
    made.say(0, {"loss": 0.5})
    made.say(0, {"gpt-4.1": 0.5, "f1*macro": 0.5, "gpt-4_1": 0.5}, "eval/")
    account = made.finish()["eval/"]
    assert (account.rows, account.lost_values, account.warnings) == (1, 0, [])
    log = Log(folders(tmp_path)[0])
    axes = {m["name"]: m.get("step_metric") for m in log.of("metric") if m.get("name")}
    assert {axes[name] for name in (r"eval/gpt-4\.1", "eval/f1*macro", "eval/gpt-4_1")} == {"eval/step"}
    assert {"eval/gpt-4.1", "eval/f1*macro", "eval/gpt-4_1"} < log.keys


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside bare keys"])
def test_a_prefix_with_a_dot_keeps_its_step(opened, tmp_path, beside):
    """Where wandb fills an axis in by itself, it takes one with a dot for another metric, and writes 0 over it."""
    made = opened()
    for prefix in (*([""] if beside else []), "v1.5/"):
        made.join(prefix)
    for step in (7, 8):
        made.say(step, {"a": 1.0, "x.y": 2.0}, "v1.5/")
    made.finish()
    log = Log(folders(tmp_path)[0])
    assert [(row["v1.5/step"], row["v1.5/a"], row["v1.5/x.y"]) for row in log.rows] == [(7, 1, 2), (8, 1, 2)]
    assert not [metric for metric in log.of("metric") if metric["options"].get("step_sync")]


def test_a_failed_run_says_so_with_its_reason(opened, tmp_path):
    made = opened()
    made.join()
    made.say(0, {"a": 1.0})
    made.finish(3, "ValueError: loss is nan")
    log = Log(folders(tmp_path)[0])
    assert log.exit_code == 3
    assert any("loss is nan" in json.dumps(summary) for summary in log.of("summary"))


def test_a_finished_run_is_on_the_disk_to_its_end(opened):
    """So that it is no matter what becomes of wandb-core when `finish` has returned: Ray may kill it."""
    for name in "abcde":
        made = opened(id=name)
        made.join()
        made.say(0, {"a": 1.0})
        core = wandb_setup.singleton()._connection._proc._process
        made.finish()
        assert core.poll() == 0
        [path] = made.state.facts["paths"]
        *_, last = (record for record in transaction_log.records(Path(path)) if not record.HasField("footer"))
        assert (last.HasField("exit"), last.exit.exit_code) == (True, 0)


def test_a_disabled_run_has_no_folder_and_lacks_nothing(opened, tmp_path):
    made = opened(mode="disabled")
    made.join()
    for step in range(3):
        made.say(step, {"a": 1.0, "page": wandb.Html("x")})
    account = made.finish()[""]
    assert (account.mode, account.rows, account.lost, account.path, account.ok) == ("disabled", 3, 0, None, True)
    assert folders(tmp_path) == []


# What it leaves around


def test_runs_are_kept_out_of_git_and_of_what_ray_brings_to_its_workers(opened, tmp_path):
    """Ray obeys a `.gitignore` in a job's working directory. Who has one there has that."""
    made = opened()
    made.finish()
    made.close()
    ignored = tmp_path / "wandb" / ".gitignore"
    assert ignored.read_text() == "*\n"
    ignored.write_text("mine")
    opened(life="two").finish()
    assert ignored.read_text() == "mine"


@pytest.mark.parametrize("said", [True, False], ids=["the user's", "our own"])
def test_artifacts_are_staged_where_the_user_says_or_in_the_run_s_folder(opened, tmp_path, monkeypatch, said):
    """By default wandb has them below the home folder, from where they may be gone when `wandb sync` needs them."""
    theirs = tmp_path / "theirs"
    for name in ("DATA", "CACHE"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(theirs / name) if said else "")
    made = opened()
    made.join()
    made.say(0, {"rollouts": wandb.Table(columns=["x"], data=[[1]])})  # an artifact as well
    made.finish()
    where = theirs / "DATA" if said else folders(tmp_path)[0] / "artifacts"
    [artifact] = Log(folders(tmp_path)[0]).of("artifact")
    [entry] = artifact["manifest"]["contents"]
    assert Path(entry["local_path"]).is_relative_to(where)
    assert Path(entry["local_path"]).is_file()


# What W&B refuses


def refused(step: int) -> dict:
    """A report of which W&B refuses one value: its name is too long for a file's."""
    page = {f"page{'x' * 300}": wandb.Html("refused")}
    image = wandb.Image(np.zeros((4, 4, 3), np.uint8))
    return {"a": float(step), **page, "image": image, "pages": [wandb.Html("1"), wandb.Html("2")], "z": "text"}


def test_a_value_that_wandb_refuses_leaves_the_others_of_its_row_and_is_counted(opened, tmp_path):
    made = opened()
    made.join()
    for step in range(3):
        made.say(step, refused(step) if step == 1 else {"a": float(step)})
    account = made.finish()[""]
    rows = logged(tmp_path)
    assert [(row["_step"], row["step"], row["a"]) for row in rows] == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    assert (rows[1]["image._type"], rows[1]["pages.count"], rows[1]["z"]) == ("image-file", 2, "text")
    assert not [key for key in rows[1] if key.startswith("pagex")]
    assert (account.reports, account.rows, account.lost, account.lost_values, account.ok) == (3, 3, 0, 1, False)
    assert account.warnings[0].startswith("W&B refused a value of 'pagexxx")
    assert len(account.warnings) == 1


def test_a_value_whose_file_is_gone_is_refused_alone(opened, tmp_path):
    made = opened()
    made.join()
    row = made.push(0, {"a": 1.0, "page": wandb.Html("gone"), "image": wandb.Html("stays")})
    os.unlink(row.metrics["page"]._path)  # by somebody who cleans the temporary folder
    made.writer.log(row)
    account = made.finish()[""]
    [row] = logged(tmp_path)
    assert (row["a"], row["image._type"]) == (1, "html-file")
    assert not [key for key in row if key.startswith("page")]
    assert account.lost_values == 1


@pytest.mark.parametrize("which", [0, 1], ids=["the first row", "the last row"])
def test_what_was_refused_is_counted_after_a_restart_too(opened, tmp_path, which):
    made = opened()
    made.join()
    for step in range(2):
        made.say(step, refused(step) if step == which else {"a": 1.0})
    made.abandon()
    made = opened()
    made.say(2, {"a": 2.0})
    account = made.finish()[""]
    assert numbers(logged(tmp_path)) == [0, 1, 2]
    assert (account.reports, account.rows, account.lost, account.lost_values) == (3, 3, 0, 1)
    assert len(account.warnings) == 1


def test_many_refused_values_are_one_warning_with_its_count(opened):
    made = opened()
    made.join()
    for step in range(20):
        made.say(step, refused(step))
    account = made.finish()[""]
    assert account.lost_values == 20
    [warning] = account.warnings
    assert warning.endswith("(20 times)")


def concluded(made: Opened, has: Callable[[int], bool]) -> Ledger:
    """The account where this is what is seen on the disk."""
    made.writer.has = has
    ledger.conclude(made.run.state, made.run.writer, made.run.pipelines)
    return made.state.facts["ledgers"][""]


def test_rows_that_do_not_come_to_disk_are_lost_and_told(opened):
    made = opened()
    made.join()
    made.say(0, {"a": 1.0})
    made.finish()
    account = concluded(made, lambda number: False)
    assert (account.reports, account.rows, account.lost, account.ok) == (1, 0, 1, False)
    assert account.warnings == ["1 reports are in no row"]


# Restarts


def test_a_row_that_is_missing_below_the_highest_gets_a_number_behind_all(opened, tmp_path):
    made = opened()
    made.join()
    for step in range(6):
        row = made.push(step, {"a": float(step)})
        if step not in (2, 3, 5):  # which W&B never gets
            made.writer.log(row)
    made.abandon()
    made = opened()
    account = made.finish()[""]
    rows = logged(tmp_path)
    assert [(row["_step"], row["step"], row["a"]) for row in rows] == [
        *((0, 0, 0), (1, 1, 1), (4, 4, 4)),
        *((5, 5, 5), (6, 2, 2), (7, 3, 3)),
    ]
    assert (account.reports, account.rows, account.lost) == (6, 6, 0)


def test_media_and_tables_that_were_not_there_are_logged_again(opened, tmp_path):
    made = opened()
    made.join()
    made.say(0, {"a": 0.0})
    table = wandb.Table(columns=["reward", "page"], data=[[0.5, wandb.Html("in a table")]])
    rows = {"page": wandb.Html("a page"), "rollouts": table, "pages": [wandb.Html("1"), wandb.Html("2")]}
    made.push(1, rows)  # and killed before W&B had it
    made.abandon()
    made = opened()
    made.finish()
    row = logged(tmp_path)[-1]
    assert (row["page._type"], row["rollouts._type"], row["pages.count"]) == ("html-file", "table-file", 2)
    files = folders(tmp_path)[-1] / "files"
    assert (files / row["page.path"]).read_text().endswith("a page")
    assert (files / row["rollouts.path"]).is_file()


PROGRAM = f"""
import json, sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
import wandb
from backbone.reduction import Reduction
from rooms import Opened
folder, steps, init, metrics = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), eval(sys.argv[4])
made = Opened(folder, **init)
if not made.run.pipelines:
    made.join("", Reduction(totals=["n"]))
for step in range(made.run.pipeline("").counts["reports"], steps):
    made.say(step, metrics(step))
    print(step, flush=True)
account = made.finish()[""]
print(json.dumps([account.reports, account.rows, account.lost, account.restarts, account.warnings]), flush=True)
"""


def writing(folder: Path, steps: int, init: dict, metrics: str, environ: dict | None = None) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(steps), json.dumps(init), metrics]
    quiet = {"WANDB_ERROR_REPORTING": "false"}  # as in an actor; it waits for the server at a process's end
    variables, pipe = no_account(folder) | quiet | (environ or {}), subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables)


def killed_after(process: subprocess.Popen, rows: int) -> None:
    for _ in range(rows):
        assert process.stdout.readline(), process.stderr.read()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_rows_of_writers_that_are_killed_at_any_moment_are_there_once_in_order(tmp_path, seed):
    chance = random.Random(seed)
    for _ in range(2):
        killed_after(writing(tmp_path, 800, {}, "lambda step: dict(n=1, a=step / 7)"), chance.randint(1, 400))
    last = writing(tmp_path, 800, {}, "lambda step: dict(n=1, a=step / 7)")
    stdout, stderr = last.communicate(timeout=120)
    assert json.loads(stdout.splitlines()[-1]) == [800, 800, 0, 2, []], stderr[-800:]
    assert len(folders(tmp_path)) == 3
    rows = logged(tmp_path)
    assert numbers(rows) == list(range(800))
    assert [(row["step"], row["n_total"]) for row in rows] == [(step, step + 1) for step in range(800)]
    assert [row["a"] for row in rows] == pytest.approx([step / 7 for step in range(800)])


def test_what_was_refused_before_a_kill_is_counted_and_told_once(tmp_path):
    metrics = "lambda step: dict(n=1, **({'page' + 'x' * 300: wandb.Html('x')} if step % 20 == 3 else {}))"
    killed_after(writing(tmp_path, 60, {}, metrics), 30)
    account = Opened(tmp_path).finish()[""]
    assert account.lost == 0
    assert account.lost_values == sum(step % 20 == 3 for step in range(account.reports))
    [warning] = account.warnings
    assert warning.endswith(f"({account.lost_values} times)")


def test_a_death_between_the_last_row_and_the_ledger_changes_nothing(opened):
    made = opened()
    made.join()
    for step in range(50):
        made.say(step, {"a": 1.0})
    made.end()
    made.writer.finish(0, None, {}, time.monotonic() + 60)
    made.state.close()
    account = opened().finish()[""]
    assert (account.reports, account.rows, account.lost, account.restarts, account.ok) == (50, 50, 0, 1, True)


def test_only_deaths_without_a_row_in_between_give_an_actor_up(opened, monkeypatch):
    def come_back() -> None:
        open_run(made.init, made.address, "owner", threading.RLock()).state.close()

    for step in range(DEATHS + 2):
        made = opened()
        made.join()
        made.say(step, {"a": 1.0})
        made.abandon()
    monkeypatch.setattr(Run, "start", lambda run: None)
    for _ in range(DEATHS + 1):  # the first one finds a new row
        come_back()
    with pytest.raises(GivenUpError, match=f"died {DEATHS + 1} times without a row"):
        come_back()


# Online


def online(server: Server) -> dict[str, str]:
    return server.environment | {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # seconds, instead of 15


@pytest.mark.parametrize("disk_every", ["0.5", pytest.param("100", marks=pytest.mark.slow)], ids=["disk", "server"])
def test_online_the_server_s_rows_are_those_that_are_there(tmp_path, server, disk_every):
    """Not the disk's, which may be behind or ahead of them: each row is on the server once, with its media."""
    variables = online(server) | {"WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": disk_every}
    page = "{'page': wandb.Html(str(step))} if step % 50 == 0 else {}"
    metrics = f"lambda step: time.sleep(0.003) or dict(n=1, **({page}))"
    process = writing(tmp_path, 600, dict(mode="online"), metrics, variables)
    wait_for(lambda: process.stdout.readline() and "run" in server.runs and len(server.rows("run")) > 10, every=0)
    process.kill()
    process.communicate()
    had = len(server.rows("run"))
    last = writing(tmp_path, 600, dict(mode="online"), metrics, variables)
    stdout, stderr = last.communicate(timeout=120)
    assert json.loads(stdout.splitlines()[-1]) == [600, 600, 0, 1, []], stderr[-800:]
    assert 10 < had < 600
    rows = server.rows("run")
    assert numbers(rows) == list(range(600))
    assert [row["step"] for row in rows] == list(range(600))
    assert [row["step"] for row in rows if "page" in row] == list(range(0, 600, 50))


@pytest.mark.slow
def test_passing_troubles_of_the_server_lose_nothing(tmp_path, server):
    server.troubles = [500, 429]
    process = writing(tmp_path, 30, dict(mode="online"), "lambda step: dict(n=1)", online(server))
    stdout, stderr = process.communicate(timeout=60)
    assert json.loads(stdout.splitlines()[-1]) == [30, 30, 0, 0, []], stderr[-800:]
    assert server.troubles == []
    assert numbers(server.rows("run")) == list(range(30))


def test_best_values_are_found_in_a_summary_as_wandb_has_it(opened):
    made = opened()
    pipeline, summary = made.join("", Reduction()), made.writer.run.summary
    summary.update({"reward": {"max": 3.0, "last": 1.0}, "loss": 0.5})
    pipeline.begin(Reduction(best={"reward": "max", "loss": "min", "another": "max"}), 1, {}, dict(summary))
    assert pipeline.best == {"reward": 3.0}


def test_a_resumed_run_s_rows_and_totals_go_on_from_the_server_s(tmp_path, server):
    for life in range(2):
        folder = tmp_path / str(life)  # another machine: what is known, the server knows
        folder.mkdir()
        init = dict(mode="online", resume="allow")
        stdout, stderr = writing(folder, 5, init, "lambda step: dict(n=1)", online(server)).communicate(timeout=60)
        assert json.loads(stdout.splitlines()[-1])[:3] == [5, 5, 0], stderr[-800:]
    rows = server.rows("run")
    assert numbers(rows) == list(range(10))
    assert [row["n_total"] for row in rows] == list(range(1, 11))


def test_totals_go_on_also_from_a_life_that_the_server_has_not_got(tmp_path, server):
    for life, mode in enumerate(("online", "offline", "online")):
        init = dict(life=str(life), mode=mode, resume="allow")
        stdout, stderr = writing(tmp_path, 3, init, "lambda step: dict(n=1)", online(server)).communicate(timeout=60)
        assert json.loads(stdout.splitlines()[-1])[:3] == [3, 3, 0], stderr[-800:]
        last = max(folders(tmp_path), key=lambda folder: folder.stat().st_mtime)
        assert [row["n_total"] for row in read_rows(last)] == [3 * life + n for n in (1, 2, 3)]


@pytest.mark.slow
def test_a_restart_online_sends_again_nothing_that_somebody_may_have_edited_in_the_app(tmp_path, server):
    sent, answer = [], server.graphql

    def graphql(query: str, variables: dict) -> dict:
        sent.extend([variables] if "UpsertBucket" in query else [])
        return answer(query, variables)

    server.graphql = graphql
    init = dict(mode="online", name="as it began", notes="notes", tags=["tag"], config={"lr": 1e-4})
    variables = online(server) | dict(WANDB_NOTES="of the environment", WANDB_TAGS="of the environment")
    process = writing(tmp_path, 3000, init, "lambda step: dict(n=1)", variables)
    wait_for(lambda: process.stdout.readline() and "run" in server.runs and server.rows("run"), every=0)
    process.kill()
    process.communicate()
    began = dict(displayName="as it began", notes="notes", tags=["tag"])
    assert any(began.items() <= each.items() for each in sent)
    assert any("0.0001" in str(each["config"]) for each in sent)
    server.runs["run"] |= dict(name="edited", notes="edited", tags=["edited"])
    sent.clear()
    stdout, stderr = writing(tmp_path, 3000, init, "lambda step: dict(n=1)", variables).communicate(timeout=120)
    assert json.loads(stdout.splitlines()[-1]) == [3000, 3000, 0, 1, []], stderr[-800:]
    assert sent
    assert not [each for each in sent if "0.0001" in str(each["config"])]
    assert [server.runs["run"][key] for key in ("name", "notes", "tags")] == ["edited", "edited", ["edited"]]


def test_a_new_life_of_an_id_sends_what_it_says_though_the_earlier_one_was_not_finished(opened, server, monkeypatch):
    """As it would have if that had been finished: its code may have another config."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    for life, step in (("one", 0), ("two", 1)):
        made = opened(life=life, mode="online", name=life, tags=[life], config={"life": life}, resume="allow")
        made.join("", Reduction(totals=("n",)))
        made.say(step, {"n": 1})
        if life == "one":
            made.abandon()
    assert dict(made.writer.run.config) == {"life": "two"}
    account = made.finish()[""]
    assert (account.rows, account.lost, account.name) == (2, 0, "two")
    run = server.runs["run"]
    assert (run["name"], run["tags"]) == ("two", ["two"])
    assert [(row["_step"], row["step"], row["n_total"]) for row in server.rows("run")] == [(0, 0, 1), (1, 1, 2)]
    wandb.teardown()


def test_artifacts_and_rows_have_one_deadline(tmp_path, server, opened, monkeypatch):
    """What the artifacts have taken of `finish_timeout` the upload of the rows has no more."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.fail, server.artifacts = "stall", {}
    commit, seconds, within = threading.Event(), [], writer_room._within
    answer = server.graphql
    server.graphql = lambda query, variables: (
        commit.wait(60) and {} if "CommitArtifact" in query else answer(query, variables)
    )
    monkeypatch.setattr(writer_room, "_within", lambda time, *call: (seconds.append(time), within(time, *call)))
    wandb.teardown()
    made = opened(mode="online", settings=QUIET | dict(finish_timeout=3))
    made.join()
    made.say(0, {"a": 1.0})
    folder = tmp_path / "artifact"
    what = artifacts.check("model", "model", None, ()) | artifacts.stage(
        artifacts.contents("model", {"a": b"1"}), folder, None
    )
    made.tell("log_artifact", **what, folder=str(folder))
    account = made.finish()[""]
    commit.set()
    assert seconds == [1.0]
    assert (account.lost_artifacts, account.uploaded, account.ok) == (1, False, False)
    assert [warning[:40] for warning in account.warnings] == [
        "1 artifacts were not logged or used: not", "the upload did not end within 3 s",
    ]  # fmt: skip
    wandb.teardown()


@pytest.mark.parametrize(
    "how", ["is away", *(pytest.param(how, marks=pytest.mark.slow) for how in ("is silent", "drops packets"))]
)
def test_with_a_server_that_does_not_answer_the_run_is_kept_here_long_before_wandb_gives_up(tmp_path, server, how):
    """Which it does after 90 seconds."""
    server.stop()
    with contextlib.ExitStack() as sockets:
        if how != "is away":
            backlog = 50 if how == "is silent" else 0
            sockets.enter_context(socket.create_server(("127.0.0.1", server.port), backlog=backlog))
        for _ in range(3 if how == "drops packets" else 0):  # a full backlog takes no connection, and refuses none
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", server.port))
        process = writing(tmp_path, 5, dict(mode="online"), "lambda step: dict(n=1)", server.environment)
        stdout, stderr = process.communicate(timeout=80)
    reports, rows, lost, _, warnings = json.loads(stdout.splitlines()[-1])
    assert (reports, rows, lost) == (5, 5, 0), stderr[-800:]
    assert [warning[:40] for warning in warnings] == ["the W&B server does not answer, so the r"]
    [path] = folders(tmp_path)
    assert path.name.startswith("offline-")


# Resuming, and other runs in the same folder


def test_a_run_that_is_resumed_offline_has_numbers_and_totals_behind_those_of_its_earlier_folders(opened, tmp_path):
    rule = Reduction(totals=("n",))
    for life, key in enumerate(("n", "another", "n")):  # a life without the key starts nothing anew
        made = opened(life=str(life), resume="allow")
        made.join("", rule)
        for step in range(3):
            made.say(step, {key: 1})
        made.finish()
        made.close()
    rows = logged(tmp_path)
    assert numbers(rows) == list(range(9))
    assert [row["n_total"] for row in rows if "n" in row] == [1, 2, 3, 4, 5, 6]


def test_totals_of_a_pipeline_that_the_last_life_had_not_go_on_as_well(opened, tmp_path):
    for life, prefix in enumerate(("a/", "b/", "a/")):
        made = opened(life=str(life), resume="allow")
        made.join(prefix, Reduction(totals=("n",)))
        made.say(0, {"n": 1}, prefix)
        made.finish()
        made.close()
    rows = logged(tmp_path)
    assert [row.get("a/n_total") for row in rows] == [1, None, 2]


def test_lives_in_several_time_zones_come_in_the_order_in_which_they_were(opened, tmp_path, monkeypatch):
    """The totals go on from the last one's, which by its name is the first."""
    for life, zone in enumerate(("UTC-12", "UTC+11", "UTC")):
        with monkeypatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            made = opened(life=str(life), resume="allow")
            made.join("", Reduction(totals=("n",)))
            made.say(0, {"n": 10**life})
            made.finish()
            made.close()
    time.tzset()
    in_order = transaction_log.folders(tmp_path / "wandb", "p", "run")
    assert [[row["n_total"] for row in read_rows(path)] for path in in_order] == [[1], [11], [111]]
    assert in_order != sorted(in_order)


def test_a_run_goes_on_with_nothing_of_one_of_another_project_that_has_its_id(opened, tmp_path):
    """Whether that is finished or not."""
    for project, n in (("p", 1000), ("left", 100), ("q", 1)):
        made = opened(life=project, project=project, resume="allow")
        made.join("", Reduction(totals=("n",)))
        made.say(0, {"n": n})
        if project == "left":
            made.abandon()
        else:
            assert made.finish()[""].ok
            made.close()
    mine = [Log(path) for path in transaction_log.folders(tmp_path / "wandb", "q", "run")]
    assert [(row["_step"], row["n_total"]) for log in mine for row in log.rows] == [(0, 1)]


@pytest.mark.parametrize("ids", [("seed-7", "7"), ("a1", "a[1]"), ("7-1", "7")], ids=str)
def test_a_run_goes_on_with_nothing_of_another_whose_id_looks_like_its_own(opened, tmp_path, ids):
    for id_ in ids:
        made = opened(life=id_, id=id_, resume="allow")
        made.join("", Reduction(totals=("n",)))
        made.say(0, {"n": 1000 if id_ == ids[0] else 1})
        made.finish()
        made.close()
    mine = [Log(path) for path in transaction_log.folders(tmp_path / "wandb", "p", ids[1])]
    assert [(row["_step"], row["n_total"]) for log in mine for row in log.rows] == [(0, 1)]


# Tables that grow


def rollout(step: int) -> wandb.Table:
    return wandb.Table(columns=["step"], data=[[step]], log_mode="INCREMENTAL")


def test_a_growing_table_counts_its_increments_over_a_restart(opened, tmp_path):
    made = opened()
    made.join()
    for step in range(2):
        made.say(step, {"rollouts": rollout(step)})
    made.abandon()
    made = opened()
    for step in range(2, 4):
        made.say(step, {"rollouts": rollout(step), "others": rollout(step)})
    made.finish()
    rows = logged(tmp_path)
    assert {row["rollouts._type"] for row in rows} == {"incremental-table-file"}
    assert [row["rollouts.increment_num"] for row in rows] == [0, 1, 2, 3]
    assert [len(row["rollouts.previous_increments_paths"]) for row in rows] == [0, 1, 2, 3]
    assert len(set(rows[-1]["rollouts.previous_increments_paths"])) == 3
    assert [row.get("others.increment_num") for row in rows] == [None, None, 0, 1]


def test_an_increment_that_was_not_there_is_logged_again_under_its_own_count(opened, tmp_path):
    made = opened()
    made.join()
    for step in range(2):
        made.say(step, {"rollouts": rollout(step)})
    made.push(2, {"rollouts": rollout(2)})  # and killed before W&B had it
    made.abandon()
    made = opened()
    made.say(3, {"rollouts": rollout(3)})
    made.finish()
    assert [row["rollouts.increment_num"] for row in logged(tmp_path)] == [0, 1, 2, 3]


def test_several_increments_that_were_not_there_are_behind_those_that_are(opened, tmp_path):
    made = opened(settings=QUIET | dict(x_transaction_log_flush_interval=100))
    made.join()
    for step in range(4):
        made.say(step, {"rollouts": rollout(step)})
    made.abandon()
    [log] = folders(tmp_path)[0].glob("*.wandb")
    whole = log.read_bytes()
    for size in range(len(whole), 0, -50):  # what a kill would have left, of four rows one
        log.write_bytes(whole[:size])
        if transaction_log.TransactionLogs([log.parent]).numbers == {0}:
            break
    made = opened()
    made.say(4, {"rollouts": rollout(4)})
    made.finish()
    rows = logged(tmp_path)
    assert [row["rollouts.increment_num"] for row in rows] == [*range(5)]
    of_rows = [row["rollouts.artifact_path"] for row in rows]
    assert [row["rollouts.previous_increments_paths"] or [] for row in rows] == [of_rows[:i] for i in range(5)]


# The disk's account


def test_numbers_of_whole_and_cut_logs_are_those_that_leet_finds(opened, tmp_path):
    made = opened()
    made.join()
    for step in range(400):  # several of the log's blocks, and records longer than one
        made.say(step, {"a": float(step), "text": "x" * (70_000 if step % 100 == 50 else step)})
    made.finish()
    path = folders(tmp_path)[0]
    whole = next(path.glob("*.wandb")).read_bytes()
    assert len(whole) > 10 * 32_768
    assert transaction_log.TransactionLogs([path]).numbers == {*numbers(read_rows(path))} == {*range(400)}
    cut, chance, found = tmp_path / "cut" / path.name, random.Random(3), Counter()
    cut.mkdir(parents=True)
    places = [7, 8, 100, 32_768, 32_769, 2 * 32_768 - 3, *(chance.randrange(7, len(whole)) for _ in range(6))]
    for place in places:
        (cut / "run-run.wandb").write_bytes(whole[:place])
        assert transaction_log.TransactionLogs([cut]).numbers == {*numbers(read_rows(cut))}, place
        found[len(transaction_log.TransactionLogs([cut]).numbers)] += 1
    assert len(found) > 6
