"""BLEU, chrF and TER: sacreBLEU's own numbers, signatures, intervals and p-values.

Post, "A Call for Clarity in Reporting BLEU Scores": https://aclanthology.org/W18-6319
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, cast

import numpy as np
from sacrebleu.metrics.base import Metric as Scorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
from sacrebleu.utils import SACREBLEU_DIR

from encdec_cli.errors import ResourceError, UsageError
from encdec_cli.evaluation.metrics import FloatArray, Metric, Setting, tokenised_warning
from encdec_cli.evaluation.ngrams import Grams, count_grams, f_scores
from encdec_cli.registry import nearest


@dataclass(kw_only=True)
class Sacre(Metric):
    """A metric of sacreBLEU: it counts, we add up and resample."""

    as_sacrebleu: ClassVar[bool] = True

    @abstractmethod
    def build(self) -> Scorer:
        """Return sacreBLEU's object for these options; raise UsageError if it cannot be made."""

    @cached_property
    def scorer(self) -> Scorer:
        """The object that `build` made, once."""
        return self.build()

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        """Return sacreBLEU's sufficient statistics [segments, k]."""
        return np.array(self.scorer._extract_corpus_statistics(hypotheses, references), dtype=np.float64)

    def scores(self, totals: FloatArray) -> FloatArray:
        """Return the score [samples, 1] of each sum of statistics [samples, k]."""
        if totals.dtype == np.float64:
            # Plain numbers are several times faster here. Rows of float32 must stay what they are: sacreBLEU's
            # bootstrap computes in float32, and its p-values depend on the last digit where scores tie.
            return np.array([[self.scorer._compute_score_from_stats(row).score] for row in totals.tolist()])
        # A copy, because sacreBLEU's add-k smoothing writes into the statistics.
        return np.array([[self.scorer._compute_score_from_stats(row.copy()).score] for row in totals])

    def signature(self, setting: Setting) -> str:
        """Return sacreBLEU's signature."""
        signature = self.scorer._SIGNATURE_TYPE({**vars(self.scorer), "num_refs": setting.references})
        signature.update("bs", setting.resamples or None)
        signature.update("ar", setting.trials or None)
        signature.update("seed", setting.seed)
        return signature.format()


@dataclass(kw_only=True)
class Bleu(Sacre):
    """BLEU: overlap of word n-grams with a brevity penalty. https://aclanthology.org/P02-1040"""

    tokenize: str = BLEU.TOKENIZER_DEFAULT
    """sacreBLEU's tokenizer: 13a, intl, char, zh, ja-mecab, ko-mecab, flores200, none, …"""
    lowercase: bool = False
    smooth_method: Literal["exp", "floor", "add-k", "none"] = "exp"
    smooth_value: float | None = None
    """For floor and add-k; None is sacreBLEU's default."""
    max_ngram_order: int = 4
    effective_order: bool = False
    """Leave out orders without any match: for short texts."""

    def __post_init__(self) -> None:
        known = list(BLEU.TOKENIZERS)
        if self.tokenize not in known:
            hint = nearest(self.tokenize, known)
            raise UsageError(f"bleu: no tokenizer '{self.tokenize}'{hint}; sacreBLEU has {', '.join(known)}.")
        _at_least("bleu", "max_ngram_order", self.max_ngram_order, 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The name sacreBLEU uses."""
        return ("BLEU",)

    def build(self) -> Scorer:
        """Return sacreBLEU's BLEU."""
        try:
            return BLEU(
                lowercase=self.lowercase,
                force=True,  # its warning goes to a logger; ours is data
                tokenize=self.tokenize,
                smooth_method=self.smooth_method,
                smooth_value=self.smooth_value,
                max_ngram_order=self.max_ngram_order,
                effective_order=self.effective_order,
            )
        except (Exception, SystemExit) as error:
            # Some tokenizers need a package or a download, and each fails in a way of its own.
            reason = " ".join(str(error).split()) or type(error).__name__
            cannot = f"bleu: sacreBLEU's tokenizer '{self.tokenize}' cannot be used"
            if self.tokenize not in SPM_MODELS:
                raise UsageError(f"{cannot}: {reason}; choose another with tokenize=….") from error
            url = SPM_MODELS[self.tokenize]["url"]
            file = Path(SACREBLEU_DIR, "models", Path(url).name)
            raise ResourceError(
                f"{cannot} ({reason}): its model is missing or damaged; put {url} in place as {file}, "
                "or choose another with tokenize=…."
            ) from error

    def pairwise(self, texts: Sequence[str]) -> FloatArray:
        """Return the sentence BLEU (with effective order) of each text with each as its reference, [texts, texts]."""
        grams, lengths = self._count(texts)
        matches = np.stack([order.shared() for order in grams], axis=-1)
        written = np.stack([order.totals() for order in grams], axis=-1)
        pairs = np.ndindex(len(texts), len(texts))
        scores = [self._of_sentence(matches[i, j], written[i], lengths[i], lengths[j]) for i, j in pairs]
        return np.array(scores).reshape(len(texts), len(texts))

    def against_mean(self, texts: Sequence[str], weights: FloatArray) -> FloatArray:
        """Return the sentence BLEU of each text against expected counts and length, [texts].

        DeNero et al. 2009, https://aclanthology.org/P09-1064.
        """
        grams, lengths = self._count(texts)
        matches = np.stack([order.shared_with_mean(weights) for order in grams], axis=-1)
        written = np.stack([order.totals() for order in grams], axis=-1)
        expected = float((lengths * weights).sum())
        rows = zip(matches, written, lengths, strict=True)
        return np.array([self._of_sentence(*row, expected) for row in rows])

    def _count(self, texts: Sequence[str]) -> tuple[list[Grams], FloatArray]:
        """Return the n-grams of each order, and the length of each text [texts]."""
        words = [self.scorer._preprocess_segment(text).split() for text in texts]
        return count_grams(words, self.max_ngram_order), np.array([float(len(line)) for line in words])

    def _of_sentence(self, matches: FloatArray, written: FloatArray, length: float, wanted: float) -> float:
        """Return sacreBLEU's score. matches, written: [orders]; length, wanted: words of both sides."""
        precision = BLEU.compute_bleu(
            correct=matches.tolist(),  # a copy, since add-k smoothing writes into it
            total=written.tolist(),
            sys_len=0,
            ref_len=0,  # no brevity penalty: it takes whole numbers only
            smooth_method=self.smooth_method,
            smooth_value=self.smooth_value,
            effective_order=True,
            max_ngram_order=self.max_ngram_order,
        )
        return float(precision.score) * (math.exp(1 - wanted / length) if 0 < length < wanted else 1.0)

    def explain(self) -> str:
        """Say what BLEU is."""
        return (
            f"BLEU of the whole corpus in percent: geometric mean of the precisions of 1- to {self.max_ngram_order}"
            "-grams, times a penalty for output shorter than the reference"
        )

    def warnings(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
        """Warn of tokenised hypotheses."""
        return tokenised_warning(hypotheses)

    def doubts(self, statistics: FloatArray) -> list[str]:
        """Warn of a BLEU of 0 where words match."""
        totals = statistics.sum(axis=0, keepdims=True)
        matches = totals[0, 2]  # after the lengths of both sides: the matches of each order
        if not matches or self.effective_order or self.scores(totals)[0, 0]:
            return []
        return [
            f"BLEU is 0 although {matches:.0f} words match, since no {self.max_ngram_order} words in a row do; "
            "for short lines use bleu,effective_order=true."
        ]


@dataclass(kw_only=True)
class Chrf(Sacre):
    """chrF: F-measure of character n-grams; with word_order 2, chrF++. https://aclanthology.org/W15-3049"""

    char_order: int = CHRF.CHAR_ORDER
    word_order: int = CHRF.WORD_ORDER
    """2 makes it chrF++."""
    beta: int = CHRF.BETA
    """How many times recall counts as much as precision."""
    lowercase: bool = False
    whitespace: bool = False
    """Whether spaces are characters too."""
    eps_smoothing: bool = False
    """Smooth as chrF++.py, NLTK and Moses do."""

    def __post_init__(self) -> None:
        _at_least("chrf", "char_order", self.char_order, 1)
        _at_least("chrf", "word_order", self.word_order, 0)
        _at_least("chrf", "beta", self.beta, 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The name sacreBLEU uses: chrF2, chrF2++."""
        return (f"chrF{self.beta}" + "+" * self.word_order,)

    def build(self) -> Scorer:
        """Return sacreBLEU's CHRF."""
        return CHRF(
            char_order=self.char_order,
            word_order=self.word_order,
            beta=self.beta,
            lowercase=self.lowercase,
            whitespace=self.whitespace,
            eps_smoothing=self.eps_smoothing,
        )

    def pairwise(self, texts: Sequence[str]) -> FloatArray:
        """Return the chrF of each text with each as its reference, [texts, texts]."""
        grams = self._count(texts)
        totals = np.stack([order.totals() for order in grams])
        matches = np.stack([order.shared() for order in grams])
        return f_scores(matches, totals[:, :, None], totals[:, None, :], self.beta, self.eps_smoothing)

    def against_mean(self, texts: Sequence[str], weights: FloatArray) -> FloatArray:
        """Return the chrF of each text against averaged n-gram counts, [texts].

        Vamvas and Sennrich 2024, https://arxiv.org/abs/2402.04251.
        """
        grams = self._count(texts)
        totals = np.stack([order.totals() for order in grams])
        matches = np.stack([order.shared_with_mean(weights) for order in grams])
        wanted = (totals * weights).sum(axis=1, keepdims=True)
        return f_scores(matches, totals, wanted, self.beta, self.eps_smoothing)

    def _count(self, texts: Sequence[str]) -> list[Grams]:
        """Return the n-grams of each order, of characters and then of words."""
        scorer = cast(CHRF, self.scorer)
        lines = [scorer._preprocess_segment(text) for text in texts]
        characters = [line if self.whitespace else "".join(line.split()) for line in lines]
        words = [scorer._remove_punctuation(line) for line in lines]
        return [*count_grams(characters, self.char_order), *count_grams(words, self.word_order)]

    def explain(self) -> str:
        """Say what chrF is."""
        words = f" and 1- to {self.word_order}-grams of words" if self.word_order else ""
        return (
            f"F-measure in percent of the whole corpus over 1- to {self.char_order}-grams of characters{words}, "
            f"recall counting {self.beta} times as much as precision"
        )


@dataclass(kw_only=True)
class Ter(Sacre):
    """TER: edits and shifts of phrases needed per reference word. https://aclanthology.org/2006.amta-papers.25"""

    higher_is_better: ClassVar[bool] = False

    normalized: bool = False
    """Split punctuation from words and undo XML escapes first."""
    no_punct: bool = False
    asian_support: bool = False
    """Split Chinese and Japanese into characters; works with normalized or no_punct."""
    case_sensitive: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The name sacreBLEU uses."""
        return ("TER",)

    def build(self) -> Scorer:
        """Return sacreBLEU's TER."""
        return TER(
            normalized=self.normalized,
            no_punct=self.no_punct,
            asian_support=self.asian_support,
            case_sensitive=self.case_sensitive,
        )

    def explain(self) -> str:
        """Say what TER is."""
        return (
            "words inserted, deleted, replaced and phrases moved to turn the output into its nearest reference, "
            "in percent of the (mean) reference length; lower is better"
        )

    def warnings(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
        """Warn of tokenised hypotheses."""
        return tokenised_warning(hypotheses)


def _at_least(metric: str, option: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{metric}: {option} is {value}; it must be at least {least}.")
