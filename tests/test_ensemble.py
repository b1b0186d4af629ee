"""Ensembles: both averages by hand, weights, models of different kinds and of different source vocabularies."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import A, B, C, Scripted, TinyGru, bounds, pad, tiny_transformer
from torch import Tensor

from encdec_cli.bundle.bundle import Bundle, build_model
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.ensemble import Ensemble
from encdec_cli.decoding.force import score_targets
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.errors import BundleError, UsageError
from encdec_cli.generation.lines import Options, generate
from encdec_cli.models.model import Memory
from encdec_cli.recipe import from_resolved
from encdec_cli.text.example import Example
from encdec_cli.text.units import Word
from encdec_cli.text.vocabulary import BOS, EOS, Vocabulary, with_special
from tests.conftest import encdec

AVERAGES = ("probabilities", "log-probabilities")
LINES = [[5, 6, 7, EOS], [20, EOS], [9, 9, 30, 31, EOS]]
ONE, TWO = {(): {A: 0.8, B: 0.2}}, {(): {A: 0.1, B: 0.4, C: 0.5}}


def first_step(models, ensemble: Ensemble) -> list[float]:
    scores = Stepper(models, *pad([[4, EOS]]), ensemble=ensemble).step(torch.tensor([BOS]))
    return scores.log_probs().exp().tolist()[0]


def search(models, ensemble: Ensemble, beam: int = 3):
    stepper = Stepper(models, *pad(LINES), beam, ensemble)
    return Beam(beam=beam, length_penalty=0.7)(stepper, bounds(len(LINES), [4, 12, 9]), [])


def test_the_mean_of_probabilities_by_hand():
    models = [Scripted(ONE), Scripted(TWO)]
    assert first_step(models, Ensemble()) == pytest.approx([0, 0, 0, 0, 0.45, 0.3, 0.25])
    weighted = first_step(models, Ensemble(weights=(0.7, 0.3)))
    assert weighted == pytest.approx([0, 0, 0, 0, 0.59, 0.26, 0.15])


def test_the_mean_of_log_probabilities_by_hand():
    models = [Scripted(ONE), Scripted(TWO)]
    # sqrt(.8 x .1) = sqrt(.08) = sqrt(.2 x .4): the two tokens that both models know are equal.
    assert first_step(models, Ensemble("log-probabilities")) == pytest.approx([0, 0, 0, 0, 0.5, 0.5, 0])
    weighted = first_step(models, Ensemble("log-probabilities", (3.0, 1.0)))
    a, b = 0.8**0.75 * 0.1**0.25, 0.2**0.75 * 0.4**0.25
    assert weighted == pytest.approx([0, 0, 0, 0, a / (a + b), b / (a + b), 0])


def test_models_that_agree_on_no_token_leave_none_possible():
    models = [Scripted({(): {A: 1.0}}), Scripted({(): {B: 1.0}})]
    assert first_step(models, Ensemble("log-probabilities")) == [0.0] * 7


def test_the_unit_of_weights_does_not_matter():
    models = [TinyGru(seed=1), TinyGru(seed=2)]
    for average in AVERAGES:
        small, *large = (first_step(models, Ensemble(average, (2 * unit, unit))) for unit in (1e-6, 1e6, 8e307))
        assert large == [pytest.approx(small, abs=1e-6)] * 2


@settings(max_examples=12, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=3), st.sampled_from(AVERAGES), st.booleans())
def test_a_model_with_itself_is_the_model_whatever_the_weights(weights, average, recurrent):
    model = TinyGru() if recurrent else tiny_transformer()
    alone = search([model], Ensemble())
    together = search([model] * len(weights), Ensemble(average, tuple(weights)))
    for ours, theirs in zip(alone, together, strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_scores == pytest.approx(other.token_scores, abs=1e-4)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("weights", [(), (0.7, 0.1, 0.2)])
def test_forced_scores_of_models_of_different_kinds_are_those_of_the_search(average, weights):
    models = [tiny_transformer(seed=1), TinyGru(seed=2), TinyGru(seed=3)]
    ensemble = Ensemble(average, weights)
    source, mask = pad(LINES)
    for sentence, hypotheses in enumerate(search(models, ensemble)):
        for one in hypotheses:
            target = torch.tensor([[BOS, *one.tokens, *[EOS] * one.finished]])
            forced = score_targets(models, source[[sentence]], mask[[sentence]], target, ensemble)[0]
            assert one.token_scores == pytest.approx(forced.tolist(), abs=1e-4)


def test_forced_scores_of_an_ensemble_do_not_depend_on_the_chunk(monkeypatch):
    models, (source, mask) = [TinyGru(seed=1), TinyGru(seed=2)], pad(LINES[:2])
    target, _ = pad([[BOS, 8, 9, 10, EOS], [BOS, 11, EOS]])
    whole = score_targets(models, source, mask, target, Ensemble("log-probabilities"))
    assert whole[1, 2:].tolist() == [0.0, 0.0]  # padding counts nothing
    monkeypatch.setattr("encdec_cli.decoding.force.POSITIONS", 2)
    torch.testing.assert_close(score_targets(models, source, mask, target, Ensemble("log-probabilities")), whole)


class Shifted(TinyGru):
    """The same model for sources whose ids are all larger by 3."""

    def encode(self, source: Tensor, mask: Tensor) -> Memory:
        return super().encode((source - 3) * mask, mask)


@pytest.mark.parametrize("average", AVERAGES)
def test_each_model_may_read_ids_and_padding_of_its_own(average):
    models, (source, mask), (_, wide) = [TinyGru(), Shifted()], pad(LINES), pad(LINES, extra=2)
    shifted = pad([[token + 3 for token in line] for line in LINES], extra=2)[0]
    sources, masks, ensemble = [source, shifted], [mask, wide], Ensemble(average)
    found = Beam(beam=3)(Stepper(models, sources, masks, 3, ensemble), bounds(3, 8), [])
    alone = Beam(beam=3)(Stepper(models[:1], source, mask, 3), bounds(3, 8), [])
    assert [[one.tokens for one in each] for each in found] == [[one.tokens for one in each] for each in alone]
    target, _ = pad([[BOS, *each[0].tokens, EOS] for each in found])
    forced = score_targets(models, sources, masks, target, ensemble)
    torch.testing.assert_close(forced, score_targets(models[:1], source, mask, target), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_is_a_number_above_0(weight):
    with pytest.raises(ValueError, match="each weight must be above 0"):
        Ensemble(weights=(1.0, weight))


def test_a_weight_that_counts_for_nothing_beside_another_is_told_of():
    with pytest.raises(ValueError, match="1e-320 beside 1"):
        Ensemble(weights=(1e-320, 1.0))


def test_every_model_needs_a_weight_where_one_has_any():
    with pytest.raises(ValueError, match="2 weights for 3 models"):
        first_step([Scripted(ONE)] * 3, Ensemble(weights=(1.0, 2.0)))


# --- from text to text -------------------------------------------------------------------------------------------

WORDS = [f"w{number}" for number in range(12)]
TEXTS = [Example(" ".join(WORDS[start::step])) for start in range(6) for step in (2, 3, 5)]


def tokenizer(words: list[str]) -> Word:
    return Word(Vocabulary(with_special(words)))


def make_bundle(seed: int = 1, target: list[str] = WORDS, max_source: int = 32) -> Bundle:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "heads": 2, "feed_forward": 16, "tie": "none"}
    recipe = from_resolved(
        {
            "task": {"name": "translation"},
            "data": {"name": "files", "train": {"source": "a", "target": "b"}},
            "text": {"tokenizer": "word", "max_source": max_source},
            "model": {"name": "transformer", **sizes},
            "decoding": {"name": "beam", "beam": 3},
        }
    )
    torch.manual_seed(seed)
    source, written = tokenizer(WORDS), tokenizer(target)
    model = build_model(recipe, len(source.vocabulary), len(written.vocabulary)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return Bundle(recipe, model, source, written)


def renumbered(bundle: Bundle) -> Bundle:
    """The same model with a source vocabulary in another order."""
    model, source = copy.deepcopy(bundle.model), tokenizer(["unused", *WORDS[::-1]])
    rows = [bundle.source.vocabulary.id(token) for token in source.vocabulary.tokens]
    embedding = torch.nn.Embedding(len(rows), 16, padding_idx=0)
    with torch.no_grad():
        embedding.weight.copy_(model.source_embedding.weight[rows])
    model.source_embedding = embedding
    return Bundle(bundle.recipe, model, source, bundle.target)


def written(bundles: list[Bundle], **options) -> list[list[tuple[str, float]]]:
    settings = Options(bundles[0].recipe.decoding.config, n_best=3, **options)
    return [[(one.text, one.score) for one in result.candidates] for result in generate(bundles, [TEXTS], settings)]


@pytest.mark.parametrize("workers", [1, 2])
def test_source_vocabularies_of_an_ensemble_may_differ(workers):
    bundle = make_bundle()
    alone, together = written([bundle]), written([bundle, renumbered(bundle)], workers=workers, batch=8)
    for ours, theirs in zip(alone, together, strict=True):
        assert [text for text, _ in ours] == [text for text, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-4)


def test_a_source_that_one_model_cannot_read_whole_is_truncated():
    short = make_bundle(seed=2, max_source=4)
    results = list(generate([make_bundle(), short], [TEXTS], Options(short.recipe.decoding.config)))
    assert [result.truncated for result in results] == [len(result.example.source.split()) > 3 for result in results]
    assert {result.truncated for result in results} == {True, False}


def test_weights_and_average_reach_the_search():
    bundles = [make_bundle(seed=1), make_bundle(seed=2)]
    mostly = written(bundles, ensemble=Ensemble(weights=(1e6, 1.0)))
    assert [[text for text, _ in each] for each in mostly] == [
        [text for text, _ in each] for each in written(bundles[:1])
    ]
    assert written(bundles, ensemble=Ensemble("log-probabilities")) != written(bundles)


def test_bundles_that_do_not_fit_together_are_refused():
    bundle = make_bundle()
    with pytest.raises(BundleError, match="must share their target vocabulary"):
        written([bundle, make_bundle(target=WORDS[::-1])])
    with pytest.raises(UsageError, match="found 3, and 2 times --model"):
        written([bundle, bundle], ensemble=Ensemble(weights=(1.0, 1.0, 1.0)))


def test_flags_of_an_ensemble(copy_run):
    models = ("--model", copy_run, "--model", copy_run)
    done = encdec("generate", *models, "--weights", "0.7,0.3", "--ensemble", "log-probabilities", stdin="1 2 3\n")
    assert (done.returncode, done.stdout) == (0, "1 2 3\n"), done.stderr
    for weights, words in (
        ("0.7", "--weights: found 1, and 2 times --model; give one number for each"),
        ("0.7,x", "--weights 0.7,x: expected a number for each --model, separated by commas, such as 0.7,0.3."),
        ("1,0", "--weights: found 0.0; each weight must be above 0"),
    ):
        done = encdec("generate", *models, "--weights", weights, stdin="1\n")
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
