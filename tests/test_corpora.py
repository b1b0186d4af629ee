"""Corpora: splits are apart, one source has one target, files in every shape, errors name file and line."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from encdec_cli.corpora import chatterbot, docstrings
from encdec_cli.corpora.chatterbot import Chatterbot
from encdec_cli.corpora.cldr import Cldr
from encdec_cli.corpora.docstrings import Docstrings, pair_of, split_of
from encdec_cli.corpora.files import Files, SplitFiles
from encdec_cli.errors import DataError, UsageError
from encdec_cli.recipe import from_resolved, load, resolved
from encdec_cli.registry import corpora
from encdec_cli.text.example import Example


def small_cldr(**fields: Any) -> Cldr:
    return Cldr(**{"pairs": 3000, "valid": 200, "test": 200, **fields})


def test_cldr_splits_share_no_source_and_each_source_has_one_target() -> None:
    splits = {split: list(small_cldr().read(split)) for split in ("train", "valid", "test")}
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 3000, "valid": 200, "test": 200}
    sources = [example.source for examples in splits.values() for example in examples]
    assert len(sources) == len(set(sources))
    assert len({example.record["kind"] for example in splits["train"]}) == 14
    kinds = {example.record["kind"] for example in splits["test"]}
    assert len(kinds) >= 12


def test_cldr_means_the_same_on_both_sides_whatever_is_drawn() -> None:
    targets: dict[str, str] = {}
    for seed in range(4):
        for example in small_cldr(seed=seed).read("train"):
            assert targets.setdefault(example.source, str(example.target)) == example.target
    mays = {
        source: target for source, target in targets.items() if source.startswith("May ") and source.count(" ") == 2
    }
    assert mays
    assert all("Mai" in target for source, target in mays.items() if "\u2009" not in source)


def test_cldr_numbers_keep_their_digits() -> None:
    numbers = [example for example in small_cldr().read("train") if example.record["kind"] in ("number", "percent")]
    assert len(numbers) > 100
    for example in numbers:
        digits = [[c for c in str(text) if c.isdigit()] for text in (example.source, example.target)]
        assert digits[0] == digits[1]


def test_cldr_is_repeatable_and_held_out_pairs_do_not_depend_on_the_training_size() -> None:
    assert list(small_cldr().read("train")) == list(small_cldr().read("train"))
    assert list(small_cldr(pairs=10).read("test")) == list(small_cldr().read("test"))
    assert list(small_cldr(seed=2).read("test")) != list(small_cldr().read("test"))
    reused = small_cldr()
    assert list(reused.read("test")) == list(reused.read("test"))


@pytest.mark.parametrize("pair", [("fr", "ja"), ("de", "ar"), ("en_GB", "zh-Hant-TW"), ("pt-BR", "tr"), ("hi", "cop")])
def test_cldr_serves_other_locales(pair: tuple[str, str]) -> None:
    examples = list(Cldr(*pair, pairs=300, valid=0, test=0).read("train"))
    assert len({example.source for example in examples}) == 300
    assert all(example.target for example in examples)


def test_cldr_mistakes_are_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"^target: .*'dee'"):
        list(Cldr(target="dee").read("train"))
    with pytest.raises(UsageError, match="pairs: -1"):
        Cldr(pairs=-1)
    with pytest.raises(UsageError, match="did you mean 'train'"):
        list(Cldr().read("trian"))


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "babel", None)
    monkeypatch.delitem(sys.modules, "encdec_cli.corpora.expressions", raising=False)
    with pytest.raises(UsageError, match=r"encdec-cli\[corpora\]"):
        list(Cldr(pairs=1).read("train"))
    monkeypatch.setattr(chatterbot, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"encdec-cli\[corpora\]"):
        list(Chatterbot().read("train"))


BODY = "This is the body and it has quite enough words in it to be one."


@pytest.mark.parametrize(
    ("docstring", "pair"),
    [
        (f"Return the sum.\n\n    {BODY}\n    ", (BODY, "Return the sum.")),
        (f"Return the sum.\n\n    {BODY}\n\n    Args:\n        x: dropped\n", (BODY, "Return the sum.")),
        (f"Return the sum.\n\n{BODY}\n\nParameters\n----------\nx : dropped\n", (BODY, "Return the sum.")),
        (f"Return the sum.\n\n{BODY}\n\nAn Own Heading\n======\ndropped\n", (BODY, "Return the sum.")),
        (f"Return the sum.\n\n{BODY}\n>>> dropped()\n1\n", (BODY, "Return the sum.")),
        (f"Return the sum.\n\n{BODY}\n:param x: dropped\n", (BODY, "Return the sum.")),
        (f"Return the sum.\n\n{BODY}\nReturns: dropped\n", (BODY, "Return the sum.")),
        ("Return the sum.\n\nToo short a body.", None),
        (f"Two words.\n\n{BODY}", None),
        (f"A sentence which\ngoes on.\n\n{BODY}", None),
        (f"Return the sum.\n\n{'word ' * 121}", None),
        ("Return the sum.", None),
    ],
)
def test_docstring_pairs(docstring: str, pair: tuple[str, str] | None) -> None:
    assert pair_of(docstring) == pair


PACKAGES = ["json", "email", "asyncio", "logging", "argparse", "concurrent", "unittest", "importlib", "xml", "ctypes"]


def test_docstrings_are_unique_apart_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus = Docstrings(packages=PACKAGES)
    splits = {split: list(corpus.read(split)) for split in ("train", "valid", "test")}
    assert len(splits["train"]) > 100
    sources = [example.source for examples in splits.values() for example in examples]
    assert len(sources) == len(set(sources))
    assert all(split_of(example.source) == split for split, examples in splits.items() for example in examples)
    for example in splits["train"]:
        assert 12 <= len(example.source.split()) <= 120
        assert 3 <= len(str(example.target).split()) <= 20
    [cache] = (tmp_path / "encdec").iterdir()
    cache.write_text(json.dumps([["from the cache", "yes"]]))
    found = [example for split in splits for example in Docstrings(packages=PACKAGES).read(split)]
    assert found == [Example("from the cache", "yes")]
    cache.write_bytes(b"damaged")
    assert list(Docstrings(packages=PACKAGES).read("train")) == splits["train"]


def test_docstrings_do_without_a_cache_and_never_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encdec").write_text("a file where the cache folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package = tmp_path / "site" / "pack"
    (package / "tests").mkdir(parents=True)
    code = f'raise SystemExit\nasync def f():\n    """Return the sum.\n\n    {BODY}\n    """\n'
    (package / "__init__.py").write_text(code)
    (package / "twice.py").write_text(code.replace("sum", "sum again"))
    (package / "broken.py").write_text(code + "def (")
    (package / "tests" / "skipped.py").write_text(code.replace(BODY, BODY + " Never."))
    monkeypatch.setattr(docstrings, "_roots", lambda: [tmp_path / "site"])
    found = [example for split in ("train", "valid", "test") for example in Docstrings().read(split)]
    assert found == [Example(BODY, "Return the sum.")]


def test_chatterbot_holds_out_questions_for_test_and_samples_valid_from_training() -> None:
    splits = {split: list(Chatterbot().read(split)) for split in ("train", "valid", "test")}
    assert len(splits["train"]) > 900
    assert len(splits["test"]) > 20
    assert len(splits["valid"]) > 60
    asked = {split: {e.record["turns"][-1].lower() for e in examples} for split, examples in splits.items()}
    assert not asked["train"] & asked["test"]
    assert asked["valid"] <= asked["train"]
    for example in splits["train"]:
        assert example.source == "\t".join(example.record["turns"])
        assert example.target


def test_chatterbot_skips_what_is_no_list_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "english"
    folder.mkdir(parents=True)
    (folder / "a.yml").write_text(
        "conversations:\n- just text\n- [1, 2]\n- - {question: x}\n  - y\n- - How are you?\n  - Fine.\n  - Good.\n"
    )
    (folder / "b.yml").write_text("- no mapping\n")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(chatterbot, "find_spec", lambda name: spec)
    found = [e for split in ("train", "test") for e in Chatterbot().read(split)]
    assert sorted((e.source, e.target) for e in found) == [("How are you?", "Fine."), ("How are you?\tFine.", "Good.")]
    with pytest.raises(UsageError, match="klingon"):
        list(Chatterbot(language="klingon").read("train"))
    (folder / "c.yml").write_text("a: [")
    with pytest.raises(DataError, match=r"c\.yml"):
        list(Chatterbot().read("train"))


def rows(corpus: Files, split: str = "train") -> list[tuple[str, str | None]]:
    return [(example.source, example.target) for example in corpus.read(split)]


def test_parallel_text_plain_gzip_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "1.en").write_bytes(b"a\r\nb\n")
    (tmp_path / "1.de").write_bytes(b"A\nB\n")
    (tmp_path / "2.en").write_bytes(gzip.compress("c\u2028c\n".encode()))
    (tmp_path / "2.de").write_bytes(b"C")
    assert rows(Files(str(tmp_path), train=SplitFiles("1.en", "1.de"))) == [("a", "A"), ("b", "B")]
    corpus = Files(str(tmp_path), train=SplitFiles("*.en", "*.de"))
    assert rows(corpus) == [("a", "A"), ("b", "B"), ("c\u2028c", "C")]
    assert rows(corpus, "valid") == []
    assert any("1.en:1" in note for note in corpus.notes())


def test_tsv_by_number_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("id\ten\tde\n1\ta\tA\n2\tb\tB\n")
    by_name = Files(str(tmp_path), train=SplitFiles("en", "de", tsv="x.tsv", header=True))
    assert list(by_name.read("train")) == [Example("a", "A", {"id": "1"}), Example("b", "B", {"id": "2"})]
    by_number = Files(str(tmp_path), train=SplitFiles(2, 1, tsv="x.tsv"))
    assert rows(by_number)[0] == ("de", "en")
    assert rows(Files(str(tmp_path), train=SplitFiles(tsv="x.tsv")))[1] == ("1", "a")


def test_jsonl_fields_lists_and_the_rest(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": 1, "turns": ["a", "b\\tb"], "reply": "c"}\n')
    corpus = Files(str(tmp_path), train=SplitFiles("turns", "reply", jsonl="x.jsonl"))
    assert list(corpus.read("train")) == [Example("a\tb b", "c", {"id": 1})]


def test_empty_sides_are_dropped_and_counted_but_kept_in_test(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n \n3\n4\n")
    (tmp_path / "b").write_text("x\ny\n\nz\n")
    files = SplitFiles("a", "b")
    corpus = Files(str(tmp_path), train=files, valid=files, test=files)
    assert rows(corpus) == rows(corpus, "valid") == [("1", "x"), ("4", "z")]
    assert rows(corpus, "test") == [("1", "x"), (" ", "y"), ("3", ""), ("4", "z")]
    (tmp_path / "b").write_bytes(b"x\xff\ny\n\nz\n")
    rows(corpus, "valid")
    assert any(note.startswith("valid: 1 line (first") and "invalid UTF-8" in note for note in corpus.notes())
    assert f"train: 2 rows with an empty side dropped (first {tmp_path / 'a'}:2)." in corpus.notes()


@pytest.mark.parametrize(
    ("files", "content", "said"),
    [
        ({"tsv": "x"}, "a\tb\nonly\n", "x:2: 1 columns"),
        ({"tsv": "x", "source": "en", "target": "de", "header": True}, "en\tfr\n", "x:1: no column 'de'"),
        ({"jsonl": "x"}, '{"source": "a", "target": "b"}\n{\n', "x:2: not valid JSON"),
        ({"jsonl": "x"}, "[" * 100_000 + "\n", "x:1: not valid JSON"),
        ({"jsonl": "x"}, "[]\n", "x:1: expected a JSON object"),
        ({"jsonl": "x"}, '{"source": "a"}\n', "x:1: no field 'target'"),
        ({"jsonl": "x"}, '{"source": 1, "target": "a"}\n', "x:1: field 'source'"),
        ({"source": "x", "target": "none"}, "a\n", "none: there is no such file"),
        ({"source": "x", "target": "y*"}, "a\n", "no file matches"),
    ],
)
def test_wrong_files_name_file_and_line(tmp_path: Path, files: dict[str, Any], content: str, said: str) -> None:
    (tmp_path / "x").write_text(content)
    with pytest.raises(DataError) as caught:
        list(Files(str(tmp_path), train=SplitFiles(**files)).read("train"))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tsv": "x", "jsonl": "y"},
        {"source": 0, "target": 1},
        {"tsv": "x", "source": "en", "target": "de"},
        {"tsv": "x", "source": -1, "target": 0},
        {"source": "x", "target": "y", "header": True},
        {"source": "x"},
        {"tsv": "x", "source": 0},
        {"jsonl": "x", "source": "a"},
    ],
)
def test_wrong_split_files(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"tsv|column|target is missing"):
        SplitFiles(**fields)


def test_patterns_must_match_as_many_files_and_stdin_is_one_side(tmp_path: Path) -> None:
    for name in ("1.en", "2.en", "1.de"):
        (tmp_path / name).write_text("a\n")
    with pytest.raises(DataError, match="2 files"):
        list(Files(str(tmp_path), train=SplitFiles("*.en", "*.de")).read("train"))
    with pytest.raises(UsageError, match=r"^train: stdin \('-'\) can be one file alone, but .* for train and train;"):
        Files(train=SplitFiles("-", "-"))
    with pytest.raises(UsageError, match=r"^test: stdin .* for valid and test;"):
        Files(valid=SplitFiles(jsonl="-"), test=SplitFiles("a", "-"))


def test_fingerprints_change_with_the_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n")
    (tmp_path / "b").write_text("1\n")
    corpus = Files(str(tmp_path), train=SplitFiles("a", "b"))
    before = corpus.fingerprint()
    assert corpus.fingerprint() == before
    os.utime(tmp_path / "a", ns=(1, 1))
    assert corpus.fingerprint() != before
    assert Cldr().fingerprint() == Cldr().fingerprint() != Cldr(target="fr").fingerprint()
    assert Docstrings().fingerprint() == Docstrings().fingerprint() != Docstrings(packages=["json"]).fingerprint()
    assert Chatterbot().fingerprint() == Chatterbot().fingerprint() != Chatterbot("german").fingerprint()
    with pytest.raises(DataError, match="gone"):
        Files(str(tmp_path), train=SplitFiles("gone", "b")).fingerprint()


def test_every_built_in_corpus_is_registered() -> None:
    assert [corpora.get(name) for name in corpora.names()][:4] == [Files, Cldr, Docstrings, Chatterbot]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("{name: cldr, target: zz}", "r.yaml:2:28: data.target: CLDR has no locale 'zz'"),
        ("{name: chatterbot, language: elvish}", "r.yaml:2:36: data.language: no 'elvish' among "),
    ],
)
def test_what_a_corpus_cannot_read_is_told_at_its_key_and_bothers_no_model_in_use(tmp_path, data, told):
    path = tmp_path / "r.yaml"
    path.write_text(f"task: {{name: translation}}\ndata: {data}\n")
    with pytest.raises(UsageError, match=re.escape(told)):
        load(path)
    plain = load(path, ["data={name: cldr}"])
    kept = resolved(plain) | {"data": yaml.safe_load(data)}
    assert resolved(from_resolved(kept))["data"]["name"] == kept["data"]["name"]


def test_packages_without_docstrings_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"data.packages: no docstring found in nope_pkg; name installed ones"):
        list(Docstrings(packages=["nope_pkg"]).read("train"))
