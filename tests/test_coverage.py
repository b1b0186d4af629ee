"""Coverage by hand, and hypotheses ranked by it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scripted import A, B, Scripted, TinyGru, bounds, pad, run, tiny_transformer

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.decoding import coverage
from encdec_cli.decoding.attention import layers
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.force import as_targets
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.errors import UsageError
from encdec_cli.generation.lines import Options, generate
from encdec_cli.text.example import Example
from encdec_cli.text.vocabulary import BOS, EOS


class Shared(Scripted):
    """A scripted model whose one layer of two heads looks as the table says for the token just read."""

    def __init__(self, table, looks) -> None:
        super().__init__(table)
        self.looks = looks

    def attention(self, tokens, state):
        one = torch.tensor([[self.looks[token] for token in row] for row in tokens.tolist()])
        even = torch.full_like(one, 1 / one.shape[-1])
        yield torch.stack((one, even), 1)


# The source is two tokens and EOS. After BOS it is read to the left, after A to the right, after B nowhere but at EOS.
LOOKS = {BOS: [0.9, 0.0, 0.1], A: [0.0, 0.9, 0.1], B: [0.0, 0.0, 1.0], EOS: [9.0, 9.0, 9.0], 0: [9.0, 9.0, 9.0]}
LINE = [[4, 7, EOS]]
TABLE = {(): {A: 0.4, B: 0.6}}


def test_attention_received_by_hand():
    model, (source, mask) = Shared(TABLE, LOOKS), pad(LINE)
    target, _ = pad([[BOS, A, EOS], [BOS, B, EOS], [BOS, EOS]])
    found = coverage.received(model, source, mask, target, beam=3)
    # The mean of the two heads; an even head gives each of three places a third of each token.
    assert found.tolist() == [
        pytest.approx([0.45 + 1 / 3, 0.45 + 1 / 3, 1]),
        pytest.approx([0.45 + 1 / 3, 1 / 3, 1]),
        pytest.approx([0.45 + 1 / 6, 1 / 6, 1]),
    ]
    assert coverage.penalty(found).tolist() == pytest.approx(
        [2 * math.log(0.45 + 1 / 3), math.log((0.45 + 1 / 3) / 3), math.log((0.45 + 1 / 6) / 6)]
    )


def test_more_than_one_is_enough_and_nothing_is_finite():
    assert coverage.penalty(torch.tensor([[5.0, 1.0, 2.0]])).tolist() == [0.0]
    assert -100 < float(coverage.penalty(torch.tensor([[0.0]]))) < -80


def test_the_coverage_penalty_ranks_what_was_found_and_leaves_the_scores_of_tokens():
    plain = run(Beam(beam=2), Shared(TABLE, LOOKS), lines=LINE)[0]
    assert [one.tokens for one in plain] == [[B], [A]]
    ranked = run(Beam(beam=2, coverage_penalty=0.5), Shared(TABLE, LOOKS), lines=LINE)[0]
    assert [one.tokens for one in ranked] == [[A], [B]]
    assert ranked[0].score == pytest.approx(math.log(0.4) / 2 + 0.5 * 2 * math.log(0.45 + 1 / 3))
    assert ranked[0].token_scores == pytest.approx([math.log(0.4), 0.0])
    slight = run(Beam(beam=2, coverage_penalty=0.01), Shared(TABLE, LOOKS), lines=LINE)[0]
    assert [one.tokens for one in slight] == [[B], [A]]


def test_an_output_that_was_cut_stays_behind_those_that_end():
    table = {(): {A: 0.3, B: 0.7}, (A,): {A: 1.0}}
    found = run(Beam(beam=2, coverage_penalty=5.0), Shared(table, LOOKS), lines=LINE, maximum=1)[0]
    assert [(one.tokens, one.finished) for one in found] == [([B], True), ([A], False)]


@torch.no_grad()
@pytest.mark.parametrize("members", [1, 2])
def test_the_penalty_is_that_of_each_hypothesis_alone_by_the_first_model(members):
    models = [tiny_transformer(seed=seed) for seed in range(members)]
    lines = [[5, 6, 7, 8, EOS], [20, EOS], [9, 9, 30, 31, EOS], [40, 41, EOS]]
    maximum = [12, 3, 9, 0]
    plain = run(Beam(beam=3), models, maximum=maximum, lines=lines)
    source, mask = pad(lines)
    ranked = Beam(beam=3, coverage_penalty=0.3)(Stepper(models, source, mask, 3), bounds(4, maximum), [])
    for line, before, after in zip(lines, plain, ranked, strict=True):
        wanted = []
        for one in before:
            target = as_targets([[one]], 1, torch.device("cpu"))
            count, real = len(one.token_scores), len(line) - 1
            each = sum(w.mean(1)[0, :count] for w in layers(models[0], *pad([line]), target)) / 2
            total = each.sum(0)[:real]
            penalty = sum(math.log(min(1.0, x)) if x > 0 else math.log(1.1754943508222875e-38) for x in total.tolist())
            wanted.append((one.finished, pytest.approx(one.score + 0.3 * penalty, abs=1e-4), one.tokens))
        assert sorted(tokens for *_, tokens in wanted) == sorted(one.tokens for one in after)
        for one in after:
            assert (one.finished, one.score, one.tokens) in wanted
        assert after == sorted(after, key=lambda one: (not one.finished, -one.score))


def test_a_model_without_attention_has_no_coverage():
    with pytest.raises(UsageError, match="no attention to show"):
        run(Beam(beam=2, coverage_penalty=0.2), Scripted(TABLE))


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_wrong_weights_are_refused(wrong):
    with pytest.raises(ValueError, match="coverage_penalty"):
        Beam(coverage_penalty=wrong)


def test_the_share_of_unread_tokens_by_hand():
    looks = {BOS: [0.6, 0.0, 0.0, 0.4, 0.0, 0.0], A: [0.0, 0.5, 0.0, 0.5, 0.0, 0.0], EOS: [9.0] * 6, 0: [9.0] * 6}
    model, (source, mask) = Shared(TABLE, looks), pad([[4, 7, 8, EOS]], extra=2)
    target, _ = pad([[BOS, A, EOS], [BOS, EOS]])
    found = coverage.received(model, source, mask, target, beam=2)
    even = 1 / 12  # half of one sixth for each token written
    assert found.tolist() == [
        pytest.approx([0.3 + 2 * even, 0.25 + 2 * even, 2 * even, 1, 1, 1]),
        pytest.approx([0.3 + even, even, even, 1, 1, 1]),
    ]
    assert coverage.unread(model, source, mask, target, beam=2).tolist() == pytest.approx([1 / 3, 2 / 3])


def test_outputs_that_stop_too_early_have_low_coverage(copy_run):
    bundle = Bundle.load(copy_run)
    sources = [Example("1 2 3 4 5 6"), Example("9 8 7 6 5"), Example("3 1 4 2 5 9")]

    def low(**changes):
        options = Options(replace(bundle.recipe.decoding.config, **changes), coverage=True)
        return [coverage.low_coverage(one.candidates[0].unread) for one in generate([bundle], [sources], options)]

    assert low() == [False] * 3
    assert low(max_length=2) == [True] * 3
    plain = next(generate([bundle], [sources], Options(bundle.recipe.decoding.config)))
    assert plain.candidates[0].unread is None


def test_worker_processes_refuse_in_the_same_words(copy_run):
    bundle = Bundle.load(copy_run)
    bundle = replace(bundle, model=TinyGru(len(bundle.target.vocabulary)))
    options = Options(Beam(beam=2, coverage_penalty=0.2), batch=1, workers=2)
    with pytest.raises(UsageError, match=r"^this model \(TinyGru\) has no attention to show\.$"):
        list(generate([bundle], [[Example("1"), Example("2 3")]], options))
