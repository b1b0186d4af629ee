"""Exports do what their model does, in every variant, and say so when they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import ctranslate2
import pytest
import torch

from encdec_cli import atomic, cli
from encdec_cli.bundle.bundle import Bundle, build_model
from encdec_cli.bundle.ctranslate2 import TOLERANCES, CTranslate2
from encdec_cli.bundle.export import MARKER, DisagreementError, Outputs, Tolerance, compare, export
from encdec_cli.cli.export import export as export_command
from encdec_cli.data.batch import collate
from encdec_cli.decoding.force import score_targets
from encdec_cli.errors import DataError, UsageError
from encdec_cli.generation.lines import Options, generate
from encdec_cli.recipe import from_resolved, resolved
from encdec_cli.registry import load_plugin
from encdec_cli.text.example import Example
from encdec_cli.text.options import TokenizerOptions
from encdec_cli.text.tokenizer import Character, SentencePiece, Word
from tests.conftest import save

WORDS = [f"w{number}" for number in range(40)]
SIZES = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16, "heads": 2, "feed_forward": 32}
PLAIN = ("word", "word")


def lines(count: int, seed: int, longest: int = 9) -> list[str]:
    chance = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(1, longest + 1, (), generator=chance))
        found.append(" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=chance).tolist()))
    return found


def tokenizer(kind: str, seed: int = 0):
    text = [" ".join(WORDS), *lines(200, seed)]
    if kind == "word":
        return Word.train(text, TokenizerOptions(size=100))
    if kind == "character":
        return Character.train(text, TokenizerOptions(size=100, symbols=("w1",)))
    return SentencePiece.train(text, TokenizerOptions(size=320))


def make_bundle(source=None, target=None, task=None, text=None, **model) -> Bundle:
    """A model with large random weights, so that its outputs depend on everything it reads."""
    recipe = from_resolved(
        {
            "task": task or {"name": "translation"},
            "data": {"name": "files", "train": {"source": "a", "target": "b"}},
            "text": {"tokenizer": "word", "vocabulary": 100, "max_source": 32, "max_target": 24, **(text or {})},
            "model": {"name": "transformer", **SIZES, **model},  # `name` may be another
            "decoding": {"name": "beam", "beam": 4, "length_penalty": 0.6},
        }
    )
    source = source or tokenizer("word")
    target = target or source
    torch.manual_seed(3)
    network = build_model(recipe, len(source.vocabulary), len(target.vocabulary)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.3)
            elif "embedding" in name or "positions" in name or name.startswith("output"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=0.5)
    return Bundle(recipe, network, source, target)


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


def examples(count: int = 20, seed: int = 7) -> list[Example]:
    return [Example(one, two) for one, two in zip(lines(count, seed), lines(count, seed + 1), strict=True)]


VARIANTS = {
    "defaults": {},
    "post-norm": {"norm_order": "post"},
    "rms": {"norm": "rms"},
    "rms post-norm": {"norm": "rms", "norm_order": "post"},
    "gelu": {"activation": "gelu"},
    "swiglu": {"activation": "swiglu"},
    "swiglu post-norm": {"activation": "swiglu", "norm_order": "post"},
    "learned": {"positions": "learned", "max_positions": 40},
    "rotary": {"positions": "rotary"},
    "rotary rms swiglu without bias": {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False},
    "without bias": {"bias": False},
    "without scale": {"scale_embeddings": False},
    "decoder tied": {"tie": "decoder"},
    "not tied": {"tie": "none"},
    "deep encoder": {"encoder_layers": 4, "decoder_layers": 1},
    "deep decoder": {"encoder_layers": 1, "decoder_layers": 3},
    "one head": {"heads": 1},
    "odd sizes": {"d_model": 18, "heads": 3, "feed_forward": 21},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_scores_and_translates_as_the_model(options, tmp_path):
    bundle = make_bundle(**options)
    export(CTranslate2(), bundle, tmp_path / "out")
    translator = ctranslate2.Translator(str(tmp_path / "out"), inter_threads=1, intra_threads=1)
    texts, targets = lines(16, 1), lines(16, 2)
    token_lists = [text.split() for text in texts]

    batch = collate([bundle.source.encode(t) for t in texts], [bundle.target.encode(t) for t in targets], range(16))
    ours = score_targets([bundle.model], batch.source, batch.source_mask, batch.known_target)
    for row, result in zip(ours, translator.score_batch(token_lists, [t.split() for t in targets]), strict=True):
        found = torch.tensor(result.log_probs)
        torch.testing.assert_close(found, row[: len(found)], rtol=0, atol=1e-4)
        assert (row[len(found) :] == 0).all()

    greedy = replace(bundle.recipe.decoding.config, beam=1, max_length="20")
    written = [r.candidates[0].text for r in generate([bundle], [[Example(t) for t in texts]], Options(greedy))]
    results = translator.translate_batch(
        token_lists,
        beam_size=1,
        max_decoding_length=20,
        disable_unk=True,
        suppress_sequences=[["<pad>"], ["<s>"]],
    )
    assert [" ".join(result.hypotheses[0]) for result in results] == written
    others = score_targets([bundle.model], batch.source.roll(1, 0), batch.source_mask.roll(1, 0), batch.known_target)
    assert ((ours - others).abs().amax(1) > 0.05).all()  # the scores do depend on the source


def test_check_agrees_and_beams_are_equal_too(tmp_path):
    bundle = make_bundle(tie="none")
    with torch.no_grad():  # CTranslate2 normalises without the banned tokens: let them be improbable, as in real models
        bundle.model.output.weight.mul_(6)[:3].zero_()
    agreement = export(CTranslate2(), bundle, tmp_path / "out", examples())
    assert agreement.holds
    assert agreement.lines == 20
    assert agreement.tokens == sum(len(example.target.split()) + 1 for example in examples())
    assert agreement.difference < 1e-4
    assert agreement.equal == 1
    assert agreement.equal_beam == 1


def test_check_without_known_targets_and_with_empty_lines(bundle, tmp_path):
    probe = [Example("w1 w2 w3"), Example("  "), Example("never seen words"), Example("w4", "")]
    agreement = export(CTranslate2(), bundle, tmp_path / "out", probe)
    assert agreement.holds
    assert agreement.lines == 3


def test_a_probe_of_empty_lines_is_an_error(bundle, tmp_path):
    with pytest.raises(DataError, match="no line with text"):
        export(CTranslate2(), bundle, tmp_path / "out", [Example(""), Example(" ")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "encoder.0.attention.joined.weight",
        "decoder.1.cross.query.bias",
        "decoder.0.feed_forward.outer.weight",
        "decoder_norm.weight",
    ],
)
def test_one_wrong_weight_makes_the_check_disagree(name, tmp_path):
    exported, model = make_bundle(), make_bundle()
    with torch.no_grad():
        dict(exported.model.named_parameters())[name].view(-1)[5] += 0.3
    exporter = CTranslate2()
    (tmp_path / "out").mkdir()
    exporter.write(exported, tmp_path / "out")
    assert exporter.check(exported, tmp_path / "out", examples()).holds
    assert not exporter.check(model, tmp_path / "out", examples()).holds


def test_a_disagreement_leaves_the_older_export_alone(bundle, tmp_path, monkeypatch):
    export(CTranslate2(), bundle, tmp_path / "out")
    before = atomic.verify(tmp_path / "out")
    monkeypatch.setitem(TOLERANCES, "int8", Tolerance(0.0, 1.0))
    with pytest.raises(DisagreementError, match="nothing was written") as caught:
        export(CTranslate2(quantize="int8"), bundle, tmp_path / "out", examples())
    assert caught.value.agreement.difference > 0
    assert caught.value.code == 3
    assert atomic.verify(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_score_that_is_not_a_number_never_agrees():
    ours = Outputs([[-1.0, -2.0]], [[4]], [[4]])
    theirs = Outputs([[float("nan"), -2.0]], [[4]], [[4]])
    agreement = compare(ours, theirs, Tolerance(100.0, 0.0))
    assert not agreement.holds
    assert agreement.plain()["largest-difference"] is None


def test_compare_by_hand():
    ours = Outputs([[-1.0, -2.0], [-3.0]], [[4, 5], [6]], [[4], [6]])
    theirs = Outputs([[-1.0, -2.25], [-2.875]], [[4, 5], [7]], [[5], [7]])
    agreement = compare(ours, theirs, Tolerance(0.25, 0.5))
    assert (agreement.lines, agreement.tokens, agreement.difference) == (2, 3, 0.25)
    assert (agreement.equal, agreement.equal_beam) == (0.5, 0.0)
    assert agreement.holds
    assert not replace(agreement, tolerance=Tolerance(0.24, 0.5)).holds
    assert not replace(agreement, tolerance=Tolerance(0.25, 0.51)).holds


@pytest.mark.parametrize("quantize", [name for name in TOLERANCES if name != "none"])
def test_quantised_exports_load_are_smaller_and_leave_the_model_alone(bundle, quantize, tmp_path):
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    export(CTranslate2(), bundle, tmp_path / "full")
    exporter = CTranslate2(quantize=quantize)
    export(exporter, bundle, tmp_path / "small")
    # Greedy outputs of random weights hang on near-ties, so only the scores are compared here.
    difference = exporter.check(bundle, tmp_path / "small", examples()).difference
    assert difference < TOLERANCES[quantize].difference
    assert quantize == "float32" or difference > 1e-5
    full, small = ((tmp_path / name / "model.bin").stat().st_size for name in ("full", "small"))
    assert small == full if quantize == "float32" else small < full
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())


def test_an_unknown_quantisation_names_the_known_ones():
    with pytest.raises(UsageError, match=r"no 'int9' among none, float32, .*did you mean 'int8'"):
        CTranslate2(quantize="int9")


def test_problems_are_named_by_key_all_at_once(bundle):
    config = replace(bundle.model.config)
    config.activation, config.positions = "mish", "alibi"
    odd = make_bundle()
    odd.model.config = config
    found = CTranslate2().problems(odd)
    assert [problem.partition(":")[0] for problem in found] == ["model.activation", "model.positions"]
    assert "relu, gelu, swiglu" in found[0]
    assert CTranslate2().problems(bundle) == []


def test_a_model_of_ones_own_cannot_be_expressed(tmp_path):
    class Own(type(make_bundle().model)):
        pass

    own = make_bundle()
    own.model.__class__ = Own
    with pytest.raises(UsageError, match=r"model.name: 'transformer' is a model of its own"):
        export(CTranslate2(), own, tmp_path / "out")


def test_sources_longer_than_the_model_reads_are_cut_as_by_us(tmp_path):
    bundle = make_bundle(text={"max_source": 6})
    agreement = export(CTranslate2(), bundle, tmp_path / "out", [Example(" ".join(WORDS[:20]), "w1")])
    assert agreement.holds
    assert run_program(tmp_path / "out", " ".join(WORDS[:20])) == run_program(tmp_path / "out", " ".join(WORDS[:5]))


def run_program(folder, text: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, folder / "translate.py"], input=text.encode(), capture_output=True, check=True, timeout=60
    )
    return result.stdout.decode().split("\n")[:-1]


@pytest.mark.parametrize("kinds", [PLAIN, ("sentencepiece", "sentencepiece"), ("character", "sentencepiece")])
def test_the_folder_can_be_used_alone(kinds, tmp_path):
    """translate.py, with a beam, writes what `encdec generate` writes."""
    source = tokenizer(kinds[0])
    target = source if kinds[0] == kinds[1] else tokenizer(kinds[1])
    bundle = make_bundle(source, target, tie="all" if source is target else "decoder")
    export(CTranslate2(), bundle, tmp_path / "out")
    given = [*lines(6, 11, longest=4), "", "w1 <s> unseen"]
    search = replace(bundle.recipe.decoding.config, max_length="23")
    results = generate([bundle], [[Example(line) for line in given]], Options(search))
    expected = [r.candidates[0].text if r.candidates else "" for r in results]
    found = run_program(tmp_path / "out", "\n".join(given))
    assert len(found) == len(given)
    assert found[6] == ""
    # Beams may part where banned tokens were probable: CTranslate2 normalises without them.
    assert sum(one == two for one, two in zip(found, expected, strict=True)) >= 6


def test_the_page_says_how_the_task_prepares_a_line(bundle, tmp_path):
    export(CTranslate2(), bundle, tmp_path / "plain")
    assert "this model reads" not in (tmp_path / "plain" / "README.txt").read_text()
    tagged = make_bundle(task={"name": "translation", "target_language": "de", "tag": True})
    export(CTranslate2(), tagged, tmp_path / "tagged")
    assert "this model reads '<2de> one\\ttwo'" in (tmp_path / "tagged" / "README.txt").read_text()


def test_files_of_the_folder(bundle, tmp_path):
    export(CTranslate2(quantize="int8"), bundle, tmp_path / "shared")
    atomic.verify(tmp_path / "shared")
    names = {path.name for path in (tmp_path / "shared").iterdir()}
    assert names == {
        *("MANIFEST.json", "README.txt", "config.json", "export.json", "model.bin", "shared_vocabulary.json"),
        *("source.tokenizer", "translate.py"),
    }
    facts = json.loads((tmp_path / "shared" / MARKER).read_text())
    assert (facts["target"], facts["quantize"], facts["model"]["d_model"]) == ("ctranslate2", "int8", 16)
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert (config["decoder_start_token"], config["add_source_eos"], config["add_source_bos"]) == ("<s>", True, False)

    two = make_bundle(tokenizer("word"), tokenizer("character"), tie="decoder")
    export(CTranslate2(), two, tmp_path / "two")
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert {"source_vocabulary.json", "target_vocabulary.json", "target.tokenizer"} <= names


def test_a_folder_that_is_no_export_is_not_replaced(bundle, tmp_path):
    for name in ("bundle", "other"):
        folder = tmp_path / name
        save(bundle, folder) if name == "bundle" else folder.mkdir()
        (folder / "precious").write_text("x")
        with pytest.raises(UsageError, match=r"no export .*not replaced"):
            export(CTranslate2(), bundle, folder)
        assert (folder / "precious").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not replaced"):
        export(CTranslate2(), bundle, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export(CTranslate2(), bundle, tmp_path / "empty")
    export(CTranslate2(quantize="int8"), bundle, tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / MARKER).read_text())["quantize"] == "int8"


# The command.


@pytest.fixture
def encdec(monkeypatch, capsys, tmp_path):
    """Run the command line in this process, in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENCDEC_MODEL", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "export", export_command)
    # This process is shared with other tests, which want their one thread back.
    monkeypatch.setattr("encdec_cli.training.machine.use_threads", lambda count: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def run_folder(bundle, tmp_path):
    """The folder of a run whose recipe names a corpus that is there."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.src").write_text("".join(f"{line}\n" for line in lines(60, 21)))
        (tmp_path / f"{split}.tgt").write_text("".join(f"{line}\n" for line in lines(60, 22)))
    data = {split: {"source": f"{split}.src", "target": f"{split}.tgt"} for split in ("train", "test")}
    plain = resolved(bundle.recipe) | {"data": {"name": "files", "root": str(tmp_path), **data}}
    save(replace(bundle, recipe=from_resolved(plain)), tmp_path / "runs" / "mt" / "bundle")
    return tmp_path / "runs" / "mt"


def test_the_command_prints_the_folder_alone(encdec, run_folder):
    code, out, err = encdec("export", "--to", "ctranslate2", "--model", run_folder)
    assert (code, out) == (0, "mt-ctranslate2\n")
    assert "mt-ctranslate2" in err
    ctranslate2.Translator("mt-ctranslate2")


@pytest.mark.parametrize("model", ["", "bundle", "../mt"])
def test_the_default_output_is_named_after_the_run(encdec, run_folder, model):
    assert encdec("export", "--to", "ctranslate2", "--model", run_folder / model)[1] == "mt-ctranslate2\n"


def test_the_command_takes_the_newest_run_and_says_so(encdec, run_folder):
    code, out, err = encdec("export", "--to", "ctranslate2")
    assert (code, out) == (0, "mt-ctranslate2\n")
    assert "runs/mt" in err


def test_check_prints_the_numbers_after_the_folder(encdec, run_folder):
    code, out, _ = encdec("export", "--to", "ctranslate2", "--model", run_folder, "--output", "there", "--check")
    assert code == 0
    folder, *rows = out.split("\n")[:-1]
    numbers = dict(row.split(" ") for row in rows)
    assert folder == "there"
    assert numbers["lines"] == "50"  # of the 60 held-out ones
    assert float(numbers["largest-difference"]) < 1e-4
    assert (numbers["equal-greedy"], numbers["agrees"]) == ("1", "yes")


def test_check_as_json_on_lines_of_ones_own(encdec, run_folder, tmp_path):
    (tmp_path / "probe.txt").write_text("w1 w2\n\nw3\n")
    words = ("export", "--to", "ctranslate2", "--model", run_folder, "--check", "--probe", tmp_path / "probe.txt")
    code, out, _ = encdec(*words, "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["folder"], result["lines"], result["equal-greedy"]) == ("mt-ctranslate2", 2, 1.0)
    assert result["agrees"] is True


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_disagreement_is_exit_3_with_both_numbers(encdec, run_folder, tmp_path, monkeypatch, as_json):
    monkeypatch.setitem(TOLERANCES, "int8", Tolerance(1e-9, 1.0))
    words = ("export", "--to", "ctranslate2", "--quantize", "int8", "--check", "--model", run_folder)
    code, out, err = encdec(*words, *as_json)
    assert code == 3
    assert "does not agree" in err
    numbers = json.loads(out) if as_json else dict(row.split(" ") for row in out.split("\n")[:-1])
    assert float(numbers["largest-difference"]) > 1e-9
    assert 0 <= float(numbers["equal-greedy"]) <= 1
    assert numbers["agrees"] in (False, "no")
    assert not (tmp_path / "mt-ctranslate2").exists()


def test_mistakes_of_the_command_line_are_exit_2(encdec, run_folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    words = ("export", "--model", run_folder, "--to")
    for rest, sentence in (
        (("ctranslate3",), "did you mean 'ctranslate2'?"),
        (("ctranslate2", "--quantize", "int7"), "--quantize: no 'int7' among"),
        (("ctranslate2", "--output", "taken"), "not replaced"),
        (("ctranslate2", "--probe", "probe.txt"), "add --check"),
    ):
        code, out, err = encdec(*words, *rest)
        assert (code, out) == (2, "")
        assert sentence in err


def test_a_missing_corpus_points_to_probe(encdec, run_folder, tmp_path):
    (tmp_path / "test.src").unlink()
    code, out, err = encdec("export", "--to", "ctranslate2", "--model", run_folder, "--check")
    assert (code, out) == (4, "")
    assert "--probe FILE" in err
    assert not (tmp_path / "mt-ctranslate2").exists()


def test_without_the_package_the_extra_is_named(encdec, run_folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "encdec_cli.bundle.ctranslate2")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    code, _, err = encdec("export", "--to", "ctranslate2", "--model", run_folder)
    assert code == 2
    assert "pip install 'encdec-cli[ctranslate2]'" in err


PLUGIN = """
from encdec_cli.models.transformer import Transformer
from encdec_cli.registry import models


@models.register("registry_test_transformer")
class MyTransformer(Transformer):
    pass
"""


def test_a_plugin_model_is_refused_with_the_reason(encdec, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    load_plugin(tmp_path / "mine.py")
    save(make_bundle(name="registry_test_transformer"), tmp_path / "mine")
    words = ("export", "--to", "ctranslate2", "--model", "mine", "--plugin", "mine.py")
    code, out, err = encdec(*words)
    assert (code, out) == (2, "")
    assert "model.name: 'registry_test_transformer' is a model of its own" in err


TARGET = """
from dataclasses import dataclass
from encdec_cli.registry import exporters


@exporters.register("registry_test_target")
@dataclass
class Target:
    def problems(self, bundle):
        return []

    def write(self, bundle, folder):
        (folder / "README.txt").write_text("one file")

    def facts(self):
        return {"target": "registry_test_target"}
"""


def test_a_target_of_a_plugin_is_found_and_needs_no_quantize(encdec, run_folder, tmp_path):
    (tmp_path / "target.py").write_text(TARGET)
    words = ("export", "--to", "registry_test_target", "--plugin", tmp_path / "target.py", "--model", run_folder)
    assert encdec(*words, "--output", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "README.txt").read_text() == "one file"
    code, _, err = encdec(*words, "--quantize", "int8")
    assert code == 2
    assert "one way alone" in err
