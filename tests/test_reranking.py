"""Reranking: minimum Bayes risk against sacreBLEU itself, the noisy channel against known probabilities, the flag."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor, nn

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.config import parse_component
from encdec_cli.errors import UsageError
from encdec_cli.evaluation.likelihood import likelihoods
from encdec_cli.evaluation.ngrams import count_grams
from encdec_cli.evaluation.overlap import TokenF1
from encdec_cli.evaluation.sacre import Bleu, Chrf, Ter
from encdec_cli.generation.lines import Candidate, Generated, Options, generate
from encdec_cli.models.model import Memory, Model
from encdec_cli.recipe import from_resolved
from encdec_cli.registry import rerankers
from encdec_cli.reranking.mbr import MinimumBayesRisk
from encdec_cli.reranking.reranker import Reranker, generate_reranked, rerank
from encdec_cli.text.example import Example
from encdec_cli.text.units import Word
from encdec_cli.text.vocabulary import Vocabulary, with_special
from tests.conftest import encdec

SOURCE = Example("a source")
TEXTS = ["the cat sat on the mat.", "The cat sat on a mat", "", "a", "dogs bark (loudly)", "the the the the", "猫 sat"]
lines = st.lists(st.text("ab. (", max_size=12), min_size=1, max_size=6)


def candidates(*texts: str, chances: tuple[float, ...] = ()) -> list[Candidate]:
    scores = [math.log(chance) for chance in chances] or [-1.0] * len(texts)
    return [Candidate(text, score, [score], True, []) for text, score in zip(texts, scores, strict=True)]


def order(reranker: Reranker, *texts: str) -> list[str]:
    (found,) = rerank([Generated(SOURCE, candidates(*texts))], reranker, len(texts))
    return [candidate.text for candidate in found.candidates]


# --- n-grams and utilities ---------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(lines, st.integers(1, 4), st.sampled_from([1, 5, 1 << 22]))
def test_shared_grams_are_the_sums_of_the_smaller_counts(texts, longest, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("encdec_cli.evaluation.ngrams._BLOCK", block)
        for length, grams in enumerate(count_grams(texts, longest), start=1):
            counts = [Counter(text[i : i + length] for i in range(len(text) - length + 1)) for text in texts]
            assert grams.totals().tolist() == [each.total() for each in counts]
            assert grams.shared().tolist() == [[(one & other).total() for other in counts] for one in counts]


CHRFS = [{}, {"word_order": 2}, {"eps_smoothing": True, "word_order": 1}, {"whitespace": True}, {"beta": 1}]
BLEUS = [{}, {"max_ngram_order": 2, "smooth_method": "add-k"}, {"tokenize": "char"}, {"smooth_method": "none"}]


@pytest.mark.parametrize("options", [*CHRFS, {"lowercase": True, "char_order": 3}], ids=str)
def test_pairwise_chrf_is_sacrebleus(options):
    scorer = CHRF(**options)
    expected = [[scorer.sentence_score(one, [other]).score for other in TEXTS] for one in TEXTS]
    np.testing.assert_allclose(Chrf(**options).pairwise(TEXTS), expected, atol=1e-9)


@pytest.mark.parametrize("options", [*BLEUS, {"lowercase": True}], ids=str)
def test_pairwise_bleu_is_sacrebleus_with_effective_order(options):
    scorer = BLEU(effective_order=True, **options)
    expected = [[scorer.sentence_score(one, [other]).score for other in TEXTS] for one in TEXTS]
    np.testing.assert_allclose(Bleu(**options).pairwise(TEXTS), expected, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(lines, st.sampled_from(CHRFS), st.sampled_from(BLEUS))
def test_pairwise_scores_of_wild_texts_are_sacrebleus(texts, chrf, bleu):
    for metric, scorer in ((Chrf(**chrf), CHRF(**chrf)), (Bleu(**bleu), BLEU(effective_order=True, **bleu))):
        expected = [[scorer.sentence_score(one, [other]).score for other in texts] for one in texts]
        np.testing.assert_allclose(metric.pairwise(texts), expected, atol=1e-9)


def test_pairwise_scores_of_any_metric_are_those_of_its_segments():
    assert TokenF1().pairwise(["a b", "a c"]).tolist() == [[100, 50], [50, 100]]
    assert Ter().pairwise(["a b c d", "a b c"]).round(2).tolist() == [[0, 33.33], [25, 0]]


@settings(max_examples=30, deadline=None)
@given(lines, st.sampled_from(CHRFS), st.data())
def test_chrf_against_the_mean_is_sacrebleus_formula_on_mean_counts(texts, options, data):
    weights = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(texts), max_size=len(texts))), float)
    weights /= weights.sum()
    scorer = CHRF(**options)
    each = scorer._extract_reference_info(texts)["ref_ngrams"]
    mean = [Counter() for _ in each[0]]
    for grams, weight in zip(each, weights, strict=True):
        for total, counts in zip(mean, grams, strict=True):
            for gram, count in counts.items():
                total[gram] += weight * count
    expected = [scorer._compute_segment_statistics(text, {"ref_ngrams": [mean]}) for text in texts]
    found = Chrf(**options).against_mean(texts, weights)
    np.testing.assert_allclose(found, [scorer._compute_f_score(row) for row in expected], atol=1e-9)


def test_bleu_against_the_mean_by_hand():
    # Mean counts of "a b" and "a c": a 1, b 1/2, c 1/2; ab 1/2, ac 1/2. Each shares 1.5 of 2 words and 0.5 of 1 pair.
    found = Bleu(tokenize="none").against_mean(["a b", "a c"], np.array([0.5, 0.5]))
    assert found.tolist() == pytest.approx([100 * math.sqrt(0.75 * 0.5)] * 2)


@pytest.mark.parametrize("metric", [Chrf(), Chrf(word_order=2, eps_smoothing=True), Bleu()], ids=str)
def test_the_mean_of_equal_texts_is_that_text(metric):
    for text in TEXTS:
        found = metric.against_mean([text, text, text], np.full(3, 1 / 3))
        assert found == pytest.approx(metric.pairwise([text])[0].repeat(3))


# --- minimum Bayes risk ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(lines)
def test_expected_utilities_are_those_of_a_double_loop(texts):
    scorer = CHRF()
    expected = [sum(scorer.sentence_score(one, [other]).score for other in texts) / len(texts) for one in texts]
    assert MinimumBayesRisk()(SOURCE, candidates(*texts)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("options", [{}, {"aggregate": True}, {"weights": "probability"}, {"metric": "f1"}], ids=str)
def test_one_candidate_is_chosen_and_equal_ones_keep_their_order(options):
    reranker = MinimumBayesRisk(**options)
    (only,) = rerank([Generated(SOURCE, candidates("x"))], reranker, 1)[0].candidates
    assert only.text == "x"
    same = [Candidate("x y", score, [-1.0], True, []) for score in (3.0, 1.0, 2.0)]
    found = rerank([Generated(SOURCE, same)], reranker, 3)[0].candidates
    assert [one.score for one in found] == [3.0, 1.0, 2.0]
    assert len({one.rerank_score for one in found}) == 1


def test_an_output_drawn_twice_counts_twice():
    exact = MinimumBayesRisk(metric="exact")
    assert exact(SOURCE, candidates("a", "b", "b", "c")) == [25, 50, 50, 25]
    assert order(exact, "a", "b", "b", "c") == ["b", "b", "a", "c"]


def test_outputs_may_count_by_their_probability():
    by_probability = MinimumBayesRisk(metric="exact", weights="probability")
    assert by_probability(SOURCE, candidates("a", "b", "c", chances=(0.1, 0.3, 0.1))) == pytest.approx([20, 60, 20])
    # Probabilities far below the smallest float keep their proportions.
    tiny = [Candidate(text, 0.0, [-2000.0, math.log(chance)], True, []) for text, chance in (("a", 0.1), ("b", 0.3))]
    assert by_probability(SOURCE, tiny) == pytest.approx([25, 75])


def test_aggregated_utility_by_hand():
    # Mean counts of ab, ac, ab: a 1, b 2/3, c 1/3; precision and recall of ab are 5/6, of ac 4/6.
    aggregated = MinimumBayesRisk(metric="chrf,char_order=1", aggregate=True)
    assert aggregated(SOURCE, candidates("ab", "ac", "ab")) == pytest.approx([500 / 6, 400 / 6, 500 / 6])


def test_a_metric_that_is_better_when_lower_is_turned_round():
    found = MinimumBayesRisk(metric="ter")(SOURCE, candidates("a b c d", "a b c"))
    assert found == pytest.approx([-100 / 3 / 2, -100 / 4 / 2])
    assert order(MinimumBayesRisk(metric="ter"), "x y z", "a b c d", "a b c") == ["a b c", "a b c d", "x y z"]


def test_the_order_of_the_candidates_does_not_part_equal_utilities():
    texts = ["ab", "cd", "ef", "gh", "ij"]
    scores = MinimumBayesRisk()(SOURCE, candidates(*texts))
    assert len(set(scores)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mbr,metric=perplexity", "metric: perplexity gives no number for a single segment"),
        ("mbr,metric=distinct", "metric: distinct gives no number for a single segment"),
        ("mbr,metric=chrff", "did you mean 'chrf'?"),
        ("mbr,metric='chrf,word_ordre=2'", "did you mean 'word_order'?"),
        ("mbr,metric=rouge,aggregate=true", "rouge1: this metric has no n-gram counts to average"),
        ("mbr,weights=equal", "weights"),
        ("mrb", "no reranker 'mrb' among mbr, noisy_channel"),
        ("noisy_channel", "channel: name a model of the reverse direction, or a language model by lm"),
        ("noisy_channel,channel=x,lm=y", "lm_source: goes with lm"),
        ("noisy_channel,channel=x,weight_lm=3", "weight_lm: goes with lm"),
        ("noisy_channel,channel=x,lm_source=y", "goes with lm"),
    ],
)
def test_mistakes_are_told(text, words):
    with pytest.raises(UsageError) as error:
        parse_component(text, rerankers, "--rerank")
    assert words in str(error.value)


def test_a_metric_keeps_its_options():
    reranker = parse_component("mbr,metric='chrf,word_order=2'", rerankers, "--rerank")
    assert reranker(SOURCE, candidates("a b", "a c")) == pytest.approx(
        (Chrf(word_order=2).pairwise(["a b", "a c"]).sum(1) / 2).tolist()
    )


# --- the noisy channel -------------------------------------------------------------------------------------------


@dataclass
class _Weights:
    rows: Tensor

    def reorder(self, rows: Tensor) -> None:
        self.rows = self.rows[rows]


class Reader(Model):
    """Whatever stands before, a token has the weight 9 if it stands in the source and 1 if not."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.unused = nn.Parameter(torch.zeros(1))

    def encode(self, source: Tensor, mask: Tensor) -> Memory:
        return Memory(nn.functional.one_hot(source, self.vocab).float() * mask[..., None], mask)

    def start(self, memory: Memory, beam: int = 1) -> _Weights:
        return _Weights((1 + 8 * memory.states.amax(1)).repeat_interleave(beam, 0))

    def decode(self, tokens: Tensor, state: _Weights) -> Tensor:
        return state.rows.log()[:, None].expand(-1, tokens.shape[1], -1)

    def project(self, hidden: Tensor) -> Tensor:
        return hidden


def log_prob(source: str, target: str, vocab: int) -> float:
    """What a Reader gives to the target, EOS included."""
    read = {*source.split(), "EOS"}
    whole = 9 * len(read) + vocab - len(read)
    return sum(math.log((9 if word in read else 1) / whole) for word in [*target.split(), "EOS"])


def reader(words: str, max_target: int = 32) -> Bundle:
    recipe = from_resolved(
        {
            "task": {"name": "translation"},
            "data": {"name": "files", "train": {"source": "a", "target": "b"}},
            "text": {"tokenizer": "word", "max_target": max_target},
            "model": {"name": "transformer"},
        }
    )
    tokenizer = Word(Vocabulary(with_special(words.split())))
    return Bundle(recipe, Reader(len(tokenizer.vocabulary)), tokenizer, tokenizer)


@pytest.fixture
def noisy_channel(monkeypatch):
    """Makes a reranker whose channel knows a b c d (8 tokens), and whose language model knows a b c d lm (9)."""
    bundles = {"channel": reader("a b c d"), "lm": reader("lm d c b a"), "short": reader("a b c d", max_target=3)}
    monkeypatch.setattr(Bundle, "load", lambda path, device: bundles[path.name])

    def build(keys: str) -> Reranker:
        reranker = parse_component(f"noisy_channel,{keys}", rerankers, "--rerank")
        reranker.load("cpu")
        return reranker

    return build


def three(*texts: str) -> list[Candidate]:
    """Candidates whose own log-probability is -1 for each word and -0.5 for the end."""
    return [Candidate(text, 0.0, [-1.0] * len(text.split()) + [-0.5], True, []) for text in texts]


def test_the_channel_prefers_what_explains_the_source(noisy_channel):
    reranker = noisy_channel("channel=channel")
    found = reranker(Example("a b"), three("c d", "a", "a b c"))
    # The source "a b" has 3 tokens with its end; the candidates have 3, 2 and 4.
    expected = [-2.5 / 3 + log_prob("c d", "a b", 8) / 3, -1.5 / 2 + log_prob("a", "a b", 8) / 3]
    expected.append(-3.5 / 4 + log_prob("a b c", "a b", 8) / 3)
    assert found == pytest.approx(expected, abs=1e-5)
    (result,) = rerank([Generated(Example("a b"), three("c d", "a", "a b c"))], reranker, 2)
    assert [one.text for one in result.candidates] == ["a b c", "a"]


def test_weights_lengths_and_the_language_model(noisy_channel):
    keys = "channel=channel,lm=lm,lm_source=lm,weight_channel=0.5,weight_lm=0.25"
    for penalty in (0.0, 0.5, 1.0):
        found = noisy_channel(f"{keys},length_penalty={penalty}")(Example("a b"), three("lm d", "a", ""))
        expected = [
            own / tokens**penalty + (0.5 * log_prob(text, "a b", 8) + 0.25 * log_prob("lm", text, 9)) / 3**penalty
            for text, own, tokens in (("lm d", -2.5, 3), ("a", -1.5, 2), ("", -0.5, 1))
        ]
        # The channel does not know `lm`, which it reads as an unknown token: one more token of the source.
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_language_model_alone_reranks_too(noisy_channel):
    found = noisy_channel("lm=lm,lm_source=lm,weight_lm=0.25")(Example("a b"), three("a", "c d"))
    expected = [-1.5 / 2 + 0.25 * log_prob("lm", "a", 9) / 2, -2.5 / 3 + 0.25 * log_prob("lm", "c d", 9) / 3]
    assert found == pytest.approx(expected, abs=1e-5)


def test_weights_of_0_leave_the_models_own_order(noisy_channel):
    reranker = noisy_channel("channel=channel,weight_channel=0")
    assert reranker(Example("a b"), three("a", "c d")) == pytest.approx([-1.5 / 2, -2.5 / 3])


def test_a_source_longer_than_the_channel_judges_is_cut(noisy_channel):
    short, long = noisy_channel("channel=short"), noisy_channel("channel=channel")
    texts = three("a", "c d")
    assert short(Example("a b c d a"), texts) == pytest.approx(long(Example("a b"), texts))


def test_lines_are_judged_together_as_one_by_one_and_what_is_equal_once(noisy_channel, monkeypatch):
    judged = []

    def counted(bundle, examples, targets, longest):
        judged.append(len(targets))
        return likelihoods(bundle, examples, targets, longest)

    monkeypatch.setattr("encdec_cli.reranking.noisy_channel.likelihoods", counted)
    reranker = noisy_channel("channel=channel,lm=lm,lm_source=lm,weight_lm=0.5")
    group = [("a b", ("c d", "a", "a")), ("d", ("b",)), ("c", ("a", "", "d d d d d"))]
    lines_ = [Generated(Example(source), three(*texts)) for source, texts in group]
    found = reranker.together(lines_)
    assert judged == [5, 6]  # of seven; the language model reads the outputs alone, and three of them are "a"
    for line, scores in zip(lines_, found, strict=True):
        assert scores == pytest.approx(list(reranker(line.example, line.candidates)), abs=1e-5)


# --- between the search and what is written ----------------------------------------------------------------------


@dataclass(kw_only=True)
class Shortest(Reranker):
    """The shorter, the better."""

    def __call__(self, example, candidates):
        return [-float(len(candidate.text)) for candidate in candidates]


def test_candidates_are_ordered_cut_and_keep_their_own_score():
    given_ = candidates("aaa", "b", "cc", "d", chances=(0.4, 0.3, 0.2, 0.1))
    (found,) = rerank([Generated(SOURCE, given_, truncated=True)], Shortest(), 3)
    assert [one.text for one in found.candidates] == ["b", "d", "cc"]
    assert [one.rerank_score for one in found.candidates] == [-1, -1, -2]
    assert [one.score for one in found.candidates] == [math.log(chance) for chance in (0.3, 0.1, 0.2)]
    assert found.truncated


def test_all_hypotheses_of_the_search_are_offered(copy_run):
    bundle = Bundle.load(copy_run)
    examples = [Example("1 2 3"), Example(""), Example("4 5")]
    strategy = bundle.recipe.decoding.config  # a beam of 2
    every = list(generate([bundle], [examples], Options(strategy, n_best=2)))
    found = list(generate_reranked([bundle], [examples], Options(strategy, n_best=1), Shortest()))
    assert [len(result.candidates) for result in found] == [1, 0, 1]
    for all_of_it, chosen in zip(every, found, strict=True):
        shortest = min((len(one.text) for one in all_of_it.candidates), default=0)
        assert [len(one.text) for one in chosen.candidates] == [shortest] * len(chosen.candidates)


SAMPLES = ("--strategy", "sampling,beam=8,temperature=2.0", "--rerank")


def test_the_flag_gives_one_line_for_each_in_order_with_both_scores(copy_run):
    source = "1 2 3\n\n4 5 6\n7\n"
    words = ("generate", "--model", copy_run, *SAMPLES, "mbr,metric=chrf")
    done = encdec(*words, "--json", "--n-best", "3", stdin=source)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    assert [record["status"] for record in records] == ["ok", "empty", "ok", "ok"]
    for record in (records[0], records[2], records[3]):
        ranks = [one["rerank_score"] for one in record["candidates"]]
        assert len(ranks) == 3
        assert ranks == sorted(ranks, reverse=True)
        assert (record["text"], record["rerank_score"]) == (record["candidates"][0]["text"], ranks[0])
        assert record["score"] == pytest.approx(sum(record["token_scores"]), abs=1e-4)
    plain = encdec(*words, "--scores", stdin=source)
    columns = [line.split("\t") for line in plain.stdout.split("\n")[:-1]]
    assert columns[1] == [""]
    assert [columns[row][1] for row in (0, 2, 3)] == [records[row]["text"] for row in (0, 2, 3)]
    assert float(columns[0][0]) == pytest.approx(records[0]["rerank_score"], abs=1e-4)


def test_a_run_is_a_channel_and_exact_holds(copy_run):
    # The copy of a copy is the source: the model is its own reverse direction.
    lines_ = [" ".join(str((start + step) % 10) for step in range(4)) for start in range(12)]
    words = ("generate", "--model", copy_run, *SAMPLES, f"noisy_channel,channel={copy_run},weight_channel=3", "--exact")
    forth = encdec(*words, "--scores", "--workers", "1", stdin="".join(f"{line}\n" for line in lines_))
    back = encdec(*words, "--scores", "--workers", "2", "--batch", "3", stdin="".join(f"{x}\n" for x in lines_[::-1]))
    assert forth.returncode == back.returncode == 0, forth.stderr + back.stderr
    assert forth.stdout.split("\n")[:-1] == back.stdout.split("\n")[:-1][::-1]
    assert sum(line.split("\t")[1] == x for line, x in zip(forth.stdout.split("\n"), lines_, strict=False)) >= 10


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--rerank", "mbr", "--beam", "1"], 2, "--rerank mbr: the search gives 1 output a line"),
        (["--rerank", "mbr,metrik=chrf"], 2, "did you mean 'metric'?"),
        (["--rerank", "noisy_channel,channel=nowhere"], 5, "nowhere: no such model folder"),
    ],
)
def test_mistakes_with_the_flag_are_one_sentence(copy_run, arguments, code, words):
    done = encdec("generate", "--model", copy_run, *arguments, stdin="1\n")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_evaluate_reranks_what_the_model_writes(copy_run, tmp_path):
    words = ("evaluate", "--model", copy_run, "--metric", "exact", "--json")
    done = encdec(*words, "--rerank", "mbr,metric=exact,weights=probability")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"][0]["value"] >= 90
    refused = encdec(*words, "--rerank", "mbr", stdin="1\n")
    assert refused.returncode == 2
    assert "--rerank mbr: the hypotheses are given" in refused.stderr


def test_rerankers_are_listed():
    done = encdec("list", "--json")
    assert [row["name"] for row in json.loads(done.stdout)["rerankers"]] == ["mbr", "noisy_channel", "oracle"]


def test_the_reranker_of_the_page_works(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "decoding.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (plugin,) = [block for block in blocks if "rerankers.register" in block]
    (tmp_path / "like_source.py").write_text(plugin, encoding="utf-8")
    namespace = runpy.run_path(str(tmp_path / "like_source.py"))
    line = Generated(Example("abcd"), candidates("a", "ab", "abc"))
    (found,) = rerank([line], namespace["LikeSource"](ratio=0.5), 2)
    assert [(one.text, one.rerank_score) for one in found.candidates] == [("ab", 0), ("a", -1)]
