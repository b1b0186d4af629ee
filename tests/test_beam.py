"""Beam search: worked cases, exhaustive search, a slow search in plain Python, and invariances."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import VOCAB, A, B, C, Scripted, TinyGru, bounds, pad, run, tiny_transformer
from slow_search import SlowSearch, divisor, log_softmax, random_table

from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.contrastive import Contrastive
from encdec_cli.decoding.diverse import Diverse
from encdec_cli.decoding.siblings import Siblings
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.text.vocabulary import BOS, EOS, UNK

GARDEN = {(): {A: 0.6, B: 0.4}, (A,): {A: 0.4, B: 0.3, EOS: 0.3}, (B,): {A: 0.1, EOS: 0.9}}
"""The best first token leads to a worse end."""


def outputs(found):
    return [(one.tokens, one.finished) for one in found]


def test_greedy_walks_down_the_garden_path_and_a_beam_does_not():
    greedy = run(Beam(beam=1, length_penalty=0), Scripted(GARDEN))[0]
    assert outputs(greedy) == [([A, A], True)]
    assert greedy[0].score == pytest.approx(math.log(0.6 * 0.4))
    beam = run(Beam(beam=2, length_penalty=0), Scripted(GARDEN))[0]
    assert beam[0].tokens == [B]
    assert beam[0].score == pytest.approx(math.log(0.4 * 0.9))
    assert beam[0].token_scores == pytest.approx([math.log(0.4), math.log(0.9)])


def test_n_best_stands_in_order():
    found = run(Beam(beam=4, length_penalty=0), Scripted(GARDEN))[0]
    assert [one.tokens for one in found] == [[B], [A, A], [A], [A, B]]
    assert [math.exp(one.score) for one in found] == pytest.approx([0.36, 0.24, 0.18, 0.18])


def test_the_length_penalty_chooses_between_short_and_long():
    # A: .5 x .8 = .4 in 2 tokens; BBB: .5 x .9^3 = .3645 in 4 tokens.
    table = {
        **{(): {A: 0.5, B: 0.5}, (A,): {EOS: 0.8, C: 0.2}},
        **{(B,): {B: 0.9, C: 0.1}, (B, B): {B: 0.9, C: 0.1}, (B, B, B): {EOS: 0.9, C: 0.1}},
    }
    short = run(Beam(beam=4, length_penalty=0), Scripted(table))[0][0]
    assert (short.tokens, short.score) == ([A], pytest.approx(math.log(0.4)))
    long = run(Beam(beam=4, length_penalty=1), Scripted(table))[0][0]
    assert (long.tokens, long.score) == ([B, B, B], pytest.approx(math.log(0.3645) / 4))


ENDLESS = {tuple([B] * n): {B: 0.9, EOS: 0.1} for n in range(20)}


def test_an_endless_output_is_cut_at_its_maximum_and_says_so():
    found = run(Beam(beam=1), Scripted(ENDLESS, ENDLESS), maximum=[3, 5])
    assert [outputs(one) for one in found] == [[([B] * 3, False)], [([B] * 5, False)]]
    assert found[0][0].token_scores == pytest.approx([math.log(0.9)] * 3)
    assert found[0][0].score == pytest.approx(math.log(0.9))


def test_eos_may_follow_right_after_the_last_allowed_token():
    table = {(): {A: 1.0}, (A,): {A: 1.0}, (A, A): {EOS: 1.0}}
    assert outputs(run(Beam(beam=1), Scripted(table), maximum=2)[0]) == [([A, A], True)]


def test_unfinished_outputs_come_last_and_only_fill_up():
    # With a beam of 2 each step has EOS as its second candidate: two of them end the search.
    assert outputs(run(Beam(beam=2), Scripted(ENDLESS), maximum=9)[0]) == [([B], True), ([], True)]
    # Only one fits before the maximum of 0; the row itself has ended, so nothing is left to fill up with.
    assert outputs(run(Beam(beam=2), Scripted(ENDLESS), maximum=0)[0]) == [([], True)]
    # EOS is third: it is never among the best two.
    table = {prefix: {A: 0.5, B: 0.3, EOS: 0.2} for prefix in [(), (A,), (B,), (A, A), (A, B), (B, A), (B, B)]}
    found = run(Beam(beam=2), Scripted(table), maximum=1)[0]
    assert outputs(found) == [([A], False), ([B], False)]
    # A finished output stands before an unfinished one with a better score.
    table = {(): {EOS: 0.1, A: 0.9}, (A,): {A: 0.9, B: 0.06, EOS: 0.04}}
    found = run(Beam(beam=2), Scripted(table), maximum=1)[0]
    assert outputs(found) == [([], True), ([A], False)]
    assert found[0].score < found[1].score


def test_a_minimum_of_one_forbids_an_empty_output():
    table = {(): {EOS: 0.9, A: 0.1}}
    assert outputs(run(Beam(beam=1), Scripted(table))[0]) == [([], True)]
    found = run(Beam(beam=1, length_penalty=0), Scripted(table), minimum=1)[0]
    assert outputs(found) == [([A], True)]
    assert found[0].score == pytest.approx(math.log(0.1))  # not renormalised


def test_each_sentence_has_its_own_minimum():
    table = {tuple([A] * n): {EOS: 0.7, A: 0.3} for n in range(9)}
    found = run(Beam(beam=1), Scripted(table, table, table), minimum=[0, 3, 2])
    assert [len(one[0].tokens) for one in found] == [0, 3, 2]


def test_unk_is_never_written():
    found = run(Beam(beam=2, length_penalty=0), Scripted({(): {UNK: 0.8, A: 0.15, B: 0.05}}))[0]
    assert [one.tokens for one in found] == [[A], [B]]
    assert found[0].score == pytest.approx(math.log(0.15))


def test_equal_scores_go_to_the_lowest_token():
    table = {(): {C: 0.25, B: 0.25, A: 0.25, EOS: 0.25}}
    assert [one.tokens for one in run(Beam(beam=4, length_penalty=0), Scripted(table))[0]] == [[], [A], [B], [C]]
    assert run(Beam(beam=1), Scripted(table), minimum=1)[0][0].tokens == [A]


def test_a_rule_changes_the_output():
    def no_third_a(scores, prefix, sentences):
        if prefix.shape[1] >= 2:
            scores[:, A] = -torch.inf
        return scores

    table = {tuple([A] * n): {A: 0.9, B: 0.06, EOS: 0.04} for n in range(9)}
    assert run(Beam(beam=1), Scripted(table), maximum=4)[0][0].tokens == [A] * 4
    found = run(Beam(beam=1), Scripted(table), maximum=6, rules=[no_third_a])[0]
    assert outputs(found) == [([A, A, B], True)]


def test_a_rule_that_forbids_everything_leaves_what_was_written():
    def stop(scores, prefix, sentences):
        return scores if prefix.shape[1] < 2 else torch.full_like(scores, -torch.inf)

    found = run(Beam(beam=2), Scripted(ENDLESS, GARDEN), rules=[stop], minimum=2)
    assert outputs(found[0]) == [([B, B], False)]
    assert outputs(found[1]) == [([A, A], False), ([A, B], False)]


def test_a_rule_that_changes_nothing_changes_nothing():
    model, lines = TinyGru(), [[5, 6, 7, EOS], [20, EOS], [9, 9, EOS]]
    with_rule = run(Beam(beam=4), model, lines=lines, rules=[lambda scores, prefix, sentences: scores])
    assert with_rule == run(Beam(beam=4), model, lines=lines)


def test_the_prefix_a_rule_sees_is_the_one_written():
    seen = []

    def look(scores, prefix, sentences):
        seen.append((prefix.tolist(), sentences.tolist()))
        return scores

    run(Beam(beam=1), Scripted(GARDEN), rules=[look])
    assert seen == [([[]], [0]), ([[A]], [0]), ([[A, A]], [0])]


@pytest.mark.parametrize(
    "strategy",
    [
        Beam(beam=1),
        Beam(beam=3),
        Beam(beam=2, stop="never"),
        Diverse(beam=4, groups=2),
        Siblings(beam=3),
        Contrastive(),
    ],
    ids=repr,
)
def test_a_rule_knows_the_sentence_of_each_row_when_others_have_left(strategy):
    """One that lets each sentence write its own token alone, for as long as its place in the batch says."""
    lengths = torch.tensor([1, 6, 2, 9, 3, 4])

    def own_token(scores, prefix, sentences):
        allowed = torch.where(prefix.shape[1] < lengths[sentences], 4 + sentences % 3, EOS)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, allowed[:, None], True)
        return scores.masked_fill(~keep, -torch.inf)

    found = run(strategy, TinyGru(), maximum=10, lines=[[5, EOS]] * 6, rules=[own_token])
    assert [one[0].tokens for one in found] == [[4 + i % 3] * n for i, n in enumerate(lengths.tolist())]


@pytest.mark.parametrize(
    "wrong",
    [
        {"beam": 0},
        {"length_penalty": math.nan},
        {"length_penalty": -11.0},
        {"coverage_penalty": 1e308},
        {"stop": "early"},
        {"normalization": "mean"},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Beam(**wrong)


@pytest.mark.parametrize("many", [lambda: Beam(beam=10**20), lambda: Contrastive(top_k=10**20)])
def test_more_hypotheses_than_any_machine_decodes_are_refused(many):
    with pytest.raises(ValueError, match="100000000000000000000 hypotheses for each sentence"):
        many()


def test_a_stepper_of_another_beam_is_refused():
    with pytest.raises(ValueError, match="has 2 rows a sentence, the search needs 3"):
        Beam(beam=3)(Stepper([Scripted(GARDEN)], *pad([[4, EOS]]), beam=2), bounds(1, 5), [])


# Random tables -------------------------------------------------------------------------------------


def exhaustive(table, maximum: int, minimum: int, normalise: Callable[[int], float]) -> list[tuple[float, list[int]]]:
    """Every output of at most `maximum` tokens, best first."""
    found, prefixes = [], [((), 0.0)]
    for length in range(maximum + 1):
        longer = []
        for prefix, score in prefixes:
            row = log_softmax(table(prefix))
            if length >= minimum:
                found.append(((score + row[EOS]) / normalise(length + 1), list(prefix)))
            longer += [((*prefix, token), score + row[token]) for token in (A, B, C)]
        prefixes = longer
    return sorted(found, reverse=True)


PENALTIES = st.sampled_from([0.0, 0.6, 1.0, 2.0, -0.5])
NORMALIZATIONS = st.sampled_from(["power", "gnmt"])
STOPS = st.sampled_from(["first", "bound", "never"])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 2), PENALTIES, NORMALIZATIONS, STOPS)
def test_a_beam_wide_enough_is_exhaustive_search(seed, maximum, minimum, penalty, normalization, stop):
    table = random_table(seed)
    wanted = exhaustive(table, maximum, minimum, lambda length: divisor(length, penalty, normalization))
    # 81 outputs of four tokens, each with four ways to go on: with 324 rows nothing is ever dropped.
    strategy = Beam(beam=324, length_penalty=penalty, normalization=normalization, stop=stop)
    found = run(strategy, Scripted(table), maximum=maximum, minimum=minimum)[0]
    finished = [one for one in found if one.finished]
    assert [one.tokens for one in finished] == [tokens for _, tokens in wanted]
    assert [one.score for one in finished] == pytest.approx([score for score, _ in wanted], abs=1e-5)
    assert found[: len(finished)] == finished


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=9),
    st.integers(1, 5),
    PENALTIES,
    NORMALIZATIONS,
    STOPS,
)
def test_a_batch_is_searched_as_its_sentences_one_by_one_in_plain_python(sentences, size, penalty, normalization, stop):
    tables = [random_table(seed) for seed, _, _ in sentences]
    low, high = [low for _, low, _ in sentences], [high for _, _, high in sentences]
    keys = {"beam": size, "length_penalty": penalty, "normalization": normalization, "stop": stop}
    found = run(Beam(**keys), Scripted(*tables), maximum=high, minimum=low)
    for table, minimum, maximum, ours in zip(tables, low, high, found, strict=True):
        wanted = SlowSearch(table, minimum, maximum, **keys)()
        assert outputs(ours) == [(tokens, finished) for tokens, _, finished in wanted]
        assert [one.score for one in ours] == pytest.approx([score for _, score, _ in wanted], abs=1e-5)
        for one in ours:
            total = sum(one.token_scores) / divisor(max(1, len(one.token_scores)), penalty, normalization)
            assert total == pytest.approx(one.score, abs=1e-5)


def watched(table: Mapping[tuple[int, ...], Mapping[int, float]], seen: list[tuple[int, ...]]):
    """The table as a function that notes what it has been asked for."""

    def row(prefix: tuple[int, ...]) -> list[float]:
        seen.append(prefix)
        chances = table.get(prefix, {EOS: 1.0})
        return [math.log(chances.get(token, 1e-30)) for token in range(VOCAB)]

    return row


LATE = {(): {EOS: 0.5, A: 0.3, B: 0.2}, **{tuple([A] * n): {A: 0.95, B: 0.05} for n in range(1, 10)}}
"""Empty: .5. Ten A and EOS: .3 x .95^9 = .189, which is the better one by length."""


@pytest.mark.parametrize(
    ("stop", "penalty", "tokens", "steps"),
    [
        ("first", 2.0, [], 1),
        ("bound", 2.0, [A] * 10, 11),  # log(.3) / 11^2 beats log(.5): worth going on to the end
        ("never", 2.0, [A] * 10, 11),
        ("first", 0.0, [], 1),
        ("bound", 0.0, [], 1),  # log(.3) is below log(.5) for good
        ("never", 0.0, [], 11),
    ],
)
def test_when_to_stop_by_hand(stop, penalty, tokens, steps):
    seen = []
    found = run(Beam(beam=1, length_penalty=penalty, stop=stop), Scripted(watched(LATE, seen)), maximum=10)[0]
    assert outputs(found) == [(tokens, True)]
    assert len(seen) == steps


def test_the_bound_is_reached_in_the_middle():
    """With a penalty of 1 and a maximum of 3, what is unfinished may be divided by 4; [] has log(.5) = -.693."""
    for chance, steps in ((0.3, 3), (0.02, 2)):
        # log(.3) / 4 = -.301; then log(.3 x .3) / 4 = -.602 and log(.3^3) / 4 = -.903, or log(.3 x .02) / 4 = -1.279.
        table = {(): {EOS: 0.5, A: 0.3, B: 0.2}, (A,): {A: chance, UNK: 1 - chance}, (A, A): {A: 0.3, UNK: 0.7}}
        seen = []
        assert outputs(run(Beam(beam=1, stop="bound"), Scripted(watched(table, seen)), maximum=3)[0]) == [([], True)]
        assert len(seen) == steps


@pytest.mark.parametrize("build", [TinyGru, tiny_transformer])
def test_the_bound_changes_nothing_but_the_time(build):
    model, lines = build(), [[i, i + 3, EOS] for i in range(5, 25)]
    maximum = [4 + i % 9 for i in range(20)]
    for penalty in (0.0, 1.0):
        keys = {"beam": 3, "length_penalty": penalty}
        never = run(Beam(stop="never", **keys), model, maximum=maximum, lines=lines)
        bound = run(Beam(stop="bound", **keys), model, maximum=maximum, lines=lines)
        assert [outputs(found) for found in bound] == [outputs(found) for found in never]
        for ours, theirs in zip(bound, never, strict=True):
            assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], abs=1e-5)


def test_gnmt_s_length_penalty_by_hand():
    # A: .4 in 2 tokens, divided by (7/6)^x; BBB: .3645 in 4 tokens, divided by (9/6)^x.
    table = {
        **{(): {A: 0.5, B: 0.5}, (A,): {EOS: 0.8, C: 0.2}},
        **{(B,): {B: 0.9, C: 0.1}, (B, B): {B: 0.9, C: 0.1}, (B, B, B): {EOS: 0.9, C: 0.1}},
    }
    for alpha, tokens, score in (
        (1.0, [B, B, B], math.log(0.3645) / 1.5),
        (0.3, [A], math.log(0.4) / (7 / 6) ** 0.3),  # by power, .3 is enough for BBB
    ):
        best = run(Beam(beam=4, length_penalty=alpha, normalization="gnmt"), Scripted(table))[0][0]
        assert (best.tokens, best.score) == (tokens, pytest.approx(score))
    assert run(Beam(beam=4, length_penalty=0.3), Scripted(table))[0][0].tokens == [B, B, B]


@pytest.mark.parametrize("beam", [1, 4])
def test_finished_sentences_leave_the_batch_and_change_nothing(beam):
    lengths = [1, 30, 2, 3, 12, 2, 5, 28, 1, 9]
    tables = [
        {tuple([A] * n): ({EOS: 0.9, B: 0.1} if n >= length else {A: 0.9, B: 0.1}) for n in range(40)}
        for length in lengths
    ]
    model = Scripted(*tables)
    together = run(Beam(beam=beam), model, maximum=35)
    sizes = model.states[0].sizes
    assert sizes[0] == 10 * beam
    assert sizes[-1] < 10 * beam
    assert sizes == sorted(sizes, reverse=True)
    if beam == 1:
        assert [found[0].tokens for found in together] == [[A] * length for length in lengths]
    for place in range(len(lengths)):
        assert run(Beam(beam=beam), model, maximum=35, lines=[[4 + place, EOS]])[0] == together[place]


def test_nothing_moves_while_few_are_done():
    short = {(): {EOS: 1.0}}
    long = {tuple([A] * n): ({EOS: 1.0} if n == 9 else {A: 1.0}) for n in range(10)}
    model = Scripted(short, *[long] * 9)
    run(Beam(beam=1), model)
    assert model.states[0].sizes == [10]


@pytest.mark.parametrize("build", [TinyGru, tiny_transformer])
def test_a_beam_of_one_takes_the_best_token_each_time(build):
    model, lines = build(), [[5, 6, 7, EOS], [20, EOS], [9, 9, 30, 31, EOS]]
    found = run(Beam(beam=1), model, maximum=8, lines=lines)
    for line, hypotheses in zip(lines, found, strict=True):
        written = [BOS]
        with torch.no_grad():
            while len(written) <= 9 and written[-1] != EOS:
                hidden = model(*pad([line]), torch.tensor([written]))
                logits = model.project(hidden[0, -1:])[0]
                logits[[0, 1, 2]] = -torch.inf
                written.append(int(logits.argmax()))
        assert hypotheses[0].tokens == [token for token in written[1:9] if token != EOS]
