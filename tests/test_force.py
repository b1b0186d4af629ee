"""Given targets are scored as a search would score them, in order, one result for each pair."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from scripted import A, B

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.cli.scoring import read_pair
from encdec_cli.data.batch import collate
from encdec_cli.decoding.force import as_targets, score_targets
from encdec_cli.decoding.hypothesis import Hypothesis
from encdec_cli.errors import DataError
from encdec_cli.evaluation.likelihood import likelihoods
from encdec_cli.generation.lines import Options, generate
from encdec_cli.generation.scoring import perplexity, score
from encdec_cli.models.transformer import Transformer
from encdec_cli.tasks.dialogue import Dialogue
from encdec_cli.tasks.translation import Translation
from encdec_cli.text.example import Example
from encdec_cli.text.vocabulary import BOS, EOS
from tests.conftest import encdec


def test_hypotheses_as_targets():
    ended, cut = Hypothesis([A, B], 0.0, [], finished=True), Hypothesis([A], 0.0, [], finished=False)
    found = as_targets([[ended, cut], [cut]], 2, torch.device("cpu"))
    assert found.tolist() == [[BOS, A, B, EOS], [BOS, A, 0, 0], [BOS, A, 0, 0], [BOS, 0, 0, 0]]
    nothing = Hypothesis([], 0.0, [], finished=False)
    assert as_targets([[nothing]], 1, torch.device("cpu")).tolist() == [[BOS, 0]]


@pytest.fixture(scope="module")
def copying(copy_run):
    return Bundle.load(copy_run)


PAIRS = [
    *[Example(" ".join("31415926"[:n]), " ".join("31415926"[:m])) for n in range(1, 6) for m in (0, 2, 5, n)],
    *(Example("", "1 2"), Example("", ""), Example("1 " * 50, "1 1"), Example("1", "unseen " * 3)),
]


def by_hand(bundle: Bundle, example: Example) -> list[float]:
    source = bundle.source.encode(example.source)[: bundle.longest_source]
    batch = collate([source], [bundle.target.encode(example.target)], [0])
    return score_targets([bundle.model], batch.source, batch.source_mask, batch.known_target)[0].tolist()


@pytest.mark.parametrize("windows", [[PAIRS], [PAIRS[:3], [], PAIRS[3:]], [[pair] for pair in PAIRS]])
def test_every_pair_is_scored_in_its_place_whatever_stands_beside_it(copying, windows):
    found = list(score([copying], windows, batch=4))
    assert [one.example for one in found] == PAIRS
    for one in found:
        assert one.token_scores == pytest.approx(by_hand(copying, one.example), abs=1e-5)
        assert one.tokens == [*[word if word != "unseen" else "<unk>" for word in one.example.target.split()], "</s>"]
        assert one.truncated == (one.example.source.count("1 ") == 50)


def test_exact_scores_are_the_same_bits_in_any_window(copying):
    together = [one.token_scores for one in score([copying], [PAIRS], exact=True)]
    alone = [one.token_scores for one in score([copying], [[pair] for pair in reversed(PAIRS)], exact=True)]
    assert together == alone[::-1]


def test_what_a_search_writes_is_scored_as_the_search_scored_it(copying):
    sources = [Example(pair.source) for pair in PAIRS if pair.source]
    options = Options(replace(copying.recipe.decoding.config, beam=3), n_best=3)
    for result in generate([copying], [sources], options):
        written = [replace(result.example, target=one.text) for one in result.candidates if one.finished]
        scored = list(score([copying], [written]))
        scores = [one.token_scores for one in result.candidates if one.finished]
        assert [one.token_scores for one in scored] == [pytest.approx(row, abs=1e-4) for row in scores]


def test_an_ensemble_scores_with_the_mean_of_its_probabilities(copying):
    torch.manual_seed(1)
    other = replace(copying, model=copying.recipe.model.build(*[len(copying.target.vocabulary)] * 2).eval())
    alone = [list(score([bundle], [PAIRS])) for bundle in (copying, other)]
    for first, second, both in zip(*alone, score([copying, other], [PAIRS]), strict=True):
        pairs = zip(first.token_scores, second.token_scores, strict=True)
        assert both.token_scores == pytest.approx([math.log((math.exp(x) + math.exp(y)) / 2) for x, y in pairs])


def test_a_target_that_is_longer_than_the_model_reads_is_named_by_its_line(copying):
    config = Transformer.Config(encoder_layers=1, decoder_layers=1, d_model=8, heads=1, feed_forward=8,
                                positions="learned", max_positions=4)  # fmt: skip
    size = len(copying.target.vocabulary)
    short = replace(copying, model=Transformer(config, size, size).eval())
    fits, long = Example("1", "1 2 3"), Example("1", "1 2 3 4")
    assert len(next(score([short], [[fits]])).tokens) == 4
    with pytest.raises(DataError, match="line 3: a target of 4 tokens, and the model reads at most 3"):
        list(score([short], [[fits, fits], [long]]))


def test_perplexity_and_likelihoods(copying):
    assert perplexity(-2 * math.log(8), 2) == pytest.approx(8)
    assert perplexity(-1e6, 1) == math.inf
    totals, counts = likelihoods(copying, [Example("1 2"), Example("3")], ["1 2", ""])
    wanted = [by_hand(copying, pair) for pair in (Example("1 2", "1 2"), Example("3", ""))]
    assert totals.tolist() == pytest.approx([sum(row) for row in wanted], abs=1e-5)
    assert counts.tolist() == [3, 1]
    assert [array.shape for array in likelihoods(copying, [], [])] == [(0,), (0,)]


def test_the_target_stands_after_the_last_tab_whatever_the_task():
    assert read_pair(Translation(), "a b\tc d") == Example("a b", "c d")
    assert read_pair(Translation(), "\t") == Example("", "")
    assert read_pair(Translation(), "a b").target is None
    dialogue = Dialogue()
    pair = read_pair(dialogue, "hello\thi there\thow are you")
    assert dialogue.source(pair) == "hello <turn> hi there"
    assert pair.target == "how are you"


def test_the_command_writes_columns_and_the_totals(copy_run, copying):
    done = encdec("generate", "--score", "--model", copy_run, stdin="1 2\t1 2\n\t\n5\t6 7\r\n")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.split("\n")[:-1]]
    wanted = [by_hand(copying, pair) for pair in (Example("1 2", "1 2"), Example("", ""), Example("5", "6 7"))]
    for row, scores in zip(rows, wanted, strict=True):
        assert row[1] == str(len(scores))
        assert float(row[0]) == pytest.approx(sum(scores), abs=1e-4)
        assert float(row[2]) == pytest.approx(math.exp(-sum(scores) / len(scores)), rel=1e-3)
    mean = sum(map(sum, wanted)) / 7
    assert f"scored 3 lines of 7 tokens: log-probability {mean:.4f} per token, perplexity " in done.stderr
    nothing = encdec("generate", "--score", "--model", copy_run, stdin="")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "")


def test_records_are_scored_and_keep_their_fields(copy_run, copying):
    given = json.dumps({"source": "1 2", "target": "1 2", "id": "x"})
    done = encdec("generate", "--score", "--json", "--model", copy_run, stdin=f"{given}\n3\t4\n")
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.split("\n")[:-1])
    assert first["token_scores"] == pytest.approx(by_hand(copying, Example("1 2", "1 2")), abs=1e-5)
    assert first["log_probability"] == pytest.approx(sum(first["token_scores"]), abs=1e-5)
    assert first["perplexity"] == pytest.approx(math.exp(-first["log_probability"] / 3), rel=1e-4)
    assert (first["id"], first["target"], first["tokens"]) == ("x", "1 2", ["1", "2", "</s>"])
    assert (second["id"], second["tokens"], second["status"]) == (2, ["4", "</s>"], "ok")


@pytest.mark.parametrize(("asked", "line"), [([], "3 4"), (["--json"], '{"source": "3"}')])
def test_a_line_without_a_target_is_named_after_the_good_ones(copy_run, asked, line):
    done = encdec("generate", "--score", "--model", copy_run, *asked, stdin=f"1\t2\n{line}\n5\t6\n")
    assert done.returncode == 4
    assert done.stdout.count("\n") == 1
    assert "stdin:2: there is no target to score; expected source, TAB and target" in done.stderr


def test_scoring_searches_for_nothing(copy_run):
    done = encdec("generate", "--score", "--beam", "3", "--model", copy_run, stdin="")
    assert done.returncode == 2
    assert "--score searches for nothing; leave --beam out" in done.stderr
