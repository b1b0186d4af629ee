"""Tokenizers: text comes back, nothing is unknown to bytes, training is repeatable, mistakes are sentences."""

from __future__ import annotations

import signal
import subprocess
import sys
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encdec_cli.errors import BundleError, DataError, UsageError
from encdec_cli.text.options import evenly
from encdec_cli.text.subword import _interruptible
from encdec_cli.text.tokenizer import KINDS, Tokenizer, TokenizerOptions, load_tokenizer, train_tokenizer
from encdec_cli.text.vocabulary import BOS, EOS, PAD, SPECIAL, UNK, Vocabulary

LINES = [
    f"the {word} fox number {i * 37} jumps over  it, says Zoë" for i, word in enumerate(["quick", "lazy", "brown"] * 9)
]
OPTIONS = TokenizerOptions(size=400, symbols=("<turn>", "<2de>"))


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def subword(request: pytest.FixtureRequest) -> Tokenizer:
    options = TokenizerOptions(size=400, symbols=("<turn>", "<2de>"), algorithm=request.param)
    return train_tokenizer("sentencepiece", LINES, options)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back_from_subwords_and_nothing_is_unknown(subword: Tokenizer, text: str) -> None:
    ids = subword.encode(text)
    assert subword.decode(ids) == text
    assert not {PAD, UNK, BOS, EOS} & set(ids)


@pytest.mark.parametrize(
    "text", ["two  spaces ", " lead", "tab\there", "ﬁ ① Å e\u0301 \u00a0\u202f", "a\u2028b", "<s> </s>"]
)
def test_subwords_do_not_normalise(subword: Tokenizer, text: str) -> None:
    assert subword.decode(subword.encode(text)) == text


def test_the_one_documented_exception(subword: Tokenizer) -> None:
    assert subword.decode(subword.encode("a\u2581b")) == "a b"


@pytest.mark.parametrize("kind", list(KINDS))
def test_symbols_are_one_token(kind: str) -> None:
    tokenizer = train_tokenizer(kind, LINES, OPTIONS)
    symbol = tokenizer.vocabulary.id("<turn>")
    assert symbol > EOS
    assert tokenizer.encode("the fox <turn> it").count(symbol) == 1


def test_digits_stand_alone(subword: Tokenizer) -> None:
    pieces = [subword.vocabulary.token(id).strip("\u2581") for id in subword.encode("number 370 333")]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("370333")


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_twice_gives_the_same_bytes_and_they_load(kind: str) -> None:
    first, second = (train_tokenizer(kind, iter(LINES), OPTIONS) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()
    loaded = load_tokenizer(kind, first.to_bytes())
    assert loaded.vocabulary == first.vocabulary
    assert loaded.vocabulary.sha256 == first.vocabulary.sha256
    assert loaded.encode(LINES[3]) == first.encode(LINES[3])
    assert loaded.kind == kind
    assert loaded.to_bytes() == first.to_bytes()


@pytest.mark.parametrize("kind", list(KINDS))
def test_special_ids(kind: str) -> None:
    tokenizer = train_tokenizer(kind, LINES, OPTIONS)
    assert tokenizer.vocabulary.tokens[:4] == SPECIAL
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode([BOS, *ids, EOS, PAD, PAD]) == "the fox"
    assert not {PAD, BOS, EOS} & set(tokenizer.encode("<pad> <s> </s> the"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_lone_surrogate_is_replaced(kind: str) -> None:
    tokenizer = train_tokenizer(kind, [*LINES, "\ufffd"], TokenizerOptions(size=400))
    assert tokenizer.encode("a \ud800") == tokenizer.encode("a \ufffd")


def test_words_are_ranked_by_frequency_then_alphabet() -> None:
    tokenizer = train_tokenizer("word", ["b a c", "c b", "z"], TokenizerOptions(size=7))
    assert tokenizer.vocabulary.tokens == (*SPECIAL, "b", "c", "a")
    assert tokenizer.decode(tokenizer.encode("c  z b")) == "c <unk> b"


def test_characters_come_back_exactly() -> None:
    tokenizer = train_tokenizer("character", ["ab  c\tü"], TokenizerOptions(size=50, symbols=("<x>",)))
    assert tokenizer.decode(tokenizer.encode("ü  b<x>\tc")) == "ü  b<x>\tc"
    assert len(tokenizer.encode("<x>ab")) == 3
    assert tokenizer.decode(tokenizer.encode("aQb")) == "a<unk>b"


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_no_text_is_a_data_error(kind: str, lines: list[str]) -> None:
    if kind == "character" and lines:
        pytest.skip("a space is a character")
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(kind, lines, OPTIONS)


def test_a_vocabulary_too_small_says_what_is_needed() -> None:
    with pytest.raises(UsageError, match=r"100 is too small.*at least \d+"):
        train_tokenizer("sentencepiece", LINES, TokenizerOptions(size=100))


@pytest.mark.parametrize("lines", [["a"], ["x" * 50_000], ["a\tb", "c\0d"], ["日本語" * 3000]])
def test_tiny_long_and_odd_corpora_train(lines: list[str]) -> None:
    tokenizer = train_tokenizer("sentencepiece", lines, TokenizerOptions(size=8000))
    assert tokenizer.decode(tokenizer.encode(lines[0])) == lines[0]


@pytest.mark.parametrize("options", [{"size": 4}, {"symbols": ("a b",)}, {"symbols": ("<s>",)}])
def test_wrong_options(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        TokenizerOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("content", [b"junk", b"", b"[]", b'{"kind": "word", "tokens": 3}', b"\xff" * 99])
def test_damaged_bytes_are_a_bundle_error(kind: str, content: bytes) -> None:
    with pytest.raises(BundleError):
        load_tokenizer(kind, content)


def test_sentencepiece_prints_nothing() -> None:
    code = """
from encdec_cli.text.tokenizer import *
t = train_tokenizer("sentencepiece", ["hello there general 12"] * 30, TokenizerOptions(size=300))
load_tokenizer("sentencepiece", t.to_bytes()).decode([5, 6])
try:
    train_tokenizer("sentencepiece", ["abc"], TokenizerOptions(size=50))
except Exception as error:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == done.stderr == b""


@given(st.integers(0, 300), st.integers(1, 40))
def test_evenly_takes_every_so_many_lines(count: int, limit: int) -> None:
    chosen = [int(line) for line in evenly(map(str, range(count)), limit)]
    assert len(chosen) == count if count <= limit else limit / 2 <= len(chosen) <= limit
    assert len({b - a for a, b in pairwise(chosen)}) <= 1
    assert chosen[:1] == [0][:count]


def test_vocabulary_ids() -> None:
    vocabulary = Vocabulary((*SPECIAL, "ü", "b"))
    assert (len(vocabulary), vocabulary.id("b"), vocabulary.id("?"), vocabulary.token(4)) == (6, 5, UNK, "ü")
    assert vocabulary.sha256 != Vocabulary((*SPECIAL, "b", "ü")).sha256
    for wrong in (("a",), (*SPECIAL, "a", "a")):
        with pytest.raises(BundleError):
            Vocabulary(wrong)


def test_a_signal_is_heeded_while_pieces_are_learned():
    """SentencePiece does not come back to Python before it is done, which takes minutes of a large corpus."""

    def handle(*_):
        raise KeyboardInterrupt

    random = Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines = [" ".join("".join(random.choices(letters, k=8)) for _ in range(10)) for _ in range(40_000)]
    before, learned = signal.signal(signal.SIGALRM, handle), []
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            learned.append(train_tokenizer("sentencepiece", lines, TokenizerOptions(size=4000)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not learned


def test_what_goes_wrong_in_the_thread_that_learns_pieces_is_told():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        _interruptible(fail)
