"""What needs no Ray: arguments, dummy metrics, reduction, the pipeline's logic and its journal."""

import itertools
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import Log, folders

import common
from common import (
    InferencePipelineActor,
    PipelineActor,
    RunFinishedError,
    TrainingPipelineActor,
    generate_inference_metrics,
    generate_training_metrics,
    parse_args,
    reduce_reports,
)

TRAINING = TrainingPipelineActor.__ray_metadata__.modified_class
INFERENCE = InferencePipelineActor.__ray_metadata__.modified_class


# Arguments


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for key in list(os.environ):
        if key.startswith("WANDB_") or key in ("RAY_ADDRESS", "NETRC"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--step-seconds", "-1"], "--step-seconds"),
        (["--step-seconds", "nan"], "--step-seconds"),
        (["--training-workers", "0"], "--training-workers"),
        (["--mode", "maybe"], "--mode"),
        (["--experiment", "a/b"], "--experiment"),
        (["--experiment", ""], "--experiment"),
        (["--experiment", "x" * 200], "--experiment"),
        (["--entity", "a b"], "--entity"),
        (["--address", "127.0.0.1:1"], "--address"),
        (["--address", "nonsense"], "--address"),
        (["--dir", "/proc/nowhere"], "--dir"),
        (["--one-run"], "--one-run"),
        (["--mode", "online"], "API key"),
    ],
)
def test_bad_arguments_end_with_one_line_and_status_2(arguments, named, no_account, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args("A demo.", ["--dir", str(tmp_path), *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_mode_is_the_flag_else_the_environment_else_by_login(no_account, monkeypatch, tmp_path, capsys):
    def mode(*arguments: str) -> str:
        return parse_args("A demo.", ["--dir", str(tmp_path), *arguments]).mode

    assert mode() == "offline"
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"
    assert mode("--mode", "offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "dreaming")
    with pytest.raises(SystemExit):
        mode()


def test_a_login_in_netrc_is_found(no_account, tmp_path):
    Path(tmp_path, ".netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    Path(tmp_path, ".netrc").chmod(0o600)
    host = os.environ.setdefault("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        assert parse_args("A demo.", ["--dir", str(tmp_path)]).mode == "online", host
    finally:
        del os.environ["WANDB_BASE_URL"]


# Dummy metrics


@pytest.mark.parametrize("generate", [generate_training_metrics, generate_inference_metrics])
def test_metrics_depend_on_the_generator_and_the_step_alone(generate):
    first, again = ([generate(step, np.random.default_rng(step)) for step in range(50)] for _ in range(2))
    assert pickle.dumps(first) == pickle.dumps(again)
    assert pickle.dumps(first) != pickle.dumps([generate(step, np.random.default_rng(99)) for step in range(50)])


def test_training_metrics_stay_within_their_bounds():
    rng = np.random.default_rng(0)
    steps = [generate_training_metrics(step, rng) for step in range(500)]
    series = {key: np.array([step[key] for step in steps]) for key in steps[0]}
    assert np.allclose(
        series["grads/grad_norm_total"], np.hypot(series["grads/grad_norm_0"], series["grads/grad_norm_1"])
    )
    assert abs(series["loss"].mean()) < 0.02
    assert abs(series["loss"]).max() < 0.15
    assert series["value_loss"][:10].mean() > 3 * series["value_loss"][-10:].mean()
    assert series["entropy"][:3].mean() > 0.45
    assert 0.1 < series["entropy"][-50:].mean() < 0.2
    assert series["explained_variance"][0] < 0.1
    assert series["explained_variance"][-50:].mean() > 0.6
    assert series["kl"][0] < 0.04
    assert 0.02 < series["kl"][-50:].mean() < 0.1
    assert series["learning_rate"][0] < series["learning_rate"][7] == pytest.approx(1e-6)
    assert ((series["clip_fraction"] > 0.001) & (series["clip_fraction"] < 0.05)).all()
    assert series["mismatch_kl"].max() < 1e-2
    assert ((series["perf/mfu"] > 0.2) & (series["perf/mfu"] < 0.5)).all()


def test_inference_metrics_stay_within_their_bounds():
    rng = np.random.default_rng(0)
    rows = [
        reduce_reports([generate_inference_metrics(step, rng) for _ in range(4)], statistics=INFERENCE.statistics)
        for step in range(300)
    ]
    series = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    assert 0.1 < series["reward/mean"][:3].mean() < 0.35
    assert 0.65 < series["reward/mean"][-50:].mean() < 0.85
    assert ((series["reward/min"] >= 0) & (series["reward/max"] <= 1)).all()
    assert np.corrcoef(series["reward/mean"], series["success_rate"])[0, 1] > 0.9
    assert series["truncated_fraction"][:5].mean() > series["truncated_fraction"][-50:].mean()
    assert series["response_length/max"].max() <= 1024
    assert 3 < np.median(series["e2e/latency_ms/p99"] / series["e2e/latency_ms/p50"]) < 9
    assert ((series["kv_cache_utilization"] >= 0.4) & (series["kv_cache_utilization"] <= 0.95)).all()
    assert (np.diff(series["policy_version"]) >= 0).all()
    assert series["staleness/max"].max() <= 2
    speed = np.array([generate_inference_metrics(step, rng)["e2e/speed"] for step in range(20)])
    assert (speed < 0.1 * np.median(speed)).sum() == 4


# Reduction


def test_scalars_are_averaged_rates_summed_and_named_ones_passed_through():
    reports = [{"loss": 1.0, "speed": 10.0, "n": 2, "lr": 0.1}, {"loss": 2.0, "speed": 5.0, "n": 3, "lr": 0.1}]
    row = reduce_reports(reports, sums=("speed", "n"), largest=("lr",))
    assert row == {"loss": 1.5, "speed": 15.0, "n": 5, "lr": 0.1}
    assert isinstance(row["n"], int)


def test_samples_are_pooled_before_any_statistic():
    few, many = np.array([100.0]), np.arange(99.0)
    pooled = np.concatenate([few, many])
    row = reduce_reports([{"latency": few}, {"latency": many}], statistics={"latency": ("mean", "p99", "max")})
    assert row["latency/mean"] == pytest.approx(pooled.mean())
    assert row["latency/mean"] != pytest.approx((few.mean() + many.mean()) / 2)
    assert row["latency/p99"] == pytest.approx(np.percentile(pooled, 99))
    assert row["latency/max"] == 100
    assert set(row) == {"latency/mean", "latency/p99", "latency/max"}


def test_outcomes_are_pooled_to_one_fraction():
    assert reduce_reports([{"success": np.array([True])}, {"success": np.zeros(3, bool)}]) == {"success": 0.25}


def test_workers_that_lack_a_key_do_not_count_for_it():
    assert reduce_reports([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}


def test_odd_values_survive():
    row = reduce_reports([{"a": math.nan, "b": math.inf, "d": "x", "e": np.array([])}] * 2)
    assert math.isnan(row["a"])
    assert row["b"] == math.inf
    assert row["d"] == "x"
    assert "e" not in row
    assert math.isnan(reduce_reports([{"a": math.inf}, {"a": -math.inf}])["a"])


# The pipeline


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """pipeline(workers): a pipeline in this process, with a real offline run."""
    monkeypatch.setenv("WANDB_DATA_DIR", "")  # pipelines set both for good
    monkeypatch.setenv("WANDB_CACHE_DIR", "")

    def pipeline(workers: int, cls: type[PipelineActor] = PipelineActor, id: str = "run") -> PipelineActor:
        settings = {"x_disable_stats": True, "x_disable_meta": True}
        init = dict(project="p", name="n", id=id, dir=str(tmp_path), mode="offline", settings=settings)
        made = cls(init, workers, "", os.getpid())
        made.start()
        return made

    return pipeline


ME = ("", os.getpid(), "me")


def push(
    pipeline: PipelineActor, reports: list[tuple[int, dict]], first: int = 0, sender=ME, last: bool = True
) -> None:
    packed = [(step, pickle.dumps(metrics)) for step, metrics in reports]
    pipeline.call("_push", sender, first, packed, last)


def rows_of(pipeline: PipelineActor) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key[0] != "_"} for row in Log(pipeline._state.report.path).rows
    ]


def test_a_row_is_logged_when_all_workers_have_reported_and_late_ones_get_their_own(pipeline):
    made = pipeline(2)
    push(made, [(0, {"a": 1.0}), (1, {"a": 5.0}), (0, {"a": 3.0}), (0, {"a": 9.0})])
    report = made.finish()
    assert rows_of(made) == [
        {"a": 2.0, "step": 0, "workers": 2},
        {"a": 9.0, "step": 0, "workers": 1},
        {"a": 5.0, "step": 1, "workers": 1},
    ]
    assert (report.reports, report.rows, report.late, report.lost) == (4, 3, 1, 0)
    with pytest.raises(RunFinishedError):
        push(made, [(2, {"a": 1.0})])


def test_the_order_of_the_reports_has_no_effect_on_the_row(pipeline):
    reports = [
        {"a": 0.1, "x": np.array([0.1, 7.0])},
        {"a": 0.7, "x": np.array([3.3])},
        {"a": 1e9, "x": np.array([1e-9])},
    ]
    made = pipeline(3)
    for step, order in enumerate(itertools.permutations(reports)):
        push(made, [(step, metrics) for metrics in order], first=3 * step)
    made.finish()
    rows = [{key: value for key, value in row.items() if key != "step"} for row in rows_of(made)]
    assert len(rows) == 6
    assert all(row == rows[0] for row in rows)


def test_totals_add_up(pipeline):
    made = pipeline(2, TRAINING)
    push(made, [(step, {"tokens": 10 * worker}) for step in range(3) for worker in (1, 2)])
    made.finish()
    assert [row["tokens_total"] for row in rows_of(made)] == [30, 60, 90]


def test_what_waits_is_bounded_and_nothing_of_it_is_dropped(pipeline, monkeypatch):
    monkeypatch.setattr(PipelineActor, "MAX_HELD", 10)
    monkeypatch.setattr(PipelineActor, "MAX_CLOSED", 20)
    made = pipeline(2)
    for step in range(200):
        push(made, [(step, {"a": 1.0})], first=step)
        assert made._state.held == sum(map(len, made._state.open.values())) <= 11
    for step in range(200):  # the straggler
        push(made, [(step, {"a": 3.0})], first=step, sender=("", os.getpid(), "other"))
        assert len(made._state.closed) <= 21
    report = made.finish()
    assert report.reports == 400
    assert sum(row["workers"] for row in rows_of(made)) == 400
    assert report.lost == 0
    assert report.late > 0


def test_a_worker_that_left_is_not_waited_for(pipeline):
    made = pipeline(2)
    push(made, [(0, {"a": 1.0}), (1, {"a": 1.0})])
    assert made.progress()[0].rows == 0
    made.call("_expect", 1)
    assert made.progress()[0].rows == 2
    made.finish()


def test_reports_that_are_sent_again_are_recognised(pipeline):
    made = pipeline(1)
    push(made, [(0, {"a": 1.0}), (1, {"a": 2.0})])
    push(made, [(0, {"a": 1.0}), (1, {"a": 2.0}), (2, {"a": 3.0})])
    report = made.finish()
    assert (report.reports, report.rows, report.repeats) == (3, 3, 2)


def test_a_pipeline_that_died_goes_on_where_it_was(pipeline, tmp_path):
    """Here without the death: the second pipeline finds the first one's journal, and what its wandb has written."""
    first = pipeline(2, TRAINING)
    push(first, [(0, {"tokens": 1}), (0, {"tokens": 2}), (1, {"tokens": 4})], last=False)
    first._run.finish()
    second = pipeline(2, TRAINING)
    push(second, [(1, {"tokens": 4}), (1, {"tokens": 8})], first=2)
    report = second.finish()
    assert (report.reports, report.rows, report.repeats, report.restarts, report.lost) == (4, 2, 1, 1, 0)
    rows = [row for path in folders(tmp_path) for row in Log(path).rows]
    assert [(row["step"], row["tokens"], row["tokens_total"]) for row in rows] == [(0, 3, 3), (1, 12, 15)]
    assert not list(tmp_path.glob("wandb/.*"))


def test_the_journal_survives_a_torn_entry_and_forgets_what_is_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(common._Journal, "ROTATE_BYTES", 2000)
    monkeypatch.setattr(common._Journal, "ROTATE_SECONDS", 0.0)
    journal, state = common._Journal(tmp_path / "journal"), common._State(common.RunReport("n", "i"), workers=1)
    assert list(journal.replay()) == []
    journal.open(state)
    for i in range(500):
        if journal.is_due():
            state.report.reports = i
            journal.rotate(state)
        journal.append(("_expect", i))
    with journal.path.open("ab") as file:
        file.write(pickle.dumps(("_expect", 500))[:-3])
    for _ in range(2):  # the first time cuts off the torn entry
        oldest, *calls = journal.replay()
        assert 0 < oldest.report.reports < 499
        assert [i for _, i in calls] == list(range(oldest.report.reports, 500))


def test_the_code_says_where_its_conventions_come_from():
    """Nothing of this machine, nor of how the work on it is organised, is in the repository's files."""
    for path in Path(common.__file__).parent.glob("*.py"):
        assert not re.search(r"/(work|root|home)/", path.read_text()), path
