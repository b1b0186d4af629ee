"""Noisy channel: the output from which a model of the reverse direction would find the source again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.evaluation.likelihood import likelihoods
from encdec_cli.evaluation.metrics import FloatArray
from encdec_cli.generation.lines import Candidate, Generated
from encdec_cli.reranking.reranker import Reranker
from encdec_cli.text.example import Example


@dataclass(kw_only=True)
class NoisyChannel(Reranker):
    """Order outputs y of a source x by log p(y|x) / t + (weight_channel log p(x|y) + weight_lm log p(y)) / s.

    t is the number of y's tokens, s that of x's, EOS included (Yee et al. 2019, https://arxiv.org/abs/1908.05731).
    p(y|x) is the model's own, p(x|y) that of the channel model, p(y) that of the language model. Without a channel
    model it is reranking by the language model alone, and s is the number of y's tokens by that.
    """

    channel: Path | None = None
    """A model of the reverse direction: a bundle or a run; it reads the output and judges the source."""
    weight_channel: float = 1.0
    """What log p(x|y) counts beside log p(y|x)."""
    lm: Path | None = None
    """A language model of the output's side: a bundle or a run whose every training example had the same source."""
    lm_source: str = ""
    """That source, as it was in the language model's training data."""
    weight_lm: float = 1.0
    """What log p(y) counts beside log p(y|x)."""
    length_penalty: float = 1.0
    """Both lengths are taken to this power; 0 leaves the log-probabilities as they are, as do Ng et al. 2019,
    https://arxiv.org/abs/1907.06616."""

    def __post_init__(self) -> None:
        for key in ("weight_channel", "weight_lm", "length_penalty"):
            if not math.isfinite(vars(self)[key]):
                raise ValueError(f"{key}: {vars(self)[key]} is no finite number.")
        if self.channel is None and self.lm is None:
            raise ValueError("channel: name a model of the reverse direction, or a language model by lm, or both.")
        for key, model in (("channel", self.channel), ("lm", self.lm)):
            if model is None and vars(self)[f"weight_{key}"] != 1:
                raise ValueError(f"weight_{key}: goes with {key}, which is not given.")
        if (self.lm is None) != (not self.lm_source.strip()):
            raise ValueError("lm_source: goes with lm, and is the line that was every source of its training data.")

    def load(self, device: str) -> None:
        """Load the channel model and the language model."""
        self._channel = None if self.channel is None else Bundle.load(self.channel, device)
        self._lm = None if self.lm is None else Bundle.load(self.lm, device)

    def __call__(self, example: Example, candidates: Sequence[Candidate]) -> list[float]:
        """Return the weighted sum of the log-probabilities of each candidate."""
        return self.together([Generated(example, list(candidates))])[0]

    def together(self, lines: Sequence[Generated]) -> list[list[float]]:
        """Return the same for several lines: each model reads what it judges of all of them in its own batches."""
        candidates = [candidate for line in lines for candidate in line.candidates]
        texts = [candidate.text for candidate in candidates]
        sources = [line.example.source for line in lines for _ in line.candidates]
        others: FloatArray = np.zeros(len(texts))
        length: FloatArray = np.ones(len(texts))
        if self._lm is not None:
            language, length = _judge(self._lm, [self.lm_source] * len(texts), texts)
            others += self.weight_lm * language
        if self._channel is not None:
            channel, length = _judge(self._channel, texts, sources)
            others += self.weight_channel * channel
        own = np.array([math.fsum(candidate.token_scores) for candidate in candidates])
        # An output that was cut before its first token has none.
        written = np.array([max(1.0, len(candidate.token_scores)) for candidate in candidates])
        scores = iter((own / written**self.length_penalty + others / length**self.length_penalty).tolist())
        return [[next(scores) for _ in line.candidates] for line in lines]


def _judge(bundle: Bundle, sources: Sequence[str], targets: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """Return the log-probability of each target and its tokens with EOS, both [targets]."""
    # Samples are often the same, and each pair need be judged once.
    pairs = list(zip(sources, targets, strict=True))
    places = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    examples = [bundle.task.read(source) for source, _ in places]
    scores, lengths = likelihoods(bundle, examples, [target for _, target in places], bundle.longest_target)
    rows = [places[pair] for pair in pairs]
    return scores[rows], lengths[rows]
