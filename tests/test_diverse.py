"""Diverse beams and siblings: worked cases, a slow search in plain Python, and what equals plain beam search."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import A, B, C, Scripted, TinyGru, run, tiny_transformer
from slow_search import SlowSearch, random_table

from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.diverse import Diverse
from encdec_cli.decoding.siblings import Siblings
from encdec_cli.text.vocabulary import EOS

FIRST = {(): {A: 0.5, B: 0.3, C: 0.2}}
"""One token, then EOS for sure."""
BY_LOG_PROBABILITY = {"length_penalty": 0.0}


def outputs(found):
    return [(one.tokens, one.finished) for one in found]


def chances(found):
    return [math.exp(one.score) for one in found]


@pytest.mark.parametrize(
    ("beam", "strength", "tokens"),
    [
        # The second group prefers B once A costs more than log(.5 / .3) = .511.
        (2, 0.50, [[A], [A]]),
        (2, 0.52, [[A], [B]]),
        # The third pays once for A and once for B, or twice for A: log(.5 / .2) = .916.
        (3, 0.50, [[A], [A], [B]]),
        (3, 0.52, [[A], [A], [B]]),
        (3, 0.91, [[A], [A], [B]]),
        (3, 0.92, [[A], [B], [C]]),
    ],
)
def test_how_much_an_earlier_group_s_token_costs(beam, strength, tokens):
    found = run(Diverse(beam=beam, diversity_strength=strength, **BY_LOG_PROBABILITY), Scripted(FIRST))[0]
    assert [one.tokens for one in found] == tokens
    # What was paid is in no score.
    assert chances(found) == pytest.approx([FIRST[()][written[0]] for written in tokens])


def test_a_token_costs_once_for_each_hypothesis_that_took_it():
    # The first group of two goes on with AA and BA; so A costs the second twice, and C of chance .1 is worth it when
    # 2 x strength is above log(.9 / .1) = 2.197.
    after = {(first,): {A: 0.9, C: 0.1} for first in (A, B)}
    table = {(): {A: 0.5, B: 0.5}, **after}
    for strength, second in ((1.0, [[A, A], [B, A]]), (1.2, [[A, C], [B, C]])):
        keys = {"beam": 4, "groups": 2, "diversity_strength": strength, **BY_LOG_PROBABILITY}
        # In the first step both groups go on with A and B: there is nothing else.
        found = run(Diverse(**keys), Scripted(table))[0]
        assert sorted(one.tokens for one in found) == sorted([[A, A], [B, A], *second])


def test_eos_costs_nothing():
    found = run(Diverse(beam=3, diversity_strength=9.0, **BY_LOG_PROBABILITY), Scripted({(): {EOS: 0.6, A: 0.4}}))[0]
    assert outputs(found) == [([], True)] * 3


def test_a_group_that_is_done_costs_nobody_anything():
    # The first group ends with [] at once, going on with A beside it in that step; then A is free for the second.
    table = {(): {EOS: 0.5, B: 0.3, A: 0.2}, (A,): {A: 0.6, B: 0.4}, (B,): {A: 0.6, B: 0.4}}
    found = run(Diverse(beam=2, diversity_strength=5.0, **BY_LOG_PROBABILITY), Scripted(table), minimum=0)[0]
    assert [one.tokens for one in found] == [[], []]
    table[()] = {A: 0.6, B: 0.4}
    table[(A,)] = {EOS: 0.9, C: 0.1}
    table[(B,)] = {C: 0.8, B: 0.2}
    table[(B, C)] = {A: 0.6, B: 0.4}
    found = run(Diverse(beam=2, diversity_strength=9.0, **BY_LOG_PROBABILITY), Scripted(table))[0]
    # Step 2: the first ends with A, and would have gone on with C, which counts in that step: the second takes BB.
    assert [one.tokens for one in found] == [[A], [B, B]]


@pytest.mark.parametrize("rate", [0.1, 0.2])
def test_what_siblings_pay(rate):
    # AA and AB have .25 each, BA .21: the second child of A pays `rate`, and log(.25 / .21) is .174.
    table = {(): {A: 0.5, B: 0.3, C: 0.2}, (A,): {A: 0.5, B: 0.5}, (B,): {A: 0.7, B: 0.3}}
    found = run(Siblings(beam=2, diversity_rate=rate, **BY_LOG_PROBABILITY), Scripted(table))[0]
    assert [one.tokens for one in found] == ([[A, A], [A, B]] if rate < 0.174 else [[A, A], [B, A]])
    assert chances(found) == pytest.approx([0.25, 0.25] if rate < 0.174 else [0.25, 0.21])


def test_siblings_pay_anew_in_each_step():
    """What AB paid in the second step is forgotten in the third: .24 x .9 is above .36 x .5."""
    table = {(): {A: 0.6, B: 0.4}, (A,): {A: 0.6, B: 0.4}, (B,): {C: 0.5, B: 0.5}, (A, B): {A: 0.9, C: 0.1}}
    table[(A, A)] = {B: 0.5, C: 0.5}
    found = run(Siblings(beam=2, diversity_rate=0.1, **BY_LOG_PROBABILITY), Scripted(table))[0]
    assert [one.tokens for one in found] == [[A, B, A], [A, A, B]]


LINES = [[(7 * i * j) % 140 + 5 for j in range(1, 2 + i % 5)] + [EOS] for i in range(17)]
MAXIMUM = [3 + 2 * (i % 6) for i in range(17)]


@pytest.mark.parametrize("build", [TinyGru, tiny_transformer])
@pytest.mark.parametrize("groups", [2, 3])
def test_groups_without_a_price_are_the_same_beam_so_many_times(build, groups):
    model = build()
    one = run(Beam(beam=2), model, maximum=MAXIMUM, lines=LINES)
    several = run(Diverse(beam=2 * groups, groups=groups, diversity_strength=0.0), model, maximum=MAXIMUM, lines=LINES)
    for found, copies in zip(one, several, strict=True):
        assert outputs(copies) == [pair for pair in outputs(found) for _ in range(groups)]
        wanted = [hypothesis.score for hypothesis in found for _ in range(groups)]
        assert [hypothesis.score for hypothesis in copies] == pytest.approx(wanted, abs=1e-5)


SENTENCES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2), st.integers(0, 7)), min_size=1, max_size=8)
STOPS = st.sampled_from(["first", "bound", "never"])


def check_against_plain_python(strategy, sentences, keys):
    tables = [random_table(seed) for seed, _, _ in sentences]
    low, high = [low for _, low, _ in sentences], [high for _, _, high in sentences]
    found = run(strategy, Scripted(*tables), maximum=high, minimum=low)
    for table, minimum, maximum, ours in zip(tables, low, high, found, strict=True):
        wanted = SlowSearch(table, minimum, maximum, **keys)()
        assert outputs(ours) == [(tokens, finished) for tokens, _, finished in wanted]
        assert [one.score for one in ours] == pytest.approx([score for _, score, _ in wanted], abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(SENTENCES, st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0, 20.0]), STOPS)
def test_diverse_beams_are_those_of_plain_python(sentences, width, groups, strength, stop):
    keys = {"beam": width * groups, "groups": groups, "diversity_strength": strength, "stop": stop}
    check_against_plain_python(Diverse(**keys), sentences, keys)


@settings(max_examples=40, deadline=None)
@given(SENTENCES, st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0, 20.0]), STOPS)
def test_diverse_siblings_are_those_of_plain_python(sentences, beam, rate, stop):
    keys = {"beam": beam, "diversity_rate": rate, "stop": stop}
    check_against_plain_python(Siblings(**keys), sentences, keys)


def test_more_strength_gives_more_different_first_tokens():
    model, lines = TinyGru(), [[i, i + 3, EOS] for i in range(5, 25)]
    firsts = [
        sum(
            len({(one.tokens or [EOS])[0] for one in found})
            for found in run(Diverse(beam=4, diversity_strength=strength), model, lines=lines, minimum=1)
        )
        for strength in (0.0, 0.2, 30.0)
    ]
    assert firsts[0] == 20
    assert firsts[0] < firsts[1] < firsts[2] == 80


def test_sentences_leave_only_when_all_their_groups_are_done():
    lengths = [1, 9, 2, 1, 1, 2, 1, 1, 9, 1]
    tables = [
        {tuple([A] * n): ({EOS: 0.9, B: 0.1} if n >= length else {A: 0.9, B: 0.1}) for n in range(12)}
        for length in lengths
    ]
    model, strategy = Scripted(*tables), Diverse(beam=4, groups=2, diversity_strength=0.1)
    together = run(strategy, model, maximum=12)
    sizes = model.states[0].sizes
    assert sizes[0] == 40
    assert sizes[-1] < 40
    for place in range(10):
        assert run(strategy, model, maximum=12, lines=[[4 + place, EOS]])[0] == together[place]


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Diverse, {"groups": 2}),  # of a beam of 5
        (Diverse, {"groups": -1}),
        (Diverse, {"diversity_strength": -0.1}),
        (Diverse, {"diversity_strength": math.nan}),
        (Diverse, {"diversity_strength": 1e308}),
        (Diverse, {"stop": "early"}),
        (Siblings, {"diversity_rate": -1.0}),
        (Siblings, {"diversity_rate": 1e308}),
        (Siblings, {"beam": 0}),
    ],
)
def test_wrong_settings_are_refused(kind, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind(**wrong)
