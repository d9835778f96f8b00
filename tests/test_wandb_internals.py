"""Contract tests of what is used of wandb without being public: they fail when wandb changes it.

Those of `has_login` and `mode_of_this_folder` are in test_arguments.py, of `with_endpoints` in test_nodes.py, of
`agent_is_running` in test_owner.py, of `add_reference` in test_artifacts.py, of the order of folders in test_files.py.
"""

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import termios
from pathlib import Path

from backbone import media, transaction_log, wandb_internals

import numpy as np
import pandas as pd
import plotly.graph_objects
import pytest
import wandb
from conftest import ROOT, Log, folders, no_account, wait_for
from wandb.sdk.data_types._private import MEDIA_TMP
from wandb.util import get_core_path
from wandb_server import Server

QUIET = dict(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)


@pytest.fixture
def begin(tmp_path):
    made = []

    def begin(settings: dict | None = None, **init) -> wandb.Run:
        options = dict(project="p", dir=tmp_path, mode="offline", reinit="create_new") | init
        made.append(wandb.init(**options, settings=wandb.Settings(**QUIET | (settings or {}))))
        return made[-1]

    yield begin
    for run in made:
        run.finish()


# Transaction logs (cut ones: see test_writer.py)


def test_the_records_of_a_log_say_what_leet_says(begin):
    run = begin()
    run.log({"a": 1, "n": {"b": 2.5}, "x/tokens_total": 7, "gone": 1}, step=3)
    run.log({"a": 2, "nan": float("nan"), "text": "ü"}, step=5)
    artifacts = [wandb.Artifact(name, "model") for name in ("one", "two")]
    for artifact in artifacts:
        run.log_artifact(artifact)
    run.finish()
    folder = Path(run.sync_dir)
    log = Log(folder)
    assert transaction_log.TransactionLogs([folder]).numbers == {row["_step"] for row in log.rows} == {3, 5}
    found = transaction_log.artifacts(folder)
    assert found == {artifact["client_id"] for artifact in log.of("artifact")}
    assert found == {wandb_internals.client_id(artifact) for artifact in artifacts}
    assert len(found) == 2


def test_a_folder_without_a_log_has_no_records(tmp_path):
    assert transaction_log.TransactionLogs([tmp_path]).numbers == set()
    assert [*transaction_log.records(tmp_path)] == []


def test_the_log_is_written_as_often_as_is_asked_for(begin):
    """By default every 15 s."""
    seldom, often = begin(), begin(wandb_internals.FLUSH_EVERY)
    for run in (seldom, often):
        run.log({"a": 1})
    wait_for(lambda: transaction_log.TransactionLogs([often.sync_dir]).numbers == {0})
    assert transaction_log.TransactionLogs([seldom.sync_dir]).numbers == set()


def test_a_log_is_read_on_as_it_grows(begin):
    run = begin(wandb_internals.FLUSH_EVERY)
    tail, found = transaction_log.Tail(Path(run.sync_dir)), []
    for first in (0, 3):
        for step in range(first, first + 3):
            run.log({"a": 1, "text": "x" * 30_000}, step=step, commit=True)
        wait_for(lambda: found.extend(tail.numbers()) or len(found) == first + 3, every=0.05)  # noqa: B023
    assert found == [0, 1, 2, 3, 4, 5]
    assert tail.numbers() == []


# Metrics


@pytest.mark.parametrize("key", ["win_rate/gpt-4.1", "f1*macro", "f1*", "x\\y", "a.b.c", "plain"])
def test_a_metric_that_is_defined_by_name_is_this_very_one_whatever_is_in_its_name(begin, key):
    """What is defined is seen by what wandb does with it: here its summary, to begin with."""
    run, send = begin(), wandb.Run._metric_callback

    def with_summary(record) -> None:
        record.summary.max = True
        send(run, record)

    run._metric_callback = with_summary
    wandb_internals.define_by_name(run, key, "v1.5/step")
    for value in (1, 3, 2):
        run.log({key: value, f"{key}x": value, "v1.5/step": value})
    run.finish()
    log = Log(Path(run.sync_dir))
    assert (log.summary[key], log.summary[f"{key}x"], log.summary["v1.5/step"]) == ({"max": 3}, 2, 2)
    [metric] = log.of("metric")
    assert (metric["step_metric"], metric["options"]) == ("v1.5/step", {"defined": True})


def test_by_define_metric_neither_a_star_nor_a_dot_stands_for_itself(begin):
    """So that the test before can fail, and be done without when wandb takes such names."""
    run = begin()
    with pytest.raises(wandb.Error):
        run.define_metric("f1*macro", step_metric="step")
    run.define_metric("a.b", summary="max")
    run.define_metric(wandb_internals.metric_name("c.d"), summary="max")
    for value in (1, 3, 2):
        run.log({"a.b": value, "c.d": value})
    run.finish()
    summary = Log(Path(run.sync_dir)).summary
    assert (summary["a.b"], summary["c.d"]) == (2, {"max": 3})


# Troubles


def program(folder: Path, code: str, **variables: str) -> subprocess.Popen:
    """A process of its own, because wandb's service is the process's, and a server is found once."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    environ, pipe = no_account(folder) | {"WANDB_ERROR_REPORTING": "false"} | variables, subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environ, stdout=pipe, stderr=pipe, text=True)


def printed(process: subprocess.Popen) -> list[str]:
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    return stdout.split("\n")[:-1]


UNREACHABLE = f"""
from backbone import wandb_internals
import wandb
try:
    wandb.init(project="p", mode="online", settings=wandb.Settings(init_timeout=2, **{QUIET}))
except wandb.Error as error:
    print(wandb_internals.is_unreachable(error), error)
"""


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_told_from_one_that_says_no(tmp_path):
    server = Server()
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as nobody:
        refused = nobody.getsockname()[1]
        nobody.close()
        key = server.environment["WANDB_API_KEY"]
        cases = {
            "silent": (silent.getsockname()[1], key),
            "refused": (refused, key),
            "wrong key": (server.port, "k" * 40),
        }
        processes = {}
        for name, (port, key_) in cases.items():
            variables = dict(WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY=key_)
            (tmp_path / name).mkdir()
            processes[name] = program(tmp_path / name, UNREACHABLE, **variables)
        said = {name: printed(process)[0].partition(" ") for name, process in processes.items()}
    server.stop()
    assert {name: verdict for name, (verdict, _, _) in said.items()} == {
        "silent": "True",
        "refused": "True",
        "wrong key": "False",
    }, said


@pytest.mark.slow
def test_a_refused_upload_is_in_the_run_s_own_log_and_a_good_one_is_not(tmp_path):
    server, verdicts = Server(), {}
    code = f"""
from pathlib import Path
from backbone import wandb_internals
import wandb
run = wandb.init(project="p", settings=wandb.Settings(finish_timeout=20, **{QUIET}))
run.log({{"a": 1}})
run.finish()
print(wandb_internals.upload_was_refused(Path(run.sync_dir)))
"""
    for status in (None, 403):
        server.fail = status
        verdicts[status] = printed(program(tmp_path, code, **server.environment))
    server.stop()
    assert verdicts == {None: ["False"], 403: ["True"]}


DEATHS = "before log", "between two steps of finish"


@pytest.mark.parametrize("death", [*(pytest.param(when, marks=pytest.mark.slow) for when in DEATHS), "during finish"])
def test_a_dead_service_is_told_from_other_errors(tmp_path, death):
    code = f"""
import os, signal, threading, time
from pathlib import Path
from backbone import wandb_internals
import wandb
run = wandb.init(project="p", mode="offline", settings=wandb.Settings(**{QUIET}))
try:
    run.log([1])
except Exception as error:
    print(wandb_internals.service_has_died(error))
children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
[core] = [int(pid) for pid in children if "wandb-core" in Path(f"/proc/{{pid}}/cmdline").read_text()]
try:
    if {death == "before log"}:
        os.kill(core, signal.SIGKILL)
        while True:
            run.log({{"a": 1}})
    os.kill(core, signal.SIGSTOP)
    threading.Timer(1, os.kill, [core, signal.SIGKILL]).start()
    if {death == "between two steps of finish"}:
        while not wandb_internals.service_is_dead():
            time.sleep(0.1)
        time.sleep(0.5)  # and the end of the connection is known
        run._interface.deliver_exit(1)  # the second step
    run.finish()
except Exception as error:
    print(wandb_internals.service_has_died(error), type(error).__name__, flush=True)
os._exit(0)
"""
    mistake, died = printed(program(tmp_path, code))
    assert mistake == "False"
    assert died.startswith("True"), died


def test_a_service_that_has_ended_is_dead(tmp_path):
    code = f"""
import os, signal, time
from pathlib import Path
from backbone import wandb_internals
import wandb
run = wandb.init(project="p", mode="offline", settings=wandb.Settings(**{QUIET}))
print(wandb_internals.service_is_dead())
children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
[core] = [int(pid) for pid in children if "wandb-core" in Path(f"/proc/{{pid}}/cmdline").read_text()]
os.kill(core, signal.SIGKILL)
for _ in range(100):
    if wandb_internals.service_is_dead():
        break
    time.sleep(0.1)
print(wandb_internals.service_is_dead(), flush=True)
os._exit(0)
"""
    assert printed(program(tmp_path, code)) == ["False", "True"]


@pytest.mark.parametrize(
    ("death", "said"),
    [("ends", "None"), pytest.param("stops", "TimeoutError", marks=pytest.mark.slow), ("dies", "ConnectionError")],
)
def test_a_service_is_ended_or_said_not_to_have(tmp_path, death, said):
    code = f"""
import os, signal, threading
from backbone import wandb_internals
import wandb
from wandb.sdk import wandb_setup
run = wandb.init(project="p", mode="offline", settings=wandb.Settings(**{QUIET}))
run.finish()
core = wandb_setup.singleton()._connection._proc._process.pid
if {death != "ends"}:
    os.kill(core, signal.SIGSTOP)
if {death == "dies"}:
    threading.Timer(1, os.kill, [core, signal.SIGKILL]).start()
try:
    print(wandb_internals.end_service(2.0), wandb_internals.service_is_dead(), flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
os.kill(core, signal.SIGKILL) if {death == "stops"} else None
os._exit(0)
"""
    assert printed(program(tmp_path, code))[0].split()[0] == said


# Data types


def test_data_types_are_told_from_other_values():
    table = wandb.Table(columns=["x"], data=[[1]])
    for value in (table, wandb.Html("x"), wandb.Histogram([1]), wandb.plot.bar(table, "x", "x")):
        assert media.is_data_type(value)
        assert media.is_table(value) == (value is table)
    for value in (1.0, "x", [table], {"x": table}, np.zeros(2), wandb.Html, None):
        assert not media.is_data_type(value)
        assert not media.is_table(value)


def test_figures_and_frames_become_what_wandb_makes_of_them(begin):
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    (drawn, axes), (shown, more) = pyplot.subplots(), pyplot.subplots()
    axes.plot([1, 2])
    more.imshow(np.zeros((4, 4)))
    plot, frame = plotly.graph_objects.Figure(plotly.graph_objects.Scatter(y=[1, 2])), pd.DataFrame({"a": [1]})
    run = begin()
    for theirs in (drawn, axes, shown, plot, frame):
        run.log({"theirs": theirs, "ours": media.made_of(theirs)})
    run.finish()
    pyplot.close("all")
    rows = Log(Path(run.sync_dir)).rows
    assert [row["ours._type"] for row in rows] == [*["plotly-file"] * 2, "image-file", "plotly-file", "table-file"]
    assert [row["theirs._type"] for row in rows] == [row["ours._type"] for row in rows]


def files_in(folder: str) -> list[Path]:
    return [path for path in Path(folder).rglob("*") if path.is_file()]


@pytest.fixture
def empty_folder():
    for path in files_in(MEDIA_TMP.name):
        path.unlink()


def test_media_take_their_temporary_file_with_them_and_may_be_made_again_in_another_process(begin, empty_folder):
    page = wandb.Html("<b>x</b>")
    [temporary] = files_in(MEDIA_TMP.name)
    content = temporary.read_bytes()
    for _ in range(2):
        parts = media.parts(page)
        assert (parts[0], parts[2]) == (wandb.Html, content)
        assert files_in(MEDIA_TMP.name) == [temporary]  # its owner may log it to a run of his own
    del page
    assert files_in(MEDIA_TMP.name) == []
    again = media.assembled(*parts)
    [temporary] = files_in(MEDIA_TMP.name)
    assert media.parts(again)[2] == content
    assert files_in(MEDIA_TMP.name) == [temporary]  # a run needs it
    run = begin()
    run.log({"page": again})
    run.finish()
    [row] = Log(Path(run.sync_dir)).rows
    assert Path(run.sync_dir, "files", row["page.path"]).read_bytes() == content
    assert files_in(MEDIA_TMP.name) == []
    for value in (wandb.Histogram([1]), wandb.Table(columns=["x"]), 1.0):
        assert media.parts(value) is None


def test_media_may_be_made_again_where_the_temporary_folder_was_cleaned():
    parts = media.parts(wandb.Html("x"))
    for path in Path(MEDIA_TMP.name).iterdir():
        path.unlink()
    Path(MEDIA_TMP.name).rmdir()
    again = media.assembled(*parts)
    assert media.parts(again)[2] == parts[2]


def test_what_wandb_has_copied_of_a_table_or_an_artifact_is_removed(begin, empty_folder):
    run, rows = begin(), [[wandb.Html("in a table"), np.zeros((300, 2))]]
    table, chart = (wandb.Table(columns=["page", "array"], data=rows) for _ in range(2))
    run.log({"table": table, "chart": wandb.plot.bar(chart, "page", "page")})
    artifact = wandb.Artifact("pages", "pages")
    artifact.add(wandb.Html("in an artifact"), "page")
    run.log_artifact(artifact)
    assert len(files_in(MEDIA_TMP.name)) == 4  # of the array one for each table
    media.remove_copied_files([table, 1.0])
    assert len(files_in(MEDIA_TMP.name)) == 2
    media.remove_copied_files([wandb.plot.bar(chart, "page", "page"), artifact])
    assert files_in(MEDIA_TMP.name) == []
    run.finish()
    entries = [entry for each in Log(Path(run.sync_dir)).of("artifact") for entry in each["manifest"]["contents"]]
    assert len(entries) == 8  # each table with its page and array, the page with its description
    assert all(Path(entry["local_path"]).is_file() for entry in entries)


def test_wandb_cuts_tables_and_lists_of_images_where_we_do(begin, monkeypatch):
    monkeypatch.setattr(wandb.Table, "MAX_ARTIFACT_ROWS", 3)
    table = wandb.Table(columns=["x"], data=[[i] for i in range(5)])
    images = [wandb.Image(np.full((2, 2), i, np.uint8)) for i in range(wandb.Image.MAX_ITEMS + 1)]
    pages = [wandb.Html("x") for _ in images]
    chart = wandb.plot.bar(wandb.Table(["x"], table.data), "x", "x")
    growing = wandb.Table(["x"], table.data, log_mode="INCREMENTAL")
    ours = [media.excess(value) for value in (table, images, pages, chart, growing)]
    run = begin()
    run.log({"table": table, "images": images, "pages": pages, "chart": chart, "growing": growing})
    run.finish()
    log = Log(Path(run.sync_dir))
    entries = [entry for artifact in log.of("artifact") for entry in artifact["manifest"]["contents"]]
    tables = [json.loads(Path(entry["local_path"]).read_text())["data"] for entry in entries]
    assert tables == [[[0], [1], [2]]] * 3
    [row] = log.rows
    assert [row["images.count"], row["pages.count"]] == [108, 109]
    assert ours == [
        "5 rows, of which W&B takes 3: the others are lost",
        "109 elements, of which W&B takes 108: the others are lost",
        "",
        "5 rows, of which W&B takes 3: the others are lost",
        "5 rows, of which W&B takes 3: the others are lost",
    ]


def test_an_incremental_table_is_made_the_next_one_of_those_logged(begin):
    def table(i: int) -> wandb.Table:
        return wandb.Table(columns=["x"], data=[[i]], log_mode="INCREMENTAL")

    run, logged = begin(), []
    for i in range(3):
        made = table(i)
        media.continue_table(made, logged, i, resumed=False)
        run.log({"table": made})
        logged = media.logged_increments(made, logged, i)
    run.finish()
    rows = Log(Path(run.sync_dir)).rows
    assert [row["table.increment_num"] for row in rows] == [0, 1, 2]
    assert len(rows[2]["table.previous_increments_paths"]) == 2


# Settings


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """wandb in another folder, as if just imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def test_what_the_environment_or_a_file_says_is_not_set(fresh, tmp_path):
    defaults = dict(finish_timeout=60, init_timeout=10, console="off")
    assert wandb_internals.unless_set(defaults) == defaults | wandb_internals.FLUSH_EVERY
    fresh.setenv("WANDB_FINISH_TIMEOUT", "7")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nconsole = wrap\n")
    wandb.teardown()
    assert wandb_internals.unless_set(defaults) == {"init_timeout": 10} | wandb_internals.FLUSH_EVERY


def test_the_repository_around_the_working_directory_is_that_of_the_run(fresh, tmp_path, begin):
    assert wandb_internals.repository() == {}
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@e"]
    repository = tmp_path / "code"
    subprocess.run([*git, "init", "-q", repository], check=True)
    subprocess.run([*git, "-C", repository, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.check_output([*git, "-C", repository, "rev-parse", "HEAD"], text=True).strip()
    (repository / "below").mkdir()
    fresh.chdir(repository / "below")
    assert wandb_internals.repository() == {"git_root": str(repository)}
    run = begin(wandb_internals.repository() | dict(x_disable_meta=False))
    run.finish()
    assert commit in str(Log(Path(run.sync_dir)).run)


# LEET


def shown(folder: Path, *until: str) -> str:
    """What LEET shows of a folder, from its start until it has shown these texts."""
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(terminal, (50, 180))
    command = [get_core_path(), "leet", "run", "--no-observability", str(folder)]
    environ = no_account(folder.parent) | {"TERM": "xterm-256color"}
    process = subprocess.Popen(command, env=environ, stdin=its_end, stdout=its_end, stderr=its_end)
    seen = b""

    def text() -> str:
        return re.sub(r"\x1b\[[0-9;?>]*[a-zA-Z]", "", seen.decode(errors="replace"))

    def more() -> bool:
        nonlocal seen
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 1 << 16)
        return all(each in text() for each in until)

    try:
        wait_for(more, every=0)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
        os.close(its_end)
    return text()


def test_leet_shows_the_runs_and_first_the_metrics_that_it_is_told_of(begin, tmp_path):
    for id_ in ("before", "first", "second"):
        run = begin(id=id_)
        run.log({"loss": 1, "zebra": 1, "kl": 1})
        run.finish()
    before, first, second = folders(tmp_path)
    wandb_internals.open_in_leet(tmp_path / "wandb", [first, second], "loss|kl")
    text = shown(tmp_path / "wandb", 'Filter (regex): "loss|kl"', f"▶ {first.name}", f"● {second.name}", before.name)
    assert not re.search(rf"[▶●] {before.name}", text.rpartition("Runs [3 items]")[2])  # as it is shown in the end


def test_a_filter_that_the_user_has_typed_stays(tmp_path):
    memory = tmp_path / ".wandb-leet.json"
    wandb_internals.open_in_leet(tmp_path, [tmp_path / "a"], "loss")
    memory.write_text(memory.read_text().replace('"loss"', '"typed"'))
    wandb_internals.open_in_leet(tmp_path, [tmp_path / "b", tmp_path / "c"], "loss")
    text = memory.read_text()
    assert '"typed"' in text
    assert '"pinned_run": "b"' in text
    memory.write_text("no json")
    wandb_internals.open_in_leet(tmp_path, [tmp_path / "a"], "loss")
    assert memory.read_text() == "no json"
