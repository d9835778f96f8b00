"""Each demo, run as its user runs it, keeps the promises of its docstring: read back from the transaction logs."""

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

from common import generate_inference_metrics, generate_training_metrics

import numpy as np
import pytest
from conftest import DEMOS, ROOT, STEPS, Log, folders, logs

TRAINING_KEYS = {
    *("loss", "value_loss", "explained_variance", "learning_rate", "entropy", "kl", "clip_fraction", "mismatch_kl"),
    *("grads/grad_norm_0", "grads/grad_norm_1", "grads/grad_norm_total", "tokens", "tokens_total", "perf/mfu"),
    *("e2e/speed", "e2e/latency_ms/mean", "e2e/latency_ms/p50", "e2e/latency_ms/p99", "time/wait_for_batch_s"),
}
INFERENCE_KEYS = {
    *("reward/mean", "reward/min", "reward/max", "reward/std", "success_rate", "truncated_fraction"),
    *("response_length/mean", "response_length/p90", "response_length/max", "rollouts", "rollouts_total"),
    *("e2e/speed", "e2e/latency_ms/mean", "e2e/latency_ms/p50", "e2e/latency_ms/p99", "kv_cache_utilization"),
    *("requests/running", "requests/waiting", "policy_version", "staleness/mean", "staleness/max"),
}


def under(prefix: str, keys: set[str]) -> set[str]:
    return {prefix + key for key in keys | {"step", "workers"}}


def independent(generate: Callable, pipeline: int, workers: int = 2, seed: int = 42) -> list[list[dict]]:
    """What the workers reported, per step."""
    rngs = [np.random.default_rng([seed, pipeline, worker]) for worker in range(workers)]
    return [[generate(step, rng) for rng in rngs] for step in range(STEPS)]


def check_training_rows(rows: list[dict], prefix: str = "") -> None:
    tokens = 0
    for step, (row, reports) in enumerate(zip(rows, independent(generate_training_metrics, 0), strict=True)):
        assert (row[f"{prefix}step"], row[f"{prefix}workers"]) == (step, 2)
        tokens += sum(report["tokens"] for report in reports)
        assert (row[f"{prefix}tokens_total"], row[f"{prefix}learning_rate"]) == (tokens, reports[0]["learning_rate"])
        for key in ("loss", "kl", "entropy", "grads/grad_norm_0", "perf/mfu", "time/wait_for_batch_s"):
            assert row[prefix + key] == pytest.approx(np.mean([report[key] for report in reports]), rel=1e-9)
        assert row[f"{prefix}e2e/speed"] == pytest.approx(sum(report["e2e/speed"] for report in reports), rel=1e-9)
        pooled = np.concatenate([report["e2e/latency_ms"] for report in reports])
        assert row[f"{prefix}e2e/latency_ms/p99"] == pytest.approx(np.percentile(pooled, 99), rel=1e-9)


def check_inference_rows(rows: list[dict], prefix: str = "") -> None:
    for step, (row, reports) in enumerate(zip(rows, independent(generate_inference_metrics, 1), strict=True)):
        assert (row[f"{prefix}step"], row[f"{prefix}workers"]) == (step, 2)
        pooled = {key: np.concatenate([np.atleast_1d(report[key]) for report in reports]) for key in reports[0]}
        for key, value in {
            "reward/mean": pooled["reward"].mean(),
            "reward/std": pooled["reward"].std(),
            "reward/min": pooled["reward"].min(),
            "success_rate": pooled["success_rate"].mean(),
            "truncated_fraction": pooled["truncated_fraction"].mean(),
            "response_length/p90": np.percentile(pooled["response_length"], 90),
            "e2e/latency_ms/p99": np.percentile(pooled["e2e/latency_ms"], 99),
            "e2e/speed": pooled["e2e/speed"].sum(),
            "requests/waiting": pooled["requests/waiting"].sum(),
            "rollouts_total": 64 * (step + 1),
            "policy_version": step // 5 * 5,
            "staleness/max": pooled["staleness"].max(),
        }.items():
            assert row[prefix + key] == pytest.approx(value, rel=1e-9), key


def axes(log: Log) -> dict[str, str]:
    return {m["glob_name"]: m["step_metric"] for m in log.of("metric") if m.get("glob_name")}


def hidden(log: Log) -> set[str]:
    return {m["name"] for m in log.of("metric") if m.get("options", {}).get("hidden")}


def check_whole(log: Log) -> None:
    assert len(log.rows) == STEPS
    assert log.exit_code == 0
    assert log.config["experiment"] == "exp"
    assert log.config["seed"] == 42


# Demo 2 as a user does who has set the mode, and in a hurry; the others as it comes.
HURRY = ("--step-seconds", "0")


@pytest.mark.parametrize("demo", ["demo1", "demo2", "demo3", "demo4"])
def test_a_demo_is_quiet_says_where_its_runs_are_and_leaves_nothing_else(ran, demo):
    done, directory = ran(demo, *HURRY, WANDB_MODE="offline") if demo == "demo2" else ran(demo)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) < 25
    assert sum("No W&B API key found" in line for line in lines) == (demo != "demo2")  # WANDB_MODE is set for that one
    for path in folders(directory):
        assert str(path.relative_to(directory)) in done.stdout
    assert sum(f"{STEPS} rows from {2 * STEPS} reports" in line for line in lines) == 2
    assert not [line for line in lines if "lost" in line or "late" in line]
    assert {path.name for path in directory.iterdir()} == {"wandb"}
    left = {path.name for path in (directory / "wandb").iterdir() if not path.name.startswith("offline-run-")}
    assert left <= {"latest-run", "debug.log", "debug-internal.log", ".wandb-leet.json"}


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
    found = logs(ran("demo2", *HURRY, WANDB_MODE="offline")[1])
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
        assert log.run["project"] == "rl-agent"
    check_training_rows(training.rows, "training/")
    check_inference_rows(inference.rows, "inference/")


def test_demo3_can_put_both_pipelines_into_one_run_each_on_its_own_axis(ran):
    done, directory = ran("demo3", "--one-run")
    assert (done.returncode, done.stderr) == (0, "")
    [(name, log)] = logs(directory).items()
    assert name == "exp"
    assert len(log.rows) == 2 * STEPS
    assert log.keys == under("training/", TRAINING_KEYS) | under("inference/", INFERENCE_KEYS)
    assert axes(log) == {"training/*": "training/step", "inference/*": "inference/step"}
    assert hidden(log) == {"training/step", "training/workers", "inference/step", "inference/workers"}
    check_training_rows([row for row in log.rows if "training/step" in row], "training/")
    check_inference_rows([row for row in log.rows if "inference/step" in row], "inference/")


def artifacts(log: Log, name: str) -> list[dict]:
    return [artifact for artifact in log.of("artifact") if artifact["name"] == name]


def contents(artifact: dict) -> dict[str, Path]:
    return {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}


def test_demo4_ties_the_runs_of_an_experiment_together(ran):
    _, directory = ran("demo4")
    found = logs(directory)
    for job, log in (("training", found["training-exp"]), ("inference", found["inference-exp"])):
        check_whole(log)
        assert log.run["project"] == "rl-agent-extended"
        assert (log.run["job_type"], log.run["run_group"]) == (job, "exp")
        assert {"demo4", "seed-42"} <= set(log.run["tags"])
        for artifact in log.of("artifact"):
            for path in contents(artifact).values():
                assert path.is_file()
                assert path.is_relative_to(log.path)
    check_training_rows(found["training-exp"].rows)
    check_inference_rows(found["inference-exp"].rows)

    checkpoints = artifacts(found["training-exp"], "checkpoint")
    assert [set(version["aliases"]) - {"best"} for version in checkpoints] == [{"latest", f"step-{n}"} for n in (0, 10)]
    scores = [json.loads(version["metadata"])["explained_variance"] for version in checkpoints]
    best = ["best" in version["aliases"] for version in checkpoints]
    assert best == [score == max(scores[: i + 1]) for i, score in enumerate(scores)]
    weights = [np.load(contents(version)["weights.npy"]) for version in checkpoints]
    assert [matrix[0, 0] for matrix in weights] == [0, 10]

    rollouts = independent(generate_inference_metrics, 1)
    trajectories = artifacts(found["inference-exp"], "trajectories")
    assert [json.loads(version["metadata"])["checkpoint"] for version in trajectories] == [
        *("checkpoint:step-0", "checkpoint:step-10")
    ]
    for step, version in zip((0, 10), trajectories, strict=True):
        table = json.loads(contents(version)["rollouts.table.json"].read_text())
        assert table["columns"] == ["step", "rollout", "reward", "response_length", "success"]
        assert [row[2] for row in table["data"]] == pytest.approx(list(rollouts[step][0]["reward"]))
    assert found["inference-exp"].config["used_artifacts"] == ["checkpoint:step-0", "checkpoint:step-10"]


def test_the_same_seed_gives_the_same_numbers_whatever_the_timing(ran):
    def numbers(directory: Path) -> dict:
        return {
            name: [{key: value for key, value in row.items() if key[0] != "_"} for row in log.rows]
            for name, log in logs(directory).items()
        }

    assert numbers(ran("demo1")[1]) == numbers(ran("demo2", *HURRY, WANDB_MODE="offline")[1])


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
