"""The ways in which a phrase can stand in an output, by hand for each kind of tokenizer and of script."""

from __future__ import annotations

import io
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli.errors import DataError
from encdec_cli.generation.phrases import constraint_ids, constraints_of_columns, constraints_of_record, spellings
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.subword import SentencePiece
from encdec_cli.text.units import Character, Word

APART = "the house is big and red , however they saw houses ( in the old town ) . и дом"
JOINED = (
    "我 他 喜欢 爱 猫 狗 书 。",
    "私 は 猫 犬 も が 好き です 。",
    "ฉัน ชอบ แมว มาก รัก หมา",
    "( house ) [ town ] , yes",
)
"""Words with spaces between them, and what is written without any."""


def corpus() -> list[str]:
    chance = random.Random(1)
    apart = [" ".join(chance.choices(APART.split(), k=8)) for _ in range(400)]
    return apart + ["".join(chance.choices(words.split(), k=8)) for words in JOINED for _ in range(60)]


PIECES = SentencePiece.train(corpus(), TokenizerOptions(size=420, algorithm="bpe"))


def spelled(tokenizer, phrase: str, **options) -> list[str]:
    ways = spellings(tokenizer, phrase, **options)
    return [" ".join(tokenizer.vocabulary.token(id) for id in way) for way in ways]


@pytest.mark.parametrize(
    ("phrase", "as_words", "anywhere"),
    [
        ("house", ["▁house"], ["▁house", "house"]),
        ("  house ", ["▁house"], ["▁house", "house"]),
        ("the old town", ["▁the ▁old ▁town"], ["▁the ▁old ▁town", "t he ▁old ▁town"]),
        ("дом", ["▁дом"], ["▁дом", "дом"]),
        # Punctuation joins what stands before it.
        (",", ["▁,", ","], ["▁,", ","]),
        (", however", ["▁, ▁however", ", ▁however"], ["▁, ▁however", ", ▁however"]),
        ("(house)", ["▁( house )", "( house )"], ["▁( house )", "( house )"]),
        # So does what is written without spaces; the way that holds the other is not needed beside it.
        ("喜欢", ["▁喜欢", "喜欢"], ["▁喜欢", "喜欢"]),
        ("猫が", ["▁猫 が", "猫 が"], ["▁猫 が", "猫 が"]),
        ("แมว", ["▁แมว", "แมว"], ["▁แมว", "แมว"]),
        ("好き", ["好き"], ["好き"]),
        # What has no piece is spelled in bytes.
        ("日", ["<0xE6> <0x97> <0xA5>"], ["<0xE6> <0x97> <0xA5>"]),
        ("42", ["▁ <0x34> <0x32>"], ["<0x34> <0x32>"]),
        ("zebra", ["▁ <0x7A> e b r a"], ["<0x7A> e b r a"]),
    ],
)
def test_pieces_by_hand(phrase, as_words, anywhere):
    assert spelled(PIECES, phrase, as_words=True) == as_words
    assert spelled(PIECES, phrase) == anywhere


def found(tokenizer, phrase: str, line: str, **options) -> bool:
    tokens = tokenizer.encode(line)
    ways = spellings(tokenizer, phrase, **options)
    return any(tokens[start : start + len(way)] == way for way in ways for start in range(len(tokens)))


@pytest.mark.parametrize(
    ("phrase", "line", "as_words", "anywhere"),
    [
        ("house", "house is", True, True),
        ("house", "the house", True, True),
        ("house", "(house)", False, True),
        ("house", "townhouse", False, True),
        ("house", "houses", False, False),  # another token: tokens are looked for, not letters
        (",", "the house, however", True, True),
        ("喜欢", "我喜欢猫。", True, True),
        ("喜欢", "喜欢", True, True),
        ("喜欢", "is 喜欢 (喜欢)", True, True),
        ("猫", "私は猫が", True, True),
        ("แมว", "ฉันชอบแมวมาก", True, True),
        ("日", "猫日", True, True),
    ],
)
def test_where_a_phrase_is_found(phrase, line, as_words, anywhere):
    assert found(PIECES, phrase, line, as_words=True) is as_words
    assert found(PIECES, phrase, line) is anywhere


SYLLABLES = [f"{first}{second}" for first in "bdfgkl" for second in ("a", "e", "i", "on", "ut")]
SMALL = SentencePiece.train(
    [f"the {word} is here ({word}) and {word}, yes" for word in SYLLABLES for _ in range(5)], TokenizerOptions(size=400)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SYLLABLES), min_size=1, max_size=2), st.sampled_from(["{}", "the {}", "is ({}) and"]))
def test_a_phrase_is_found_wherever_it_stands_as_a_word(words, context):
    phrase = " ".join(words)
    assert found(SMALL, phrase, context.format(phrase))
    assert found(SMALL, phrase, context.format(phrase), as_words=True) or "(" in context
    assert all(SMALL.decode(way).strip() == phrase for way in spellings(SMALL, phrase))


def test_a_bracket_that_is_one_piece_with_what_follows_hides_nothing():
    tokenizer = SentencePiece.train(["(-x) and y-x"] * 50, TokenizerOptions(size=300, algorithm="bpe"))
    assert tokenizer.vocabulary.token(tokenizer.encode("(-x")[0]) == "▁(-"
    assert found(tokenizer, "-x", "y-x", as_words=True)


def of_others(**options) -> SentencePiece:
    """A tokenizer as SentencePiece trains it unless told otherwise."""
    model, ids = io.BytesIO(), {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=90, **ids, **options
    )
    return SentencePiece.from_bytes(model.getvalue())


def test_a_tokenizer_of_others_that_reads_a_line_break_as_a_space():
    tokenizer = of_others()
    assert tokenizer.encode("\n") == []
    assert found(tokenizer, "house", "(house)")
    assert found(tokenizer, "喜欢", "我喜欢猫。", as_words=True)
    assert not found(tokenizer, "house", "townhouse", as_words=True)


def test_a_tokenizer_of_others_that_puts_no_space_before_a_line():
    tokenizer = of_others(add_dummy_prefix=False)
    assert tokenizer.encode("house") != tokenizer.encode("the house")[-len(tokenizer.encode("house")) :]
    for line in ("house is", "the house"):
        assert found(tokenizer, "house", line)
        assert found(tokenizer, "house", line, as_words=True)


@pytest.mark.parametrize("options", [{}, {"as_words": True}])
def test_words_and_characters(options):
    word, character = (kind.train(["ba be (", *corpus()], TokenizerOptions(size=120)) for kind in (Word, Character))
    assert spellings(word, " ba be ", **options) == [word.encode("ba be")]
    assert spellings(word, "ba nowhere", **options) == []
    for tokenizer in (word, character):
        for phrase in ("house", ", however"):
            assert spellings(tokenizer, phrase, **options) == [tokenizer.encode(phrase)]
    # With characters a phrase is any text that holds it.
    assert found(character, "house", "townhouse", **options)
    assert found(character, "猫", "我喜欢猫。", **options)


def test_alternatives_of_a_constraint():
    word = Word.train(corpus(), TokenizerOptions(size=99))
    assert constraint_ids(word, ["the zebra", "house"]) == [word.encode("house")]
    with pytest.raises(DataError, match="constraint 'zebra', 'the zebra': the model cannot write it"):
        constraint_ids(word, ["zebra", "the zebra"])


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, []),
        ([], []),
        (["a", [" b c ", "d|e"]], [["a"], ["b c", "d|e"]]),
        ("a", "field 'constraints': expected a list, found str"),
        ([1], "expected texts or lists of texts, found int"),
        ([["a", None]], "expected texts or lists of texts, found NoneType"),
        (["a", " "], "found an empty phrase"),
        ([[]], "found an empty phrase"),
    ],
)
def test_constraints_of_a_record(given, found):
    if isinstance(found, str):
        with pytest.raises(DataError, match=found):
            constraints_of_record({"constraints": given})
    else:
        assert constraints_of_record({"constraints": given}) == found
        assert constraints_of_record({}) == []


def test_constraints_of_columns():
    assert constraints_of_columns(["a", "", " b c | d", " "]) == [["a"], ["b c", "d"]]
    with pytest.raises(DataError, match="found an empty phrase"):
        constraints_of_columns(["a|"])
