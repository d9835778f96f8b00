"""What needs no Ray: arguments, dummy metrics, reduction, the pipeline's logic and its journal."""

import contextlib
import itertools
import math
import os
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
from common import (
    InferencePipelineActor,
    PipelineActor,
    Reduction,
    RunFinishedError,
    TrainingPipelineActor,
    _Journal,
    _Pipeline,
    generate_inference_metrics,
    generate_training_metrics,
    parse_args,
    reduce_reports,
)

import numpy as np
import pytest
from conftest import Log, folders

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
        reduce_reports([generate_inference_metrics(step, rng) for _ in range(4)], InferencePipelineActor.reduction)
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
    assert (speed < 0.4 * np.median(speed)).sum() == 4


# Reduction


def test_scalars_are_averaged_rates_summed_and_named_ones_passed_through():
    reports = [{"loss": 1.0, "speed": 10.0, "n": 2, "lr": 0.1}, {"loss": 2.0, "speed": 5.0, "n": 3, "lr": 0.1}]
    row = reduce_reports(reports, Reduction(sums=("speed", "n"), largest=("lr",)))
    assert row == {"loss": 1.5, "speed": 15.0, "n": 5, "lr": 0.1}
    assert isinstance(row["n"], int)


def test_samples_are_pooled_before_any_statistic():
    few, many = np.array([100.0]), np.arange(99.0)
    pooled = np.concatenate([few, many])
    reduction = Reduction(statistics={"latency": ("mean", "p99", "max")})
    row = reduce_reports([{"latency": few}, {"latency": many}], reduction)
    assert row["latency/mean"] == pytest.approx(pooled.mean())
    assert row["latency/mean"] != pytest.approx((few.mean() + many.mean()) / 2)
    assert row["latency/p99"] == pytest.approx(np.percentile(pooled, 99))
    assert row["latency/max"] == 100
    assert set(row) == {"latency/mean", "latency/p99", "latency/max"}


def test_a_statistic_that_is_none_is_refused_where_it_is_named():
    with pytest.raises(ValueError, match="'p999'"):
        Reduction(statistics={"latency": ("mean", "p999")})


def test_outcomes_are_pooled_to_one_fraction():
    outcomes = [{"success": np.array([True])}, {"success": np.zeros(3, bool)}]
    assert reduce_reports(outcomes, Reduction()) == {"success": 0.25}
    assert reduce_reports([*outcomes, {"success": np.array([])}], Reduction()) == {"success": 0.25}


def test_samples_of_a_narrow_type_are_pooled_as_doubles():
    reduction = Reduction(statistics={"a": ("p50", "p99", "max")})
    assert reduce_reports([{"a": np.array([-100, 100], np.int8)}], reduction) == {"a/p50": 0, "a/p99": 98, "a/max": 100}


def test_workers_that_lack_a_key_do_not_count_for_it():
    assert reduce_reports([{"a": 1.0}, {"a": 3.0, "b": 5.0}], Reduction()) == {"a": 2.0, "b": 5.0}


def test_odd_values_survive():
    row = reduce_reports([{"a": math.nan, "b": math.inf, "d": "x", "e": np.array([])}] * 2, Reduction())
    assert math.isnan(row["a"])
    assert row["b"] == math.inf
    assert row["d"] == "x"
    assert "e" not in row
    assert math.isnan(reduce_reports([{"a": math.inf}, {"a": -math.inf}], Reduction())["a"])
    mixed = [{"a": 1}, {"a": np.array([3.0])}]
    assert reduce_reports(mixed, Reduction()) == {"a/mean": 2, "a/min": 1, "a/max": 3}
    assert reduce_reports([*mixed, {"a": "x"}], Reduction()) == {"a": "x"}


# The pipeline


ME = ("", os.getpid(), "me")


def packed(reports: list[tuple[int, dict]]) -> list[tuple[int, bytes]]:
    return [(step, pickle.dumps(metrics)) for step, metrics in reports]


def pushed(pipeline: _Pipeline, reports: list[tuple[int, dict]], first: int = 0, sender=ME) -> list[dict]:
    return list(pipeline.push(sender, first, packed(reports), last=False))


def test_a_total_leaves_out_what_is_no_number():
    pipeline = _Pipeline("", Reduction(sums=("n",), totals=("n",)))
    rows = pushed(pipeline, [(0, {"n": 1}), (1, {"n": "x"}), (2, {"n": 2})])
    assert [row.get("n_total") for row in rows] == [1, None, 3]


def test_a_row_is_due_when_all_workers_have_reported_and_late_ones_get_their_own():
    pipeline = _Pipeline("", workers=2)
    assert pushed(pipeline, [(0, {"a": 1.0}), (1, {"a": 5.0})]) == []
    late = [(0, {"a": 3.0}), (0, {"a": 9.0})]
    assert pushed(pipeline, late, first=2) == [
        {"a": 2.0, "step": 0, "workers": 2},
        {"a": 9.0, "step": 0, "workers": 1},
    ]
    assert list(pipeline.finish()) == [{"a": 5.0, "step": 1, "workers": 1}]
    assert pipeline.counts == {"reports": 4, "rows": 3, "late": 1, "repeats": 0}


def test_the_order_of_the_reports_has_no_effect_on_the_row():
    reports = [
        {"a": 0.1, "x": np.array([0.1, 7.0])},
        {"a": 0.7, "x": np.array([3.3])},
        {"a": 1e9, "x": np.array([1e-9])},
    ]
    rows = [
        row
        for order in itertools.permutations(reports)
        for row in pushed(_Pipeline("", workers=3), [(0, metrics) for metrics in order])
    ]
    assert len(rows) == 6
    assert all(row == rows[0] for row in rows)


def test_totals_add_up():
    pipeline = _Pipeline("training/", TrainingPipelineActor.reduction, workers=2)
    rows = pushed(pipeline, [(step, {"tokens": 10 * worker}) for step in range(3) for worker in (1, 2)])
    assert [row["training/tokens_total"] for row in rows] == [30, 60, 90]


def test_what_waits_is_bounded_and_nothing_of_it_is_dropped(monkeypatch):
    monkeypatch.setattr(_Pipeline, "MAX_WAITING", 10)
    monkeypatch.setattr(_Pipeline, "MAX_CLOSED", 20)
    pipeline, rows = _Pipeline("", workers=2), []
    for step in range(200):
        rows += pushed(pipeline, [(step, {"a": 1.0})], first=step)
        assert pipeline.waiting == sum(map(len, pipeline.open.values())) <= 11
    for step in range(200):
        rows += pushed(pipeline, [(step, {"a": 3.0})], first=step, sender=("", os.getpid(), "straggler"))
        assert len(pipeline.closed) <= 21
    rows += pipeline.finish()
    assert pipeline.counts["reports"] == sum(row["workers"] for row in rows) == 400
    assert pipeline.counts["late"] > 0


def test_a_worker_that_left_is_not_waited_for():
    pipeline = _Pipeline("", workers=2)
    assert pushed(pipeline, [(0, {"a": 1.0}), (1, {"a": 1.0})]) == []
    assert [row["step"] for row in pipeline.expect(1)] == [0, 1]
    assert [row["step"] for row in pushed(pipeline, [(2, {"a": 1.0})], first=2)] == [2]


def test_reports_that_are_sent_again_are_recognised():
    pipeline, reports = _Pipeline(""), [(step, {"a": 1.0}) for step in range(3)]
    assert len(pushed(pipeline, reports[:2])) == 2
    assert [row["step"] for row in pushed(pipeline, reports)] == [2]
    assert (pipeline.counts["reports"], pipeline.counts["repeats"]) == (3, 2)


def test_the_same_calls_lead_to_the_same_state_and_rows_from_any_snapshot():
    calls = [(worker, step, float(np.random.default_rng(step).normal())) for step in range(40) for worker in range(2)]
    pipeline, rows, snapshots = _Pipeline("", workers=2), [], []
    for i, (worker, step, value) in enumerate(calls):
        snapshots.append((i, len(rows), pickle.dumps(pipeline)))
        rows += pushed(pipeline, [(step, {"a": value})], first=step, sender=("", 1, str(worker)))
    for i, count, snapshot in snapshots[::7]:
        again = pickle.loads(snapshot)
        replayed = [
            row
            for worker, step, value in calls[i:]
            for row in pushed(again, [(step, {"a": value})], first=step, sender=("", 1, str(worker)))
        ]
        assert (replayed, again) == (rows[count:], pipeline)


@pytest.fixture
def actor(tmp_path, monkeypatch):
    """actor(...): a pipeline actor in this process, with a real offline run."""
    monkeypatch.setenv("WANDB_DATA_DIR", "")  # actors set both for good
    monkeypatch.setenv("WANDB_CACHE_DIR", "")
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr(common, "_core_of_its_own", contextlib.nullcontext)  # this process is pytest's

    def actor() -> PipelineActor:
        settings = {"x_disable_stats": True, "x_disable_meta": True}
        init = dict(project="p", name="n", id="run", dir=str(tmp_path), mode="offline", settings=settings)
        made = PipelineActor(init, os.getpid(), {}, [__file__])
        made.join("", TrainingPipelineActor.reduction, 2)
        return made

    return actor


def test_an_actor_that_died_goes_on_where_it_was(actor, tmp_path):
    """Here without the death: the second actor finds the first one's journal, and what its wandb has written."""
    first = actor()
    first.call("", "push", ME, 0, packed([(0, {"tokens": 1}), (0, {"tokens": 2}), (1, {"tokens": 4})]), False)
    first._run.finish()
    first._journal._db.close()
    second = actor()
    second.call("", "push", ME, 2, packed([(1, {"tokens": 4}), (1, {"tokens": 8})]), True)
    report = second.finish(0)[""]
    assert (report.reports, report.rows, report.repeats, report.restarts, report.lost) == (4, 2, 1, 1, 0)
    with pytest.raises(RunFinishedError):
        second.call("", "push", ME, 4, packed([(2, {"tokens": 1})]), True)
    rows = [row for path in folders(tmp_path) for row in Log(path).rows]
    assert [(row["step"], row["tokens"], row["tokens_total"]) for row in rows] == [(0, 3, 3), (1, 12, 15)]
    assert not list(tmp_path.glob("wandb/.*journal*"))


def test_two_actors_can_not_have_the_same_run_at_once(actor):
    first = actor()
    with pytest.raises(OSError, match="is another run of this id going on"):
        actor()
    first.finish(0)


def test_a_row_that_wandb_refuses_is_counted_as_lost_and_harms_no_other(actor):
    made = actor()
    reports = [(0, {"a": 1.0}), (1, {"a": object()}), (2, {"a": 3.0})]  # `WandbRun.log` would refuse it
    made.call("", "push", ME, 0, packed([report for report in reports for _ in range(2)]), True)
    report = made.finish(0)[""]
    assert [row["step"] for row in Log(report.path).rows] == [0, 2]
    assert (report.reports, report.rows, report.lost) == (6, 2, 2)
    assert not report.ok


def test_a_row_whose_file_is_gone_is_counted_as_lost_and_harms_no_other(actor):
    import wandb

    made, page = actor(), wandb.Html("rollout")
    os.unlink(page._path)  # it was in the folder of a worker that has ended
    reports = [(0, {"a": 1.0}), (1, {"a": page}), (2, {"a": 3.0})]
    made.call("", "push", ME, 0, packed([report for report in reports for _ in range(2)]), True)
    report = made.finish(0)[""]
    assert [row["step"] for row in Log(report.path).rows] == [0, 2]
    assert (report.reports, report.rows, report.lost, report.ok) == (6, 2, 2, False)


def test_rows_that_come_to_disk_while_they_are_counted_are_not_called_lost(actor, monkeypatch):
    """The lag is wandb's own, a few milliseconds; here it is made to fall between two looks."""
    made, looks, distinct_rows = actor(), [], common._distinct_rows
    made.call("", "push", ME, 0, packed([(step, {"a": 1.0}) for step in range(5) for _ in range(2)]), True)

    def first_without_the_last(paths):
        rows = distinct_rows(paths)
        looks.append(len(rows))
        return dict(list(rows.items())[:-1]) if len(looks) == 1 else rows

    monkeypatch.setattr(common, "_distinct_rows", first_without_the_last)
    read_summary = common.read_summary
    monkeypatch.setattr(common, "read_summary", lambda path: read_summary(path) if looks else {})
    report = made.finish(0)[""]
    assert looks == [5, 5]
    assert (report.reports, report.rows, report.lost, report.warnings) == (10, 5, 0, [])


def test_two_may_finish_a_run_at_once(actor, monkeypatch):
    monkeypatch.setattr(PipelineActor, "GRACE", 1.0)
    made = actor()
    made.call("", "push", ME, 0, packed([(0, {"a": 1.0})]), False)  # more may come: both wait for that
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(made.finish, (0, 1))
    assert one == other
    assert (one[""].reports, one[""].rows, one[""].lost) == (1, 1, 0)


def test_what_was_lost_between_two_batches_is_counted():
    pipeline = _Pipeline("")
    rows = pushed(pipeline, [(0, {"a": 1.0})]) + pushed(pipeline, [(3, {"a": 1.0})], first=3)
    assert (pipeline.counts["reports"], len(rows)) == (4, 2)


def test_data_types_that_were_logged_do_not_get_into_the_journal_s_way(actor, monkeypatch):
    import wandb

    monkeypatch.setattr(_Journal, "SECONDS", 0.0)
    made, table = actor(), wandb.Table(columns=["reward"], data=[[0.5]])
    for step in range(3):
        made.call("", "push", ME, 2 * step, packed([(step, {"a": 1.0, "rollouts": table})] * 2), step == 2)
        made.log_artifact(
            {"rollouts": table, "notes": b"x"}, name="trajectories", type="rollouts", metadata={}, aliases=[]
        )
        time.sleep(0.3)  # until it is logged
    report = made.finish(0)[""]
    assert (report.rows, report.lost, report.lost_artifacts, report.warnings) == (3, 0, 0, [])
    log = Log(report.path)
    assert [row["rollouts._type"] for row in log.rows] == ["table-file"] * 3
    assert len(log.of("artifact")) >= 3


def test_the_journal_forgets_what_is_on_disk_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(_Journal, "SECONDS", 0.01)
    journal = _Journal(tmp_path / "journal")
    assert journal.read() == ([], [])
    journal.snapshot(0)
    for i in range(200):
        journal.append((i,), i)  # `i` is the state before call i
        time.sleep(0.001)
    (oldest, *later), calls = journal.read()
    assert 0 < oldest < 199
    assert len(later) == 1
    assert calls == [(i,) for i in range(oldest, 200)]
    journal.snapshot(200)  # as after a restart: what was replayed may not be on disk yet
    assert journal.read() == ([oldest, *later, 200], calls)
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_code_names_nothing_of_the_machine_it_was_written_on():
    for path in Path(common.__file__).parent.glob("*.py"):
        assert not re.search(r"/(work|root|home)/", path.read_text()), path
