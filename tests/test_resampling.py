"""Other subwords for the same text: against SentencePiece, and against the distribution worked out in full."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli.errors import UsageError
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.resampling import Resampler
from encdec_cli.text.subword import SentencePiece
from encdec_cli.text.tokenizer import Character

SYMBOLS = ("<turn>",)


SYLLABLES = ["lo", "w", "er", "est", "ne", "s", "wi", "de", "sh", "ow", "ing", "l", "y"]


def some_lines(count: int) -> list[str]:
    """Lines of words that have parts in common."""
    random = Random(1)

    def word() -> str:
        return "".join(random.choices(SYLLABLES, range(len(SYLLABLES), 0, -1), k=random.randint(1, 4)))

    return [" ".join(word() for _ in range(random.randint(1, 12))) for _ in range(count)]


@cache
def tokenizer(algorithm: str) -> SentencePiece:
    return SentencePiece.train(some_lines(300), TokenizerOptions(350, algorithm, SYMBOLS))


def resampler(algorithm: str, amount: float) -> Resampler:
    return Resampler(tokenizer(algorithm), algorithm, amount, SYMBOLS)


def segmentations(text: str, pieces: dict[str, int]) -> list[list[int]]:
    if not text:
        return [[]]
    cuts = [(pieces[text[:end]], text[end:]) for end in range(1, len(text) + 1) if text[:end] in pieces]
    return [[first, *others] for first, rest in cuts for others in segmentations(rest, pieces)]


TEXTS = st.sampled_from(["lowest", "slower", "news", "<turn>", "<s>", "<0x41>", "ö", "▁", "  ", "🙂", "xyz"])


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@given(st.lists(TEXTS, max_size=9).map(" ".join), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_the_text_stays_the_same(algorithm, text, seed):
    one = tokenizer(algorithm)
    ids = one.encode(text)
    other = resampler(algorithm, 0.3)(ids, Random(seed))
    assert one.decode(other) == one.decode(ids)
    symbol = one.vocabulary.id("<turn>")
    assert other.count(symbol) == ids.count(symbol)


@pytest.mark.parametrize(("algorithm", "amount"), [("unigram", 100.0), ("bpe", 1e-12)])
def test_without_noise_it_is_what_sentencepiece_does(algorithm, amount):
    one, again = tokenizer(algorithm), resampler(algorithm, amount)
    random = Random(5)
    for _ in range(100):
        text = " ".join("".join(random.choices("lowernsthdia", k=random.randint(1, 9))) for _ in range(4))
        assert again(one.encode(text), random) == one.encode(text)


def test_a_unigram_segmentation_is_drawn_by_its_probability_to_the_power():
    one = tokenizer("unigram")
    scores = one.scores()
    every = segmentations("\u2581slower", {one.vocabulary.token(id): id for id in scores})
    weights = [math.exp(0.3 * sum(scores[id] for id in ids)) for ids in every]
    draw, random, ids = resampler("unigram", 0.3), Random(1), one.encode("slower")
    counts = Counter(tuple(draw(ids, random)) for _ in range(20_000))
    assert len(every) > 10
    assert counts.keys() <= {tuple(ids) for ids in every}
    for found, weight in zip(every, weights, strict=True):
        share = weight / sum(weights)
        assert abs(counts[tuple(found)] / 20_000 - share) < 4 * math.sqrt(share / 20_000) + 1e-4


def test_bpe_dropout_is_that_of_the_paper():
    one = tokenizer("bpe")
    scores, ids = one.scores(), one.encode("lower")
    ranks = {one.vocabulary.token(id): score for id, score in scores.items()}
    expected: Counter[tuple[str, ...]] = Counter()

    def merge(parts: tuple[str, ...], chance: float) -> None:
        """Follow every choice of algorithm 1: which of the possible merges are left out."""
        places = [i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks]
        places.sort(key=lambda i: -ranks[parts[i] + parts[i + 1]])
        for tried, i in enumerate(places):  # all before it are left out, it is not
            merge((*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]), chance * 0.4**tried * 0.6)
        expected[parts] += chance * 0.4 ** len(places)

    merge(tuple("\u2581lower"), 1.0)
    draw, random = resampler("bpe", 0.4), Random(1)
    counts = Counter(tuple(map(one.vocabulary.token, draw(ids, random))) for _ in range(20_000))
    assert len(expected) > 5
    assert counts.keys() <= expected.keys()
    for parts, share in expected.items():
        assert abs(counts[parts] / 20_000 - share) < 4 * math.sqrt(share / 20_000) + 1e-4


def test_tokenizers_without_subwords_are_refused():
    with pytest.raises(UsageError, match=r"regularize\.subword_sampling: a character tokenizer"):
        Resampler(Character.train(["abc"], TokenizerOptions(20)), "unigram", 0.1, ())


def test_what_is_no_probability_is_refused():
    with pytest.raises(UsageError, match=r"regularize\.subword_sampling: 1\.5 is the probability"):
        resampler("bpe", 1.5)
