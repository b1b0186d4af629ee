"""What a micro-batch costs a model: the number that training makes small."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import Batch
from encdec_cli.data.store import Store
from encdec_cli.kernels.losses import agreement
from encdec_cli.models.model import Model
from encdec_cli.text.vocabulary import EOS
from encdec_cli.training import loss
from encdec_cli.training.guide import GuidedAttention, chosen_head
from encdec_cli.training.loss import Criterion, chunk_of, chunked_loss, real_rows
from encdec_cli.training.risk import ExpectedRisk
from encdec_cli.training.teacher import with_teacher


class Objective(Protocol):
    """The loss of a micro-batch, a sum over its target tokens in nats."""

    def __call__(self, model: Model, batch: Batch, parameters: Iterable[nn.Parameter], weight: float) -> Tensor:
        """Return `weight` times the summed loss, a scalar to be differentiated.

        Args:
            model: in training mode.
            batch: with targets, on the model's device.
            parameters: those that learn.
            weight: 1 / (target tokens of the whole update), so that micro-batches add up to the mean of its tokens.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Label-smoothed cross-entropy of each target token, given those before it."""

    smoothing: float
    prior: Tensor | None = None
    """[vocab]: how the smoothing spreads; None: evenly."""

    def __call__(self, model: Model, batch: Batch, parameters: Iterable[nn.Parameter], weight: float) -> Tensor:
        """Return `weight` times the summed loss; see `Objective`."""
        hidden = model(batch.source, batch.source_mask, batch.decoder_input)
        rows, labels = real_rows(hidden, batch.known_target[:, 1:])
        criterion = loss.CrossEntropy(labels, self.smoothing, self.prior, compiled=model.compiled)
        return chunked_loss(rows, model.project, criterion, parameters, weight)


@dataclass(frozen=True)
class RDrop:
    """R-Drop (Liang et al. 2021, https://arxiv.org/abs/2106.14448): two passes with different dropout that must agree.

    The mean cross-entropy of both passes plus `weight` / 4 times the divergence of each token's two distributions, both
    ways: half of the paper's loss, so that it remains the loss of one pass.
    """

    smoothing: float
    prior: Tensor | None
    """As of `CrossEntropy`."""
    weight: float

    def __call__(self, model: Model, batch: Batch, parameters: Iterable[nn.Parameter], weight: float) -> Tensor:
        """Return `weight` times the summed loss; see `Objective`. Both passes are one batch of twice the rows."""
        source, mask, read = (
            side.repeat_interleave(2, 0) for side in (batch.source, batch.source_mask, batch.decoder_input)
        )
        # The two passes of a position side by side: [rows, tgt_len x 2, dim].
        hidden = model(source, mask, read).unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2)
        rows, labels = real_rows(hidden, batch.known_target[:, 1:].repeat_interleave(2, 1))
        criterion = Agreement(
            loss.CrossEntropy(labels, self.smoothing, self.prior, compiled=model.compiled), self.weight
        )
        # Half the chunk, since twice as much is computed from it: less time is spent on fresh memory.
        return chunked_loss(rows, model.project, criterion, parameters, weight, chunk_of(rows.device) // 2)


@dataclass(frozen=True)
class Agreement:
    """Half of a criterion, plus a quarter of `weight` times KL(p, q) + KL(q, p) of each two rows that follow."""

    group: ClassVar[int] = 2

    base: Criterion
    weight: float

    def __call__(self, logits: Tensor, rows: slice, weight: float) -> tuple[Tensor, Tensor]:
        """Return loss and gradient; see `Criterion`."""
        base = self.base
        if isinstance(base, loss.CrossEntropy) and base.by_kernel(logits) and base.scale is None:
            return agreement(logits, base.target[rows], base.smoothing, base.prior, self.weight / 4, weight)
        logits = logits.float()  # and so is the gradient, to which more is added
        total, gradient = self.base(logits, rows, weight / 2)
        shape, share = (-1, 2, logits.shape[1]), weight * self.weight / 4
        chances = logits.log_softmax(1).view(shape)
        ratio = chances[:, 0] - chances[:, 1]
        p, q = chances.exp_().unbind(1)  # in place, here and below: what is freed and taken anew costs more
        forth, back = (sign * torch.einsum("nv,nv->n", one, ratio)[:, None] for sign, one in ((1, p), (-1, q)))
        # Of KL(p, q) by the logits of p: p (ln p/q - KL); of KL(q, p): p - q.
        of_first, of_second = gradient.view(shape).unbind(1)
        of_first.addcmul_(p, ratio, value=share).addcmul_(p, 1 - forth, value=share).sub_(q, alpha=share)
        of_second.addcmul_(q, ratio, value=-share).addcmul_(q, 1 - back, value=share).sub_(p, alpha=share)
        return total / 2 + (forth + back).sum() * (self.weight / 4), gradient


@dataclass(frozen=True)
class Mixture:
    """The weighted sum of several objectives."""

    parts: Sequence[tuple[float, Objective]]

    def __call__(self, model: Model, batch: Batch, parameters: Iterable[nn.Parameter], weight: float) -> Tensor:
        """Return `weight` times the summed loss; see `Objective`."""
        losses = [part(model, batch, parameters, weight * share) for share, part in self.parts]
        return torch.stack(losses).sum()


def make_objective(bundle: Bundle, store: Store, device: str, dtype: torch.dtype) -> Objective:
    """Return the objective of a recipe: what its `train`, `regularize`, `teacher`, `guide` and `risk` add up to.

    Args:
        bundle: the model that learns, on its device, whole, and its recipe. Raises UsageError if it has no head to
            guide.
        store: the training examples.
        device: where it is computed.
        dtype: in which it is computed.
    """
    recipe, prior = bundle.recipe, None
    if recipe.regularize.smoothing_prior == "unigram":
        prior = _unigram(store, len(bundle.target.vocabulary)).to(device)
    smoothing, agreement = recipe.train.label_smoothing, recipe.regularize.rdrop
    objective: Objective = RDrop(smoothing, prior, agreement) if agreement else CrossEntropy(smoothing, prior)
    if recipe.teacher.model:
        objective = with_teacher(bundle, recipe.teacher.model, prior, dtype)
    share = recipe.risk.weight if recipe.risk.metric else 0.0
    parts: list[tuple[float, Objective]] = [(1 - share, objective), (share, ExpectedRisk(recipe.risk.sharpness))]
    if recipe.guide.weight:
        parts.append((recipe.guide.weight, GuidedAttention(chosen_head(bundle.model, recipe.guide))))
    parts = [(share, part) for share, part in parts if share]
    return parts[0][1] if len(parts) == 1 else Mixture(parts)


def _unigram(store: Store, vocabulary: int) -> Tensor:
    """Return the share of each token among the training targets, their EOS included: [vocabulary] fp32."""
    counts = torch.from_numpy(store.target_counts(vocabulary)).double()
    counts[EOS] += len(store)
    return (counts / counts.sum()).float()
