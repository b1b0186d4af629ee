"""Rules: worked cases, slow versions in plain Python, outputs that obey whatever the model, and any order of rules."""

from __future__ import annotations

import math
import random
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import VOCAB, A, B, C, Scripted, TinyGru, run, tiny_transformer
from test_beam import exhaustive, log_softmax, random_table

from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.forced import Forced, OneOf
from encdec_cli.decoding.hypothesis import length_of
from encdec_cli.decoding.rules import Banned, Boosted, NoRepeatNgram, NoRepeatSourceNgram, RepetitionPenalty
from encdec_cli.decoding.sampling import Sampling
from encdec_cli.text.vocabulary import EOS, UNK

CPU = torch.device("cpu")


def greedy(table, rules, maximum=10, **options):
    return run(Beam(beam=1, length_penalty=0), Scripted(table), rules=rules, maximum=maximum, **options)[0][0]


def constant(**chances):
    """A table with the same chances after every prefix, as logits."""
    names = {"a": A, "b": B, "c": C, "end": EOS}
    row = [-30.0] * VOCAB
    for name, chance in chances.items():
        row[names[name]] = math.log(chance)
    return lambda prefix: row


# --- worked cases ------------------------------------------------------------------------------------------------


def test_blocked_ngrams_by_hand():
    table = constant(a=0.8, b=0.15, end=0.05)
    assert greedy(table, [NoRepeatNgram(1)]).tokens == [A, B]
    # After A A another A would write (A, A) again; then (A, A) and (A, B) are taken, and the end is all that is left.
    assert greedy(table, [NoRepeatNgram(2)]).tokens == [A, A, B, A]
    assert greedy(table, [NoRepeatNgram(3)]).tokens == [A, A, A, B, A, A]
    found = greedy(table, [NoRepeatNgram(2)])
    assert math.exp(found.token_scores[2]) == pytest.approx(0.15, abs=1e-6)  # the model's own, not renormalised


def test_source_ngrams_are_not_copied_by_hand():
    table = constant(a=0.8, b=0.15, end=0.05)
    source = torch.tensor([[A, A, B, EOS, 0, 0]])
    assert greedy(table, [NoRepeatSourceNgram(1, source)]).tokens == []
    # A A is in the source, A B too: after A nothing but the end.
    assert greedy(table, [NoRepeatSourceNgram(2, source)]).tokens == [A]
    assert greedy(table, [NoRepeatSourceNgram(3, source)], maximum=3).tokens == [A, A, A]
    # The end of the source is no token of an n-gram: after `A B` the output may end.
    short = torch.tensor([[A, B, EOS]])
    sure = {(): {A: 1.0}, (A,): {B: 1.0}, (A, B): {EOS: 0.9, C: 0.1}}
    assert greedy(sure, [NoRepeatSourceNgram(3, short)]).tokens == [A, B]


def test_the_repetition_penalty_by_hand():
    table = constant(a=0.5, b=0.3, end=0.2)
    # ln .5 = -.69, twice that is -1.39: less than ln .3 = -1.20, and then more than 2 ln .3; ln .2 = -1.61 is least.
    assert greedy(table, [RepetitionPenalty(2.0)], maximum=3).tokens == [A, B, A]
    assert greedy(table, [RepetitionPenalty(1.5)], maximum=2).tokens == [A, A]
    assert greedy(table, [RepetitionPenalty(2.4)], maximum=3).tokens == [A, B]  # 2.4 x ln .5 = -1.66
    found = run(Beam(beam=1, length_penalty=0), Scripted(table), rules=[RepetitionPenalty(2.0)], maximum=3)[0][0]
    assert found.score == pytest.approx(2 * math.log(0.5) + math.log(0.3) + math.log(0.5), abs=1e-5)
    assert sum(found.token_scores) == pytest.approx(2 * math.log(0.5) + math.log(0.3), abs=1e-5)


def test_banned_phrases_by_hand():
    table = constant(a=0.6, b=0.3, end=0.1)
    assert greedy(table, [Banned([[A]], CPU)], maximum=2).tokens == [B, B]
    assert greedy(table, [Banned([[A, A]], CPU)], maximum=4).tokens == [A, B, A, B]
    assert greedy(table, [Banned([[A, A], [A, B], [C]], CPU)]).tokens == [A]
    assert greedy(table, [Banned([[A, A, A]], CPU)], maximum=4).tokens == [A, A, B, A]


def test_a_boosted_phrase_is_lent_its_bonus_step_by_step():
    rule = Boosted([([A, B], 1.0), ([A, A, C], -0.3)], CPU)
    scores = torch.zeros(4, VOCAB)
    prefix = torch.tensor([[C, C], [C, A], [A, A], [A, B]])
    gained = rule(scores, prefix, torch.zeros(4, dtype=torch.int64))
    expected = torch.zeros(4, VOCAB)
    expected[0, A] = 0.5 - 0.1  # both begin
    expected[1] = -0.5 + 0.1  # both are broken off …
    expected[1, A] += 0.5 - 0.2  # … but A begins the first again and continues the second
    expected[1, B] += 1.0
    expected[2] = -0.5 + 0.2
    expected[2, A] += 0.5 - 0.2
    expected[2, B] += 1.0
    expected[2, C] += -0.3
    expected[3, A] = 0.5 - 0.1
    torch.testing.assert_close(gained, expected)


def test_a_prefix_is_forced_with_the_models_own_scores():
    table = {(): {A: 0.9, B: 0.1}, (B,): {A: 0.3, EOS: 0.7}, (B, A): {EOS: 1.0}, (A,): {EOS: 1.0}}
    for strategy in (Beam(beam=1, length_penalty=0), Beam(beam=3, length_penalty=0), Sampling(beam=2)):
        found = run(strategy, Scripted(table, table), rules=[Forced([[B, A], []], [], CPU)])
        assert found[0][0].tokens == [B, A]
        assert found[0][0].token_scores == pytest.approx([math.log(0.1), math.log(0.3), 0.0], abs=1e-6)
        assert found[0][0].score == pytest.approx(math.log(0.03), abs=1e-6)
        assert found[1][0].tokens in ([A], [B], [B, A])
    assert found[1][0].finished


def test_a_prefix_comes_before_every_other_rule_which_then_hold():
    table = constant(a=0.8, b=0.15, end=0.05)
    others = [Banned([[B], [UNK]], CPU), NoRepeatNgram(2)]
    assert greedy(table, [Forced([[B, B, B]], others, CPU)]).tokens == [B, B, B, A, A]
    assert greedy(table, [Forced([[B]], [Banned([[B]], CPU)], CPU)], maximum=3).tokens == [B, A, A]


def test_only_allowed_outputs_by_hand():
    rule = OneOf([[A, B], [A, C, C], [B], [A, B]], CPU)
    assert rule.longest == 3
    assert all(map(rule.begins, ([], [A], [A, C], [B], [A, C, C])))
    assert not any(map(rule.begins, ([C], [B, A], [A, C, B], [A, A], [B, B, B, B])))
    table = constant(a=0.5, b=0.3, c=0.1, end=0.1)
    assert greedy(table, [rule]).tokens == [A, B]
    found = run(Beam(beam=5, length_penalty=0), Scripted(table), rules=[rule], maximum=3)[0]
    assert [(one.tokens, one.finished) for one in found] == [([B], True), ([A, B], True), ([A, C, C], True)]
    assert [math.exp(one.score) for one in found] == pytest.approx([0.03, 0.015, 0.0005], rel=1e-4)


@pytest.mark.parametrize(
    ("formula", "length", "tokens"),
    [
        *(("2x+20", 3, 26), ("0.5x", 5, 2), ("0.5x+2", 4, 4), (10, 99, 10), ("0", 7, 0)),
        *((10**20, 7, 1 << 30), (f"{10**20}x", 3, 3 << 30)),
    ],
)
def test_formulas_of_lengths(formula, length, tokens):
    assert length_of(formula, length) == tokens


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"min_length": "x2"}, "min_length: expected a formula"),
        ({"max_length": "-3"}, "max_length: expected a formula"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram: -1 must be 1 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 must be above 0"),
        ({"banned": ["a", " "]}, "banned: an empty phrase"),
        ({"boosted": {"a": math.nan}}, "boosted: a bonus is at most 1,000,000 nats"),
        ({"boosted": {"a": -2e6}}, "boosted: a bonus is at most 1,000,000 nats"),
        ({"outputs": "list.txt", "banned": ["a"]}, "outputs: the list alone"),
    ],
)
def test_wrong_settings_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Beam(**wrong)


# --- against plain Python ----------------------------------------------------------------------------------------


def ngrams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def occurrences(tokens, phrase):
    return ngrams(tokens, len(phrase)).count(tuple(phrase))


tokens = st.lists(st.integers(4, 6), max_size=9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(tokens, min_size=1, max_size=3), st.integers(0, 9), st.lists(tokens, max_size=4))
def test_forbidden_tokens_are_those_that_would_break_the_rule(n, sources, written, phrases):
    prefix = torch.tensor([[random.Random(f"{row} {i}").randint(4, 6) for i in range(written)] for row in range(5)])
    prefix = prefix.view(5, written)
    sentences = torch.arange(5) % len(sources)
    width = max(map(len, sources)) + 1
    padded = torch.tensor([[*source, EOS, *[0] * (width - 1 - len(source))] for source in sources])
    phrases = [phrase for phrase in phrases if phrase]
    rules = (NoRepeatNgram(n), NoRepeatSourceNgram(n, padded), Banned(phrases, CPU))
    found = [rule(torch.zeros(5, VOCAB), prefix, sentences).tolist() for rule in rules]
    for row, done in enumerate(prefix.tolist()):
        for token in (EOS, A, B, C):
            longer = [*done, token]
            last = tuple(longer[-n:]) if len(longer) >= n else None
            wrong = [
                last is not None and last in ngrams(done, n),
                last is not None and last in ngrams(sources[sentences[row]], n),
                any(longer[-len(phrase) :] == phrase for phrase in phrases),
            ]
            assert [scores[row][token] == -math.inf for scores in found] == wrong


phrases_ = st.lists(st.lists(st.integers(4, 6), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), phrases_, st.sampled_from([-1.0, 0.5, 3.0]), st.sampled_from([0.0, 1.0]))
def test_a_finished_output_gains_a_bonus_for_each_phrase_it_holds(seed, phrases, bonus, penalty):
    table = random_table(seed)
    boosted = [(phrase, bonus * (1 + i)) for i, phrase in enumerate(phrases)]
    wanted = []
    for score, output in exhaustive(table, 4, 0, lambda length: 1.0):
        gain = sum(bonus * occurrences(output, phrase) for phrase, bonus in boosted)
        wanted.append(((score + gain) / (len(output) + 1) ** penalty, output))
    found = run(Beam(beam=324, length_penalty=penalty), Scripted(table), maximum=4, rules=[Boosted(boosted, CPU)])[0]
    finished = [one for one in found if one.finished]
    assert [one.score for one in finished] == pytest.approx(
        [score for score, _ in sorted(wanted, reverse=True)], abs=1e-4
    )
    by_output = {tuple(output): score for score, output in wanted}
    assert all(one.score == pytest.approx(by_output[tuple(one.tokens)], abs=1e-4) for one in finished)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.lists(st.integers(4, 6), min_size=1, max_size=4), min_size=1, max_size=12),
    st.integers(0, 2),
)
def test_a_wide_beam_finds_the_best_allowed_output_that_begins_as_it_must(seed, outputs, forced):
    table = random_table(seed)
    prefix = outputs[0][:forced]
    allowed = [list(one) for one in dict.fromkeys(map(tuple, outputs)) if list(one[: len(prefix)]) == prefix]

    def score(output):
        steps = [(tuple(output[:i]), token) for i, token in enumerate([*output, EOS])]
        return sum(log_softmax(table(before))[token] for before, token in steps)

    rules = [Forced([prefix], [OneOf(outputs, CPU)], CPU)]
    found = run(Beam(beam=40, length_penalty=0), Scripted(table), maximum=4, rules=rules)[0]
    assert all(one.finished for one in found)
    assert [one.score for one in found] == pytest.approx(sorted(map(score, allowed), reverse=True), abs=1e-4)
    assert sorted(one.tokens for one in found) == sorted(allowed)
    drawn = run(Sampling(beam=3, temperature=2.0), Scripted(table), maximum=4, rules=rules)[0]
    assert all(one.finished and one.tokens in allowed for one in drawn)


# --- laws --------------------------------------------------------------------------------------------------------

STRATEGIES = [Beam(beam=1), Beam(beam=4), Sampling(beam=2), Sampling(beam=3, temperature=2.0, top_p=0.95)]
SOURCES = [[(7 * i * j) % 20 + 4 for j in range(1, 3 + i % 5)] + [EOS] for i in range(9)]
PHRASES = [[5], [9, 7], [6, 6]]


def padded(sources):
    width = max(map(len, sources))
    return torch.tensor([[*source, *[0] * (width - len(source))] for source in sources])


def all_rules(sources=SOURCES):
    return [NoRepeatNgram(2), NoRepeatSourceNgram(2, padded(sources)), Banned(PHRASES, CPU)]


def written(found):
    return [[(one.tokens, one.finished) for one in hypotheses] for hypotheses in found]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("build", [TinyGru, tiny_transformer])
def test_outputs_obey_every_rule_in_any_order(build, strategy):
    model = build(vocab=24)
    soft = [RepetitionPenalty(1.3), Boosted([([8, 9], 2.0)], CPU)]
    results = set()
    for rules in list(permutations(all_rules()))[::2]:
        found = run(strategy, model, lines=SOURCES, maximum=12, minimum=2, rules=[*soft, *rules])
        results.add(repr(written(found)))
        for source, hypotheses in zip(SOURCES, found, strict=True):
            for one in hypotheses:
                assert len(set(ngrams(one.tokens, 2))) == max(0, len(one.tokens) - 1)
                assert not set(ngrams(one.tokens, 2)) & set(ngrams(source[:-1], 2))
                assert not any(occurrences(one.tokens, phrase) for phrase in PHRASES)
    assert len(results) == 1


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("build", [TinyGru, tiny_transformer])
def test_a_rule_that_the_outputs_satisfy_anyway_changes_nothing(build, strategy):
    model = build(vocab=24)
    free = run(strategy, model, lines=SOURCES, maximum=6)
    longest = max(len(one.tokens) for found in free for one in found)
    seen = {token for found in free for one in found for token in one.tokens}
    unseen = sorted(set(range(4, 24)) - seen)
    assert unseen
    neutral = [NoRepeatNgram(longest + 1), NoRepeatSourceNgram(9, padded(SOURCES)), RepetitionPenalty(1.0)]
    neutral += [Boosted([([5, 6], 0.0)], CPU), Banned([[5] * 8], CPU), Forced([[]] * len(SOURCES), [], CPU)]
    if isinstance(strategy, Beam) and strategy.beam == 1:  # others look at tokens that they do not write
        neutral.append(Banned([[token] for token in unseen], CPU))
    assert written(run(strategy, model, lines=SOURCES, maximum=6, rules=neutral)) == written(free)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_a_batch_gives_what_its_sentences_give_alone(strategy):
    model = TinyGru(vocab=24)
    prefixes = [[9, 7, 5][: i % 4] for i in range(9)]
    outputs = [[*prefix, *tail] for prefix in prefixes for tail in ([8], [10, 11], [12, 12, 13])]

    def search(places, allowed):
        sources = [SOURCES[i] for i in places]
        others = [OneOf(outputs, CPU)] if allowed else all_rules(sources)
        rules = [RepetitionPenalty(1.2), Forced([prefixes[i] for i in places], others, CPU)]
        return written(run(strategy, model, lines=sources, maximum=8, rules=rules))

    for allowed in (False, True):
        together = search(range(9), allowed)
        assert search(range(8, -1, -1), allowed) == together[::-1]
        assert [search([i], allowed)[0] for i in range(9)] == together
        for prefix, hypotheses in zip(prefixes, together, strict=True):
            assert all(tokens[: len(prefix)] == prefix for tokens, _ in hypotheses)
            assert not allowed or all(tokens in outputs and finished for tokens, finished in hypotheses)


def test_a_bonus_counts_across_the_end_of_a_forced_prefix():
    """What is lent for a phrase that begins within the prefix is there to be taken back."""
    table = random_table(3)
    boosted = [([A, B], 2.0)]
    rule = Boosted(boosted, CPU)
    forced = Forced([[A]], [rule], CPU, rule)
    found = run(Beam(beam=200, length_penalty=0), Scripted(table), maximum=3, rules=[forced])[0]
    assert len(found) > 5
    for one in found:
        gain = 2.0 * occurrences(one.tokens, [A, B])
        lent = 1.0 * (not one.finished and one.tokens[-1:] == [A])
        assert one.score == pytest.approx(sum(one.token_scores) + gain + lent, abs=1e-4)
