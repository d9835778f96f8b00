"""The pages that `dashboard.py` makes fit what the demos log, and arrive at the server."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, Log, logs, no_account

pytestmark = pytest.mark.xdist_group("pages")  # in one process, for they share what takes long

PROJECTS = {"rl-agent", "rl-agent-extended", "rl-experiment", "inference-only"}


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """dashboard("--print"): the script as a process of its own."""

    def dashboard(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "dashboard.py"), *arguments]
        variables = no_account(tmp_path_factory.mktemp("home")) | variables
        return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60)

    return dashboard


@pytest.fixture(scope="module")
def pages(dashboard) -> list[dict]:
    """Demo 3's workspace, demo 4's workspace and the Report, of the experiment that the conftest's demos are."""
    done = dashboard("--print", "--experiment", "exp")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture
def server(server):
    server.projects = set(PROJECTS)
    return server


def metrics(*found: Log) -> set[str]:
    """The keys of numbers in the runs' rows; a table's parts (`rollouts_table.path`) left out."""
    items = (item for log in found for row in log.rows for item in row.items())
    return {key for key, value in items if "." not in key and key[0] != "_" and not isinstance(value, str)}


def over_what_is_spent(panel: dict) -> bool:
    return " over " in panel["title"]


def check_panels(panels: list[dict], *found: Log, prefix: str = "", axis: str = "step") -> None:
    """All that these runs log is on exactly one panel over the steps, an axis that each row carries."""
    panels = [panel for panel in panels if not over_what_is_spent(panel)]
    shown = [key for panel in panels for key in panel["y"]]
    axes = {prefix + key for key in ("step", "workers", axis)}
    assert sorted(shown) == sorted(metrics(*found) - axes)
    assert {panel["x"] for panel in panels} == {prefix + axis}
    for log in found:
        assert all(prefix + axis in row for row in log.rows)
        assert [m["step_metric"] for m in log.of("metric") if m.get("glob_name")] == [f"{prefix}step"]


def test_demo3s_workspace_has_a_section_for_each_pipeline_with_all_that_it_logs(ran, pages):
    found, workspace = logs(ran("demo3")[1]), pages[0]
    assert {log.run["project"] for log in found.values()} == {workspace["project"]}
    assert [section["name"] for section in workspace["sections"]] == ["training", "inference"]
    for section in workspace["sections"]:
        name = section["name"]
        check_panels(section["panels"], found[f"{name}-exp"], prefix=f"{name}/")
        assert section["panel_settings"]["x_axis"] == f"{name}/step"
        assert section["is_open"]
    assert workspace["runset_settings"]["filters"] == "Config(\"experiment\") == 'exp'"


def test_demo4s_workspace_shows_all_that_it_logs_by_group_and_job_type(ran, pages):
    found, workspace = logs(ran("demo4")[1]), pages[1]
    assert {log.run["project"] for log in found.values()} == {workspace["project"]}
    both, training, inference, evaluation, rollouts = (section["panels"] for section in workspace["sections"])
    runs = found["training-exp"], found["inference-exp"]
    check_panels([*both, *training, *inference], *runs)
    compared = {key for panel in both for key in panel["y"]}
    assert compared == metrics(runs[0]) & metrics(runs[1]) - {"step", "workers"}
    check_panels(evaluation, found["evaluation-exp"], axis="checkpoint_step")
    [table] = rollouts
    assert any(f"{table['table_name']}.path" in row for row in runs[1].rows)
    runs = workspace["runset_settings"]
    assert [group["name"] for group in runs["groupby"]] == ["Group", "JobType"]
    for log in found.values():
        assert f"{log.run['job_type']!r}" in runs["filters"].split(" and ")[0]
        assert "demo4" in log.run["tags"]
    assert "Metric(\"Tags\") in ['demo4']" in runs["filters"]


def test_the_report_compares_what_demo2_logs_to_both_of_its_projects(ran, pages):
    found = logs(ran("demo2")[1])
    [grid] = pages[2]["blocks"]
    assert {runset["project"]: f"{runset['name']}-exp" for runset in grid["runsets"]} == {
        log.run["project"]: name for name, log in found.items()
    }
    assert {runset["filters"] for runset in grid["runsets"]} == {"Config(\"experiment\") == 'exp'"}
    assert {log.config["experiment"] for log in found.values()} == {"exp"}
    shown = [key for panel in grid["panels"] for key in panel["y"]]
    assert shown == [
        "tokens",
        "e2e/speed",
        "e2e/latency_ms/mean",
        "e2e/latency_ms/p50",
        "e2e/latency_ms/p99",
        "tokens_total",
    ]
    for log in found.values():
        assert {"step", *shown} <= log.keys


@pytest.mark.slow
def test_the_reward_is_also_drawn_over_a_running_total_that_is_in_its_rows(ran, pages):
    for page, demo, prefix in ((pages[0], "demo3", "inference/"), (pages[1], "demo4", "")):
        every = [panel for section in page["sections"] for panel in section["panels"] if "title" in panel]
        [panel] = filter(over_what_is_spent, every)
        assert (panel["x"], panel["y"]) == (f"{prefix}tokens_total", [f"{prefix}reward/mean"])
        rows = logs(ran(demo)[1])["inference-exp"].rows
        assert all({panel["x"], *panel["y"]} <= row.keys() for row in rows if f"{prefix}reward/mean" in row)
        totals = [row[panel["x"]] for row in rows]
        assert totals == sorted(set(totals))


@pytest.mark.slow
def test_who_waits_for_whom_and_how_old_rollouts_are_is_shown_early(pages):
    training, inference = ([panel["title"] for panel in section["panels"]] for section in pages[0]["sections"])
    assert {"time/wait_for_batch_s", "off_policy"} <= {*training[:8]}
    assert "time/wait_for_policy_s" in inference[:8]


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # the library's own, when it is imported
def test_the_panels_named_first_exist_and_come_first(pages):
    import dashboard

    sections = [*pages[0]["sections"], next(s for s in pages[1]["sections"] if s["name"] == "evaluation")]
    named = (dashboard.TRAINING, dashboard.INFERENCE, dashboard.EVALUATION)
    for section, first in zip(sections, named, strict=True):
        titles = [panel["title"] for panel in section["panels"] if not over_what_is_spent(panel)]
        assert titles[: len(first)] == list(first)
    panels = [panel for section in pages[0]["sections"] for panel in section["panels"] if not over_what_is_spent(panel)]
    assert {panel["title"] for panel in panels if "smoothing_type" in panel} == set(dashboard.NOISY)


def spec(view: dict) -> dict:
    return json.loads(view["spec"])


@pytest.mark.slow
def test_saving_sends_the_pages_and_saving_again_replaces_them(dashboard, server, pages):
    arguments = ("--entity", "e", "--experiment", "exp")
    done = dashboard(*arguments, **server.environment)
    assert (done.returncode, done.stderr) == (0, "")
    paths, groups, report = server.views.values()
    base = server.environment["WANDB_BASE_URL"]
    slugs = [view["name"].removeprefix("nw-").removesuffix("-v") for view in (paths, groups)]
    projects = ("rl-experiment", "rl-agent-extended")
    urls = [f"{base}/e/{project}?nw={slug}" for project, slug in zip(projects, slugs, strict=True)]
    assert done.stdout.split()[:2] == urls
    assert done.stdout.split()[2].startswith(f"{base}/e/rl-agent/reports/")

    sections = spec(paths)["section"]["panelBankConfig"]["sections"]
    for sent, printed in zip(sections, pages[0]["sections"], strict=True):
        assert sent["name"] == printed["name"]
        configs = [panel["config"] for panel in sent["panels"]]
        assert [(config["xAxis"], config["metrics"]) for config in configs] == [
            (panel["x"], panel["y"]) for panel in printed["panels"]
        ]
    [runset] = spec(groups)["section"]["runSets"]
    assert runset["grouping"] == [{"section": "run", "name": name} for name in ("group", "jobType")]
    assert [(f["key"]["name"], f["op"], f["value"]) for f in runset["filters"]["filters"]] == [
        ("jobType", "IN", ["training", "inference", "evaluation"]),
        ("tags", "IN", ["demo4"]),
        ("experiment", "=", "exp"),
    ]
    [grid] = [block for block in spec(report)["blocks"] if block["type"] == "panel-grid"]
    assert [runset["project"]["name"] for runset in grid["metadata"]["runSets"]] == ["rl-agent", "inference-only"]

    assert dashboard(*arguments, **server.environment).stdout == done.stdout
    assert len(server.views) == 3
    assert dashboard("--entity", "e", **server.environment).stdout != done.stdout
    assert len(server.views) == 6


def check_told_in_one_line(done: subprocess.CompletedProcess, status: int, *words: str) -> None:
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert all(word in done.stderr for word in words)


@pytest.mark.slow
def test_what_it_cannot_do_is_told_in_one_line(dashboard, server, tmp_path):
    check_told_in_one_line(dashboard(), 2, "--entity")
    check_told_in_one_line(dashboard("--print", "--experiment", "a'b"), 2, "--experiment")
    check_told_in_one_line(dashboard("--entity", "e"), 2, "wandb login")
    short = server.environment | {"WANDB_API_KEY": "short"}
    check_told_in_one_line(dashboard("--entity", "e", **short), 2, "WANDB_API_KEY")
    wrong = server.environment | {"WANDB_API_KEY": "k" * 40}
    check_told_in_one_line(dashboard("--entity", "e", **wrong), 1, "verify")
    check_told_in_one_line(dashboard("--entity", "nobody", **server.environment), 1, "nobody", *PROJECTS)
    server.projects.remove("inference-only")
    check_told_in_one_line(dashboard("--entity", "e", **server.environment), 1, "inference-only")
    server.stop()
    check_told_in_one_line(dashboard("--entity", "e", **server.environment), 1, "connection refused")
    assert server.views == {}
    (tmp_path / "wandb_workspaces.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb_workspaces'\")")
    check_told_in_one_line(dashboard("--print", PYTHONPATH=str(tmp_path)), 1, "--group dashboard")
