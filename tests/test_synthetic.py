"""Corpora that models write: distillation and back-translation, in parts that outlive a kill, and `encdec distill`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest

from encdec_cli import recipe as recipes
from encdec_cli.bundle.bundle import Bundle
from encdec_cli.corpora.synthetic import Synthetic, Trouble
from encdec_cli.errors import BundleError, DataError, UsageError
from encdec_cli.generation import lines
from encdec_cli.generation.flags import FLAGS
from encdec_cli.generation.lines import TROUBLES, Candidate, Options, first_text, generate
from encdec_cli.reranking.oracle import Oracle
from encdec_cli.text.example import Example
from encdec_cli.training.data import prepared_data
from encdec_cli.training.synthesis import write_outputs
from tests.conftest import copy_task, log_lines, save, write_lines
from tests.test_contract import TEXT, make_bundle

DISTILLED = """\
task: {{name: translation}}
data:
  name: distilled
  models: [{model}]
  corpus:
    name: files
    root: {root}
    train: {{source: train.src, target: train.tgt}}
    test: {{source: test.src, target: test.tgt}}
text: {{tokenizer: word, vocabulary: 80}}
"""
BACK = """\
task: {{name: translation}}
data:
  name: backtranslation
  models: [{model}]
  monolingual: [{root}/mono.tgt]
  corpus:
    name: files
    root: {root}
    train: {{source: train.src, target: train.tgt}}
    test: {{source: test.src, target: test.tgt}}
text: {{tokenizer: word, vocabulary: 80}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model that writes something at random for each line, the same each time."""
    folder = tmp_path_factory.mktemp("model") / "big"
    save(make_bundle(), folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.src", TEXT[:60])
        write_lines(tmp_path / f"{split}.tgt", [line.upper() for line in TEXT[:60]])
    write_lines(tmp_path / "mono.tgt", [*TEXT[60:100], "", *TEXT[100:130]])
    return tmp_path


def load(text: str, root: Path, model: Path, *overrides: str) -> recipes.Recipe:
    path = root / "recipe.yaml"
    path.write_text(text.format(root=root, model=model))
    return recipes.load(path, overrides, sections=recipes.DATA_SECTIONS)


def corpus(text: str, root: Path, model: Path, *overrides: str) -> Synthetic:
    return load(text, root, model, *overrides).data.config


def outputs(made: Synthetic) -> list[str]:
    """What the model writes for all that the corpus asks for, in one window."""
    bundle = make_bundle()
    return [first_text(one) for one in generate([bundle], [list(made.asked())], Options(bundle.recipe.decoding.config))]


def test_the_targets_are_what_the_teacher_writes(root, model):
    made = corpus(DISTILLED, root, model, "data.drop=[]", "data.corpus.root=" + str(root))
    write_outputs(made, root / "synthetic", "cpu", lambda _: None)
    pairs = [(example.source, example.target) for example in made.read("train")]
    assert pairs == list(zip(TEXT[:60], outputs(made), strict=True))
    assert [example.target for example in made.read("test")] == [line.upper() for line in TEXT[:60]]
    both = corpus(DISTILLED, root, model, "data.drop=[]", "data.real=2")
    write_outputs(both, root / "synthetic", "cpu", lambda _: None)
    targets = [example.target for example in both.read("train")]
    assert targets == [line.upper() for line in TEXT[:60]] * 2 + [target for _, target in pairs]


def test_monolingual_lines_get_tagged_sources_beside_the_real_pairs(root, model):
    loaded = load(BACK, root, model, "data.drop=[]", "data.real=3")
    prepared, made_now = prepared_data(loaded, root / "run", lambda _: None)
    assert made_now
    assert prepared.count("train") == 3 * 60 + 70  # the blank line asks for nothing
    made = loaded.data.config
    pairs = [(example.source, example.target) for example in made.read("train")][180:]
    assert pairs == [(f"<BT> {text}", line) for text, line in zip(outputs(made), TEXT[60:130], strict=True)]
    tag = prepared.source.vocabulary.id("<BT>")
    first = [int(prepared.store("train").gather([row])[0].tokens[0]) for row in (0, 179, 180, 249)]
    assert [one == tag for one in first] == [False, False, True, True]
    # All of it is there, and nothing is done again.
    (root / "synthetic").mkdir()
    assert prepared_data(load(BACK, root, model, "data.drop=[]", "data.real=3"), root / "run", print)[1] is False


@pytest.mark.parametrize(
    ("text", "wanted", "noted"),
    [
        (DISTILLED, ["en", "de"], False),
        (DISTILLED, ["de", "en"], True),
        (BACK, ["en", "de"], True),
        (BACK, ["de", "en"], False),
        (BACK, ["", ""], False),
    ],
)
def test_a_model_of_the_other_direction_is_noted(root, model, text, wanted, noted):
    bundle = Bundle.load(model, "cpu")
    task = bundle.recipe.task.config
    task.source_language, task.target_language = "en", "de"
    save(bundle, root / "known")
    said: list[str] = []
    write_outputs(corpus(text, root, root / "known"), root / "written", "cpu", said.append, wanted)
    assert any("translates en to de, where" in sentence for sentence in said) == noted


@pytest.mark.parametrize(("tag", "begins"), [("", "ba"), ("<synthetic>", "<synthetic> ba")])
def test_the_tag_may_be_another_or_none(root, model, tag, begins):
    made = corpus(BACK, root, model, f"data.tag='{tag}'")
    assert made.pair(Example("a line"), "ba") == Example(begins, "a line")
    assert made.symbols() == ((tag,) if tag else ())


def test_outputs_that_look_wrong_are_left_out_and_counted(root, model):
    made = corpus(DISTILLED, root, model)
    made.written = root / "written"
    made.written.mkdir()
    troubles = [[], ["loop"], ["max-length", "loop"], ["copy"], ["empty"], ["length"]]
    records = [
        {"source": str(i), "target": "t", "record": {"n": i}, "output": f"o{i}", "troubles": found}
        for i, found in enumerate(troubles)
    ]
    write_lines(made.written / "part-000000.jsonl", [json.dumps(record) for record in records])
    assert [(e.source, e.target, e.record) for e in made.read("train")] == [
        ("0", "o0", {"n": 0}),
        ("3", "o3", {"n": 3}),
        ("5", "o5", {"n": 5}),
    ]
    assert made.notes()[-1] == "train: outputs left out: 1 loop, 1 max-length, 1 empty."
    assert set(get_args(Trouble)) == {*TROUBLES, *FLAGS} - {"coverage"}  # which costs a pass of its own


class Killed(BaseException):
    """No exception that anything may catch."""


def test_a_killed_decode_goes_on_where_it_was(root, model, monkeypatch):
    monkeypatch.setattr(lines, "WINDOW", 1)  # the largest batch is then the window: 640 rows of beams of 3
    write_lines(root / "mono.tgt", [f"{line} {i}" for i in range(2) for line in TEXT])
    options = ("data.strategy=beam=32",)  # a window of 20
    whole = corpus(BACK, root, model, *options)
    write_outputs(whole, root / "whole", "cpu", lambda _: None)
    killed = corpus(BACK, root, model, *options)
    everything = killed.asked

    def some():
        for number, example in enumerate(everything()):
            if number == 130:
                raise Killed
            yield example

    killed.asked = some
    with pytest.raises(Killed):
        write_outputs(killed, root / "parts", "cpu", lambda _: None)
    before = {path.name: path.stat().st_mtime_ns for path in (root / "parts").glob("*.jsonl")}
    assert len(before) == 6
    (root / "parts" / "part-000006.jsonl.tmp-99").write_text("half a lin")
    said: list[str] = []
    again = corpus(BACK, root, model, *options)
    write_outputs(again, root / "parts", "cpu", said.append)
    assert f"after {len(before)} parts" in said[0]
    assert {name: (root / "parts" / name).stat().st_mtime_ns for name in before} == before
    content = {path.name: path.read_bytes() for path in (root / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (root / "parts").iterdir()} == content
    assert list(again.read("train")) == list(whole.read("train"))
    # Complete: nothing is decoded; another search: all of it.
    write_outputs(again, root / "parts", "cpu", said.append)
    assert len(said) == 1
    write_outputs(corpus(BACK, root, model, "data.strategy=beam=2"), root / "parts", "cpu", said.append)
    assert len(said) == 2
    assert "after" not in said[1]


@pytest.mark.parametrize(
    ("text", "override", "place"),
    [
        (DISTILLED, "data.corpus.pears=3", "data.corpus.pears=3: unknown key"),
        (DISTILLED, "data.corpus.name=flies", "data.corpus.name=flies: no corpus 'flies' among"),
        (DISTILLED, "data.corpus.train.target=", "data.corpus.train.target=: expected str or int"),
        (DISTILLED, "data.models=[]", "data.models=[]: empty"),
        (DISTILLED, "data.drop=[loops]", "data.drop"),
        (BACK, "data.monolingual=[]", "data.monolingual=[]: empty"),
        (BACK, "data.real=-1", "data.real=-1: -1 must be 0 or more"),
        (BACK.replace("  corpus:", "  corpse:"), "data.real=1", "recipe.yaml:6:3: data.corpse: unknown key"),
    ],
)
def test_mistakes_are_told_with_their_place(root, model, text, override, place):
    with pytest.raises(UsageError) as caught:
        load(text, root, model, override)
    assert place in str(caught.value)


def test_what_is_missing_is_named(root, model, tmp_path):
    with pytest.raises(UsageError, match="`encdec train` lets the models write"):
        list(corpus(BACK, root, model).read("train"))
    with pytest.raises(BundleError, match="nowhere is neither a bundle nor a run"):
        corpus(BACK, root, tmp_path / "nowhere").fingerprint()
    with pytest.raises(DataError, match="none/mono"):
        corpus(BACK, root, model, "data.monolingual=[none/mono.tgt]").fingerprint()
    with pytest.raises(UsageError, match="strategy beem: no strategy 'beem'"):
        write_outputs(corpus(BACK, root, model, "data.strategy=beem"), tmp_path / "out", "cpu", print)


def test_what_is_written_changes_with_all_that_decides_it(root, model):
    marks = {
        corpus(*arguments).mark()
        for arguments in (
            (BACK, root, model),
            (BACK, root, model, "data.strategy=beam=2"),
            (BACK, root, model, "data.rerank=mbr"),
            (BACK, root, model, f"data.monolingual=[{root}/train.tgt]"),
            (DISTILLED, root, model),
            (DISTILLED, root, model, "data.corpus.train.source=test.src"),
        )
    }
    assert len(marks) == 6
    usual = corpus(BACK, root, model).mark()
    assert corpus(BACK, root, model, "data.tag=x", "data.real=7", "data.drop=[]").mark() == usual


def test_the_oracle_puts_the_output_first_that_is_nearest_to_the_reference():
    candidates = [Candidate(text, 0.0, [], True, []) for text in ("a dog", "the cat sat", "the cat sits", "")]
    example = Example("x", "the cat sat")
    scores = Oracle(metric="exact")(example, candidates)
    assert scores == [0, 100, 0, 0]
    assert sorted(range(4), key=lambda i: -Oracle(metric="chrf")(example, candidates)[i])[:3] == [1, 2, 0]
    assert Oracle(metric="ter")(example, candidates)[1] == 0  # lower is better: negative elsewhere
    assert max(Oracle(metric="ter")(example, candidates)) == 0
    with pytest.raises(DataError, match="compares with references"):
        Oracle()(Example("x"), candidates)
    with pytest.raises(UsageError, match="no number for a single segment"):
        Oracle(metric="perplexity")


def test_interpolation_takes_the_beams_nearest_output(root, model):
    made = corpus(DISTILLED, root, model, "data.drop=[]", "data.rerank='oracle,metric=f1'")
    write_outputs(made, root / "synthetic", "cpu", lambda _: None)
    bundle = make_bundle()
    options = Options(bundle.recipe.decoding.config, n_best=3)
    found = generate([bundle], [list(made.asked())], options)
    for example, result in zip(made.read("train"), found, strict=True):
        scores = Oracle(metric="f1")(result.example, result.candidates)
        assert example.target == result.candidates[scores.index(max(scores))].text


def test_distill_trains_and_compares_and_has_nothing_to_do_the_second_time(forks, copy_run, tmp_path):
    recipe = copy_task(tmp_path / "corpus", train=300)
    words = ("distill", copy_run, "--student", recipe, "--output", tmp_path / "small", "--metric", "exact")
    words = (*words, "train.steps=30", "train.validate_every=30")
    done = forks(*words)
    assert done.wait() == 0, done.stderr
    head, big, small, quantised, signature, _ = done.stdout.split("\n")
    assert head.split() == ["model", "parameters", "precision", "sentences/s", "speed-up", "exact", "difference"]
    assert big.split()[0] == str(copy_run)
    assert [line.split()[2] for line in (big, small)] == ["fp32", "fp32"]
    assert quantised.split()[2] in ("int8", "bf16")
    assert "p = " in small
    assert "p = " not in big
    assert signature.startswith("exact: nrefs:1|bs:1000")
    pair = json.loads((tmp_path / "small" / "synthetic" / "part-000000.jsonl").read_text().split("\n")[0])
    assert pair["output"]
    again = forks(*words, "--json")
    assert again.wait() == 0, again.stderr
    assert "nothing to do" in again.stderr
    rows = json.loads(again.stdout)
    assert [row["precision"] for row in rows][:2] == ["fp32", "fp32"]
    assert rows[0]["parameters"] > rows[1]["parameters"] == rows[2]["parameters"]
    assert rows[0]["speed_up"] == 1
    assert rows[1]["scores"][0]["baseline"] == rows[0]["scores"][0]["value"]
    # What the run would be refused for afterwards is told before a teacher writes anything.
    another = shutil.copytree(tmp_path / "small" / "bundle", tmp_path / "another")
    for changed, why in (
        ((*words, "--strategy", "beam=1"), "data.strategy was '', is 'beam=1'"),
        (("distill", another, *words[2:]), "(data.models) have changed"),
        (("distill", *words[1:5], copy_run), "is the run of a teacher"),
    ):
        refused = forks(*changed)
        assert refused.wait() == 2
        assert why in refused.stderr
        assert "writing in" not in refused.stderr
    test = Bundle.load(tmp_path / "small").recipe.data.config.read("test")
    assert [example.source for example in test] == (tmp_path / "corpus" / "test.src").read_text().split("\n")[:-1]


def test_distill_of_tokens_decodes_nothing_and_learns_the_teachers_distribution(forks, copy_run, tmp_path):
    recipe = copy_run.parent / "corpus" / "recipe.yaml"
    words = ("distill", copy_run, "--student", recipe, "--level", "token", "train.steps=12", "train.validate_every=12")
    for weight in ("0", "1"):
        done = forks(*words, "--output", tmp_path / weight, "--metric", "exact", f"teacher.weight={weight}")
        assert done.wait() == 0, done.stderr
        assert done.stdout.count("\n") == 5
        assert not (tmp_path / weight / "synthetic").exists()
        loss = [line["loss"] for line in log_lines(tmp_path / weight, "train")]
        assert loss == sorted(loss, reverse=True)
    plain = forks("train", recipe, *words[6:], "--output", tmp_path / "plain")
    assert plain.wait() == 0, plain.stderr
    weights = [(tmp_path / run / "bundle" / "model.safetensors").read_bytes() for run in ("plain", "0", "1")]
    assert weights[0] == weights[1] != weights[2]
    refused = forks(*words, "--output", tmp_path / "no", "--strategy", "beam=1")
    assert refused.wait() == 2
    assert "--level token: one teacher, which decodes nothing" in refused.stderr
