"""Sampling: the numbers, the filters, the distribution, and that a line has its sample wherever it stands."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import A, B, C, Scripted, TinyGru, run

from encdec_cli.decoding.draw import draw, signed, streams, uniform
from encdec_cli.decoding.sampling import Sampling
from encdec_cli.decoding.scorer import Scores
from encdec_cli.text.vocabulary import EOS, UNK

CPU = torch.device("cpu")
GOLDEN, ALL = 0x9E3779B97F4A7C15, (1 << 64) - 1


def splitmix64(state: int) -> int:
    """One output of splitmix64 in unbounded integers."""
    state = (state + GOLDEN) & ALL
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & ALL
    return state ^ (state >> 31)


def test_splitmix64_gives_its_published_numbers():
    # The first outputs for the seed 1234567 of the reference implementation.
    assert splitmix64(1234567) == 6457827717110365317
    assert splitmix64((1234567 + GOLDEN) & ALL) == 3203168211198807973


@pytest.mark.parametrize("seed", [0, 1, -5, 2**64 + 3])
def test_uniform_is_splitmix64_of_seed_key_sample_and_step(seed):
    keys = [0, 1, 2**63 - 1, 0x0123456789ABCDEF]
    numbers = streams(seed, keys, 3, CPU)
    for step in (0, 1, 70):
        found = iter(uniform(numbers, step).tolist())
        for key in keys:
            line = splitmix64((splitmix64(seed & ALL) ^ key) - GOLDEN & ALL)
            for sample in range(3):
                stream = splitmix64((line + sample * GOLDEN) & ALL)
                assert next(found) == (splitmix64((stream + step * GOLDEN) & ALL) >> 11) / 2**53


def test_uniform_numbers_are_spread_evenly_over_keys_samples_and_steps():
    for numbers in (
        uniform(streams(1, range(20_000), 1, CPU), 0),
        uniform(streams(1, [5], 20_000, CPU), 3),
        torch.cat([uniform(streams(1, [5], 1, CPU), step) for step in range(2_000)]),
    ):
        expected = len(numbers) / 20
        counts = torch.histc(numbers.float(), 20, 0, 1)
        # 19 degrees of freedom: 43.8 is passed by one seed in a thousand; this one is fixed.
        assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_signed_wraps():
    assert [signed(n) for n in (0, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1)] == [0, 2**63 - 1, -(2**63), -1, 0, -1]


def test_draw_by_hand():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, numbers).flatten().tolist() == [1, 1, 3, 3, 4, 4]
    assert draw(torch.zeros(1, 4), torch.tensor([0.5])).tolist() == [[0]]


FIRST = {A: 0.5, B: 0.25, C: 0.125, EOS: 0.125}
ONE_TOKEN = {(): FIRST}


def firsts(strategy: Sampling, count: int = 4000, table=None, **options) -> Counter[int]:
    """Count first tokens (EOS for an empty output) over many lines with the same table."""
    model = Scripted(table or ONE_TOKEN)
    lines = [[4, 7 + number, EOS] for number in range(count)]
    found = run(strategy, model, lines=lines, maximum=1, **options)
    return Counter((one.tokens or [EOS])[0] for sentence in found for one in sentence)


def chi_square(counts: Counter[int], chances: dict[int, float]) -> float:
    total = sum(counts.values())
    assert set(counts) <= set(chances)
    return sum((counts[token] - total * p) ** 2 / (total * p) for token, p in chances.items())


# The bounds are passed by one seed in a thousand (3, 2, 1 degrees of freedom); the seeds are fixed.
@pytest.mark.parametrize(
    ("options", "chances", "bound"),
    [
        ({}, FIRST, 16.27),
        ({"seed": 7}, FIRST, 16.27),
        ({"temperature": 0.5}, {A: 16 / 22, B: 4 / 22, C: 1 / 22, EOS: 1 / 22}, 16.27),
        ({"temperature": 2.0}, {t: math.sqrt(p) / 1.9142 for t, p in FIRST.items()}, 16.27),
        ({"top_k": 2}, {A: 2 / 3, B: 1 / 3}, 10.83),
        ({"top_p": 0.8}, {A: 4 / 7, B: 2 / 7, EOS: 1 / 7}, 13.82),  # EOS before C: equal, the lower token
        ({"top_k": 3, "top_p": 0.7}, {A: 2 / 3, B: 1 / 3}, 10.83),  # of .5 .25 .125, that is .571 .286 .143
        ({"top_p": 0.6, "temperature": 0.5}, {A: 1.0}, 0.1),
        ({"min_p": 0.5}, {A: 2 / 3, B: 1 / 3}, 10.83),
        ({"epsilon": 0.2}, {A: 2 / 3, B: 1 / 3}, 10.83),
        ({"typical": 0.4}, {A: 2 / 3, B: 1 / 3}, 10.83),
        ({"typical": 0.8}, {A: 4 / 7, B: 2 / 7, EOS: 1 / 7}, 13.82),
    ],
)
def test_samples_follow_the_filtered_distribution(options, chances, bound):
    assert chi_square(firsts(Sampling(**options)), chances) < bound


def test_many_samples_of_one_line_follow_the_distribution_too():
    assert chi_square(firsts(Sampling(beam=4000), count=1), FIRST) < 16.27


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.4, {A}),
        (0.5, {A}),  # exactly reached: the next is not needed
        (0.51, {A, B}),
        (0.75, {A, B}),
        (0.76, {A, B, EOS}),
        (0.875, {A, B, EOS}),
        (0.88, {A, B, C, EOS}),
        (1e-9, {A}),
    ],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_its_mass(top_p, kept):
    assert set(firsts(Sampling(top_p=top_p), count=500)) == kept


@pytest.mark.parametrize(
    ("min_p", "kept"),
    [
        (0.2, {A, B, C, EOS}),
        (0.25, {A, B, C, EOS}),  # .125 is exactly a quarter of .5
        (0.26, {A, B}),
        (0.5, {A, B}),
        (0.51, {A}),
        (1.0, {A}),
    ],
)
def test_min_p_keeps_what_has_its_share_of_the_best(min_p, kept):
    assert set(firsts(Sampling(min_p=min_p), count=500)) == kept


@pytest.mark.parametrize(
    ("epsilon", "kept"),
    [(0.1, {A, B, C, EOS}), (0.125, {A, B, C, EOS}), (0.126, {A, B}), (0.25, {A, B}), (0.26, {A}), (0.6, {A})],
)
def test_epsilon_keeps_what_has_its_probability_and_the_best(epsilon, kept):
    assert set(firsts(Sampling(epsilon=epsilon), count=500)) == kept


@pytest.mark.parametrize(
    ("typical", "kept"),
    [
        # The entropy is 1.75 bits. Surprises: B 2 bits (.25 away), A 1 (.75 away), EOS and C 3 (1.25 away).
        (1e-9, {B}),
        (0.25, {B}),  # exactly reached
        (0.26, {A, B}),
        (0.75, {A, B}),
        (0.76, {A, B, EOS}),  # EOS before C: equal, the lower token
        (0.88, {A, B, C, EOS}),
    ],
)
def test_typical_keeps_the_surprises_nearest_to_the_entropy(typical, kept):
    assert set(firsts(Sampling(typical=typical), count=500)) == kept


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        # Temperature first: squared, the chances are 16, 4, 1, 1 of 22.
        ({"temperature": 0.5, "min_p": 0.25}, {A, B}),
        ({"temperature": 0.5, "min_p": 0.26}, {A}),
        ({"temperature": 0.5, "epsilon": 4 / 22}, {A, B}),
        ({"temperature": 0.5, "epsilon": 0.19}, {A}),
        # Of the best two, A has 2/3 and B 1/3: epsilon and typical see these.
        ({"top_k": 2, "epsilon": 1 / 3}, {A, B}),
        ({"top_k": 2, "epsilon": 0.34}, {A}),
        # Their entropy is .918 bits; the surprise of A is .585 (.333 away), of B 1.585 (.667 away).
        ({"top_k": 2, "typical": 0.66}, {A}),
        ({"top_k": 2, "typical": 0.67}, {A, B}),
        ({"top_p": 0.75, "typical": 0.66}, {A}),
        ({"min_p": 0.5, "typical": 0.66}, {A}),
        # Typical leaves B alone, which then has all the mass: epsilon comes last.
        ({"typical": 0.2, "epsilon": 0.9}, {B}),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.3, "typical": 0.99, "epsilon": 0.34}, {A}),
    ],
)
def test_each_filter_sees_what_those_before_it_have_left(options, kept):
    assert set(firsts(Sampling(**options), count=300)) == kept


def slow_filters(chances: list[float], options: dict[str, float]) -> set[int]:
    """The tokens that are left, in plain Python from the words of `Sampling`."""

    def renormalised(left):
        total = sum(left.values())
        return {token: p / total for token, p in left.items()}

    def fewest(order, share):
        kept, mass = [], 0.0
        for token in order:
            if kept and mass >= share - 1e-6:
                break
            kept.append(token)
            mass += left[token]
        return renormalised({token: left[token] for token in kept})

    left = {token: p ** (1 / options.get("temperature", 1.0)) for token, p in enumerate(chances) if p > 0}
    left = renormalised(left)
    best = sorted(left, key=lambda token: (-left[token], token))
    if "top_k" in options:
        left = renormalised({token: left[token] for token in best[: options["top_k"]]})
    if "top_p" in options:
        left = fewest([token for token in best if token in left], options["top_p"])
    if "min_p" in options:
        highest = max(left.values())
        left = renormalised({t: p for t, p in left.items() if p >= options["min_p"] * highest * (1 - 1e-6)})
    if "typical" in options:
        entropy = -sum(p * math.log(p) for p in left.values())
        left = fewest(
            sorted(left, key=lambda token: (abs(-math.log(left[token]) - entropy), token)), options["typical"]
        )
    if "epsilon" in options:
        highest = max(left.values())
        left = {t: p for t, p in left.items() if p >= options["epsilon"] * (1 - 1e-6) or p == highest}
    return set(left)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 1.0, 2.0]),
        "top_k": st.integers(1, 40),
        "top_p": st.floats(0.05, 0.999),
        "min_p": st.floats(0.001, 1.0),
        "typical": st.floats(0.05, 0.999),
        "epsilon": st.floats(0.001, 0.9),
    },
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), OPTIONS)
def test_filters_leave_what_plain_python_leaves(seed, options):
    random = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(1, 30, generator=random, dtype=torch.float64).mul(2).log_softmax(-1).float()
    log_probs[0, 7] = -torch.inf
    # Of 3,000 numbers spread evenly over [0, 1), each token that is left and has some mass gets one.
    numbers = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    scores = Scores(log_probs.expand(3000, -1).clone(), normalised=True)
    drawn = set(Sampling(**options)._choose(scores, numbers).tolist())
    left = slow_filters(log_probs[0].exp().tolist(), options)
    assert drawn <= left
    shares = log_probs[0].div(options.get("temperature", 1.0)).exp()
    mass = float(shares[list(left)].sum())
    assert {token for token in left if shares[token] > mass / 2000} <= drawn


@pytest.mark.parametrize("options", [{"typical": 0.9}, {"typical": 0.9, "top_p": 0.95}])
def test_typical_sets_wider_than_the_first_look(monkeypatch, options):
    model, lines = TinyGru(), [[i, EOS] for i in range(5, 45)]
    wide = run(Sampling(**options), model, lines=lines, maximum=6)
    monkeypatch.setattr("encdec_cli.decoding.filters.FIRST_LOOK", 2)
    assert run(Sampling(**options), model, lines=lines, maximum=6) == wide


def test_a_nucleus_wider_than_the_first_look(monkeypatch):
    model, lines = TinyGru(), [[i, EOS] for i in range(5, 45)]
    wide = run(Sampling(top_p=0.9), model, lines=lines, maximum=6)
    monkeypatch.setattr("encdec_cli.decoding.filters.FIRST_LOOK", 2)
    assert run(Sampling(top_p=0.9), model, lines=lines, maximum=6) == wide


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}, {"min_p": 0.05}, {"typical": 0.7}]
)
def test_a_line_has_its_samples_wherever_it_stands(options):
    model, strategy = TinyGru(), Sampling(beam=2, **options)
    lines = [[5 + i, *([9] * (i % 4)), EOS] for i in range(30)]
    together = run(strategy, model, lines=lines, maximum=[3 + i % 8 for i in range(30)])
    for place in (0, 7, 29):
        alone = run(strategy, model, lines=[lines[place]], maximum=[3 + place % 8])[0]
        assert [one.tokens for one in alone] == [one.tokens for one in together[place]]
    backwards = run(strategy, model, lines=lines[::-1], maximum=[3 + i % 8 for i in range(30)][::-1])[::-1]
    assert [[one.tokens for one in found] for found in backwards] == [[o.tokens for o in found] for found in together]
    twice = run(strategy, model, lines=[lines[3], lines[4], lines[3]])
    assert [one.tokens for one in twice[0]] == [one.tokens for one in twice[2]]
    other = run(Sampling(beam=2, seed=2, **options), model, lines=lines, maximum=8)
    assert [found[0].tokens for found in other] != [found[0].tokens for found in together]


def test_the_score_is_the_log_probability_of_the_model_itself():
    table = {(): FIRST, (A,): {B: 0.5, EOS: 0.5}, (A, B): {EOS: 1.0}}
    chances = {(): 0.125, (A,): 0.25, (A, B): 0.25, (B,): 0.25, (C,): 0.125}
    for options in ({}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.9, "temperature": 2.0}):
        for number in range(20):
            one = run(Sampling(seed=number, **options), Scripted(table))[0][0]
            assert one.finished
            assert one.score == pytest.approx(math.log(chances[tuple(one.tokens)]))
            assert sum(one.token_scores) == pytest.approx(one.score)
            assert len(one.token_scores) == len(one.tokens) + 1


def test_samples_come_best_first_and_a_cut_one_says_so():
    endless = {tuple([A] * n): {A: 0.7, EOS: 0.3} for n in range(9)}
    found = run(Sampling(beam=20), Scripted(endless), maximum=3)[0]
    assert len(found) == 20
    assert {(len(one.tokens), one.finished) for one in found} == {
        *((n, True) for n in range(4)),
        (3, False),
    }
    finished = [one for one in found if one.finished]
    assert found[: len(finished)] == finished
    assert [one.score for one in finished] == sorted((one.score for one in finished), reverse=True)


def test_minimum_and_banned_tokens_hold_for_samples():
    table = {(): {UNK: 0.5, EOS: 0.3, A: 0.1, B: 0.1}}
    assert set(firsts(Sampling(), count=200, table=table)) == {EOS, A, B}
    assert set(firsts(Sampling(), count=200, table=table, minimum=1)) == {A, B}


def no_token_twice(scores, prefix, sentences):
    return scores.scatter(1, prefix, -torch.inf)


def test_rules_hold_for_samples_and_scores_stay_the_model_s():
    table = {tuple([A] * n): {A: 0.75, B: 0.125, EOS: 0.125} for n in range(9)}
    for options in ({}, {"top_p": 0.95}, {"top_k": 3}):
        for number in range(20):
            one = run(Sampling(seed=number, **options), Scripted(table), rules=[no_token_twice])[0][0]
            assert one.tokens in ([], [A], [B], [A, B])
            last = 0.0 if one.tokens[-1:] == [B] else math.log(0.125)
            assert one.token_scores[-1] == pytest.approx(last)

    def stop(scores, prefix, sentences):
        return torch.full_like(scores, -torch.inf)

    for options in ({}, {"temperature": 0}, {"top_p": 0.5}, {"min_p": 0.1}, {"typical": 0.5}, {"epsilon": 0.1}):
        nothing = run(Sampling(**options), Scripted(table), rules=[stop])[0]
        assert [(one.tokens, one.finished) for one in nothing] == [([], False)]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"beam": 0}, {"temperature": -1}, {"temperature": 1e300}, {"temperature": 1e-46}, {"top_k": -1}),
        *({"top_p": 0.0}, {"top_p": 1.5}),
        *({"min_p": -0.1}, {"min_p": 1.1}, {"typical": 0.0}, {"typical": 1.1}, {"epsilon": 1.0}, {"epsilon": -0.1}),
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
