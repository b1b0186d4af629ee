"""`encdec generate` in a shell: one line out per line in, in order, whatever comes down the pipe."""

from __future__ import annotations

import gzip
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.generation.lines import Options, generate
from encdec_cli.text.example import Example
from tests.conftest import encdec, environment, start


def lines(text: str) -> list[str]:
    return text.split("\n")[:-1]


@pytest.fixture(scope="module")
def sources(copy_run):
    return lines((copy_run.parent / "corpus" / "test.src").read_text())


def test_the_copy_task_is_solved_through_the_commands(copy_run, sources):
    done = encdec("generate", "--model", copy_run, "--beam", "5", stdin="".join(f"{s}\n" for s in sources))
    assert done.returncode == 0, done.stderr
    right = sum(out == source for out, source in zip(lines(done.stdout), sources, strict=True))
    assert right >= 0.95 * len(sources)


def test_one_line_out_per_line_in_whatever_comes(copy_run):
    wild = [
        "1 2 3",
        "",
        "   ",
        "\t",
        "unseen words",
        "1 2\u2028 3",
        "4 \u0085 5",
        "7\r8",
        "9 " * 400,
        "\ufeff1",
        "1\x002",
        "5",
    ]
    content = b"".join(line.encode() + b"\n" for line in wild) + b"\xff\xfe 1\r\n" + b"8 9"
    done = encdec("generate", "--model", copy_run, stdin=content)
    assert done.returncode == 0, done.stderr
    out = lines(done.stdout)
    assert len(out) == len(wild) + 2
    assert out[1] == out[2] == ""
    assert out[0] == "1 2 3"
    assert out[-1] == "8 9"
    for word in ("UTF-8", "NUL", "1 line was longer"):
        assert word in done.stderr, done.stderr


def test_a_file_a_gzip_and_a_pipe_give_the_same(copy_run, sources, tmp_path):
    content = "".join(f"{source}\n" for source in sources)
    (tmp_path / "in.txt").write_text(content)
    (tmp_path / "in.gz").write_bytes(gzip.compress(content.encode()))
    outputs = {
        encdec("generate", tmp_path / "in.txt", "--model", copy_run).stdout,
        encdec("generate", tmp_path / "in.gz", "--model", copy_run).stdout,
        encdec("generate", "--model", copy_run, "--batch", "3", stdin=content).stdout,
    }
    assert len(outputs) == 1
    assert outputs.pop().count("\n") == len(sources)


def test_json_records_keep_their_fields_and_tell_what_happened(copy_run):
    records = [
        json.dumps({"id": "a7", "source": "1 2 3", "year": 2016, "nested": {"x": [1]}}),
        "4 5",
        "",
        json.dumps({"source": "1 " * 300}),
    ]
    done = encdec("generate", "--model", copy_run, "--json", stdin="".join(f"{r}\n" for r in records))
    assert done.returncode == 0, done.stderr
    first, second, third, fourth = (json.loads(line) for line in lines(done.stdout))
    assert (first["id"], first["year"], first["nested"]) == ("a7", 2016, {"x": [1]})
    assert (first["text"], first["status"]) == ("1 2 3", "ok")
    assert len(first["token_scores"]) == 4  # three tokens and the end
    # The score is the length-normalised log-probability (length penalty 1).
    assert first["score"] == pytest.approx(sum(first["token_scores"]) / 4, abs=1e-5)
    assert (second["id"], second["text"]) == (2, "4 5")
    assert (third["text"], third["status"]) == ("", "empty")
    assert fourth["status"] == "truncated"


def test_a_model_knows_the_usual_ratios_of_lengths(copy_run):
    assert Bundle.load(copy_run).facts["length_ratios"] == [1.0, 1.0]


def test_half_of_a_surrogate_pair_in_a_record_becomes_the_replacement_character(copy_run):
    done = encdec("generate", "--model", copy_run, "--json", stdin='{"source": "1", "note": "\\ud800"}\n')
    assert (done.returncode, json.loads(done.stdout)["note"]) == (0, "\ufffd"), done.stderr


def test_a_broken_record_is_named_by_its_line_after_the_good_ones(copy_run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"source": "1"}\n4 5\n{"source": 2\n6\n')
    done = encdec("generate", tmp_path / "in.jsonl", "--model", copy_run, "--json")
    assert done.returncode == 4
    assert [json.loads(line)["text"] for line in lines(done.stdout)] == ["1", "4 5"]
    assert "in.jsonl:3" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_json_cannot_hold_is_refused_by_its_line(copy_run, number):
    content = f'{{"source": "1", "x": 0.5}}\n{{"source": "1", "x": [{number}]}}\n'
    done = encdec("generate", "--model", copy_run, "--json", stdin=content)
    assert done.returncode == 4
    assert [json.loads(line)["x"] for line in lines(done.stdout)] == [0.5]
    assert f"stdin:2: not a record this task can read ({number} is no number of JSON; write null)" in done.stderr


def test_n_best_and_scores_are_columns(copy_run):
    done = encdec("generate", "--model", copy_run, "--n-best", "2", "--scores", stdin="1 2 3\n\n")
    assert done.returncode == 0, done.stderr
    first, second = lines(done.stdout)
    score, text, other_score, other = first.split("\t")
    assert text == "1 2 3"
    assert other != text
    assert float(score) >= float(other_score)
    assert second == ""
    wide = encdec("generate", "--model", copy_run, "--n-best", "4", stdin="1 2 3\n")  # the recipe's beam is 2
    assert wide.stdout.count("\t") == 3
    for words in (("--beam", "2"), ("--strategy", "beam,beam=2,prefix='beam=9'")):
        refused = encdec("generate", "--model", copy_run, "--n-best", "9", *words, stdin="1\n")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "--n-best 9: the search keeps 2 hypotheses a line; give --beam 9" in refused.stderr


def test_a_beam_of_its_own_flag_is_checked_with_the_keys_beside_it(copy_run):
    done = encdec("generate", "--model", copy_run, "--strategy", "diverse,groups=2", "--beam", "4", stdin="1 2\n")
    assert (done.returncode, done.stdout) == (0, "1 2\n"), done.stderr


def test_samples_are_the_same_wherever_the_line_stands(copy_run):
    strategy = ("--strategy", "sampling,temperature=3.0,seed=5")
    source = ["1 2 3", "4 5 6 7", "1 2 3", "9 9", "4 5 6 7", "8"]
    forth = encdec("generate", "--model", copy_run, *strategy, stdin="".join(f"{s}\n" for s in source))
    back = encdec(
        "generate", "--model", copy_run, *strategy, "--batch", "2", stdin="".join(f"{s}\n" for s in source[::-1])
    )
    assert forth.returncode == 0, forth.stderr
    assert lines(forth.stdout) == lines(back.stdout)[::-1]
    assert lines(forth.stdout)[0] == lines(forth.stdout)[2]
    other = encdec(
        "generate",
        "--model",
        copy_run,
        "--strategy",
        "sampling,temperature=3.0,seed=6",
        stdin="".join(f"{s}\n" for s in source),
    )
    assert other.stdout != forth.stdout


@pytest.mark.parametrize(
    "strategy",
    [
        "beam,beam=3,stop=never,normalization=gnmt",
        "diverse,beam=4,groups=2",
        "siblings",
        "contrastive,penalty_alpha=0.1",
    ],
)
def test_every_strategy_copies_as_the_model_has_learned(copy_run, strategy):
    done = encdec("generate", "--model", copy_run, "--strategy", strategy, stdin="1 2 3\n\n7\n")
    assert (lines(done.stdout), done.returncode) == (["1 2 3", "", "7"], 0), done.stderr


def test_an_ensemble_of_a_model_with_itself_is_the_model(copy_run, sources):
    content = "".join(f"{source}\n" for source in sources[:10])
    one = encdec("generate", "--model", copy_run, "--scores", stdin=content)
    two = encdec("generate", "--model", copy_run, "--model", copy_run, "--scores", stdin=content)
    assert two.returncode == 0, two.stderr
    for ours, theirs in zip(lines(one.stdout), lines(two.stdout), strict=True):
        assert ours.split("\t")[1] == theirs.split("\t")[1]
        assert float(ours.split("\t")[0]) == pytest.approx(float(theirs.split("\t")[0]), abs=1e-3)


@pytest.mark.parametrize("named", [(), ("/dev/stdin",)], ids=["stdin", "a pipe with a name"])
def test_a_co_process_gets_its_answer_line_by_line(copy_run, named):
    process = start("generate", "--model", copy_run, *named, stderr=subprocess.DEVNULL)
    try:
        for line in ("1 2", "", "3 4 5", "6"):
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], 60)
            assert ready, "no answer while the pipe stays open"
            assert process.stdout.readline() == f"{line}\n".encode()
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_head_ends_an_endless_pipe_quietly(copy_run):
    command = f"yes '1 2 3' | {sys.executable} -m encdec_cli generate --model {copy_run} --batch 8 | head -n 3"
    done = subprocess.run(
        ["bash", "-c", command],
        env=environment(),
        capture_output=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout == b"1 2 3\n" * 3
    assert done.stderr == b""


def test_a_full_disk_on_stdout(copy_run):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("wb") as full:
        process = start("generate", "--model", copy_run, stdout=full)
        _, errors = process.communicate(b"1 2\n", timeout=60)
    assert process.returncode == 6
    assert b"Traceback" not in errors
    assert errors.count(b"\n") == 1


def test_closed_streams_are_no_failures_of_ours(copy_run):
    command = f"{sys.executable} -m encdec_cli generate --model {copy_run}"
    for closing, code, said in ((">&- < /dev/null", 0, b""), ("<&-", 4, b"encdec: error: stdin is closed; ")):
        done = subprocess.run(
            ["bash", "-c", f"{command} {closing}"], env=environment(), capture_output=True, check=False
        )
        assert (done.returncode, done.stdout) == (code, b"")
        assert done.stderr.startswith(said)


def test_ctrl_c_leaves_with_130(copy_run):
    process = start("generate", "--model", copy_run)
    process.stdin.write(b"1 2\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"1 2\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "nowhere"], 5, "nowhere: no such model folder"),
        (["no-such-file.txt"], 4, "no-such-file.txt"),
        (["--strategy", "beem"], 2, "did you mean 'beam'?"),
        (["--strategy", "beam,length_penalti=1"], 2, "did you mean 'length_penalty'?"),
        (["--beam", "0"], 2, "--beam"),
        (["--strategy", "beam,stop=early"], 2, "stop: expected"),
        (["--strategy", "contrastive", "--beam", "3"], 2, "--strategy contrastive,beam=3: beam: 3; contrastive search"),
        (["--strategy", "diverse,beam=4,groups=2", "--beam", "3"], 2, "the beam must be a multiple of the groups"),
        (["--device", "tpu9"], 2, "--device"),
        (["--strategy", "beam,max_length=2y"], 2, "2x+20"),
        (["--strategy", "beam,zzz=1"], 2, "zzz: unknown key; expected beam, max_length, min_length, no_repeat_ngram"),
    ],
)
def test_mistakes_are_one_sentence_and_the_documented_code(copy_run, arguments, code, words):
    model = [] if "--model" in arguments else ["--model", str(copy_run)]
    done = encdec("generate", *model, *arguments, stdin="1\n")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_without_a_model_it_says_where_it_looked(tmp_path):
    done = encdec("generate", stdin="1\n", cwd=tmp_path)
    assert done.returncode == 2
    assert "ENCDEC_MODEL" in done.stderr
    assert "encdec train" in done.stderr


def test_a_task_that_writes_several_lines_still_gives_one(copy_run, monkeypatch):
    bundle = Bundle.load(copy_run)
    monkeypatch.setattr(bundle.task, "write", lambda example, text: f"{text}\nb\rc")
    (result,) = generate([bundle], [[Example("1 2")]], Options(bundle.recipe.decoding.config))
    assert result.candidates[0].text == "1 2 b c"


def test_the_newest_run_is_found_and_named(copy_run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "copy").symlink_to(copy_run)
    done = encdec("generate", stdin="1 2\n", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "1 2\n"
    assert re.fullmatch(r"model: runs/copy \(the only run with a model, last trained [-\d]+ [:\d]+\)\n", done.stderr)


def test_the_newest_run_is_the_one_trained_last_not_the_one_with_the_newest_model(copy_run, tmp_path):
    for name, model, log in (("early", 1_000_000_000, 1_700_000_000), ("late", 1_600_000_000, 1_600_000_000)):
        run = tmp_path / "runs" / name
        shutil.copytree(copy_run / "bundle", run / "bundle")
        shutil.copy(copy_run / "log.jsonl", run / "log.jsonl")
        os.utime(run / "bundle" / "bundle.json", (model, model))
        os.utime(run / "log.jsonl", (log, log))
    done = encdec("generate", stdin="1 2\n", cwd=tmp_path, TZ="UTC")
    assert done.stderr == "model: runs/early (the newest of 2 runs with a model, last trained 2023-11-14 22:13)\n"
    named = encdec("generate", stdin="1 2\n", cwd=tmp_path, ENCDEC_MODEL="runs/late")
    assert named.stderr == "model: runs/late (ENCDEC_MODEL)\n"


def test_a_damaged_bundle_is_refused_by_file(copy_run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(copy_run / "bundle", broken)
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    done = encdec("generate", "--model", broken, stdin="1\n")
    assert done.returncode == 5
    assert "model.safetensors" in done.stderr
    assert "SHA-256" in done.stderr
    assert "`encdec train` with the run's recipe writes a lost model anew, or copy it again" in done.stderr
    assert done.stderr.count("\n") == 1
