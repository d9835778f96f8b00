"""The made-up metrics look like those of a real run: bounds, trends and relations between curves (docs in `common`)."""

import pickle
from collections.abc import Callable

from backbone.reduction import Reduction, reduce_reports
from common import (
    CHECKPOINT_EVERY,
    SYNC_EVERY,
    InferencePipelineActor,
    TrainingPipelineActor,
    generate_evaluation_metrics,
    generate_inference_metrics,
    generate_training_metrics,
)

import numpy as np
import pytest

GENERATORS = [generate_training_metrics, generate_inference_metrics, generate_evaluation_metrics]


def curves(generate: Callable, reduction: Reduction, steps: range, workers: int = 4) -> dict[str, np.ndarray]:
    """What a pipeline of so many workers logs, by key."""
    rngs = [np.random.default_rng([7, worker]) for worker in range(workers)]
    rows = [reduce_reports([generate(step, rng) for rng in rngs], reduction) for step in steps]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture(scope="module")
def training() -> dict[str, np.ndarray]:
    return curves(generate_training_metrics, TrainingPipelineActor.reduction, range(500))


@pytest.fixture(scope="module")
def inference() -> dict[str, np.ndarray]:
    return curves(generate_inference_metrics, InferencePipelineActor.reduction, range(300))


@pytest.fixture(scope="module")
def evaluation() -> dict[str, np.ndarray]:
    return curves(generate_evaluation_metrics, Reduction(), range(0, 300, CHECKPOINT_EVERY), workers=1)


@pytest.mark.parametrize("generate", GENERATORS)
def test_metrics_depend_on_the_generator_and_the_step_alone(generate):
    first, again = ([generate(step, np.random.default_rng(step)) for step in range(50)] for _ in range(2))
    assert pickle.dumps(first) == pickle.dumps(again)
    assert pickle.dumps(first) != pickle.dumps([generate(step, np.random.default_rng(99)) for step in range(50)])


# Training


def within(values: np.ndarray, low: float, high: float) -> bool:
    return bool(((values >= low) & (values <= high)).all())


def test_the_policy_loss_is_noise_around_zero_and_the_value_loss_decays(training):
    assert abs(training["loss"].mean()) < 0.02
    assert within(training["loss"], -0.1, 0.1)
    assert training["loss"].std() > 0.005
    assert training["value_loss"][:10].mean() > 3 * training["value_loss"][-10:].mean()
    assert training["explained_variance"][0] < 0.1
    assert 0.6 < training["explained_variance"][-50:].mean() < 0.8


def test_gradient_norms_add_up_and_their_spikes_show_in_kl():
    steps = [generate_training_metrics(step, np.random.default_rng(step)) for step in range(200)]
    norms = {key: np.array([step[key] for step in steps]) for key in steps[0] if key.startswith("grads/")}
    first, second, total = (norms[f"grads/grad_norm_{name}"] for name in (0, 1, "total"))
    assert np.allclose(total**2, first**2 + second**2)
    spikes = total > 2.5 * np.median(total)
    assert 2 <= spikes.sum() <= 8
    assert within(total[~spikes], 0.1, 1.3)
    kl = np.array([step["kl"] for step in steps])
    calm = [kl[step - 5 : step].mean() for step in np.flatnonzero(spikes)]  # just before
    assert (kl[spikes] > 1.2 * np.array(calm)).all()


def test_the_policy_moves_away_from_its_reference_and_loses_entropy(training):
    assert training["entropy"][:3].mean() > 0.45
    assert 0.1 < training["entropy"][-50:].mean() < 0.2
    assert training["kl"][0] < 0.02
    assert 0.02 < training["kl"][-50:].mean() < 0.1
    assert training["mismatch_kl"].max() < 1e-2


def test_the_learning_rate_warms_up(training):
    assert within(np.diff(training["learning_rate"][:8]), 1e-9, 1e-6)
    assert training["learning_rate"][7:] == pytest.approx(1e-6)


def test_clipping_rises_with_the_staleness_of_the_rollouts(training):
    assert within(training["clip_fraction"], 0.001, 0.05)
    by_age = [training["clip_fraction"][age::SYNC_EVERY].mean() for age in range(SYNC_EVERY)]
    assert by_age == sorted(by_age)


def test_a_checkpoint_shows_in_speed_latency_and_utilization(training):
    at = np.arange(500) % CHECKPOINT_EVERY == 0
    for key, direction in {"e2e/speed": -1, "perf/mfu": -1, "e2e/latency_ms/mean": 1}.items():
        assert (direction * (training[key][at] / training[key][~at].mean() - 1)).min() > 0.1, key
        assert training[key][~at].std() < 0.12 * training[key][~at].mean(), key
    assert within(training["tokens"] / training["tokens"].mean(), 0.9, 1.1)
    assert within(training["perf/mfu"], 0.2, 0.45)
    step_s = 8 * training["e2e/latency_ms/mean"] / 1000 + training["time/wait_for_batch_s"]
    assert within((training["time/wait_for_batch_s"] / step_s)[~at], 0.05, 0.4)


# Inference


def test_the_reward_is_learned_and_success_follows_it(inference):
    assert 0.1 < inference["reward/mean"][:3].mean() < 0.35
    assert 0.65 < inference["reward/mean"][-50:].mean() < 0.85
    assert within(inference["reward/min"], 0, 1)
    assert within(inference["reward/max"], 0, 1)
    assert np.corrcoef(inference["reward/mean"], inference["success_rate"])[0, 1] > 0.9


def test_the_easier_source_is_learned_first(inference):
    gsm8k, code = (inference[f"reward/{source}/mean"] for source in ("gsm8k", "code"))
    assert (gsm8k[5:40].mean(), gsm8k[-50:].mean()) > (code[5:40].mean() + 0.1, code[-50:].mean())
    assert np.allclose((gsm8k + code) / 2, inference["reward/mean"])


def test_groups_without_a_signal_go_from_unsolved_to_solved(inference):
    for key, direction in {"groups/all_solved": 1, "groups/none_solved": -1}.items():
        assert direction * (inference[key][-100:].mean() - inference[key][:10].mean()) > 0.05, key
        assert within(inference[key], 0, 1)


def test_responses_are_truncated_less_and_less(inference):
    assert 0.08 < inference["truncated_fraction"][:10].mean() < 0.25
    assert inference["truncated_fraction"][-50:].mean() < 0.06
    assert inference["response_length/max"].max() <= 1024


def test_a_truncated_response_solves_nothing():
    for step in range(20):
        batch = generate_inference_metrics(step, np.random.default_rng(step))
        assert not (batch["success_rate"] & batch["truncated_fraction"]).any()


def test_latencies_have_a_heavy_tail(inference):
    assert 3 < np.median(inference["e2e/latency_ms/p99"] / inference["e2e/latency_ms/p50"]) < 9


def test_a_weight_sync_shows_in_speed_cache_version_and_staleness(inference):
    syncing = np.arange(300) % SYNC_EVERY == SYNC_EVERY - 1
    assert inference["e2e/speed"][syncing].max() < 0.4 * inference["e2e/speed"][~syncing].min()
    assert within(inference["kv_cache_utilization"], 0.4, 0.95)
    assert (np.diff(inference["kv_cache_utilization"])[~syncing[:-1]] > 0).all()
    assert (np.flatnonzero(np.diff(inference["policy_version"])) % SYNC_EVERY == SYNC_EVERY - 1).all()
    assert (inference["policy_version"] <= np.arange(300)).all()
    assert within(inference["staleness/max"], 0, 2)
    assert inference["staleness/mean"][~syncing].mean() < inference["staleness/mean"][syncing].mean()


def test_waiting_requests_come_in_bursts(inference):
    waiting = inference["requests/waiting"]
    assert waiting.std() > 2 * np.sqrt(waiting.mean()) / 1.5  # a Poisson process has the root of its mean
    assert within(inference["requests/running"], 4 * 24, 4 * 64)


# Evaluation


def test_accuracy_follows_an_s_curve_by_source_and_more_answers_help_less_and_less(evaluation):
    for source in ("gsm8k", "math", "code"):
        one, four = evaluation[f"{source}/accuracy"], evaluation[f"{source}/pass@4"]
        assert one[0] < 0.3
        assert one[-5:].mean() > 0.55
        assert (four >= one).all()
        assert (four - one)[:3].mean() > 2 * (four - one)[-5:].mean()
        assert np.allclose(one * 200, np.round(one * 200))  # so many problems
    final = [evaluation[f"{source}/accuracy"][-5:].mean() for source in ("gsm8k", "math", "code")]
    assert final == sorted(final, reverse=True)
    assert evaluation["checkpoint_step"].tolist() == list(range(0, 300, CHECKPOINT_EVERY))
