"""The same hypotheses and scores as CTranslate2 and as Hugging Face `generate`, on the same weights.

Where definitions differ the test says how; docs/decoding.md has the table.
"""

from __future__ import annotations

import importlib.util
import random

import ctranslate2
import pytest
import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.bundle.ctranslate2 import CTranslate2
from encdec_cli.bundle.export import export
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.forced import Forced
from encdec_cli.decoding.hypothesis import Limits
from encdec_cli.decoding.rules import NoRepeatNgram
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.text.vocabulary import BOS, EOS, PAD
from tests.benchmarks.huggingface import to_huggingface
from tests.scripted import pad

MAXIMUM = 20
SOURCES = 40
SEARCHES = [
    {"beam": 1, "length_penalty": 0.0},
    {"beam": 4, "length_penalty": 0.0},
    {"beam": 4, "length_penalty": 1.0},
    {"beam": 4, "length_penalty": 0.6},
]
Found = list[list[tuple[list[int], float]]]
"""For each sentence its hypotheses, tokens without EOS and score, best first."""


@pytest.fixture(scope="module")
def bundle(copy_run) -> Bundle:
    """A model that copies digits, and is unsure where they are many or repeat themselves."""
    return Bundle.load(copy_run)


def sources(bundle: Bundle) -> list[list[int]]:
    random_ = random.Random(3)
    texts = [" ".join(random_.choice("0123456789") for _ in range(random_.randint(1, 7))) for _ in range(SOURCES)]
    return [bundle.source.encode(text) for text in texts]


def ours(bundle: Bundle, rules=(), **search) -> Found:
    """Beam search over every token of the vocabulary: the peers have no word on PAD and BOS."""
    ids, mask = pad([[*source, EOS] for source in sources(bundle)])
    stepper = Stepper([bundle.model], ids, mask, search["beam"], forbidden=())
    limits = Limits(torch.zeros(SOURCES, dtype=torch.int64), torch.full((SOURCES,), MAXIMUM))
    found = Beam(**search)(stepper, limits, rules)
    return [[(one.tokens, one.score) for one in hypotheses] for hypotheses in found]


def assert_same(found: Found, expected: Found) -> None:
    """The same hypotheses in the same order, with the same scores."""
    for one, other in zip(found, expected, strict=True):
        assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]
        assert [score for _, score in one] == pytest.approx([score for _, score in other], abs=2e-4)


# CTranslate2


@pytest.fixture(scope="module")
def translator(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer") / "model"
    export(CTranslate2(), bundle, folder, None)
    return ctranslate2.Translator(str(folder), inter_threads=1, intra_threads=1)


def ctranslate2_found(bundle: Bundle, translator, beam: int, length_penalty: float, **options) -> Found:
    tokens = [[bundle.source.vocabulary.token(id) for id in source] for source in sources(bundle)]
    results = translator.translate_batch(
        tokens,
        beam_size=beam,
        num_hypotheses=beam,
        length_penalty=length_penalty,
        max_decoding_length=MAXIMUM + 1,  # it counts EOS
        max_input_length=0,
        min_decoding_length=0,
        return_scores=True,
        return_end_token=True,
        **options,
    )
    found: Found = []
    for result in results:
        ids = [[bundle.target.vocabulary.id(token) for token in one] for one in result.hypotheses]
        found.append([(one[:-1], s) for one, s in zip(ids, result.scores, strict=True) if one and one[-1] == EOS])
    return found


def ended(found: Found, other: Found) -> tuple[Found, Found]:
    """The best of each sentence, where both programs came to an end."""
    pairs = [(one[:1], two[:1]) for one, two in zip(found, other, strict=True) if one and two]
    assert len(pairs) > 0.8 * SOURCES
    return [one for one, _ in pairs], [two for _, two in pairs]


# Without a length penalty CTranslate2 stops a sentence as soon as its best hypothesis ends, as none can overtake it.
@pytest.mark.parametrize("search", [SEARCHES[0], *SEARCHES[2:]], ids=str)
def test_the_best_is_that_of_ctranslate2(bundle, translator, search):
    assert_same(*ended(ours(bundle, **search), ctranslate2_found(bundle, translator, **search)))


def test_blocked_bigrams_are_those_of_ctranslate2(bundle, translator):
    """Greedily, and the tokens alone: it takes what is blocked out of the normalisation, and ranks by that."""
    found = ours(bundle, [NoRepeatNgram(2)], **SEARCHES[0])
    theirs = ctranslate2_found(bundle, translator, no_repeat_ngram_size=2, **SEARCHES[0])
    one, other = ended(found, theirs)
    assert [best[0][0] for best in one] == [best[0][0] for best in other]


def forced(bundle: Bundle) -> tuple[list[int], Forced]:
    tokens = bundle.target.encode("7 7")
    return tokens, Forced([tokens] * SOURCES, [], torch.device("cpu"))


def assert_same_but_for_the_prefix(found: Found, expected: Found) -> None:
    """Equal hypotheses, whose scores differ by that of the prefix, which is the same for all of a sentence."""
    for one, other in zip(found, expected, strict=True):
        assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]
        prefix = [score - rest for (_, score), (_, rest) in zip(one, other, strict=True)]
        assert prefix == pytest.approx(prefix[:1] * len(prefix), abs=1e-3)


def test_a_forced_prefix_is_that_of_ctranslate2(bundle, translator):
    """Its score leaves the prefix out."""
    tokens, rule = forced(bundle)
    words = [[bundle.target.vocabulary.token(token) for token in tokens]] * SOURCES
    theirs = ctranslate2_found(bundle, translator, target_prefix=words, **SEARCHES[0])
    assert_same_but_for_the_prefix(*ended(ours(bundle, [rule], **SEARCHES[0]), theirs))


# Hugging Face


@pytest.fixture(scope="module")
def huggingface(bundle):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install -c constraints.txt transformers")
    return to_huggingface(bundle)


@torch.inference_mode()
def huggingface_found(bundle: Bundle, model, beam: int, length_penalty: float, prefix=(), **options) -> Found:
    from transformers import GenerationConfig

    ids, mask = pad([[*source, EOS] for source in sources(bundle)])
    settings = GenerationConfig(
        num_beams=beam,
        num_return_sequences=beam,
        length_penalty=length_penalty,
        early_stopping=True,
        max_new_tokens=MAXIMUM + 1 - len(prefix),
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    start = torch.tensor([[BOS, *prefix]] * SOURCES)
    out = model.generate(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=start, generation_config=settings)
    scores = out.sequences_scores.tolist() if beam > 1 else [0.0] * len(out.sequences)
    rows = [(row[1:].tolist(), score) for row, score in zip(out.sequences, scores, strict=True)]
    found: Found = []
    for first in range(0, len(rows), beam):
        some = rows[first : first + beam]
        found.append([(row[: row.index(EOS)] if EOS in row else row, score) for row, score in some])
    return found


@pytest.mark.parametrize("search", SEARCHES[1:], ids=str)
def test_all_hypotheses_and_scores_are_those_of_huggingface(bundle, huggingface, search):
    assert_same(ours(bundle, **search), huggingface_found(bundle, huggingface, **search))


def test_greedy_outputs_are_those_of_huggingface(bundle, huggingface):
    found, theirs = ours(bundle, **SEARCHES[0]), huggingface_found(bundle, huggingface, **SEARCHES[0])
    pairs = [(a[0][0], b[0][0]) for a, b in zip(found, theirs, strict=True) if len(a[0][0]) < MAXIMUM]
    assert len(pairs) > 0.8 * SOURCES
    assert all(one == two for one, two in pairs)


def test_blocked_bigrams_are_those_of_huggingface(bundle, huggingface):
    found = ours(bundle, [NoRepeatNgram(2)], **SEARCHES[2])
    assert_same(found, huggingface_found(bundle, huggingface, no_repeat_ngram_size=2, **SEARCHES[2]))


def test_a_forced_prefix_is_that_of_huggingface(bundle, huggingface):
    """Its score leaves the prefix, `decoder_input_ids`, out."""
    tokens, rule = forced(bundle)
    theirs = huggingface_found(bundle, huggingface, prefix=tokens, **SEARCHES[1])
    assert_same_but_for_the_prefix(ours(bundle, [rule], **SEARCHES[1]), theirs)
