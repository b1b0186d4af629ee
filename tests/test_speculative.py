"""Speculative decoding: greedy search's outputs whatever the draft proposes, in fewer calls of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import A, B, Scripted, TinyGru, bounds, pad, run, tiny_transformer

from encdec_cli.bundle.bundle import Bundle, build_model
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.speculative import Draft, DraftedStepper, Speculative
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.errors import BundleError, UsageError
from encdec_cli.generation.lines import Options, generate
from encdec_cli.recipe import from_resolved
from encdec_cli.registry import load_plugin, models
from encdec_cli.testing import check
from encdec_cli.text.example import Example
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.units import Character
from encdec_cli.text.vocabulary import BOS, EOS
from tests.conftest import save

GRU = Path(__file__).parent.parent / "docs" / "examples" / "gru.py"
PLAIN = Speculative(draft=Path("unused"))


def speculate(members, draft, lines, limits, draft_tokens=4, rules=()):
    """Search greedily with a draft model."""
    source, mask = pad(lines)
    longest = int(limits.maximum.max())
    stepper = DraftedStepper(members, source, mask, Draft(Stepper([draft], source, mask), draft_tokens, longest))
    return PLAIN(stepper, limits, rules)


def same(found, greedy):
    for ours, theirs in zip(found, greedy, strict=True):
        assert [(one.tokens, one.finished) for one in ours] == [(one.tokens, one.finished) for one in theirs]
        assert ours[0].token_scores == pytest.approx(theirs[0].token_scores, abs=1e-4)
        assert ours[0].score == pytest.approx(theirs[0].score, abs=1e-4)


MODELS = {
    "gru": [TinyGru(40)],
    "transformer": [tiny_transformer(40)],
    "ensemble": [TinyGru(40), tiny_transformer(40), TinyGru(40, seed=5)],
}
DRAFTS = [TinyGru(40), TinyGru(40, seed=9), tiny_transformer(40), tiny_transformer(40, seed=9)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(range(len(DRAFTS))),
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(4, 39), st.integers(0, 3), st.integers(0, 25)), min_size=1, max_size=9),
)
def test_the_output_is_that_of_greedy_search(kind, draft, draft_tokens, sentences):
    lines = [[first, *range(5, 5 + i % 4), EOS] for i, (first, _, _) in enumerate(sentences)]
    low, high = [low for _, low, _ in sentences], [high for _, _, high in sentences]
    found = speculate(MODELS[kind], DRAFTS[draft], lines, bounds(len(lines), high, low), draft_tokens)
    same(found, run(Beam(beam=1, length_penalty=0), MODELS[kind], high, low, lines))


def test_rules_hold_and_scores_stay_the_model_s():
    def no_token_twice(scores, prefix, sentences):
        return scores.scatter(1, prefix, -torch.inf)

    lines = [[5 + i, EOS] for i in range(6)]
    for members in MODELS.values():
        found = speculate(members, DRAFTS[1], lines, bounds(6, 20), rules=[no_token_twice])
        same(found, run(Beam(beam=1, length_penalty=0), members, 20, 0, lines, [no_token_twice]))
        assert all(len(set(one.tokens)) == len(one.tokens) for (one,) in found)


class Watched(Scripted):
    """Notes what it reads in each call, for one sentence."""

    def __init__(self, *tables):
        super().__init__(*tables)
        self.calls = []

    def decode(self, tokens, state):
        self.calls.append(tokens.tolist()[0])
        return super().decode(tokens, state)


def endless(token: int) -> dict:
    return {tuple([token] * n): {token: 0.9, EOS: 0.1} for n in range(30)}


def test_accepted_proposals_save_calls_of_the_model():
    model, draft = Watched(endless(A)), Watched(endless(A))
    (found,) = speculate([model], draft, [[4, EOS]], bounds(1, 6), draft_tokens=3)[0]
    assert (found.tokens, found.finished) == ([A] * 6, False)
    # Four tokens a call; in the last nothing is proposed beyond the maximum.
    assert model.calls == [[BOS, A, A, A], [A, A, A]]
    # The last proposal of a round is read in the next one.
    assert draft.calls == [[BOS], [A], [A], [A, A], [A]]


def test_a_wrong_proposal_costs_nothing_but_time():
    model, draft = Watched(endless(A)), Scripted(lambda prefix: [9.0 * (token == B) for token in range(7)])
    (found,) = speculate([model], draft, [[4, EOS]], bounds(1, 3), draft_tokens=2)[0]
    assert found.tokens == [A] * 3
    assert model.calls == [[BOS, B, B], [A, B, B], [A, B], [A]]
    assert model.states[0].prefixes == [(BOS, A, A, A)]


def test_proposals_end_with_eos():
    table = {(): {A: 1.0}, (A,): {EOS: 1.0}}
    model = Watched(table)
    (found,) = speculate([model], Scripted(table), [[4, EOS]], bounds(1, 20), draft_tokens=9)[0]
    assert (found.tokens, found.finished) == ([A], True)
    assert model.calls == [[BOS, A, EOS]]


def test_a_sentence_that_has_ended_holds_nobody_up():
    """What stands after EOS agrees with no draft, and is not asked to."""
    model, draft = Watched({(): {EOS: 1.0}, (EOS,): {B: 1.0}}, endless(A)), Scripted(endless(A), endless(A))
    found = speculate([model], draft, [[4, EOS], [5, EOS]], bounds(2, 8), draft_tokens=3)
    assert [one.tokens for (one,) in found] == [[], [A] * 8]
    assert [len(call) for call in model.calls] == [4, 4, 1, 4][: len(model.calls)]


def test_the_tiny_recurrent_model_obeys_the_laws():
    check(lambda: TinyGru(17))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"beam": 2}, "beam is 2; speculative decoding writes 1"), ({"draft_tokens": 0}, "draft_tokens is 0")],
)
def test_wrong_settings_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Speculative(draft=Path("draft"), **wrong)


# Bundles -------------------------------------------------------------------------------------------------------------

TOKENIZER = Character.train(["a b c d e f g h"], TokenizerOptions(size=30))


def bundle(tokenizer=TOKENIZER, seed: int = 3, **model) -> Bundle:
    """A model with large random weights."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "heads": 2, "feed_forward": 16}
    recipe = from_resolved(
        {
            "task": {"name": "translation"},
            "data": {"name": "files", "train": {"source": "a", "target": "b"}},
            "text": {"max_source": 20, "max_target": 20},
            "model": model if "name" in model else {"name": "transformer", **sizes, **model},
        }
    )
    network = build_model(recipe, len(tokenizer.vocabulary), len(tokenizer.vocabulary)).eval()
    torch.manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return Bundle(recipe, network, tokenizer, tokenizer)


LINES = ["a b", "c", "", "h g f e d", "a", "bb", "dd dd"]


def texts(one, strategy, **options):
    results = generate([one], [[Example(line) for line in LINES]], Options(strategy, **options))
    return [(result.candidates[0].text if result.candidates else "", result.status) for result in results]


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_are_those_of_greedy_search(tmp_path, workers):
    save(bundle(seed=2), tmp_path / "draft")
    model, strategy = bundle(), Speculative(draft=tmp_path / "draft", draft_tokens=3)
    found = texts(model, strategy, batch=2, workers=workers)
    assert found == texts(model, Beam(beam=1))
    assert len(set(found)) > 5


def test_a_draft_that_does_not_fit_is_refused_with_a_sentence(tmp_path):
    other = Character.train(["a b c d e f g i"], TokenizerOptions(size=30))
    save(bundle(other), tmp_path / "other")
    save(bundle(positions="learned", max_positions=24), tmp_path / "short")
    load_plugin(GRU)
    gru = bundle(name="gru", hidden=8)
    assert models.get("gru").Config(hidden=8) == gru.recipe.model.config
    save(bundle(), tmp_path / "good")
    for model, draft, kind, sentence in (
        (bundle(), "other", BundleError, "other: its source vocabulary is another than the model's"),
        (bundle(), "short", BundleError, "short: reads 24 positions at most"),
        (bundle(), "nowhere", BundleError, "nowhere: no such model folder"),
        (gru, "good", UsageError, r"the state of a Gru cannot forget tokens.*give GruState a method `crop\(length\)`"),
    ):
        with pytest.raises(kind, match=sentence):
            texts(model, Speculative(draft=tmp_path / draft))


def test_in_a_shell(forks, tmp_path):
    save(bundle(), tmp_path / "model")
    save(bundle(seed=2), tmp_path / "draft")
    content = "".join(f"{line}\n" for line in LINES)
    words = ("generate", "--model", tmp_path / "model", "--workers", "1", "--strategy")
    speculative = (*words, f"speculative,draft={tmp_path / 'draft'}")
    done = forks(*speculative, stdin=content)
    assert done.code() == 0, done.stderr
    assert done.stdout == forks(*words, "beam,beam=1,length_penalty=0", stdin=content).stdout
    for wrong, code, sentence in (
        ((*words, "speculative"), 2, "draft: missing"),
        ((*words, f"speculative,draft={tmp_path / 'no'}"), 5, "no such model"),
        ((*speculative, "--beam", "2"), 2, "speculative decoding writes 1 output"),
        ((*speculative, "--n-best", "2"), 2, "speculative decoding writes 1 output"),
    ):
        done = forks(*wrong, stdin=content)
        assert (done.code(), sentence in done.stderr) == (code, True), done.stderr
