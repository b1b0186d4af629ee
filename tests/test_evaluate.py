"""`encdec evaluate` in a shell: hypotheses from a pipe, a file or the model; sacreBLEU's own numbers."""

from __future__ import annotations

import gzip
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
import torch

from encdec_cli import cli
from encdec_cli.evaluation.likelihood import likelihoods
from encdec_cli.generation.lines import Options, first_text, generate
from encdec_cli.text.example import Example
from tests.conftest import copy_task, encdec, save, start, write_lines
from tests.test_contract import TEXT, make_bundle

HYPOTHESES = ["the cat sat on the mat", "a dog barks", "it rains in Spain today", "nothing to see here"]
REFERENCES = ["the cat sat on a mat", "the dog barks loudly", "it rains in Spain", "there is nothing to see"]
OTHERS = ["a cat was on the mat", "a dog barks loudly", "today it rains in Spain", "nothing to see"]


@pytest.fixture
def files(tmp_path):
    for name, lines in (("hyp", HYPOTHESES), ("ref", REFERENCES), ("ref2", OTHERS), ("base", OTHERS)):
        write_lines(tmp_path / name, lines)
    return tmp_path


def test_bleu_from_a_pipe_is_sacrebleus(files):
    done = encdec(
        "evaluate",
        "--metric",
        "bleu",
        "--reference",
        files / "ref",
        "--score-only",
        stdin="".join(f"{h}\n" for h in HYPOTHESES),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score:.2f}\n"


def test_several_metrics_and_references_and_a_gzip(files):
    (files / "hyp.gz").write_bytes(gzip.compress((files / "hyp").read_bytes()))
    done = encdec(
        *("evaluate", files / "hyp.gz", "--reference", files / "ref", "--reference", files / "ref2", "--json"),
        *("--metric", "bleu,tokenize=zh", "--metric", "chrf,word_order=2", "--metric", "ter", "--metric", "rouge"),
        *("--metric", "exact", "--metric", "f1", "--metric", "distinct"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    scores = {score["name"]: score for score in report["scores"]}
    both = [REFERENCES, OTHERS]
    assert scores["chrF2++"]["value"] == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, both, word_order=2).score)
    assert scores["TER"]["value"] == pytest.approx(sacrebleu.corpus_ter(HYPOTHESES, both).score)
    assert "nrefs:2" in scores["BLEU"]["signature"]
    assert "tok:zh" in scores["BLEU"]["signature"]
    assert {"rouge1", "rouge2", "rougeL", "rougeLsum"} <= set(scores)
    assert all(
        score["low"] <= score["value"] <= score["high"] for score in report["scores"] if score["low"] is not None
    )


@pytest.mark.parametrize("seed", ["", "7"])
def test_the_paired_test_has_sacrebleus_p_value(files, monkeypatch, seed):
    """With another seed too, which sacreBLEU takes from SACREBLEU_SEED."""
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    if seed:
        monkeypatch.setenv("SACREBLEU_SEED", seed)
    many = {"hyp": HYPOTHESES * 5, "ref": REFERENCES * 5, "base": OTHERS * 5}
    for name, lines in many.items():
        write_lines(files / name, lines)
    done = encdec(
        "evaluate", files / "hyp", "--metric", "bleu", "-r", files / "ref", "--baseline", files / "base", "--json"
    )
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)["scores"][0]
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        files / "ref",
        "-i",
        files / "base",
        files / "hyp",
        "-m",
        "bleu",
        "--paired-ar",
        "-f",
        "json",
    ]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert ours["p_value"] == pytest.approx(theirs[1]["BLEU"]["p_value"], abs=1e-9)
    assert f"seed:{seed or 12345}" in ours["signature"]


def test_a_seed_that_is_none(files):
    done = encdec("evaluate", files / "hyp", "--metric", "bleu", "-r", files / "ref", SACREBLEU_SEED="x")
    assert done.returncode == 2
    assert "SACREBLEU_SEED: expected a whole number from 0 on, found 'x'" in done.stderr


def test_files_of_unequal_length_are_refused_with_counts_and_row(files):
    write_lines(files / "short", [*HYPOTHESES[:1], *HYPOTHESES[2:]])
    done = encdec("evaluate", files / "short", "-r", files / "ref")
    assert done.returncode == 4
    assert "3 lines" in done.stderr
    assert "4" in done.stderr
    assert "row" in done.stderr
    assert done.stdout == ""


def test_an_empty_pipe_is_a_broken_pipeline(files):
    done = encdec("evaluate", "-r", files / "ref", stdin="")
    assert done.returncode == 4
    assert "no hypotheses" in done.stderr


def test_a_silent_pipe_is_told_what_it_waits_for_and_is_waited_for(files):
    process = start("evaluate", "-r", files / "ref", "--score-only")
    try:
        said = process.stderr.readline().decode()
        assert said.startswith("still waiting for hypotheses on stdin; give FILE")
        out, rest = process.communicate("".join(f"{h}\n" for h in HYPOTHESES).encode(), timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, rest) == (0, b"")
    assert out.decode() == f"{sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score:.2f}\n"


def test_one_form_of_output_at_a_time(files):
    done = encdec("evaluate", files / "hyp", "-r", files / "ref", "--json", "--score-only")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("encdec: error: --json and --score-only: give one of them;")
    assert done.stderr.count("\n") == 1


def test_flags_that_nothing_needs_are_named(files):
    done = encdec("evaluate", files / "hyp", "-r", files / "ref", "--model", "nowhere", "--source", files / "ref2")
    assert done.returncode == 0
    assert done.stderr == (
        "encdec: warning: --model and --source not used: hypotheses and references are given, and no metric asks a "
        "model\n"
    )


def test_a_bleu_of_0_on_short_lines_has_a_hint(files):
    write_lines(files / "short", ["a b c", "d e"])
    done = encdec("evaluate", files / "short", "-r", files / "short", "--score-only")
    assert (done.returncode, done.stdout) == (0, "0.00\n")
    assert done.stderr == (
        "encdec: warning: BLEU is 0 although 5 words match, since no 4 words in a row do; for short lines use "
        "bleu,effective_order=true.\n"
    )
    hinted = encdec(
        "evaluate", files / "short", "-r", files / "short", "--score-only", "--metric", "bleu,effective_order=true"
    )
    assert (hinted.stdout, hinted.stderr) == ("100.00\n", "")


def test_a_tokenizer_that_cannot_be_downloaded_says_which_file_to_put_where(files):
    done = encdec(
        *("evaluate", files / "hyp", "-r", files / "ref", "--metric", "bleu,tokenize=flores200"),
        SACREBLEU=str(files / "sacrebleu"),
        https_proxy="http://127.0.0.1:9",
    )
    assert (done.returncode, done.stdout) == (6, "")
    assert f"as {files / 'sacrebleu' / 'models' / 'flores200sacrebleuspm'}, or choose another" in done.stderr
    assert "put https://" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("ter,zzz=1", "zzz: unknown key; expected normalized, no_punct, asian_support, case_sensitive"),
        ("ter,normalized=1", "normalized: expected true or false, found 1"),
        ("chrf,beta=0", "beta is 0; it must be at least 1"),
        ("chrf,word_ordr=2", "word_ordr: unknown key (did you mean 'word_order'?)"),
        ("blue", "did you mean 'bleu'?"),
    ],
)
def test_wrong_options_of_a_metric_are_one_sentence(files, metric, words):
    done = encdec("evaluate", files / "hyp", "-r", files / "ref", "--metric", metric)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [("-r", "-"), ("-r", "REF", "--baseline", "-"), ("-", "-r", "REF", "-r", "-")])
def test_stdin_is_read_once(files, words):
    done = encdec("evaluate", *(files / "ref" if word == "REF" else word for word in words), stdin="a\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "-: stdin can be read once; give hypotheses, references or a source as a file" in done.stderr


def test_a_closed_stdin_is_told(files):
    code = (
        "import os, sys; os.close(0); "
        "os.execv(sys.executable, [sys.executable, '-m', 'encdec_cli', 'evaluate', '-r', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", code, files / "ref"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (4, b"")
    assert done.stderr == b"encdec: error: stdin is closed; give a file, or write lines to stdin.\n"


def test_a_test_split_that_is_named_from_another_folder_is_told_of(tmp_path):
    recipe = copy_task(tmp_path / "corpus", train=20)
    words = ("train.steps=2", f"data.root={recipe.parent.name}", "model.d_model=16")
    assert encdec("train", recipe, *words, "--output", "run", cwd=tmp_path).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    done = encdec("evaluate", "--model", "../run", cwd=tmp_path / "elsewhere", stdin=None)
    assert done.returncode == 4
    assert "there is no such file; the model's recipe names its test split" in done.stderr
    assert "give --source and --reference" in done.stderr


def test_the_model_writes_the_hypotheses_of_its_own_test_split(copy_run):
    done = encdec("evaluate", "--model", copy_run, "--metric", "exact", "--metric", "perplexity", "--json")
    assert done.returncode == 0, done.stderr
    scores = {score["name"]: score["value"] for score in json.loads(done.stdout)["scores"]}
    assert scores["exact"] >= 95
    assert 1 <= scores["perplexity"] < 2


def test_generate_then_evaluate_in_a_pipe_is_the_model_evaluated(copy_run):
    corpus = copy_run.parent / "corpus"
    encdec_ = f"{sys.executable} -m encdec_cli"
    writer = f"{encdec_} generate {corpus}/test.src --model {copy_run}"
    command = f"{writer} | {encdec_} evaluate --metric bleu --reference {corpus}/test.tgt"
    from tests.conftest import environment

    piped = subprocess.run(
        ["bash", "-c", command], env=environment(), capture_output=True, check=True, stdin=subprocess.DEVNULL
    )
    alone = encdec("evaluate", "--model", copy_run, "--metric", "bleu")
    assert piped.stdout.decode() == alone.stdout
    assert piped.stdout.startswith(b"BLEU = ")


def test_what_a_precision_costs_is_told_against_fp32(tmp_path, monkeypatch, capfd):
    save(make_bundle(), tmp_path / "model")
    write_lines(tmp_path / "in", TEXT[:80])
    bundles = [make_bundle(), make_bundle()]
    bundles[1].model.to(torch.bfloat16)
    options = Options(bundles[0].recipe.decoding.config)
    full, short = (
        [first_text(one) for one in generate([b], [list(map(Example, TEXT[:80]))], options)] for b in bundles
    )
    assert full != short
    write_lines(tmp_path / "ref", full)
    write_lines(tmp_path / "other", TEXT[:80])
    monkeypatch.setattr(importlib.import_module("encdec_cli.cli.evaluate"), "_stdin_asks_model", lambda: True)
    words = ["evaluate", "--metric", "exact", "--json", "--model", str(tmp_path / "model"), "--precision", "bf16"]
    words += ["--source", str(tmp_path / "in"), "--reference", str(tmp_path / "ref"), "--metric", "perplexity"]
    threads = torch.get_num_threads()
    assert cli.run(words) == 0
    written, said = capfd.readouterr()
    report = json.loads(written)
    score, perplexity = report["scores"]
    assert "baseline: the same model in fp32" in said
    assert score["baseline"] == 100
    assert score["value"] < 100
    assert 0 < score["p_value"] <= 1
    assert not [warning for warning in report["warnings"] if "no baseline" in warning]
    for side, bundle in (("baseline", bundles[0]), ("value", bundles[1])):
        log_probs, tokens = likelihoods(bundle, list(map(Example, TEXT[:80])), full)
        assert perplexity[side] == pytest.approx(float(np.exp(-log_probs.sum() / tokens.sum())), rel=1e-4)
    assert perplexity["baseline"] != perplexity["value"]
    assert 0 < perplexity["p_value"] <= 1
    assert cli.run([*words, "--baseline", str(tmp_path / "other")]) == 0
    assert json.loads(capfd.readouterr().out)["scores"][0]["baseline"] == 0
    assert cli.run([*words, str(tmp_path / "other")]) == 2
    assert "--precision bf16: the hypotheses are given" in capfd.readouterr().err
    torch.set_num_threads(threads)
