"""Metrics against sacreBLEU, rouge-score and cases worked by hand; reports as a user sees them."""

from __future__ import annotations

import json
import math
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF, TER

from encdec_cli.errors import DataError, UsageError
from encdec_cli.evaluation.metrics import Metric, Setting, check_lengths, score
from encdec_cli.evaluation.overlap import Distinct, Exact, TokenF1
from encdec_cli.evaluation.perplexity import Perplexity
from encdec_cli.evaluation.report import Outputs, evaluate
from encdec_cli.evaluation.rouge import Rouge
from encdec_cli.evaluation.sacre import Bleu, Chrf, Ter
from encdec_cli.evaluation.significance import Resampling
from encdec_cli.registry import metrics

TEXT = "the The a cat cats sat on mat, Matte. runs running quickly & 3.5 „ja“ straße (hi) it's"
WORDS = TEXT.split()
QUICK = Resampling(resamples=100, trials=100)
OURS_AND_THEIRS = [
    (Bleu(), BLEU()),
    (Bleu(lowercase=True, tokenize="char"), BLEU(lowercase=True, tokenize="char")),
    (Bleu(tokenize="zh", effective_order=True), BLEU(tokenize="zh", effective_order=True)),
    (Bleu(smooth_method="add-k", smooth_value=1.5), BLEU(smooth_method="add-k", smooth_value=1.5)),
    (Bleu(smooth_method="floor", max_ngram_order=6), BLEU(smooth_method="floor", max_ngram_order=6)),
    (Chrf(), CHRF()),
    (Chrf(word_order=2, lowercase=True), CHRF(word_order=2, lowercase=True)),
    (Chrf(char_order=4, beta=1, whitespace=True), CHRF(char_order=4, beta=1, whitespace=True)),
    (Ter(), TER()),
    (Ter(normalized=True, case_sensitive=True), TER(normalized=True, case_sensitive=True)),
    (Ter(no_punct=True), TER(no_punct=True)),
]
TEXT_METRICS: list[Metric] = [Bleu(), Chrf(), Ter(), Rouge(), Exact(), TokenF1(), Distinct(orders=3)]


def made_up(segments: int, streams: int = 1, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Return references and hypotheses that are noisy copies of the first of them."""
    chance = random.Random(seed)
    first = [" ".join(chance.choices(WORDS, k=chance.randint(1, 12))) for _ in range(segments)]

    def noisy(line: str) -> str:
        return " ".join(word if chance.random() < 0.7 else chance.choice(WORDS) for word in line.split())

    references = [first, *([noisy(line) for line in first] for _ in range(streams - 1))]
    return [noisy(line) for line in first], references


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize(("ours", "theirs"), OURS_AND_THEIRS)
def test_score_interval_and_signature_are_sacrebleus(ours, theirs, streams, monkeypatch):
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    hypotheses, references = made_up(40, streams)
    plain = evaluate([ours], Outputs(hypotheses=hypotheses, references=references), Resampling(resamples=0)).scores[0]
    theirs.n_bootstrap = theirs.seed = None
    expected = theirs.corpus_score(hypotheses, references)
    assert (plain.name, plain.value) == (expected.name, pytest.approx(expected.score, rel=1e-13))
    assert plain.signature == str(theirs.get_signature())
    assert plain.low is None

    sure = evaluate([ours], Outputs(hypotheses=hypotheses, references=references), Resampling(resamples=200)).scores[0]
    expected = theirs.corpus_score(hypotheses, references, n_bootstrap=200)
    assert sure.mean == pytest.approx(expected._mean, rel=1e-7)  # sacreBLEU rounds it to float32
    assert (sure.high - sure.low) / 2 == expected._ci
    assert sure.signature == str(theirs.get_signature())
    assert "|bs:200|seed:12345|" in sure.signature


def test_the_sacrebleu_command_prints_our_numbers(tmp_path, monkeypatch):
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    hypotheses, references = made_up(60, 2, seed=3)
    paths = [tmp_path / name for name in ("hyp", "ref1", "ref2")]
    for path, lines in zip(paths, [hypotheses, *references], strict=True):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", str(paths[1]), str(paths[2]), "-i", str(paths[0])]
    command += ["-m", "bleu", "chrf", "ter", "--chrf-word-order", "2", "--confidence", "-w", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = evaluate(
        [Bleu(), Chrf(word_order=2), Ter()], Outputs(hypotheses=hypotheses, references=references), Resampling()
    )
    for ours, theirs in zip(report.to_json()["scores"], json.loads(done.stdout), strict=True):
        assert ours["name"] == theirs["name"]
        assert f"{ours['value']:.6f}" == f"{theirs['score']:.6f}"
        assert ours["signature"] == theirs["signature"]
        assert ours["mean"] == pytest.approx(theirs["confidence_mean"], rel=1e-7)  # float32 there
        assert f"{(ours['high'] - ours['low']) / 2:.6f}" == f"{theirs['confidence_var']:.6f}"


def test_rouge_is_rouge_scores_best_reference_averaged():
    hypotheses, references = made_up(25, 2, seed=5)
    hypotheses[3] = ""
    for stemmer in (False, True):
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=stemmer)
        rows = [
            scorer.score_multi(list(targets), text)
            for text, targets in zip(hypotheses, zip(*references, strict=True), strict=True)
        ]
        report = evaluate([Rouge(stemmer=stemmer)], Outputs(hypotheses=hypotheses, references=references), QUICK)
        assert [entry.name for entry in report.scores] == scorer.rouge_types
        for entry in report.scores:
            mean = 100 * sum(row[entry.name].fmeasure for row in rows) / len(rows)
            assert entry.value == pytest.approx(mean)
            assert f"|stemmer:{'yes' if stemmer else 'no'}|" in entry.signature
            assert "nrefs:2|bs:100|seed:12345|measure:F1|" in entry.signature


def test_rouge_by_hand():
    # shared words the, cat: 2 of 3 and 2 of 4; shared pairs "the cat": 1 of 2 and 1 of 3
    one, two, longest, summary = score(Rouge(), Rouge().statistics(["The cat sat"], [["the cat lay down"]]))
    assert one == pytest.approx(100 * 4 / 7)
    assert two == pytest.approx(100 * 2 / 5)
    assert longest == summary == one


def test_rouge_lsum_splits_sentences_when_asked():
    hypothesis, reference = "B b. A a.", "A a. B b."
    whole = score(Rouge(), Rouge().statistics([hypothesis], [[reference]]))
    split = score(Rouge(split="sentence"), Rouge().statistics([hypothesis], [[reference]]))
    apart = score(Rouge(split="sentence"), Rouge(split="sentence").statistics([hypothesis], [[reference]]))
    assert whole == split
    assert whole[3] == pytest.approx(50)
    assert apart[2:] == (pytest.approx(50), pytest.approx(100))


def test_rouge_without_punkt_data_says_what_to_do(monkeypatch):
    def missing(*_):
        raise LookupError("punkt_tab")

    monkeypatch.setattr("nltk.sent_tokenize", missing)
    with pytest.raises(UsageError, match="split=sentence"):
        Rouge(split="punkt").statistics(["a"], [["a"]])


def test_rouge_warns_where_it_is_blind():
    assert "chrf" in Rouge().warnings(["a"], [["привет", "мир", "ok"]])[0]
    assert not Rouge().warnings(["привет"], [["fine"]])


@pytest.mark.parametrize(
    ("metric", "hypothesis", "references", "expected"),
    [
        (Exact(), "A b", ["a b", "A b"], 100),
        (Exact(), "A b", ["a b"], 0),
        (Exact(lowercase=True), "A b", ["a b"], 100),
        (Exact(), "a ", ["a"], 100),
        (Exact(strip=False), "a ", ["a"], 0),
        # 2 shared of 3 written and 4 wanted: F1 = 2 * 2 / 7
        (TokenF1(), "a a b", ["a b c d"], 100 * 4 / 7),
        (TokenF1(), "a a b", ["a b c d", "b a a"], 100),
        (TokenF1(), "The cat!", ["cat"], 0),
        (TokenF1(normalize=True), "The cat!", ["cat"], 100),
        (TokenF1(lowercase=True), "Cat", ["cat dog"], 100 * 2 / 3),
        (TokenF1(), "", [""], 100),
        (TokenF1(), "", ["a"], 0),
    ],
)
def test_overlap_by_hand(metric, hypothesis, references, expected):
    statistics = metric.statistics([hypothesis, hypothesis], [[reference] * 2 for reference in references])
    assert score(metric, statistics) == (pytest.approx(expected),)


def test_distinct_by_hand():
    metric = Distinct(orders=3)
    # words: a b a | a b -> 2 of 5; pairs: ab ba | ab -> 2 of 3; triples: aba -> 1 of 1
    statistics = metric.statistics(["a b a", "a b"], [["", ""]])
    assert score(metric, statistics) == (pytest.approx(40), pytest.approx(200 / 3), pytest.approx(100))
    assert score(metric, metric.statistics(["", " "], [["", ""]])) == (0, 0, 0)
    assert score(Distinct(), Distinct().statistics(["a A"], [[""]]))[0] == 100
    assert score(Distinct(lowercase=True), Distinct(lowercase=True).statistics(["a A"], [[""]]))[0] == 50


def test_perplexity_by_hand():
    # every token has probability 1/8, whatever the segment
    likelihoods = (np.log([1 / 8, 1 / 64]), np.array([1.0, 2.0]))
    report = evaluate([Perplexity()], Outputs(references=[["x", "y"]], likelihoods=likelihoods), QUICK)
    assert report.scores[0].value == pytest.approx(8)
    assert report.scores[0].low == pytest.approx(8)
    assert not report.scores[0].higher_is_better
    with pytest.raises(UsageError, match="model"):
        evaluate([Perplexity()], Outputs(hypotheses=["x"], references=[["x"]]), QUICK)


def test_an_impossible_reference_is_infinite_in_text_and_null_in_json():
    likelihoods = (np.array([-np.inf]), np.array([3.0]))
    report = evaluate([Perplexity()], Outputs(references=[["x"]], likelihoods=likelihoods), Resampling(resamples=0))
    assert report.score_lines() == ["inf"]
    assert report.to_json()["scores"][0]["value"] is None


@pytest.mark.parametrize("metric", TEXT_METRICS)
@settings(max_examples=25, deadline=None)
@given(
    lines=st.lists(st.lists(st.sampled_from(WORDS), min_size=4, max_size=8).map(" ".join), min_size=1, max_size=6),
    data=st.data(),
)
def test_identity_order_and_bounds(metric, lines, data):
    if not isinstance(metric, Distinct | Rouge):  # rouge-2 has nothing to count where two words are symbols
        best = 0 if isinstance(metric, Ter) else 100
        assert score(metric, metric.statistics(lines, [lines])) == pytest.approx((best,) * len(metric.names))
    order = data.draw(st.permutations(range(len(lines))))
    other = data.draw(st.permutations(lines))
    before = score(metric, metric.statistics(other, [lines]))
    after = score(metric, metric.statistics([other[i] for i in order], [[lines[i] for i in order]]))
    assert after == pytest.approx(before, rel=1e-12)
    assert all(0 <= value <= 100 + 1e-9 for value in before) or isinstance(metric, Ter)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=4))
def test_any_text_gives_finite_numbers(pairs):
    hypotheses, references = [a for a, _ in pairs], [b for _, b in pairs]
    report = evaluate(
        TEXT_METRICS, Outputs(hypotheses=hypotheses, references=[references]), Resampling(resamples=2, trials=2)
    )
    assert all(math.isfinite(entry.value) for entry in report.scores)
    json.dumps(report.to_json(), allow_nan=False)


def test_unequal_and_empty_texts_are_refused_with_names_counts_and_row():
    with pytest.raises(DataError, match=r"hyp\.txt has 2 lines but ref\.txt has 3.* row is 2: 'a long.*' against 'b'"):
        check_lengths("hyp.txt", ["one", "a long line of text"], "ref.txt", ["uno", "b", "a long line of text"])
    with pytest.raises(DataError, match=r"hyp\.txt has 1 line but ref\.txt has 2.* row is 2"):
        check_lengths("hyp.txt", ["one"], "ref.txt", ["uno", "due"])
    with pytest.raises(DataError, match=r"ref\.txt has no lines"):
        check_lengths("hyp.txt", ["one"], "ref.txt", [])


def test_tokenised_hypotheses_are_warned_of_and_plain_ones_not():
    for metric in (Bleu(), Ter()):
        assert "2 of 3" in metric.warnings(["Hello , you .", "So .", "x"], [["x"] * 3])[0]
        assert not metric.warnings(["Hello, you.", "So .", "x."], [["x"] * 3])
        assert metric.warnings(["So ."] * 100 + ["x"] * 900, [["x"] * 1000])


def test_report_as_text_and_as_numbers():
    hypotheses, references = made_up(30)
    outputs = Outputs(hypotheses=hypotheses, references=references, baseline=references[0])
    report = evaluate([Bleu(), Distinct()], outputs, QUICK)
    bleu, distinct, _ = report.lines()
    first = report.scores[0]
    assert bleu.startswith(f"BLEU = {first.value:.2f} [{first.low:.2f}, {first.high:.2f}] (baseline 100.00 [100.00, ")
    assert f"p = {first.p_value:.4f}) nrefs:1|bs:100|ar:100|seed:12345|case:mixed|" in bleu
    assert "[" not in distinct
    assert "p =" not in distinct
    assert any("distinct-n has no interval" in warning for warning in report.warnings)
    assert report.score_lines() == [f"{entry.value:.2f}" for entry in report.scores]
    assert report.to_json()["segments"] == 30


def test_a_baseline_that_hardly_differs_is_warned_of():
    lines = ["a", "b", "c", "d"]
    same = evaluate([Exact()], Outputs(hypotheses=lines, references=[lines], baseline=lines), QUICK)
    assert "same lines" in same.warnings[0]
    near = evaluate([Exact()], Outputs(hypotheses=lines, references=[lines], baseline=["x", *lines[1:]]), QUICK)
    assert "only 1 of 4" in near.warnings[0]


def test_wrong_options_and_missing_texts_are_explained():
    with pytest.raises(UsageError, match=r"no tokenizer 'intll' \(did you mean 'intl'\?\)"):
        Bleu(tokenize="intll")
    with pytest.raises(UsageError, match="char_order is 0"):
        Chrf(char_order=0)
    with pytest.raises(UsageError, match="orders is 0"):
        Distinct(orders=0)
    with pytest.raises(UsageError, match="BLEU needs hypotheses"):
        evaluate([Bleu()], Outputs(references=[["a"]]), QUICK)


def test_a_tokenizer_that_cannot_be_used_is_explained(monkeypatch):
    def broken(_):
        raise RuntimeError("please install\n  something")

    monkeypatch.setattr("sacrebleu.metrics.bleu._get_tokenizer", broken)
    with pytest.raises(UsageError, match="tokenizer 'ja-mecab' cannot be used: please install something"):
        Bleu(tokenize="ja-mecab").statistics(["a"], [["a"]])


def test_every_registered_metric_explains_itself_and_signs():
    for name in metrics.names():
        metric = metrics.get(name)()
        assert metric.names
        assert metric.explain()
        assert metric.signature(Setting(references=2)).startswith("nrefs:2|")


def test_no_metric_of_text_needs_torch():
    code = (
        "import sys; from encdec_cli.evaluation import sacre, rouge, overlap, perplexity, report;"
        "sys.exit('torch' in sys.modules or 'nltk' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_metric_of_the_page_works(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    plugin = tmp_path / "length.py"
    plugin.write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    namespace = runpy.run_path(str(plugin))
    outputs = Outputs(hypotheses=["abc", "d"], references=[["ab", "cd"]], baseline=["a", "d"])
    (entry,) = evaluate([namespace["Length"]()], outputs, QUICK).scores
    assert (entry.value, entry.baseline) == (100, 50)
    assert entry.low is not None
    assert entry.p_value is not None
