"""From a corpus to a folder for training: counts that add up, policies kept, and a kill leaves nothing half done."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from encdec_cli import atomic, recipe
from encdec_cli.corpora.corpus import Corpus
from encdec_cli.data.prepare import Prepared, is_current, prepare
from encdec_cli.data.prepared import FACTS
from encdec_cli.errors import BundleError, DataError
from encdec_cli.tasks.task import Task
from encdec_cli.text.example import Example

ROOT = Path(__file__).parent.parent


@dataclass
class Text(recipe.Text):
    tokenizer: Literal["sentencepiece", "word", "character"] = "word"
    vocabulary: int = 50
    max_source: int = 6
    max_target: int = 6


@dataclass
class Listed(Corpus):
    train: list[tuple[str, str | None]] = field(default_factory=list)
    valid: list[tuple[str, str | None]] = field(default_factory=list)
    test: list[tuple[str, str | None]] = field(default_factory=list)

    def read(self, split: str) -> Iterator[Example]:
        for number, pair in enumerate({"train": self.train, "valid": self.valid, "test": self.test}[split]):
            yield Example(*pair, {"id": number})

    def fingerprint(self) -> str:
        return "fixed"


@dataclass
class Shouting(Task):
    def source(self, example: Example) -> str:
        return "<up> " + example.source.upper()

    def symbols(self) -> tuple[str, ...]:
        return ("<up>",)


TRAIN = [("a b c", "x y"), ("b c", "y"), ("a a a a a a", "x"), ("c", None), (" ", "x"), ("b", "z z z z z z")]
VALID = [("a", "x"), ("a b c a b c a b c", "y"), ("", "z"), ("b", None)]


def run(
    folder: Path, corpus: Corpus, text: Text | None = None, task: Task | None = None, said: list[str] | None = None
):
    say = (said if said is not None else []).append
    return prepare(task or Task(), corpus, text or Text(), "mark", folder, say, lambda data_hash: None)


def words(prepared: Prepared, split: str) -> list[tuple[str, str]]:
    store = prepared.store(split)
    pairs = (store.gather([number]) for number in range(len(store)))
    return [
        (prepared.source.decode(source.tokens.tolist()), prepared.target.decode(target.tokens.tolist()))
        for source, target in pairs
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_kept_and_what_is_left_out(tmp_path):
    said: list[str] = []
    prepared = run(tmp_path / "data", Listed(TRAIN, VALID), said=said)
    assert words(prepared, "train") == [("a b c", "x y"), ("b c", "y")]
    assert words(prepared, "valid") == [("a", "x")]
    assert prepared.count("train") == 2
    assert prepared.count("test") == 0
    facts = prepared.facts["splits"]["train"]
    reasons = {"target unknown": 1, "source blank": 1, "source too long": 1, "target too long": 1}
    assert facts["dropped"] == reasons
    assert facts["read"] == facts["kept"] + sum(reasons.values()) == len(TRAIN)
    assert (facts["source_tokens"], facts["target_tokens"]) == (5, 3)
    assert facts["longest"][:2] == [
        {"example": 3, "source": 7, "target": 2},
        {"example": 6, "source": 2, "target": 7},
    ]
    # With EOS: sources 4 3 7 2, targets 3 2 2 7.
    assert facts["lengths"] == [
        {"to": 2, "source": 1, "target": 2}, {"to": 4, "source": 2, "target": 1}, {"to": 8, "source": 1, "target": 1}
    ]  # fmt: skip
    assert any("train: left out 4 of 6 examples" in sentence for sentence in said)


def test_held_out_text_is_complete_whatever_its_length(tmp_path):
    prepared = run(tmp_path / "data", Listed(TRAIN, VALID, VALID[:1]))
    assert [(e.source, e.target, e.record) for e in prepared.examples("valid")] == [
        (source, target, {"id": number}) for number, (source, target) in enumerate(VALID) if target is not None
    ]
    assert [example.source for example in prepared.examples("test")] == ["a"]


def test_text_that_only_json_can_hold_comes_back(tmp_path):
    odd = ["\u2028 \x85 a\x0bb\rc", "new\nline\ttab", "half \ud83d", "\u00e9\U0001f600"]
    prepared = run(tmp_path / "data", Listed(TRAIN, [(text, text) for text in odd]))
    assert [example.source for example in prepared.examples("valid")] == odd
    assert [example.target for example in prepared.examples("valid")] == odd


def test_truncate(tmp_path):
    prepared = run(tmp_path / "data", Listed(TRAIN, VALID), Text(too_long="truncate", max_source=3))
    assert words(prepared, "train") == [("a b", "x y"), ("b c", "y"), ("a a", "x"), ("b", "z z z z z")]
    assert prepared.facts["splits"]["train"]["truncated"] == 3
    assert max(prepared.store("train").source_lengths) + 1 == 3  # EOS is the third


def test_stop_names_the_example_and_the_key(tmp_path):
    with pytest.raises(DataError, match=r"train example 3 has a source of 7 tokens.*text\.max_source = 6"):
        run(tmp_path / "data", Listed(TRAIN), Text(too_long="stop"))
    with pytest.raises(DataError, match=r"train example 6 has a target of 7 tokens.*text\.max_target = 6"):
        run(tmp_path / "data", Listed(TRAIN), Text(too_long="stop", max_source=100))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("corpus", "sentence"),
    [
        (Listed(), "gave no training example"),
        (Listed([("a", None)] * 3), r"none of the 3 train examples can be used \(target unknown: 3\)"),
        (Listed([("a " * 9, "b")] * 2), r"none of the 2 train examples can be used \(source too long: 2\)"),
        (Listed(TRAIN, [("a", " ")]), r"none of the 1 valid examples can be used \(target blank: 1\)"),
        (Listed([(" ", " ")]), "no text"),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_a_corpus_without_a_usable_pair(tmp_path, corpus, sentence, shared):
    with pytest.raises(DataError, match=sentence):
        run(tmp_path / "data", corpus, Text(shared=shared))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shared", [True, False])
def test_a_corpus_that_can_be_read_only_once(tmp_path, shared):
    corpus = Listed(TRAIN)
    rows = iter(TRAIN)
    corpus.train = rows  # type: ignore[assignment]
    with pytest.raises(
        DataError, match="6 training examples at first and 0 when read again; put what comes from a pipe"
    ):
        run(tmp_path / "data", corpus, Text(shared=shared))


def test_the_task_decides_what_the_model_sees(tmp_path):
    prepared = run(tmp_path / "data", Listed(TRAIN, VALID), Text(max_source=20), Shouting())
    assert words(prepared, "train")[0] == ("<up> A B C", "x y")
    assert next(prepared.examples("valid")).source == "a"
    assert prepared.source.vocabulary.id("<up>") == 4


def test_vocabularies_shared_or_apart(tmp_path):
    shared = run(tmp_path / "a", Listed(TRAIN))
    assert shared.source is shared.target
    assert {"a", "x"} <= set(shared.source.vocabulary.tokens)
    apart = run(tmp_path / "b", Listed(TRAIN), Text(shared=False))
    assert "x" not in apart.source.vocabulary.tokens
    assert "a" not in apart.target.vocabulary.tokens
    assert words(apart, "train") == words(shared, "train")
    again = Prepared.open(tmp_path / "b")
    assert again.source.vocabulary == apart.source.vocabulary
    assert again.target.vocabulary == apart.target.vocabulary


def test_a_shared_tokenizer_that_takes_some_of_the_lines_takes_them_of_both_sides():
    """Whatever power of two is the stride, it meets as many sources as targets."""
    sides = [side for number in range(4096) for side in ((0, 1) if number.bit_count() % 2 else (1, 0))]
    for stride in (1, 2, 4, 8, 64):
        chosen = sides[::stride]
        assert sum(chosen) * 2 == len(chosen)


def test_the_same_again_is_the_same_bytes_and_something_else_another_hash(tmp_path):
    first = run(tmp_path / "a", Listed(TRAIN, VALID))
    second = run(tmp_path / "b", Listed(TRAIN, VALID))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert first.data_hash == second.data_hash
    with_test = run(tmp_path / "c", Listed(TRAIN, VALID, VALID))
    assert with_test.data_hash == first.data_hash  # the order of training does not depend on the test set
    for name, corpus in {"d": Listed(TRAIN[:2]), "e": Listed(TRAIN[1::-1] + TRAIN[2:])}.items():
        assert run(tmp_path / name, corpus).data_hash != first.data_hash


def test_current_or_stale(tmp_path):
    folder = tmp_path / "data"
    assert not is_current(folder, "mark")
    run(folder, Listed(TRAIN))
    assert is_current(folder, "mark")
    assert not is_current(folder, "other")
    for damage in (b"", b"[]", b"{", b"\xff", b'{"format": 99, "fingerprint": "mark"}'):
        (folder / FACTS).write_bytes(damage)
        assert not is_current(folder, "mark")


def test_a_failure_leaves_the_older_data(tmp_path):
    run(tmp_path / "data", Listed(TRAIN))
    before = content(tmp_path / "data")
    with pytest.raises(DataError):
        run(tmp_path / "data", Listed(TRAIN, [("", "")]))
    assert content(tmp_path / "data") == before
    run(tmp_path / "data", Listed(TRAIN[:2]))
    assert Prepared.open(tmp_path / "data").count("train") == 2


def test_every_damaged_file_is_named_with_the_remedy(tmp_path):
    folder = tmp_path / "data"
    run(folder, Listed(TRAIN, VALID, VALID), Text(shared=False))
    for name, good in content(folder).items():
        for bad in (None, b"", good[:-1], good + b"\n", bytes([good[0] ^ 4]) + good[1:], good[:-9] + b"x" + good[-8:]):
            (folder / name).unlink() if bad is None else (folder / name).write_bytes(bad)
            if name == atomic.MANIFEST and bad in (good[:-1], good + b"\n"):
                continue  # still the same JSON
            with pytest.raises(BundleError, match=rf"{name}.*Delete the folder"):
                Prepared.open(folder)
            (folder / name).write_bytes(good)
    Prepared.open(folder)


def test_consistent_but_wrong_folders_are_refused(tmp_path):
    """Manifests can be made anew; what the files say must still fit together."""
    run(tmp_path / "data", Listed(TRAIN, VALID))
    good = content(tmp_path / "data")
    facts = json.loads(good[FACTS])

    def changed(**files: bytes) -> Path:
        with atomic.new_folder(tmp_path / "bad") as folder:
            for name, value in {**good, **files}.items():
                if name != atomic.MANIFEST:
                    (folder / name).write_bytes(value)
        return tmp_path / "bad"

    other = run(tmp_path / "other", Listed([("q", "r"), ("q", "r")]))
    wrong = {
        "of format 1": {FACTS: json.dumps({**facts, "format": 2}).encode()},
        "lacks": {FACTS: json.dumps({**facts, "splits": {}}).encode()},
        "says 7": {FACTS: json.dumps({**facts, "splits": {**facts["splits"], "train": {"kept": 7}}}).encode()},
        "another vocabulary": {"train-00000.safetensors": (other.folder / "train-00000.safetensors").read_bytes()},
    }
    for sentence, files in wrong.items():
        with pytest.raises(BundleError, match=sentence):
            Prepared.open(changed(**files))


CHILD = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
from tests.test_prepare import Listed, Text, run
print("ready", flush=True)
pairs = [("a b c " * (1 + n % 3), f"x y {{n % 50}}") for n in range(4000)]
run(Path(sys.argv[1]), Listed(pairs, pairs[:200], pairs[:100]), Text(max_source=20))
"""


def test_killed_at_any_moment_and_run_again_it_is_the_same(tmp_path):
    chance = random.Random(5)

    def start(folder: Path) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE)
        with child.stdout as lines:
            lines.readline()
        return child

    clean = start(tmp_path / "clean")
    begin = time.monotonic()  # it is ready to work: to import takes longer than that
    assert clean.wait() == 0
    duration = time.monotonic() - begin
    folder, killed = tmp_path / "data", 0
    for number in range(4):
        child = start(folder)
        time.sleep((number + chance.random()) / 4 * duration)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        atomic.recover(folder)
        assert not folder.exists() or Prepared.open(folder).count("train") == 4000
    assert killed
    assert start(folder).wait() == 0
    assert content(folder) == content(tmp_path / "clean")
    assert {path.name for path in tmp_path.iterdir()} == {"clean", "data"}


def test_torch_is_not_needed_to_prepare():
    code = "import sys, encdec_cli.data.prepare, encdec_cli.data.sampler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_sentencepiece_end_to_end(tmp_path):
    pairs = [(f"The house number {n} is old.", f"Das Haus Nummer {n} ist alt.") for n in range(200)]
    text = Text("sentencepiece", vocabulary=340, max_source=100, max_target=100)
    prepared = run(tmp_path / "a", Listed(pairs, pairs[:5]), text)
    assert words(prepared, "train") == pairs
    run(tmp_path / "b", Listed(pairs, pairs[:5]), text)
    digests = [hashlib.sha256(repr(content(tmp_path / name)).encode()).hexdigest() for name in "ab"]
    assert digests[0] == digests[1]
