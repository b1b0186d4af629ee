"""What `generate` promises of a line: keys in words, prefixes, allowed outputs, the record, flags and --fail-on."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encdec_cli import cli
from encdec_cli.bundle.bundle import Bundle, build_model
from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.sampling import Sampling
from encdec_cli.errors import DataError, UsageError
from encdec_cli.generation.flags import FLAGS, flags, has_loop, is_copy, usual_ratios
from encdec_cli.generation.lines import TROUBLES, Candidate, Generated, Options, generate
from encdec_cli.recipe import from_resolved
from encdec_cli.text.example import Example
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.tokenizer import Word
from encdec_cli.text.vocabulary import UNK
from tests.conftest import save

WORDS = [f"{first}{second}" for first in "bdfgkl" for second in ("a", "e", "i", "on", "ut")]
TEXT = [" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(200)]


def make_bundle(source=None, target=None, task=None, **model) -> Bundle:
    """A random model that reads and writes words."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "heads": 2, "feed_forward": 16, **model}
    recipe = from_resolved(
        {
            "task": task or {"name": "translation"},
            "data": {"name": "files", "train": {"source": "a", "target": "b"}},
            "text": {"tokenizer": "word", "vocabulary": 100, "max_source": 12, "max_target": 24},
            "model": {"name": "transformer", **sizes},
            "decoding": {"name": "beam", "beam": 3, "max_length": 10},
        }
    )
    source = source or Word.train(TEXT, TokenizerOptions(size=100))
    target = target or source
    torch.manual_seed(5)
    network = build_model(recipe, len(source.vocabulary), len(target.vocabulary)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    return Bundle(recipe, network, source, target)


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


def results(bundle, strategy, *lines, **options):
    examples = [Example(line) if isinstance(line, str) else Example(line["source"], None, line) for line in lines]
    return list(generate([bundle], [examples], Options(strategy, **options)))


def texts(bundle, strategy, *lines):
    return [result.candidates[0].text for result in results(bundle, strategy, *lines)]


# --- keys in words -----------------------------------------------------------------------------------------------


def test_words_are_banned_and_boosted(bundle):
    line = TEXT[0]
    free = texts(bundle, Beam(beam=1, max_length=6), line)[0].split()
    banned = texts(bundle, Beam(beam=1, max_length=6, banned=[free[0], " ".join(free[1:3])]), line)[0]
    assert free[0] not in banned.split()
    assert " ".join(free[1:3]) not in banned
    other = next(word for word in WORDS if word not in free)
    assert other in texts(bundle, Beam(beam=1, max_length=6, boosted={other: 50.0}), line)[0].split()


def test_nothing_is_copied_from_the_source_but_its_end(bundle):
    lines = [" ".join(WORDS[i : i + 6]) for i in range(0, 24, 6)]
    for line, text in zip(
        lines, texts(bundle, Beam(beam=3, no_repeat_source_ngram=1, max_length=5), *lines), strict=True
    ):
        assert text
        assert not set(text.split()) & set(line.split())
    longer = texts(bundle, Beam(beam=3, no_repeat_source_ngram=10**20, max_length=5), *lines)
    assert longer == texts(bundle, Beam(beam=3, max_length=5), *lines)


def test_unknown_words_are_allowed_only_when_asked_for(bundle):
    bundle = make_bundle()
    with torch.no_grad():
        bundle.model.target_embedding.weight[UNK] *= 40
    lines = TEXT[:5]
    assert not any("<unk>" in text for text in texts(bundle, Beam(beam=2, max_length=6), *lines))
    assert any("<unk>" in text for text in texts(bundle, Beam(beam=2, max_length=6, allow_unknown=True), *lines))


def test_lengths_follow_the_source(bundle):
    lines = [" ".join(WORDS[:n]) for n in (1, 4, 9)]
    found = results(bundle, Beam(beam=2, min_length="0.5x+2", max_length="1x+1"), *lines)
    for n, result in zip((1, 4, 9), found, strict=True):
        assert all(min(n // 2 + 2, n + 1) <= len(one.tokens) <= n + 1 for one in result.candidates)
    # Where the least is above the most, the most counts.
    assert [len(r.candidates[0].tokens) for r in results(bundle, Beam(beam=2, min_length=9, max_length=4), *lines)] == [
        4
    ] * 3


def test_a_prefix_of_the_strategy_or_of_the_record_begins_the_output(bundle):
    line = TEXT[1]
    strategy = Beam(beam=2, prefix=f"{WORDS[3]} {WORDS[8]} ", max_length=5, min_length=4)
    own, none = {"source": line, "prefix": WORDS[0]}, {"source": line, "prefix": ""}
    first, second, third = texts(bundle, strategy, line, own, none)
    assert first.split()[:2] == [WORDS[3], WORDS[8]]
    assert second.split()[0] == WORDS[0]
    assert third == texts(bundle, Beam(beam=2, max_length=5, min_length=4), line)[0]
    # The minimum counts the prefix, and the maximum gives way to it.
    assert len(texts(bundle, Beam(prefix="ba be bi", max_length=2), line)[0].split()) == 3
    # What is not in the vocabulary is forced as what it is, and forbidden behind the prefix.
    unknown = texts(bundle, Beam(beam=2, max_length=6), {"source": line, "prefix": "ba nowhere"}, line)
    assert unknown[0].split()[:2] == ["ba", "<unk>"]
    assert "<unk>" not in unknown[0].split()[2:]
    assert unknown[1] == texts(bundle, Beam(beam=2, max_length=6), line)[0]


@pytest.mark.parametrize("strategy", [Beam, Sampling])
def test_only_allowed_outputs_are_written_by_workers_too(bundle, tmp_path, strategy):
    allowed = ["ba be", "ba bi bon but da de di", "fut", "gon gut"]
    (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in ["", *allowed, "ba be"]))
    chosen = strategy(beam=4, outputs=str(tmp_path / "list.txt"), max_length=1, min_length=5)
    found = results(bundle, chosen, *TEXT[:20], n_best=4, batch=4, workers=2)
    assert all(one.finished and one.text in allowed for result in found for one in result.candidates)
    if strategy is Beam:
        assert all(sorted(one.text for one in result.candidates) == sorted(allowed) for result in found)
    (result,) = results(bundle, chosen, {"source": "ba", "prefix": "ba"})
    assert result.candidates[0].text in allowed[:2]


def test_a_line_whose_prefix_no_output_has_is_named_after_those_before_it(bundle, tmp_path):
    (tmp_path / "list.txt").write_text("ba be\n")
    strategy = Beam(outputs=str(tmp_path / "list.txt"))
    examples = [Example("ba"), Example("be"), Example("bi", None, {"prefix": "be"}), Example("bon")]
    windows = [examples[:1], examples[1:]]
    found = []

    def decode():
        found.extend(result.candidates[0].text for result in generate([bundle], windows, Options(strategy)))

    sentence = r"line 3: no output in .*list.txt begins with the tokens of the prefix 'be'"
    with pytest.raises(DataError, match=sentence):
        decode()
    assert found == ["ba be"] * 2
    with pytest.raises(DataError, match="line 1: field 'prefix': expected text, found int"):
        results(bundle, Beam(), {"source": "ba", "prefix": 7})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file"),
        ("", "no allowed output; expected one on each line"),
        ("\n \n", "no allowed output"),
        ("ba\nnowhere\n", "list.txt:2: holds what is not in the model's vocabulary"),
        ("ba\nba be bi bon but da\n", "list.txt:2: 6 tokens, and the model writes at most 5"),
    ],
)
def test_a_list_of_outputs_that_cannot_be_used_is_refused(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    small = make_bundle(positions="learned", max_positions=6)
    with pytest.raises(DataError, match=sentence):
        results(small, Beam(outputs=str(tmp_path / "list.txt")), "ba")


def test_what_a_model_cannot_give_is_refused():
    other = make_bundle(target=Word.train(["x y z"], TokenizerOptions(size=10)), tie="decoder")
    with pytest.raises(UsageError, match="no_repeat_source_ngram: compares the tokens of source and output"):
        results(other, Beam(no_repeat_source_ngram=2), "ba")
    with pytest.raises(UsageError, match="boosted: 'ba' holds a word that is not in the vocabulary"):
        results(other, Beam(boosted={"ba": 1.0}), "ba")
    assert results(other, Beam(banned=["ba"]), "ba")[0].candidates  # it is never written anyway


# --- flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ("", False),
        ("a a a a a a a a", False),
        ("a a a a a a a a a", True),
        ("x y a b a b a b a b a b z", True),
        ("x a b a b a b a b z", False),
        ("a b c d a b c d a b c d", True),
        ("a b c d a b c d a b c", False),
        ("a b c d e f a b c d e f", False),  # twice is emphasis
        ("the cat and the dog and the cow and the pig and the hen", False),
    ],
)
def test_loops_by_hand(tokens, loop):
    numbers = {word: i for i, word in enumerate(dict.fromkeys(tokens.split()))}
    assert has_loop([numbers[word] for word in tokens.split()]) is loop


@given(st.lists(st.integers(0, 3), max_size=30))
def test_loops_are_those_of_a_slow_search(tokens):
    slow = any(
        all(tokens[i] == tokens[i - period] for i in range(start + period, start + period + length))
        for period in range(1, len(tokens))
        for length in [max(8, 2 * period)]
        for start in range(len(tokens) - period - length + 1)
    )
    assert has_loop(tokens) is slow


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12, unique=True), st.integers(3, 9), st.lists(st.integers(60, 90))
)
def test_planted_loops_are_found_and_lines_without_repetition_are_none(unit, times, rest):
    assert has_loop([*rest, *unit * (times + 8 // len(unit)), *rest])
    assert not has_loop([*unit, *dict.fromkeys(rest)])


def test_usual_ratios_leave_out_one_in_a_thousand_on_each_side():
    sources = np.full(10_000, 10)
    targets = np.arange(10_000)
    low, high = usual_ratios(sources, targets)
    assert ((targets + 10) / 20 < low).sum() == 9
    assert ((targets + 10) / 20 > high).sum() == 10


SENTENCE = "Wer zwei Hasen auf einmal jagt, der bekommt am Ende keinen von beiden."


@pytest.mark.parametrize(
    ("source", "output", "copy"),
    [
        (SENTENCE, SENTENCE.upper(), True),
        (SENTENCE, f"He said: {SENTENCE}", True),
        (SENTENCE, SENTENCE.replace("Hasen", "rabbits"), True),
        (SENTENCE, "If you run after two hares you will catch neither.", False),
        (SENTENCE, SENTENCE[:40], False),
        ("iPhone 15 Pro Max, 256 GB", "iPhone 15 Pro Max, 256 GB", False),  # names stay what they are
        ("1 2 3 4 5 6 7 8 9 " * 4, "1 2 3 4 5 6 7 8 9 " * 4, False),
    ],
)
def test_copies_by_hand(source, output, copy):
    assert is_copy(source, output) is copy


def test_flags_of_a_line(bundle):
    def found(source, output, ids=None, **facts):
        made = Bundle(bundle.recipe, bundle.model, bundle.source, bundle.target, facts)
        tokens = ids or list(range(4, 4 + len(output.split())))
        candidate = Candidate(output, -1.0, [-1.0], True, tokens)
        return flags(made, Generated(Example(source), [candidate], source=list(range(4, 4 + len(source.split())))))

    assert found(SENTENCE, "one two three") == []
    assert found(SENTENCE, SENTENCE) == ["copy"]
    assert found(SENTENCE, "x", ids=[5] * 20) == ["loop"]
    assert found("a b", "a b c d e f g h i j k l m n o p", length_ratios=[0.8, 1.6]) == ["length"]
    assert found("a b c d e f g h i j", "a b", length_ratios=[0.8, 1.6]) == ["length"]
    assert found("a b", "a b", length_ratios=[0.8, 1.6]) == []
    assert flags(bundle, Generated(Example(""), [])) == []
    both_loop = Generated(Example("x"), [Candidate("y", 0.0, [], True, [4] * 20)], source=[9] * 20)
    assert flags(bundle, both_loop) == []


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bundle):
    path = tmp_path_factory.mktemp("contract")
    save(bundle, path / "model")
    records = [
        {"id": "first", "source": TEXT[0], "prefix": "ba be"},
        {"source": " ".join(WORDS[:20]), "flags": 7, "alignment": 3, "candidates": "old", "rerank_score": "high"},
        {"source": "", "x": [1.5, None]},
    ]
    (path / "in.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + f"{TEXT[1]}\n")
    return path


@pytest.fixture
def command(folder, capfd):
    def call(*words):
        code = cli.run(
            ["generate", str(folder / "in.jsonl"), "--model", str(folder / "model"), "--workers", "1", *words]
        )
        out, errors = capfd.readouterr()
        return code, out.split("\n")[:-1], errors

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)  # the command takes all cores


def test_every_record_fits_the_schema(command, capfd):
    assert cli.run(["generate", "--schema"]) == 0
    schema = json.loads(capfd.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    choices = ("--n-best", "2", "--rerank", "mbr")
    for words in (
        *((), ("--n-best", "3"), ("--strategy", "sampling,beam=2,no_repeat_ngram=2")),
        *(("--alignments", "0"), choices, (*choices, "--alignments", "0")),
    ):
        code, out, _ = command("--json", *words)
        assert (code, len(out)) == (0, 4)
        records = [json.loads(line) for line in out]
        for record in records:
            validator.validate(record)
        assert [record["id"] for record in records] == ["first", 2, 3, 4]
        assert [record["status"] for record in records][1:3] == ["truncated", "empty"]
        assert records[0]["text"].startswith("ba be")
        assert records[2]["x"] == [1.5, None]
        for record in records:  # what an older output left in the input does not pose as ours
            assert ("candidates" in record) == ("--n-best" in words)
            assert ("alignment" in record) == ("--alignments" in words and record["status"] != "empty")
            assert ("rerank_score" in record) == ("--rerank" in words and record["status"] != "empty")
    for key, wrong in (
        ("status", "fine"),
        ("flags", ["odd"]),
        ("flags", ["loop", "loop"]),
        ("text", "a\nb"),
        ("score", "1"),
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**records[0], key: wrong})
    for key in ("id", "text", "score", "token_scores", "status", "flags"):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({name: value for name, value in records[0].items() if name != key})
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**records[2], "text": "something out of nothing"})
    assert set(schema["properties"]["status"]["enum"]) == {"ok", *TROUBLES}
    assert set(FLAGS) <= set(schema["properties"]["flags"]["items"]["enum"])


def test_keys_alone_change_the_strategy_of_the_recipe(command):
    _, usual, _ = command("--json", "--n-best", "3")
    _, changed, _ = command("--json", "--n-best", "3", "--strategy", "length_penalty=0,max_length=4")
    _, named, _ = command("--json", "--n-best", "3", "--strategy", "beam,beam=3,max_length=4,length_penalty=0")
    assert changed == named != usual
    code, _, errors = command("--strategy", "temperatur=1,max_length=4")
    assert (code, "temperatur: unknown key; expected beam, max_length" in errors) == (2, True)
    code, _, errors = command("--strategy", "max_length=4,no_repeat_ngram=-1")
    assert (code, "no_repeat_ngram: -1 must be 1 or more" in errors) == (2, True)
    code, out, _ = command("--strategy", f"banned=[{', '.join(WORDS[:-2])}],boosted={{{WORDS[-1]}: 2}}")
    assert code == 0
    assert set(" ".join(out[1:]).split()) <= set(WORDS[-2:])


def test_fail_on_writes_every_line_and_then_fails(command):
    _, usual, _ = command("--json")
    code, out, errors = command("--json", "--fail-on", "truncated,empty,copy")
    assert (code, out) == (3, usual)
    last = errors.split("\n")[-2]
    assert last == (
        "encdec: error: --fail-on: 1 truncated (first: line 2), 1 empty (first: line 3); every line has been written."
    )
    assert command("--fail-on", "copy")[0] == 0
    code, out, errors = command(
        "--fail-on", "loop", "--strategy", "beam,beam=1,max_length=12,prefix=ba ba ba ba ba ba ba ba ba"
    )
    assert (code, len(out)) == (3, 4)
    assert "4 loop (first: line 1)" in errors  # without --json each line is text
    # A line has one status, but is counted for all that holds.
    code, _, errors = command("--fail-on", "max-length", "--strategy", "max_length=2,boosted={ba: 20}", "--json")
    assert "3 max-length (first: line 1)" in errors


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "truncatd",
            "copy, coverage (did you mean 'truncated'?)",
        ),
        ("loop,", "no '' among"),
        ("ok", "no 'ok' among"),
    ],
)
def test_unknown_words_of_fail_on_are_refused(command, words, sentence):
    code, out, errors = command("--fail-on", words)
    assert (code, out) == (2, [])
    assert errors.startswith("encdec: error: --fail-on: no '")
    assert sentence in errors
