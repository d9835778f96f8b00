"""The recipes of `examples/`: each is imported, run, and makes the rows that its first sentence promises."""

import ast
import importlib
import json
import os
import re
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from backbone import transaction_log
from common import WandbRun, node_metrics

import numpy as np
import pytest
import ray
from conftest import ROOT, Log, each_log, folders, wait_for
from processes import below

RECIPES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in ("ray_train", "rllib_ppo"))


@pytest.fixture
def recipe(ray_here, tmp_path, monkeypatch):
    """recipe("resume"): the logs of the runs that it has made, after the older one the younger."""
    monkeypatch.chdir(tmp_path)

    def recipe(name: str, *arguments) -> list[Log]:
        importlib.import_module(f"examples.{name}").main(*arguments)
        return each_log(tmp_path)

    return recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_page_with_its_sentence_and_command_and_is_named_in_the_docs(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    tree = ast.parse(source)
    sentence, command, *_ = ast.get_docstring(tree).split("\n\n")
    assert 10 <= len(source.splitlines()) <= 40
    assert re.search(r"^[A-Z][^\n]*[.:]", sentence)
    assert re.match(rf" *(uv run python -m examples\.{name}|wandb sweep examples/{name}\.yaml)\b", command)
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert re.search(r'\nif __name__ == "__main__":\n    ray\.init\(\)\n    main\(.*\)\n$', source)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"examples/{name}.py" in page.read_text() for page in pages)


def test_each_recipe_is_run_by_a_test():
    assert {*RECIPES} == {
        *re.findall(r'\brecipe\("(\w+)"', Path(__file__).read_text().partition("\n\n\n@pytest.mark")[2])
    }


@pytest.mark.slow
def test_by_hand_loses_what_it_says_that_it_loses(recipe, tmp_path):
    [log] = recipe("by_hand")
    assert [row["_step"] for row in log.rows] == list(range(10))  # of 20 reports
    for row in log.rows:
        of_rank_0, of_rank_1 = ((rank + 1) / (row["_step"] + 1) for rank in range(2))
        assert (row["loss"], row["tokens"]) in ((of_rank_0, 100), (of_rank_1, 200))
        assert row["loss"] != pytest.approx((100 * of_rank_0 + 200 * of_rank_1) / 300)

    by_hand = importlib.import_module("examples.by_hand")
    logger = by_hand.Logger.remote(str(tmp_path))
    ray.get([logger.log.remote({"loss": 1.0}, step) for step in (5, 6, 3, 4)])
    ray.get(logger.finish.remote())
    assert [row["_step"] for row in each_log(tmp_path)[-1].rows] == [5, 6]  # a step that goes back is dropped

    logger = by_hand.Logger.remote(str(tmp_path))
    ray.get([logger.log.remote({"loss": 1.0}, step) for step in range(100)])
    pid = ray.get(logger.__ray_call__.remote(lambda _: os.getpid()))
    [core] = below(pid, "wandb-core")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{core}").exists())
    rows = [record for record in transaction_log.records(folders(tmp_path)[-1]) if record.HasField("history")]
    assert len(rows) < 100


def test_first_steps_weights_the_loss_and_counts_the_tokens(recipe):
    [log] = recipe("first_steps")
    tokens = np.array([np.random.default_rng(rank).integers(3_000, 5_000, 20) for rank in range(8)])
    assert [row["tokens"] for row in log.rows] == tokens.sum(axis=0).tolist()
    assert log.rows[-1]["tokens_total"] == tokens.sum()
    assert [row["loss"] for row in log.rows] == pytest.approx([1 / (step + 1) for step in range(20)])
    assert {row["workers"] for row in log.rows} == {8}


def test_evaluation_on_rank_0_is_a_key_of_some_rows(recipe):
    [log] = recipe("evaluation_on_rank_0")
    assert {row["step"]: row.get("eval/accuracy") for row in log.rows} == {
        step: step / 10 if step in (0, 5) else None for step in range(10)
    }
    assert {row["workers"] for row in log.rows} == {2}


def test_evaluation_beside_training_has_an_axis_of_its_own_in_the_same_run(recipe):
    [log] = recipe("evaluation_beside_training")
    assert [row["eval/step"] for row in log.rows if "eval/accuracy" in row] == [0, 10]
    assert [row["step"] for row in log.rows if "loss" in row] == list(range(20))
    axes = {metric.get("name"): metric.get("step_metric") for metric in log.of("metric")}
    assert axes["eval/accuracy"] == "eval/step"


@pytest.mark.slow
def test_percentiles_are_those_of_all_samples(recipe):
    [log] = recipe("samples_and_percentiles")
    rngs = [np.random.default_rng(engine) for engine in range(4)]
    for row in log.rows:
        drawn = [(rng.lognormal(7, 0.5, 64), rng.random(64) < 0.1) for rng in rngs]
        latency, truncated = (np.concatenate(samples) for samples in zip(*drawn, strict=True))
        assert row["latency_ms/p99"] == pytest.approx(np.percentile(latency, 99))
        assert row["truncated"] == pytest.approx(truncated.mean())
        assert row["latency_ms/histogram._type"] == "histogram"


@pytest.mark.slow
def test_rewards_are_there_by_source_and_together(recipe):
    [log] = recipe("per_source")
    assert len(log.rows) == 5
    wanted = {f"reward/{source}/{name}" for source in ("gsm8k", "code", "math") for name in ("mean", "p90")}
    assert wanted | {"reward/mean", "reward/min", "reward/max"} <= log.keys


def test_a_table_of_rollouts_grows_by_the_rows_of_all_workers(recipe):
    [log] = recipe("rollouts_to_read")
    assert [row["rollouts_table.nrows"] for row in log.rows] == [2] * 5
    assert [row["rollouts_table.increment_num"] for row in log.rows] == list(range(5))


def test_checkpoints_are_versions_of_one_artifact_and_their_use_is_noted(recipe):
    training, serving = recipe("checkpoints")
    checkpoints = [artifact for artifact in training.of("artifact") if artifact["name"] == "checkpoint"]
    assert [{*artifact["aliases"]} for artifact in checkpoints] == [{"step-0", "latest"}, {"step-10", "latest"}]
    assert "checkpoint:step-10" in str(serving.config["used_artifacts"])
    assert training.run["run_group"] == serving.run["run_group"] == "checkpoints"


def test_a_run_goes_on_under_its_id_with_its_totals(recipe):
    first, second = recipe("resume")
    assert first.run["run_id"] == second.run["run_id"] == "resumed-1"
    rows = [*first.rows, *second.rows]
    assert [row["step"] for row in rows] == [*range(15), *range(10, 20)]
    assert [row["_step"] for row in rows] == list(range(25))
    assert rows[-1]["tokens_total"] == 25_000


@pytest.mark.slow
def test_all_batches_of_a_policy_version_are_in_rows_of_that_version(recipe):
    [log] = recipe("asynchronous_rollouts")
    assert all(row["policy_version"] == row["step"] for row in log.rows)
    assert sum(row["workers"] for row in log.rows) <= 20
    assert len({row["step"] for row in log.rows}) == len(log.rows)


def test_workers_that_kill_themselves_have_logged_all(recipe, capsys):
    [log] = recipe("killed_workers")
    assert [(row["step"], row["workers"]) for row in log.rows] == [(step, 6) for step in range(300)]
    assert "killed-workers: 300 rows from 1800 reports, 0 lost\n" in capsys.readouterr().out


def test_the_tasks_of_a_step_make_its_row(recipe):
    [log] = recipe("plain_tasks")
    assert [(row["step"], row["workers"], row["rollouts"]) for row in log.rows] == [(step, 16, 16) for step in range(3)]


@pytest.mark.slow
def test_children_without_ray_log_for_their_engines(recipe):
    [log] = recipe("child_processes")
    assert [(row["step"], row["workers"]) for row in log.rows] == [(step, 2) for step in range(5)]
    assert log.rows[4]["requests/running"] == 4 + 14


def test_reducing_on_each_node_gives_the_row_of_all_ranks(recipe):
    [log] = recipe("reduce_on_each_node")
    rngs = [np.random.default_rng(node) for node in range(2)]
    for row in log.rows:
        drawn = [(rng.random(8), rng.integers(100, 200, 8), rng.random((8, 4))) for rng in rngs]
        losses, tokens, rewards = (np.concatenate(part) for part in zip(*drawn, strict=True))
        assert row["loss"] == pytest.approx(np.average(losses, weights=tokens))
        assert row["reward/p90"] == pytest.approx(np.percentile(rewards, 90))


def test_a_trial_has_its_objective_in_the_agents_run(recipe, monkeypatch):
    for name, value in {"SWEEP_ID": "s1", "RUN_ID": "trial-1", "MODE": "offline"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    [log] = recipe("sweep")
    assert (log.run["run_id"], log.run["sweep_id"]) == ("trial-1", "s1")
    assert {"training/loss", "inference/reward/mean"} <= log.keys
    assert log.summary["inference/reward/mean"]["max"] == pytest.approx(0.135)
    metric = re.search(r"name: ([\w/.]+)", (ROOT / "examples/sweep.yaml").read_text())[1]
    assert metric == "inference/reward/mean.max"


@pytest.mark.slow
def test_serving_alone_is_one_run_that_names_what_it_serves(recipe):
    [log] = recipe("serving_only")
    assert (log.run["project"], len(log.rows)) == ("inference-only", 5)
    assert "checkpoint:step-10" in str(log.config["checkpoint"])


@pytest.mark.slow
def test_the_slowest_worker_is_named(recipe):
    [log] = recipe("slowest_worker")
    found = {(row["time/step_s/worst"], row["time/step_s/max"], round(row["time/step_s"], 2)) for row in log.rows}
    assert found == {("rank 3", 1.2, 1.05)}


@pytest.mark.slow
def test_an_alert_that_all_ranks_send_goes_out_once(recipe):
    [log] = recipe("alerts")
    assert [(alert["title"], alert["level"]) for alert in log.of("alert")] == [("reward collapsed", "WARN")]
    assert re.fullmatch(r"0\.1 at step 5, says rank [0-3]", log.of("alert")[0]["text"])
    assert len(log.rows) == 10


@ray.remote(num_cpus=0)
def fail(run: WandbRun, rank: int) -> None:
    raise ValueError(f"a batch without tokens on rank {rank}")


def said(log: Log) -> str:
    return "".join(output["line"] for output in log.of("output_logger"))


@pytest.mark.slow
def test_what_workers_say_is_in_the_runs_logs_with_their_labels(recipe):
    [log] = recipe("logs")
    for rank in range(2):
        lines = [line for line in said(log).splitlines() if line.startswith(f"rank {rank}: ")]
        assert lines == [f"rank {rank}: step {step} is done" for step in range(3)]


def test_the_traceback_of_what_ends_the_with_block_is_in_the_runs_logs(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.import_module("examples.logs"), "train", fail)
    with pytest.raises(ValueError, match="a batch without tokens"):
        recipe("logs")
    [log] = each_log(tmp_path)
    assert "Traceback (most recent call last)" in said(log)
    assert "ray.get([train.remote(run, rank) for rank in range(2)])" in said(log)
    assert "a batch without tokens on rank" in said(log)


@pytest.mark.slow
def test_the_timeline_is_an_artifact_that_has_the_tasks_of_all_workers(recipe):
    [log] = recipe("timeline")
    [artifact] = log.of("artifact")
    assert (artifact["name"], artifact["type"]) == ("timeline", "profile")
    [file] = artifact["manifest"]["contents"]
    events = json.loads(Path(file["local_path"]).read_text())
    seconds = sorted(event["dur"] / 1e6 for event in events if event.get("name") == "examples.timeline.train")
    assert len(seconds) == 2
    assert seconds[0] >= 5 * 0.02  # of rank 0
    assert seconds[1] >= 5 * 0.04
    assert len(log.rows) == 5


class Pages(BaseHTTPRequestHandler):
    """What vLLM and a node of Ray's export, as far as wandb-core asks them."""

    EXPORTED = {  # noqa: RUF012 - by path
        "/metrics": ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:prompt_tokens_total"),
        "/node": ("ray_node_mem_used", "ray_node_disk_free"),
    }

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        for metric in self.EXPORTED[self.path]:
            self.wfile.write(f'# TYPE {metric} gauge\n{metric}{{model_name="m"}} 3\n'.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_an_engines_page_is_in_the_runs_system_metrics_beside_the_nodes(recipe, monkeypatch, tmp_path):
    example = importlib.import_module("examples.engine_metrics")
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.5")

    def system_metrics() -> dict[str, float]:
        [path] = folders(tmp_path)
        items = [item for record in transaction_log.records(path) for item in record.stats.item]
        pages = [item for item in items if item.key.startswith("openmetrics.")]
        return {".".join(item.key.split(".")[1:3]): float(item.value_json) for item in pages}

    def serve_until_it_was_read(seconds: float) -> None:
        assert seconds == 60
        wait_for(lambda: {key.partition(".")[0] for key in system_metrics()} == {"vllm", "node-1"})

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        found = {"node-1": f"http://{address}/node"}
        monkeypatch.setattr(example, "node_metrics", lambda: (found, node_metrics()[1]))
        monkeypatch.setattr(example, "time", SimpleNamespace(sleep=serve_until_it_was_read))
        [log] = recipe("engine_metrics", address)
        server.shutdown()
    wanted = ("vllm.vllm:num_requests_running", "vllm.vllm:kv_cache_usage_perc", "node-1.ray_node_mem_used")
    assert system_metrics() == dict.fromkeys(wanted, 3.0)  # of all that is exported
    assert len(log.rows) == 1
