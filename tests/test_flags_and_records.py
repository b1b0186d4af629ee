"""What `generate` says before any model is loaded, and of lines and records that it cannot read; the scores' schema."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest
import torch

from encdec_cli import cli
from encdec_cli.cli import schema
from encdec_cli.generation.flags import FLAGS
from encdec_cli.generation.lines import TROUBLES
from tests.conftest import encdec, save, write_lines
from tests.test_contract import TEXT, WORDS, make_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "model"
    save(make_bundle(positions="learned", max_positions=32), folder)
    return folder


@pytest.fixture
def command(model, tmp_path, capfd):
    def call(lines: list[str], *words: str):
        write_lines(tmp_path / "in", lines)
        code = cli.run(["generate", str(tmp_path / "in"), "--model", str(model), *words])
        out, errors = capfd.readouterr()
        return code, out.split("\n")[:-1], errors

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--strategy", "beem,beam=3"), "--strategy beem,beam=3: no strategy 'beem' among beam, "),
        (("--rerank", "mbx"), "--rerank mbx: no reranker 'mbx' among mbr, noisy_channel, oracle"),
        (("--fail-on", "loops"), "(did you mean 'loop'?)"),
        (("--alignments", "first"), "--alignments first: expected best, a decoder layer such as 3"),
        (("--weights", "1;2"), "--weights 1;2: expected a number for each --model"),
        (("--score", "--n-best", "3"), "--score searches for nothing; leave --n-best out"),
    ],
)
def test_what_needs_no_model_is_told_before_torch_is_imported(tmp_path, words, sentence):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    root = Path(__file__).parent.parent
    done = encdec("generate", *words, "--model", "none", PYTHONPATH=f"{tmp_path}:{root}")
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr


def test_a_plugins_names_are_known_before_the_model_is_loaded(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from encdec_cli.decoding.beam import Beam\nfrom encdec_cli.registry import strategies\n\n"
        "@strategies.register('mine')\nclass Mine(Beam):\n    pass\n"
    )
    done = encdec("generate", "--strategy", "mine,beam=2", "--plugin", plugin, "--model", tmp_path / "none")
    assert (done.returncode, "none: no such model folder" in done.stderr) == (5, True)


@pytest.mark.parametrize(
    ("words", "line", "what"),
    [
        (("--json",), '{"source": "ba be", "prefix": 5}', "field 'prefix': expected text"),
        (
            ("--json",),
            '{"source": null, "a": 1}',
            "not a record this task can read (field 'source': missing; expected source, found the fields 'a')",
        ),
        (("--json",), '{"source": 5}', "not a record this task can read (field 'source': expected text"),
        (("--score",), f"ba\t{' '.join(['be'] * 300)}", "a target of 300 tokens, and the model reads at most"),
    ],
)
def test_file_and_line_are_named_whenever_a_line_turns_out_wrong(command, tmp_path, words, line, what):
    good = "ba\tbe" if "--score" in words else "ba"
    code, out, errors = command([good, line, good], *words)
    assert code == 4
    assert len(out) <= 1
    assert errors.startswith(f"encdec: error: {tmp_path / 'in'}:2: {what}")
    assert errors.endswith("the lines before this one have been written.\n")


def test_nothing_is_said_to_be_written_before_the_first_line(command):
    code, out, errors = command(["{}"], "--json")
    assert (code, out) == (4, [])
    assert "field 'source': missing; expected source, found no field).\n" in errors


def test_a_line_that_looks_like_a_record_is_told_of_once_and_read_as_text(command):
    record = json.dumps({"source": "ba be"})
    code, out, errors = command(["ba", record, record, "{ba", "{}"])
    assert (code, len(out)) == (0, 5)
    assert errors == "encdec: warning: a line looks like a JSON record, and is read as text; --json reads records\n"
    assert command(["{ba be", "[1]"])[2] == ""
    assert "looks like" not in command([record], "--json")[2]


def test_every_record_of_scores_fits_its_schema(command, capfd):
    assert cli.run(["generate", "--score", "--schema"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["title"] != json.loads(schema.text(schema.RECORD))["title"]
    jsonschema.Draft202012Validator.check_schema(told)
    validator = jsonschema.Draft202012Validator(told)
    records = [
        {"source": TEXT[0], "target": TEXT[1], "id": "first", "status": "old", "alignment": 7, "text": "kept"},
        {"source": " ".join(WORDS[:20]), "target": "ba"},
        {"source": "", "target": "", "x": [None]},
        {"source": "ba", "target": "no such words"},
    ]
    lines = [json.dumps(record) for record in records]
    for words in ((), ("--alignments", "0")):
        code, out, _ = command([*lines, f"{TEXT[2]}\t{TEXT[3]}"], "--score", "--json", *words)
        found = [json.loads(line) for line in out]
        assert (code, len(found)) == (0, 5)
        for record in found:
            validator.validate(record)
            assert ("alignment" in record) == bool(words)
            assert len(record["tokens"]) == len(record["token_scores"])
            assert math.fsum(record["token_scores"]) == pytest.approx(record["log_probability"], abs=1e-4)
        assert [record["id"] for record in found] == ["first", 2, 3, 4, 5]
        assert [record["status"] for record in found] == ["ok", "truncated", "ok", "ok", "ok"]
        assert found[0]["text"] == "kept"  # it is no field of a score's
        assert found[2]["tokens"] == ["</s>"]
    for key, wrong in (("status", "empty"), ("perplexity", 0.5), ("log_probability", 1), ("tokens", [])):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**found[0], key: wrong})
    for key in told["required"]:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({name: value for name, value in found[0].items() if name != key})


def test_statuses_and_flags_are_those_of_the_schema():
    assert schema.troubles() == [*TROUBLES, *FLAGS]
