"""Minimum risk training (Shen et al. 2016, https://arxiv.org/abs/1512.02433): the metric itself is what is learned.

The model draws outputs before the gradient is computed, without dropout; their cost is one minus the metric against the
reference. The gradient is exact for these outputs, whatever they were drawn by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.config import parse_component
from encdec_cli.data.batch import Batch
from encdec_cli.decoding.force import as_targets
from encdec_cli.decoding.hypothesis import Hypothesis
from encdec_cli.decoding.sampling import Sampling
from encdec_cli.evaluation.metrics import Metric
from encdec_cli.generation.search import Job, Search
from encdec_cli.models.model import Model
from encdec_cli.recipe import Risk
from encdec_cli.registry import metrics
from encdec_cli.text.vocabulary import PAD
from encdec_cli.training import loss


@dataclass(kw_only=True)
class Judged(Batch):
    """A batch with outputs for each source, and what each of them costs."""

    candidates: Tensor
    """[rows, n, len]: BOS, tokens, EOS, then PAD; BOS alone where there is no further output."""
    costs: Tensor
    """[rows, n] fp32."""

    def take(self, begin: int, end: int) -> Judged:
        """Return the examples `begin … end - 1` and what belongs to them; no copies."""
        outputs, costs = self.candidates[begin:end], self.costs[begin:end]
        return Judged(**vars(super().take(begin, end)), candidates=outputs, costs=costs)


class Judge:
    """Draws outputs of a model and judges them.

    Args:
        bundle: the model that learns; its recipe's `decoding.max_length` bounds what is drawn.
        risk: metric, one of outputs, and their number.
    """

    def __init__(self, bundle: Bundle, risk: Risk) -> None:
        self._bundle, self._samples = bundle, risk.samples
        self._metric: Metric = parse_component(risk.metric, metrics, "risk.metric")

    def __call__(self, batch: Batch, seed: int) -> Judged:
        """Return the batch with the reference and up to `samples` other outputs for each source, drawn by `seed`."""
        limit = self._bundle.recipe.decoding.config.max_length
        search = Search([self._bundle], Sampling(beam=self._samples, seed=seed, max_length=limit), self._samples)
        self._bundle.model.eval()
        sources = [
            ids[: int(real) - 1] for ids, real in zip(batch.source.tolist(), batch.source_mask.sum(1), strict=True)
        ]
        drawn = search([Job(source) for source in sources])
        lengths = batch.target_lengths.tolist()
        references = [ids[1:length] for ids, length in zip(batch.known_target.tolist(), lengths, strict=True)]
        found = [_distinct(ids, some) for ids, some in zip(references, drawn, strict=True)]
        width = 1 + self._samples
        candidates = as_targets(found, width, batch.source.device).view(len(found), width, -1)
        costs = torch.zeros(len(found), width)
        for row, (some, reference) in enumerate(zip(found, references, strict=True)):
            costs[row, : len(some)] = torch.tensor(self._costs([one.tokens for one in some], reference))
        return Judged(**vars(batch), candidates=candidates, costs=costs.to(batch.source.device))

    def _costs(self, outputs: Sequence[Sequence[int]], reference: Sequence[int]) -> list[float]:
        """Return what each output costs, from 0 for the best score that a percentage can be to 1."""
        decode = self._bundle.target.decode
        statistics = self._metric.statistics([decode(ids) for ids in outputs], [[decode(reference)] * len(outputs)])
        scores = self._metric.scores(statistics)[:, 0] / 100
        return [float(1 - score if self._metric.higher_is_better else score) for score in scores]


def _distinct(reference: list[int], drawn: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Return the reference and the outputs that differ from it and from each other."""
    first = Hypothesis(reference, 0.0, [], finished=True)
    return list({(*one.tokens, one.finished): one for one in (first, *drawn)}.values())


@dataclass(frozen=True)
class ExpectedRisk:
    """The expected cost of an output, among those of a `Judged` batch, by their renormalised probabilities.

    Each sentence counts as often as its reference has tokens, so that the risk can be mixed with a loss of tokens.
    """

    sharpness: float
    """Power of the probabilities, the paper's alpha."""

    def __call__(self, model: Model, batch: Batch, parameters: Iterable[nn.Parameter], weight: float) -> Tensor:
        """Return `weight` times the summed risk; see `Objective`."""
        if not isinstance(batch, Judged):
            raise TypeError("a batch without candidates")
        sentences, width, _ = batch.candidates.shape
        target = batch.candidates.flatten(0, 1)
        state = model.start(model.encode(batch.source, batch.source_mask), width)
        hidden, labels = loss.real_rows(model.decode(target[:, :-1], state), target[:, 1:])
        owner = (target[:, 1:] != PAD).nonzero()[:, 0]
        tokens = loss.log_probs(hidden.detach(), model.project, labels)
        scores = tokens.new_zeros(len(target)).index_add_(0, owner, tokens).view(sentences, width)
        absent = batch.candidates[:, :, 1] == PAD
        chance = (self.sharpness * scores).masked_fill(absent, -torch.inf).softmax(1)
        risk = (chance * batch.costs).sum(1, keepdim=True)
        counts = batch.target_lengths.unsqueeze(1)
        # How the risk changes with the log-probability of each candidate, and so with that of each of its tokens.
        pull = counts * self.sharpness * chance * (batch.costs - risk)
        criterion = loss.CrossEntropy(labels, scale=-pull.flatten()[owner])
        surrogate = loss.chunked_loss(hidden, model.project, criterion, parameters, weight)
        return weight * (counts * risk).sum() + surrogate - surrogate.detach()
