"""Paired tests and intervals against sacreBLEU's own, exact enumeration and simulation."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

import encdec_cli.evaluation.significance as ours
from encdec_cli.errors import UsageError
from encdec_cli.evaluation.metrics import score
from encdec_cli.evaluation.overlap import Exact, TokenF1
from encdec_cli.evaluation.rouge import Rouge
from encdec_cli.evaluation.sacre import Bleu, Chrf, Ter
from encdec_cli.evaluation.significance import Resampling, interval, paired_p_values, resampled_scores

PAIRS = [(Bleu(), BLEU()), (Chrf(word_order=2), CHRF(word_order=2)), (Ter(), TER())]
TEST_NAMES = {"randomization": "ar", "bootstrap": "bs"}
TEXT = "the The a cat cats sat on mat, Matte. runs running quickly & 3.5 „ja“ straße (hi) it's"
WORDS = TEXT.split()


def made_up(segments, streams=1, seed=0):
    """Return hypotheses and references, all noisy copies of the same random lines."""
    chance = random.Random(seed)
    lines = [chance.choices(WORDS, k=chance.randint(1, 12)) for _ in range(segments)]

    def noisy():
        return [" ".join(word if chance.random() < 0.7 else chance.choice(WORDS) for word in line) for line in lines]

    references = [[" ".join(line) for line in lines], *(noisy() for _ in range(streams - 1))]
    return noisy(), references


def systems(segments, streams, noise):
    hypotheses, references = made_up(segments, streams, seed=7)
    other, _ = made_up(segments, streams, seed=7)
    worse = [line if i % noise else " ".join(reversed(line.split())) for i, line in enumerate(other)]
    return hypotheses, worse, references


@pytest.mark.parametrize("block", [1 << 22, 4000])  # one draw, and many blocks of it
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("test", ["randomization", "bootstrap"])
@pytest.mark.parametrize(("metric", "theirs"), PAIRS)
@pytest.mark.parametrize("seed", [12345, 77])
def test_p_values_are_sacrebleus(metric, theirs, test, streams, block, seed, monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", str(seed))
    monkeypatch.setattr(ours, "_BLOCK", block)
    system, baseline, references = systems(53, streams, noise=9)
    named = [("baseline", baseline), ("system", system)]
    _, expected = PairedTest(named, {"m": theirs}, references, test_type=TEST_NAMES[test], n_samples=333)()
    resampling = Resampling(resamples=333, trials=333, test=test, seed=seed)
    rows = metric.statistics(system, references), metric.statistics(baseline, references)
    (p_value,) = paired_p_values(metric, *rows, resampling)
    result = expected[metric.names[0]][1]
    assert p_value == result.p_value
    assert score(metric, rows[0])[0] == pytest.approx(result.score, rel=1e-13)
    if test == "bootstrap":
        span = interval(resampled_scores(metric, rows[0], resampling)[:, 0])
        assert (span.high - span.low) / 2 == result.ci


def test_where_nothing_ever_differs_nothing_is_significant():
    rows = Bleu().statistics(["xx yy"] * 5, [["a b c d"] * 5]), Bleu().statistics(["zz"] * 5, [["a b c d"] * 5])
    for test in TEST_NAMES:
        assert paired_p_values(Bleu(), *rows, Resampling(resamples=99, trials=99, test=test)) == (1.0,)


def test_default_sizes_and_seed_are_sacrebleus(monkeypatch):
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    system, baseline, references = systems(20, 1, noise=4)
    named = [("baseline", baseline), ("system", system)]
    rows = Bleu().statistics(system, references), Bleu().statistics(baseline, references)
    for test, short in TEST_NAMES.items():
        _, expected = PairedTest(named, {"m": BLEU()}, references, test_type=short)()
        assert paired_p_values(Bleu(), *rows, Resampling(test=test)) == (expected["BLEU"][1].p_value,)


def test_randomization_of_exact_match_agrees_with_enumeration():
    # 4 wins and 1 loss among 12 segments: of the 32 sign patterns, 2 * (5 + 1) differ by 3 or more
    system = np.array([[1.0, 1.0]] * 4 + [[0.0, 1.0]] * 8)
    baseline = np.array([[0.0, 1.0]] * 4 + [[1.0, 1.0]] + [[0.0, 1.0]] * 7)
    signs = list(itertools.product([1, -1], repeat=5))
    exact = sum(abs(np.dot(pattern, [1, 1, 1, 1, -1])) >= 3 for pattern in signs) / len(signs)
    assert exact == 12 / 32
    (p_value,) = paired_p_values(Exact(), system, baseline, Resampling(trials=20_000))
    assert p_value == pytest.approx(exact, abs=0.015)


@pytest.mark.parametrize("test", ["randomization", "bootstrap"])
def test_tests_reject_equal_systems_as_rarely_as_they_promise(test):
    chance = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):
        rows = [np.stack([chance.random(60), np.ones(60)], axis=1) for _ in range(2)]
        (p_value,) = paired_p_values(TokenF1(), *rows, Resampling(resamples=200, trials=200, test=test))
        rejected += p_value < 0.05
    # 5 % of 300 is 15; 30 lies four standard deviations above, sacreBLEU's bootstrap rule gives about 36.
    assert rejected < 30


@pytest.mark.parametrize("test", ["randomization", "bootstrap"])
def test_a_system_never_differs_from_itself_and_a_clear_winner_does(test):
    right, wrong = np.ones((50, 2)), np.stack([np.zeros(50), np.ones(50)], axis=1)
    resampling = Resampling(test=test, trials=500, resamples=500)
    mixed = np.concatenate([right[:25], wrong[:25]])
    assert paired_p_values(Exact(), mixed, mixed, resampling) == (1.0,)
    better = np.concatenate([right[:25], right[:20], wrong[:5]])
    assert paired_p_values(Exact(), better, mixed, resampling)[0] < 0.01


def test_several_numbers_have_their_own_p_values():
    system, baseline, references = systems(30, 1, noise=2)
    rows = Rouge().statistics(system, references), Rouge().statistics(baseline, references)
    ones, _, longest, _ = paired_p_values(Rouge(), *rows, Resampling(trials=500))
    # reversing words leaves the words and breaks their order
    assert ones > 0.3
    assert longest < 0.05


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    chance = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        rows = np.stack([chance.random(80), np.ones(80)], axis=1)
        span = interval(resampled_scores(TokenF1(), rows, Resampling(resamples=200))[:, 0])
        covered += span.low <= 50 <= span.high
    assert 178 <= covered <= 199  # 95 % of 200 is 190; four standard deviations on the low side


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 2**32))
def test_interval_is_ordered_inside_the_data_and_repeatable(values, seed):
    rows = np.stack([np.array(values), np.ones(len(values))], axis=1)
    samples = resampled_scores(TokenF1(), rows, Resampling(resamples=100, seed=seed))
    span = interval(samples[:, 0])
    slack = 1e-9
    assert 100 * min(values) - slack <= span.low <= span.mean + slack
    assert span.mean - slack <= span.high <= 100 * max(values) + slack
    assert np.array_equal(samples, resampled_scores(TokenF1(), rows, Resampling(resamples=100, seed=seed)))


def test_interval_contains_the_score_of_ordinary_data():
    system, _, references = systems(200, 1, noise=5)
    for metric in (Bleu(), Chrf(), Ter(), Rouge(), TokenF1(), Exact()):
        rows = metric.statistics(system, references)
        for value, samples in zip(score(metric, rows), resampled_scores(metric, rows, Resampling()).T, strict=True):
            span = interval(samples)
            assert span.low < value < span.high


def test_impossible_settings_are_refused():
    with pytest.raises(UsageError, match="resamples"):
        Resampling(test="bootstrap", resamples=0)
    with pytest.raises(UsageError, match="negative"):
        Resampling(seed=-1)


def test_sacrebleus_bootstrap_p_values_hold_where_scores_tie():
    # Few short segments: many resamples score alike, and the last digit decides which side they are counted on.
    for seed in range(12):
        system, references = made_up(6, 3, seed=seed)
        baseline, _ = made_up(6, 1, seed=seed + 100)
        for metric, theirs in PAIRS:
            named = [("baseline", baseline), ("system", system)]
            _, expected = PairedTest(named, {"m": theirs}, references, test_type="bs", n_samples=100)()
            rows = metric.statistics(system, references), metric.statistics(baseline, references)
            (p_value,) = paired_p_values(metric, *rows, Resampling(resamples=100, test="bootstrap"))
            assert p_value == expected[metric.names[0]][1].p_value
