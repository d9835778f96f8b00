"""Each demo, run as its user runs it, keeps the promises of its docstring: read back from the transaction logs."""

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from common import generate_evaluation_metrics, generate_inference_metrics, generate_training_metrics

import numpy as np
import pytest
from conftest import DEMOS, ROOT, STEPS, Log, folders, logs, read_rows, wait_for
from processes import below

TRAINING_KEYS = {
    *("loss", "value_loss", "explained_variance", "learning_rate", "entropy", "kl", "clip_fraction", "mismatch_kl"),
    *("grads/grad_norm_0", "grads/grad_norm_1", "grads/grad_norm_total", "tokens", "tokens_total", "perf/mfu"),
    *("e2e/speed", "e2e/latency_ms/mean", "e2e/latency_ms/p50", "e2e/latency_ms/p99", "time/wait_for_batch_s"),
    *("off_policy/mean", "off_policy/max", "off_policy/dropped"),
}
INFERENCE_KEYS = {
    *("reward/mean", "reward/min", "reward/max", "reward/std", "success_rate", "truncated_fraction"),
    *("response_length/mean", "response_length/p90", "response_length/max", "rollouts", "rollouts_total"),
    *("tokens", "tokens_total"),
    *("e2e/speed", "e2e/latency_ms/mean", "e2e/latency_ms/p50", "e2e/latency_ms/p99", "kv_cache_utilization"),
    *("requests/running", "requests/waiting", "policy_version", "staleness/mean", "staleness/max"),
    *("reward/gsm8k/mean", "reward/code/mean", "groups/all_solved", "groups/none_solved", "reward/p10", "reward/p90"),
    *("errors", "time/step_s", "time/step_s/max", "time/step_s/worst", "time/wait_for_policy_s"),
}
EVALUATION_KEYS = {f"{source}/{key}" for source in ("gsm8k", "math", "code") for key in ("accuracy", "pass@4")}
EVALUATION_KEYS |= {"response_length/mean", "checkpoint_step"}
CHECKPOINTS = (0, 10)  # training steps


def under(prefix: str, keys: set[str]) -> set[str]:
    return {prefix + key for key in keys | {"step", "workers"}}


def independent(generate: Callable, pipeline: int, workers: int = 2, steps=range(STEPS)) -> list[list[dict]]:
    """What the workers reported, per step."""
    rngs = [np.random.default_rng([42, pipeline, worker]) for worker in range(workers)]
    ranks = [(rank,) if generate is generate_inference_metrics else () for rank in range(workers)]
    return [[generate(step, rng, *rank) for rng, rank in zip(rngs, ranks, strict=True)] for step in steps]


def check_training_rows(rows: list[dict], prefix: str = "", workers: int = 2) -> None:
    tokens, expected = 0, independent(generate_training_metrics, 0, workers)
    for step, (row, reports) in enumerate(zip(rows, expected, strict=True)):
        assert (row[f"{prefix}step"], row[f"{prefix}workers"]) == (step, workers)
        tokens += sum(report["tokens"] for report in reports)
        assert (row[f"{prefix}tokens_total"], row[f"{prefix}learning_rate"]) == (tokens, reports[0]["learning_rate"])
        for key in ("loss", "kl", "entropy", "clip_fraction", "mismatch_kl"):  # per token
            weighted = sum(r[key] * r["tokens"] for r in reports) / sum(r["tokens"] for r in reports)
            assert row[prefix + key] == pytest.approx(weighted, rel=1e-9), key
        for key in ("value_loss", "explained_variance", "grads/grad_norm_0", "perf/mfu", "time/wait_for_batch_s"):
            assert row[prefix + key] == pytest.approx(np.mean([r[key] for r in reports]), rel=1e-9), key
        assert row[f"{prefix}e2e/speed"] == pytest.approx(sum(report["e2e/speed"] for report in reports), rel=1e-9)
        pooled = np.concatenate([report["e2e/latency_ms"] for report in reports])
        assert row[f"{prefix}e2e/latency_ms/p99"] == pytest.approx(np.percentile(pooled, 99), rel=1e-9)
        ages = np.concatenate([report["off_policy"] for report in reports])
        assert (row[f"{prefix}off_policy/mean"], row[f"{prefix}off_policy/max"]) == (ages.mean(), ages.max())
        assert row[f"{prefix}off_policy/dropped"] == sum(report["off_policy/dropped"] for report in reports)


def check_inference_rows(rows: list[dict], prefix: str = "", workers: int = 2) -> None:
    expected = independent(generate_inference_metrics, 1, workers)
    for step, (row, reports) in enumerate(zip(rows, expected, strict=True)):
        assert (row[f"{prefix}step"], row[f"{prefix}workers"]) == (step, workers)
        pooled = {key: np.concatenate([np.atleast_1d(report[key]) for report in reports]) for key in reports[0]}
        for key, value in {
            "reward/mean": pooled["reward"].mean(),
            "reward/std": pooled["reward"].std(),
            "reward/min": pooled["reward"].min(),
            "reward/p10": np.percentile(pooled["reward"], 10),
            "success_rate": pooled["success_rate"].mean(),
            "reward/gsm8k/mean": pooled["reward/gsm8k"].mean(),
            "reward/code/mean": pooled["reward/code"].mean(),
            "groups/all_solved": pooled["success_rate"].reshape(-1, 8).all(axis=1).mean(),
            "groups/none_solved": 1 - pooled["success_rate"].reshape(-1, 8).any(axis=1).mean(),
            "truncated_fraction": pooled["truncated_fraction"].mean(),
            "response_length/p90": np.percentile(pooled["response_length"], 90),
            "e2e/latency_ms/p99": np.percentile(pooled["e2e/latency_ms"], 99),
            "e2e/speed": pooled["e2e/speed"].sum(),
            "requests/waiting": pooled["requests/waiting"].sum(),
            "rollouts_total": 32 * workers * (step + 1),
            "tokens": pooled["response_length"].sum(),
            "policy_version": step // 5 * 5,
            "staleness/max": pooled["staleness"].max(),
            "errors": pooled["errors"].mean(),
            "time/step_s": pooled["time/step_s"].mean(),
            "time/step_s/max": pooled["time/step_s"].max(),
        }.items():
            assert row[prefix + key] == pytest.approx(value, rel=1e-9), key
        assert row[f"{prefix}time/step_s/worst"] == f"engine {np.argmax(pooled['time/step_s'])}"


def check_evaluation_rows(rows: list[dict]) -> None:
    reports = independent(generate_evaluation_metrics, 2, 1, CHECKPOINTS)
    for row, checkpoint, [report] in zip(rows, CHECKPOINTS, reports, strict=True):
        assert (row["step"], row["workers"], row["checkpoint_step"]) == (checkpoint, 1, checkpoint)
        for key in EVALUATION_KEYS - {"checkpoint_step"}:
            assert row[key] == pytest.approx(report[key.removesuffix("/mean")].mean(), rel=1e-9), key


def axes(log: Log) -> dict[str, str]:
    return {m["glob_name"]: m["step_metric"] for m in log.of("metric") if m.get("glob_name")}


def hidden(log: Log) -> set[str]:
    return {m["name"] for m in log.of("metric") if m.get("options", {}).get("hidden")}


def check_whole(log: Log, rows: int = STEPS) -> None:
    assert len(log.rows) == rows
    assert log.exit_code == 0
    assert log.config["experiment"] == "exp"
    assert log.config["seed"] == 42


@pytest.mark.parametrize(
    "demo", ["demo1", *(pytest.param(demo, marks=pytest.mark.slow) for demo in ("demo2", "demo3")), "demo4"]
)
def test_a_demo_is_quiet_says_where_its_runs_are_and_leaves_nothing_else(ran, demo):
    done, directory = ran(demo)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) < 25
    assert sum("No W&B API key found" in line for line in lines) == (demo != "demo2")  # WANDB_MODE is set for that one
    for path in folders(directory):
        assert str(path.relative_to(directory)) in done.stdout
    ledgers = [line.split(": ")[1] for line in lines if " rows from " in line]
    rollouts = len(CHECKPOINTS) if demo == "demo4" else 0  # which worker 0 logs by a call of its own
    reports = STEPS * (2 if demo in ("demo1", "demo2") else 1)  # the others have a worker each
    expected = [f"{STEPS} rows from {reports + more} reports, 0 lost" for more in (0, rollouts)]
    assert ledgers == expected + ["2 rows from 2 reports, 0 lost"] * (
        demo == "demo4"
    )  # so nothing is lost, and nobody silent
    assert {path.name for path in directory.iterdir()} == {"wandb"}
    left = {path.name for path in (directory / "wandb").iterdir() if not path.name.startswith("offline-run-")}
    assert left <= {"latest-run", "debug.log", "debug-internal.log", ".wandb-leet.json", ".gitignore"}
    leet = json.loads((directory / "wandb" / ".wandb-leet.json").read_text())
    assert sorted(leet["selected_runs"]) == sorted(path.name for path in folders(directory))
    assert re.search(leet["metrics_filter"]["query"], "math/accuracy")


def test_the_commands_it_prints_work_when_pasted(ran):
    done, directory = ran("demo1")
    leet, sync = (line.split(":", 1)[1].strip() for line in done.stdout.splitlines()[-2:])
    assert shlex.split(leet)[-1] == "wandb"
    inspected = leet.replace(" leet ", " leet inspect --summary --json ")
    summary = subprocess.run(inspected, shell=True, cwd=directory, capture_output=True, text=True)
    assert json.loads(summary.stdout)["step"] == STEPS - 1
    dry = subprocess.run(f"{sync} --dry-run", shell=True, cwd=directory, capture_output=True, text=True)
    assert dry.returncode == 0
    assert all(path.name in dry.stdout + dry.stderr for path in folders(directory))


def test_demo1_gives_each_pipeline_a_project_and_bare_keys(ran):
    found = logs(ran("demo1")[1])
    assert set(found) == {"training-exp", "inference-exp"}
    training, inference = found["training-exp"], found["inference-exp"]
    assert training.run["project"] == "rl-training-demo"
    assert inference.run["project"] == "rl-inference-demo"
    assert training.keys == under("", TRAINING_KEYS)
    assert inference.keys == under("", INFERENCE_KEYS)
    for log in found.values():
        check_whole(log)
        assert axes(log) == {"*": "step"}
        assert hidden(log) == {"step", "workers"}
    check_training_rows(training.rows)
    check_inference_rows(inference.rows)


def test_demo2_gives_each_kind_of_job_a_project_with_comparable_keys(ran):
    found = logs(ran("demo2")[1])
    training, inference = found["training-exp"], found["inference-exp"]
    assert training.run["project"] == "rl-agent"
    assert inference.run["project"] == "inference-only"
    assert {"e2e/speed", "e2e/latency_ms/mean", "e2e/latency_ms/p99"} <= training.keys & inference.keys
    assert inference.config["training_project"] == "rl-agent"
    assert inference.config["training_run"] == training.run["run_id"]
    for log in found.values():
        check_whole(log)
    check_training_rows(training.rows)
    check_inference_rows(inference.rows)


def test_demo3_gives_each_pipeline_a_path_in_one_project(ran):
    found = logs(ran("demo3")[1])
    training, inference = found["training-exp"], found["inference-exp"]
    assert training.keys == under("training/", TRAINING_KEYS)
    assert inference.keys == under("inference/", INFERENCE_KEYS)
    assert axes(training) == {"training/*": "training/step"}
    assert axes(inference) == {"inference/*": "inference/step"}
    for log in found.values():
        check_whole(log)
        assert log.run["project"] == "rl-experiment"
    check_training_rows(training.rows, "training/", 1)
    check_inference_rows(inference.rows, "inference/", 1)


def test_demo3_can_put_both_pipelines_into_one_run_each_on_its_own_axis(ran):
    done, directory = ran("demo3", "--one-run")
    assert (done.returncode, done.stderr) == (0, "")
    [(name, log)] = logs(directory).items()
    assert name == "exp"
    assert len(log.rows) == 2 * STEPS
    assert log.keys == under("training/", TRAINING_KEYS) | under("inference/", INFERENCE_KEYS)
    assert axes(log) == {"training/*": "training/step", "inference/*": "inference/step"}
    assert hidden(log) == {"training/step", "training/workers", "inference/step", "inference/workers"}
    check_training_rows([row for row in log.rows if "training/step" in row], "training/", 1)
    check_inference_rows([row for row in log.rows if "inference/step" in row], "inference/", 1)


def artifacts(log: Log, name: str) -> list[dict]:
    return [artifact for artifact in log.of("artifact") if artifact["name"] == name]


def contents(artifact: dict) -> dict[str, Path]:
    return {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}


def test_demo4_ties_the_runs_of_an_experiment_together(ran):
    found = logs(ran("demo4")[1])
    assert len(found) == 3
    for job in ("training", "inference", "evaluation"):
        log = found[f"{job}-exp"]
        check_whole(log, len(CHECKPOINTS) if job == "evaluation" else STEPS)
        assert log.run["project"] == "rl-agent-extended"
        assert (log.run["job_type"], log.run["run_group"]) == (job, "exp")
        assert {"demo4", "seed-42"} <= set(log.run["tags"])
        for artifact in log.of("artifact"):
            for path in contents(artifact).values():
                assert path.is_file()
                assert path.is_relative_to(log.path)
    check_training_rows(found["training-exp"].rows, workers=1)
    check_inference_rows(found["inference-exp"].rows, workers=1)


def test_demo4_evaluates_each_checkpoint_in_a_run_with_an_axis_of_its_own(ran):
    log = logs(ran("demo4")[1])["evaluation-exp"]
    assert log.keys == under("", EVALUATION_KEYS)
    assert axes(log) == {"*": "step"}
    check_evaluation_rows(log.rows)


def test_demo4_keeps_checkpoints_as_versions_and_says_who_used_them(ran):
    found = logs(ran("demo4")[1])
    checkpoints = artifacts(found["training-exp"], "checkpoint")
    aliases = [set(version["aliases"]) - {"best"} for version in checkpoints]
    assert aliases == [{"latest", f"step-{step}"} for step in CHECKPOINTS]
    scores = [json.loads(version["metadata"])["explained_variance"] for version in checkpoints]
    best = ["best" in version["aliases"] for version in checkpoints]
    assert best == [score == max(scores[: i + 1]) for i, score in enumerate(scores)]
    weights = [np.load(contents(version)["weights.npy"]) for version in checkpoints]
    assert [matrix[0, 0] for matrix in weights] == list(CHECKPOINTS)

    names = [f"checkpoint:step-{step}" for step in CHECKPOINTS]
    assert "used_artifacts" not in found["training-exp"].config
    for user in ("inference-exp", "evaluation-exp"):
        assert found[user].config["used_artifacts"] == names
    trajectories = artifacts(found["inference-exp"], "trajectories")
    assert [json.loads(version["metadata"])["checkpoint"] for version in trajectories] == names


COLUMNS = ["step", "policy_version", "source", "prompt", "response", "reward", "length", "truncated"]


def is_right(source: str, prompt: str, response: str) -> bool:
    first, *more = (int(number) for number in re.findall(r"\d+", prompt))
    if source == "gsm8k":
        return response.endswith(f"#### {first * more[0] - more[1]}")
    names = {}
    exec(response, names)
    return names["f"](5 * first) == sum(first * i for i in range(5))


def test_demo4_shows_the_best_the_worst_and_some_other_rollouts_with_words_that_fit_their_rewards(ran):
    log = logs(ran("demo4")[1])["inference-exp"]
    batches = [reports[0] for reports in independent(generate_inference_metrics, 1)]
    for step, version in zip(CHECKPOINTS, artifacts(log, "trajectories"), strict=True):
        table = json.loads(contents(version)["rollouts.table.json"].read_text())
        assert table["columns"] == COLUMNS
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in table["data"]]
        rewards = list(batches[step]["reward"])
        assert rows[0]["reward"] == pytest.approx(max(rewards))
        assert rows[1]["reward"] == pytest.approx(min(rewards))
        where = [int(np.argmin(np.abs(np.array(rewards) - row["reward"]))) for row in rows[2:]]
        assert len(set(where)) == 3
        for i, row in zip(where, rows[2:], strict=True):
            assert (row["step"], row["policy_version"]) == (step, step)
            assert row["source"] == ("gsm8k" if i < 16 else "code")
            assert row["reward"] == pytest.approx(rewards[i])
            assert row["length"] == batches[step]["response_length"][i]
            assert row["truncated"] == batches[step]["truncated_fraction"][i]
        for row in rows:
            if not row["truncated"]:
                assert is_right(row["source"], row["prompt"], row["response"]) == (row["reward"] > 0.5)


def test_demo4s_rollouts_are_on_the_runs_page_as_a_table_that_grows(ran):
    log = logs(ran("demo4")[1])["inference-exp"]
    logged = [row for row in log.rows if "rollouts_table.path" in row]
    assert [row["step"] for row in logged] == list(CHECKPOINTS)
    before = []
    for i, (row, version) in enumerate(zip(logged, artifacts(log, "trajectories"), strict=True)):
        table = {key.partition(".")[2]: value for key, value in row.items() if key.startswith("rollouts_table.")}
        assert (table["_type"], table["increment_num"]) == ("incremental-table-file", i)
        assert table["previous_increments_paths"] == before
        before.append(table["artifact_path"])
        page, artifact = log.path / "files" / table["path"], contents(version)["rollouts.table.json"]
        assert json.loads(page.read_text())["data"] == json.loads(artifact.read_text())["data"]


@pytest.fixture
def begin_demo4(start, tmp_path):
    """begin_demo4("EvaluationWorker"): demo 4 with one rank, after its first evaluation, and that worker's process."""

    def begin(worker: str) -> tuple[subprocess.Popen, int]:
        process = start("demo4", "--steps", "41", "--step-seconds", "0.1", "--training-workers", "1")
        wait_for(lambda: any(read_rows(path) for path in folders(tmp_path) if "evaluation" in path.name))
        [pid] = below(process.pid, f"ray::{worker}")
        return process, pid

    return begin


def whole(directory: Path, name: str) -> bool:
    return any(len(read_rows(path)) == 41 for path in folders(directory) if name in path.name)


@pytest.mark.slow
def test_training_does_not_wait_for_an_evaluation_that_hangs_and_the_demo_does(begin_demo4, tmp_path):
    process, evaluator = begin_demo4("EvaluationWorker")
    os.kill(evaluator, signal.SIGSTOP)
    try:
        wait_for(lambda: whole(tmp_path, "training") and whole(tmp_path, "inference"))
        assert process.poll() is None
    finally:
        os.kill(evaluator, signal.SIGCONT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "evaluation-x: 5 rows from 5 reports, 0 lost\n" in stdout
    assert [row["checkpoint_step"] for row in logs(tmp_path)["evaluation-x"].rows] == [0, 10, 20, 30, 40]


@pytest.mark.slow
def test_demo4_goes_on_without_an_evaluation_that_has_died(begin_demo4, tmp_path):
    process, evaluator = begin_demo4("EvaluationWorker")
    os.kill(evaluator, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "evaluation worker 0 failed: its process died" in stderr
    found = logs(tmp_path)
    assert [row["step"] for row in found["training-x"].rows] == list(range(41))
    assert {log.exit_code for log in found.values()} == {1}


@pytest.mark.slow
def test_demo4s_evaluation_does_not_wait_for_checkpoints_of_a_rank_that_has_died(begin_demo4, tmp_path):
    process, rank = begin_demo4("TrainingWorker")
    os.kill(rank, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "training worker 0 failed: its process died" in stderr
    found = logs(tmp_path)
    assert len(found["inference-x"].rows) == 41
    logged = [json.loads(version["metadata"])["step"] for version in artifacts(found["training-x"], "checkpoint")]
    evaluated = [row["checkpoint_step"] for row in found["evaluation-x"].rows]
    assert evaluated in (logged, logged[:-1])  # it may have died between the two
    assert found["evaluation-x"].exit_code == 1


def test_the_same_seed_gives_the_same_numbers_whatever_the_timing(ran):
    def numbers(directory: Path) -> dict:
        return {
            name: [{key: value for key, value in row.items() if key[0] != "_"} for row in log.rows]
            for name, log in logs(directory).items()
        }

    assert numbers(ran("demo1")[1]) == numbers(ran("demo2")[1])


@pytest.mark.slow
def test_disabled_keeps_nothing(ran):
    done, directory = ran("demo1", "--mode", "disabled", "--step-seconds", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert folders(directory) == []
    assert list((directory / "wandb").iterdir()) == []


def test_wrong_input_is_told_in_one_line_without_a_traceback(run_demo):
    done = run_demo("demo3", "--experiment", "a/b")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--experiment" in done.stderr


@pytest.mark.parametrize(("one", "other"), [("demo1", "demo2"), ("demo2", "demo3")])
def test_a_diff_between_two_demos_shows_the_strategy_alone(one, other):
    sources = [(ROOT / DEMOS[demo]).read_text() for demo in (one, other)]
    code = [source.split('"""\n', 1)[1] for source in sources]
    imports, mains = zip(*[(c.split("def strategy")[0], c.split("def main")[1]) for c in code], strict=True)
    assert imports[0] == imports[1]
    assert mains[0] == mains[1]
    diff = subprocess.run(["diff", ROOT / DEMOS[one], ROOT / DEMOS[other]], capture_output=True, text=True).stdout
    assert sum(line[0] in "<>" for line in diff.splitlines()) < 40
