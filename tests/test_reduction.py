"""All reports of a step become one row: what is averaged, weighted, summed, pooled, merged or passed through."""

import itertools
import math

import common
from backbone.reduction import Reduction, reduce_reports
from common import InferencePipelineActor, TrainingPipelineActor

import numpy as np
import pytest
import wandb


@pytest.fixture
def warned():
    return []


def reduced(warned: list, *reports: dict, **reduction) -> dict:
    return reduce_reports(reports, Reduction(**reduction), lambda *warning: warned.append(warning))


# Scalars


def test_scalars_are_averaged_rates_summed_and_named_ones_passed_through(warned):
    reports = {"loss": 1.0, "speed": 10.0, "n": 2, "lr": 0.1}, {"loss": 2.0, "speed": 5.0, "n": 3, "lr": 0.1}
    row = reduced(warned, *reports, sums=("speed", "n"), largest=("lr",))
    assert row == {"loss": 1.5, "speed": 15.0, "n": 5, "lr": 0.1}
    assert isinstance(row["n"], int)
    assert warned == []


def test_numbers_of_numpy_are_numbers(warned):
    reports = [{"loss": np.float64(loss), "tokens": np.int64(n), "n": np.float32(n)} for loss, n in [(1, 10), (0, 990)]]
    row = reduced(warned, *reports, weights={"loss": "tokens"}, sums=("tokens", "n"))
    assert row == {"loss": pytest.approx(0.01), "tokens": 1000, "n": 1000}
    assert {type(value) for value in row.values()} == {float, int}
    assert warned == []


def test_workers_that_lack_a_key_do_not_count_for_it(warned):
    assert reduced(warned, {"a": 1.0}, {"a": 3.0, "b": 5.0}) == {"a": 2.0, "b": 5.0}


def test_a_mean_is_weighted_by_what_its_own_report_says(warned):
    """Two ranks with (loss 1, 10 tokens) and (loss 0, 990 tokens): the mean of their means would be 0.5."""
    reports = {"loss": 1.0, "tokens": 10}, {"loss": 0.0, "tokens": 990}
    row = reduced(warned, *reports, weights={"loss": "tokens"}, sums=("tokens",))
    assert row == {"loss": pytest.approx(0.01), "tokens": 1000}
    assert warned == []


def test_micro_batches_of_one_worker_are_weighted_like_workers(warned):
    reports = [{"loss": float(value), "tokens": tokens} for value, tokens in [(4, 1), (2, 2), (1, 5)]]
    assert reduced(warned, *reports, weights={"loss": "tokens"})["loss"] == pytest.approx(13 / 8)


def test_reducing_on_each_node_first_changes_nothing_where_the_weights_travel(warned):
    rule = dict(weights={"loss": "tokens"}, sums=("tokens",))
    ranks = [{"loss": float(rank), "tokens": 10**rank} for rank in range(4)]
    nodes = reduced(warned, *ranks[:3], **rule), reduced(warned, *ranks[3:], **rule)
    assert reduced(warned, *nodes, **rule) == pytest.approx(reduced(warned, *ranks, **rule))


@pytest.mark.parametrize("nothing", [math.nan, math.inf, 3.0])
def test_a_report_whose_weight_is_0_does_not_count_whatever_it_says(warned, nothing):
    """A rank of which all labels are masked has NaN for its loss, and no tokens."""
    reports = {"loss": 1.0, "tokens": 10}, {"loss": nothing, "tokens": 0}, {"loss": 4.0, "tokens": 20}
    assert reduced(warned, *reports, weights={"loss": "tokens"})["loss"] == 3.0
    assert warned == []


@pytest.mark.parametrize("losses", [(math.nan, math.nan), (1.0, 0.0)], ids=str)
def test_where_all_weights_are_0_there_is_no_mean_and_a_warning_says_so(warned, losses):
    reports = [{"loss": loss, "tokens": 0} for loss in losses]
    assert math.isnan(reduced(warned, *reports, weights={"loss": "tokens"})["loss"])
    message = "the weights 'tokens' of 'loss' add up to 0: such a row has NaN"
    assert warned == [("weights of loss", message)]


@pytest.mark.parametrize("weights", [(10, None), (10, "many")])
def test_without_usable_weights_the_mean_is_plain_and_a_warning_says_so(warned, weights):
    reports = [{"loss": loss, "tokens": weight} for loss, weight in zip((1.0, 0.0), weights, strict=True)]
    reports = [{key: value for key, value in report.items() if value is not None} for report in reports]
    assert reduced(warned, *reports, weights={"loss": "tokens"})["loss"] == 0.5
    message = "'loss' has the plain mean where its weight 'tokens' is no number"
    assert ("no weight loss", message) in warned


def test_a_weight_that_fits_the_pattern_itself_has_the_plain_mean(warned):
    reports = [{"actor/loss": 1.0, "actor/tokens": 1}, {"actor/loss": 0.0, "actor/tokens": 3}]
    row = reduced(warned, *reports, weights={"actor/*": "actor/tokens"})
    assert (row, warned) == ({"actor/loss": 0.25, "actor/tokens": 2}, [])


def test_a_report_that_has_the_weight_alone_does_not_count(warned):
    reports = {"loss": 1.0, "tokens": 10}, {"tokens": 990}
    assert reduced(warned, *reports, weights={"loss": "tokens"})["loss"] == 1.0
    assert warned == []


def test_nan_stays_visible_and_largest_does_not_depend_on_order(warned):
    rule = dict(sums=("sum",), largest=("largest",), weights={"weighted": "n"})
    keys = ("mean", "sum", "largest", "weighted")
    reports = [dict.fromkeys(keys, value) | {"n": 1} for value in (1.0, math.nan, 2.0)]
    for order in itertools.permutations(reports):
        row = reduced(warned, *order, **rule)
        assert all(math.isnan(row[key]) for key in keys)


def test_infinities_are_kept_and_opposite_ones_are_no_number(warned):
    assert reduced(warned, {"a": math.inf}, {"a": 1.0}) == {"a": math.inf}
    assert math.isnan(reduced(warned, {"a": math.inf}, {"a": -math.inf})["a"])


# Samples


def test_samples_are_pooled_before_any_statistic(warned):
    few, many = np.array([100.0]), np.arange(99.0)
    pooled = np.concatenate([few, many])
    row = reduced(warned, {"latency": few}, {"latency": many}, statistics={"latency": ("mean", "std", "p99", "max")})
    assert row == {
        "latency/mean": pytest.approx(pooled.mean()),
        "latency/std": pytest.approx(pooled.std()),
        "latency/p99": pytest.approx(np.percentile(pooled, 99)),
        "latency/max": 100,
    }
    assert row["latency/mean"] != pytest.approx((few.mean() + many.mean()) / 2)


def test_samples_of_any_shape_and_single_numbers_are_pooled_together(warned):
    row = reduced(warned, {"a": 1}, {"a": np.array([[3.0], [5.0]])}, {"a": np.array([])})
    assert row == {"a/mean": 3, "a/min": 1, "a/max": 5}
    assert reduced(warned, {"a": np.array([])}) == {}


def test_samples_of_a_narrow_type_are_pooled_as_doubles(warned):
    row = reduced(warned, {"a": np.array([-100, 100], np.int8)}, statistics={"a": ("p50", "p99", "max")})
    assert row == {"a/p50": 0, "a/p99": 98, "a/max": 100}


def test_outcomes_are_pooled_to_one_fraction(warned):
    outcomes = {"success": np.array([True])}, {"success": np.zeros(3, bool)}
    assert reduced(warned, *outcomes) == {"success": 0.25}
    assert reduced(warned, *outcomes, {"success": np.array([])}) == {"success": 0.25}


def test_nan_among_samples_makes_their_statistics_nan(warned):
    row = reduced(warned, {"a": np.array([1.0, math.nan])}, statistics={"a": ("mean", "max", "p50")})
    assert all(map(math.isnan, row.values()))


def test_a_histogram_is_one_of_all_samples(warned):
    samples = {"a": np.arange(10.0)}, {"a": np.array([math.nan, math.inf, 90.0])}  # a histogram has no room for these
    row = reduced(warned, *samples, statistics={"a": ("mean", "histogram")})
    expected = np.histogram([*range(10), 90], bins=len(row["a/histogram"].histogram))
    assert (row["a/histogram"].histogram, row["a/histogram"].bins) == tuple(map(list, expected))
    assert (
        sum(reduced(warned, {"a": np.array([math.nan])}, statistics={"a": ["histogram"]})["a/histogram"].histogram) == 0
    )


@pytest.mark.parametrize("samples", [[0.3, 0.1 + 0.2], [1e16, 1e16 + 2], [-1e308, 1e308], [1e308] * 3], ids=str)
def test_where_samples_leave_no_room_for_its_bins_a_histogram_has_one(warned, samples):
    """numpy refuses 64 bins where samples differ in the last bit, as rewards do, and where they span too much."""
    reports = [{"a": np.array([sample])} for sample in samples]
    row = reduced(warned, *reports, statistics={"a": ("mean", "p90", "histogram")})
    assert row["a/mean"] == pytest.approx(math.fsum(sample / len(samples) for sample in samples))
    assert min(samples) <= row["a/p90"] <= max(samples)
    assert (row["a/histogram"].histogram, row["a/histogram"].bins) == ([len(samples)], [min(samples), max(samples)])
    assert warned == []


def test_statistics_of_the_largest_numbers_are_right(warned):
    """Their sum and their difference are more than a double holds."""
    row = reduced(warned, {"a": np.array([-1.5e308, 1.5e308])}, statistics={"a": ("mean", "std", "p75", "min")})
    assert row == {"a/mean": 0, "a/std": pytest.approx(1.5e308), "a/p75": pytest.approx(0.75e308), "a/min": -1.5e308}
    row = reduced(warned, {"a": np.array([1e308, math.inf])}, statistics={"a": ("mean",)})
    assert row == {"a/mean": math.inf}


def test_a_statistic_that_fails_takes_out_itself_alone_and_is_counted(warned, monkeypatch):
    def fails(*_):
        raise MemoryError("no room\nand more")

    monkeypatch.setattr(np, "percentile", fails)
    row = reduced(warned, {"a": np.arange(3.0)}, statistics={"a": ("mean", "p50", "max", "p90")})
    assert row == {"a/mean": 1, "a/max": 2}
    assert warned == [(f"refused a/{name}", f"'a/{name}' can't be computed: no room") for name in ("p50", "p90")]


# What is declared


def test_keys_may_be_patterns_and_the_first_that_fits_counts():
    rule = Reduction(
        sums=("requests/*",),
        totals=("*/tokens",),
        largest=("*_version", "requests/queue"),
        weights={"*/loss": "tokens", "aux/*": "samples"},
        statistics={"reward": ("p50",), "reward/*": ("mean",), "*": ("max",)},
    ).rule
    assert rule("requests/running").how == rule("requests/queue").how == "sum"
    assert rule("policy_version").how == "largest"
    assert rule("loss").how == "mean"
    assert [rule(key).total for key in ("train/tokens", "tokens")] == [True, False]
    assert [rule(key).weight for key in ("aux/loss", "aux/kl", "loss")] == ["tokens", "samples", None]
    assert [rule(key).statistics for key in ("reward", "reward/gsm8k", "length")] == [("p50",), ("mean",), ("max",)]
    assert Reduction().rule("length").statistics == ("mean", "min", "max")


def test_a_key_with_brackets_is_found_by_its_name():
    assert Reduction(sums=("a[1]",)).rule("a[1]").how == "sum"


@pytest.mark.parametrize("name", ["p999", "p", "median", ""])
def test_a_statistic_that_is_none_is_refused_where_it_is_named(name):
    with pytest.raises(ValueError, match=f"statistic '{name}'"):
        Reduction(statistics={"latency": ("mean", name)})


@pytest.mark.parametrize(
    "rules", [*({it: "p99"} for it in ("sums", "totals", "largest")), dict(statistics={"a": "p99"})]
)
def test_a_forgotten_comma_is_refused(rules):
    with pytest.raises(TypeError, match=r"'p99' must be a sequence of strings: \('p99',\)"):
        Reduction(**rules)


@pytest.mark.parametrize(
    "rules",
    [dict(sums=(1,)), dict(totals=None), dict(weights=("loss", "tokens")), dict(best=["a"]), dict(best={"a/*": "max"})],
    ids=str,
)
def test_what_could_only_fail_later_is_refused(rules):
    with pytest.raises((TypeError, ValueError)):
        Reduction(**rules)


def test_whole_numbers_of_64_bits_stay_exact(warned):
    """Such as the time in nanoseconds, where all workers say the same."""
    number = 2**60 + 1
    assert reduced(warned, {"a": number}, {"a": number}) == {"a": number}
    assert reduced(warned, {"a": 1}, {"a": 2}) == {"a": 1.5}


def test_outcomes_of_one_each_are_numbers_too(warned):
    assert reduced(warned, {"a": True}, {"a": np.bool_(False)}) == {"a": 0.5}


def test_the_largest_of_samples_with_nan_is_nan_though_the_slowest_is_known(warned):
    reports, rules = ({"t": np.array([1, math.nan])}, {"t": np.array([5.0])}), Reduction(worst=("t",))
    row = reduce_reports(reports, rules, lambda *said: warned.append(said), ("a", "b"))
    assert math.isnan(row["t/max"])
    assert row["t/worst"] == "b"


@pytest.mark.parametrize("rules", [dict(sums=("n",)), dict(totals=("n",)), dict(weights={"n": "m"})], ids=str)
def test_a_rule_for_numbers_that_meets_samples_is_told(warned, rules):
    assert reduced(warned, {"n": 4, "m": 1}, {"n": np.array([3, 5]), "m": 1}, **rules)["n/mean"] == 4
    what = "'n' has samples, so the row has statistics of them, and no sum or weighted mean"
    assert warned == [("samples n", what)]


def test_the_pipelines_of_the_demos_weigh_and_pool_what_their_metrics_need():
    training, inference = TrainingPipelineActor.reduction, InferencePipelineActor.reduction
    per_token = ("loss", "kl", "entropy", "clip_fraction", "mismatch_kl")
    assert {training.rule(key).weight for key in per_token} == {"tokens"}
    assert training.rule("tokens").total
    assert training.rule("e2e/speed").how == inference.rule("e2e/speed").how == inference.rule("rollouts").how == "sum"
    assert inference.rule("reward/gsm8k").statistics == ("mean",)
    assert inference.rule("e2e/latency_ms").statistics == ("mean", "p50", "p99")


# What is neither a number nor a sample


def test_one_string_is_kept_and_a_difference_is_told(warned):
    assert reduced(warned, {"a": "x"}, {"b": 1}, {"a": "x"}) == {"a": "x", "b": 1}
    assert warned == []
    assert reduced(warned, {"a": "x"}, {"a": "y"}) == {"a": "x"}
    assert warned == [("differs a", "'a' differs between workers: one of them is kept")]


@pytest.mark.parametrize("number", [1, 2.5, np.array([1.0, 2.0])])
def test_a_string_beside_numbers_is_kept_and_told(warned, number):
    assert reduced(warned, {"a": number}, {"a": "x"}) == {"a": "x"}
    assert [kind for kind, _ in warned] == ["differs a"]


@pytest.mark.parametrize("make", [wandb.Html, lambda text: [wandb.Html(text), wandb.Html("same")]])
def test_one_data_type_is_kept_and_a_difference_is_told(warned, make):
    page = make("a")
    assert reduced(warned, {"page": page}, {"page": make("a")}) == {"page": page}
    assert warned == []
    assert reduced(warned, {"page": page}, {"page": make("b")}) == {"page": page}
    assert [kind for kind, _ in warned] == ["differs page"]


def rollouts(*rewards, columns=("worker", "reward"), **options) -> wandb.Table:
    return wandb.Table(columns=list(columns), data=[["w", reward] for reward in rewards], **options)


@pytest.mark.parametrize("mode", ["IMMUTABLE", "MUTABLE", "INCREMENTAL"])
def test_tables_of_the_same_columns_become_one_of_all_rows(warned, mode):
    tables = rollouts(1, 2, log_mode=mode), rollouts(3, log_mode=mode)
    table = reduced(warned, *({"rollouts": table} for table in tables))["rollouts"]
    assert (table.columns, table.data) == (["worker", "reward"], [["w", 1], ["w", 2], ["w", 3]])
    assert table.log_mode == mode
    assert warned == []


def test_tables_whose_columns_have_other_types_become_one_too(warned):
    table = reduced(warned, {"rollouts": rollouts(1)}, {"rollouts": rollouts("none")})["rollouts"]
    assert table.data == [["w", 1], ["w", "none"]]


def test_of_tables_with_other_columns_one_is_kept_and_told(warned):
    first = rollouts(1)
    assert reduced(warned, {"t": first}, {"t": rollouts(2, columns=("worker", "score"))}) == {"t": first}
    assert [kind for kind, _ in warned] == ["differs t"]


@pytest.fixture
def short_tables(monkeypatch):
    """wandb reads this constant, too (test_wandb_internals.py): tables of 200,000 rows take long."""
    monkeypatch.setattr(wandb.Table, "MAX_ARTIFACT_ROWS", 5)


@pytest.mark.parametrize("mode", ["IMMUTABLE", "MUTABLE", "INCREMENTAL"])
@pytest.mark.parametrize("ranks", [[[1, 2, 3]] * 4, [[*range(12)]]], ids=["joined", "of one worker"])
def test_what_a_table_has_beyond_w_b_s_limit_is_counted(warned, short_tables, mode, ranks):
    tables = [rollouts(*rewards, log_mode=mode) for rewards in ranks]
    reduced(warned, *({"rollouts": table} for table in tables))
    assert warned == [("refused rollouts", "'rollouts' has 12 rows, of which W&B takes 5: the others are lost")]
    assert [len(table.data) for table in tables] == [len(rewards) for rewards in ranks]


def test_of_a_chart_s_table_what_is_beyond_the_limit_is_counted(warned, short_tables):
    reduced(warned, {"chart": wandb.plot.bar(rollouts(*range(6)), "worker", "reward")})
    assert warned == [("refused chart", "'chart' has 6 rows, of which W&B takes 5: the others are lost")]


def test_images_beyond_w_b_s_limit_are_counted(warned):
    images = [wandb.Image(np.full((2, 2), i, np.uint8)) for i in range(120)]
    # wandb cuts no others
    reduced(warned, {"frames": images, "pages": [wandb.Html("x")] * 120, "mixed": [wandb.Html("x"), *images]})
    assert warned == [("refused frames", "'frames' has 120 elements, of which W&B takes 108: the others are lost")]


def test_charts_are_compared_by_what_they_show(warned):
    chart, same, other = (wandb.plot.bar(rollouts(reward), "worker", "reward") for reward in (1, 1, 2))
    assert reduced(warned, {"chart": chart}, {"chart": same}) == {"chart": chart}
    assert warned == []
    reduced(warned, {"chart": chart}, {"chart": other})
    assert [kind for kind, _ in warned] == ["differs chart"]


def test_of_a_key_that_is_logged_and_computed_the_computed_value_is_kept_and_told(warned):
    row = reduced(warned, {"reward": np.array([1.0, 3.0]), "reward/mean": 7.0}, statistics={"reward": ("mean",)})
    assert row == {"reward/mean": 2.0}
    message = "'reward/mean' is logged, and computed from samples as well: the computed value is kept"
    assert warned == [("logged and computed", message)]


class Contrary(wandb.Html):
    """A data type of the user's own that can't be compared."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("incomparable\nand more")

    __hash__ = None


def test_values_that_can_t_be_reduced_are_counted_and_harm_no_other(warned):
    row = reduced(warned, {"a": 1.0, "page": Contrary("a")}, {"a": 3.0, "page": Contrary("b")})
    assert row == {"a": 2.0}
    assert warned == [("refused page", "the values of 'page' can't be reduced to one: incomparable")]


def test_the_public_function_takes_reports_as_log_does():
    reports = [{"a": [1, 2, 3], "time": {"step_s": np.float32(2.0)}, "b": None}, {"a": [4], "time": {"step_s": 1}}]
    row = common.reduce_reports(reports, Reduction(worst=("time/step_s",)), who=("x", "y"))
    slowest = {"time/step_s": 1.5, "time/step_s/max": 2.0, "time/step_s/worst": "x"}
    assert row == {"a/mean": 2.5, "a/min": 1.0, "a/max": 4.0} | slowest
    with pytest.raises(ValueError, match="metric key '_x'"):
        common.reduce_reports([{"_x": 1}], Reduction())
    assert common.reduce_reports([{"step": 7, "a": 1}, {"step": 8, "a": 3}], Reduction()) == {"a": 2}
