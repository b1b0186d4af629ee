"""BLEU, chrF and TER: sacreBLEU's own numbers, signatures, intervals and p-values.

Post, "A Call for Clarity in Reporting BLEU Scores": https://aclanthology.org/W18-6319
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from sacrebleu.metrics.base import Metric as Scorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
from sacrebleu.utils import SACREBLEU_DIR

from encdec_cli.errors import ResourceError, UsageError
from encdec_cli.evaluation.metrics import FloatArray, Metric, Setting, tokenised_warning
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
