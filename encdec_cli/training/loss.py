"""The loss of hidden states, such as label-smoothed cross-entropy, whose logits never stand in memory whole.

The rows are projected in chunks, and each chunk's gradient is computed while its logits are still in the cache. The
idea is that of Cut Cross-Entropy (https://arxiv.org/abs/2411.09009) and of Liger's fused linear cross-entropy
(https://arxiv.org/abs/2410.10989), here for any output layer; label smoothing is https://arxiv.org/abs/1512.00567.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from encdec_cli import kernels
from encdec_cli.kernels.losses import cross_entropy
from encdec_cli.text.vocabulary import PAD

Project = Callable[[Tensor], Tensor]
"""An output layer: hidden states [n, dim] to logits [n, vocab], each row by itself."""

CHUNK = 4 << 20
"""Logits that stand in memory at a time: 16 MB of fp32, in the last cache of most machines, and under the 32 MB from
which the C library asks the system for fresh pages each time (8 M were 15 % slower, 16 M 40 %, in bf16)."""
GPU_CHUNK = 64 << 20
"""Likewise on a GPU, where small products are slow: 256 MB of fp32."""


def chunk_of(device: torch.device) -> int:
    """Return how many logits stand in memory at a time on a device."""
    return GPU_CHUNK if device.type == "cuda" else CHUNK


def real_rows(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Select the positions that have a target: hidden [rows, len, dim] to [n, dim], target [rows, len] to [n]."""
    places = (target.reshape(-1) != PAD).nonzero().squeeze(1)
    return hidden.flatten(0, 1).index_select(0, places), target.reshape(-1).index_select(0, places)


class Criterion(Protocol):
    """What rows of logits cost."""

    group: ClassVar[int]
    """Rows that must be seen together: a chunk holds a multiple of them."""

    def __call__(self, logits: Tensor, rows: slice, weight: float) -> tuple[Tensor, Tensor]:
        """Return the summed loss of some rows, an fp32 scalar, and `weight` times its gradient by their logits.

        The gradient is fp32 or of the type of the logits.

        Args:
            logits: [n, vocab]; must not be changed.
            rows: which rows of all they are.
            weight: what the gradient is multiplied by.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy in nats of known targets, smoothed toward a prior."""

    group: ClassVar[int] = 1

    target: Tensor
    """[n], int64."""
    smoothing: float = 0.0
    """The share of probability that is spread over the vocabulary."""
    prior: Tensor | None = None
    """[vocab] fp32, sum 1: how that share is spread; None: evenly."""
    scale: Tensor | None = None
    """[n] fp32: what each row's loss is multiplied by; None: by 1."""
    compiled: bool = False
    """Whether torch's compiler makes two or three passes over the logits of what else are a dozen."""

    def __call__(self, logits: Tensor, rows: slice, weight: float) -> tuple[Tensor, Tensor]:
        """Return loss and gradient; see `Criterion`."""
        scale = None if self.scale is None else self.scale[rows]
        if self.by_kernel(logits):
            return cross_entropy(logits, self.target[rows], self.smoothing, self.prior, scale, weight)
        scale = None if scale is None else scale.unsqueeze(1)
        wanted = self.target[rows].unsqueeze(1)
        if self.compiled and len(logits) > 1:
            # One row, a part of a larger tensor and a number that is new in each update would be programs of their own.
            factor = torch.full((), weight, device=logits.device)
            return _compiled()(logits, wanted.clone(), self.smoothing, self.prior, scale, factor)
        return _smoothed(logits, wanted, self.smoothing, self.prior, scale, weight)

    def by_kernel(self, logits: Tensor) -> bool:
        """Return whether all is one call of a kernel."""
        # Measured with one thread on Zen 5, 4 million logits of 4,000 tokens: 2.0 ms in bf16 and fp32, by torch 6.6.
        return not self.compiled and kernels.usable(logits) and kernels.wide() and logits.is_contiguous()

    def parts(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return unscaled losses [n, 1], exp(logits - their maximum) [n, vocab] and its row sums [n, 1], all fp32."""
        return _parts(logits, self.target[rows].unsqueeze(1), self.smoothing, self.prior)


def _parts(logits: Tensor, wanted: Tensor, smoothing: float, prior: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    # One fp32 copy, used in place from here on: the output layer's own backward may need the logits themselves.
    scores = logits.detach().to(torch.float32, copy=True)
    right = scores.gather(1, wanted)
    if prior is not None:
        mean = (scores @ prior).unsqueeze(1)
    else:
        mean = scores.mean(1, keepdim=True) if smoothing else torch.zeros_like(right)
    maximum = scores.amax(1, keepdim=True)
    scores.sub_(maximum).exp_()
    normaliser = scores.sum(1, keepdim=True)
    losses = normaliser.log() + maximum - (1 - smoothing) * right - smoothing * mean
    return losses, scores, normaliser


def _smoothed(
    logits: Tensor,
    wanted: Tensor,
    smoothing: float,
    prior: Tensor | None,
    scale: Tensor | None,
    weight: float | Tensor,
) -> tuple[Tensor, Tensor]:
    losses, scores, normaliser = _parts(logits, wanted, smoothing, prior)
    # Softmax minus the smoothed target, times the weight.
    scores.mul_(weight / normaliser)
    if prior is not None:
        scores.sub_(smoothing * weight * prior)
    elif smoothing:
        scores.sub_(smoothing * weight / scores.shape[1])
    scores.scatter_add_(1, wanted, scores.new_zeros(wanted.shape) + (smoothing - 1) * weight)
    if scale is not None:
        losses, scores = losses * scale, scores.mul_(scale)
    return losses.sum(), scores


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_smoothed, dynamic=True)


def chunked_loss(
    hidden: Tensor,
    project: Project,
    criterion: Criterion,
    parameters: Iterable[Tensor],
    weight: float = 1.0,
    chunk: int = 0,
) -> Tensor:
    """Return `weight` times the loss of all rows, a scalar to be differentiated.

    With `weight` = 1 / (tokens of the whole update) the gradients of micro-batches add up to that of their mean token.

    Args:
        hidden: [n, dim], real positions only (see `real_rows`); fp32 or bf16.
        project: the output layer; called on chunks of rows.
        criterion: of the logits.
        parameters: every tensor that `project` may use; others among them are harmless.
        weight: what the loss, and so its gradient, is multiplied by.
        chunk: the number of logits that stand in memory at a time; 0: as many as is good for the device.
    """
    if not len(hidden):
        return hidden.float().sum() * 0.0
    used, vocab = used_by(project, hidden, parameters)
    size = max(8, (chunk or chunk_of(hidden.device)) // vocab) // criterion.group * criterion.group
    loss: Tensor = _ChunkedLoss.apply(hidden, project, criterion, (weight, size), *used)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def log_probs(hidden: Tensor, project: Project, target: Tensor) -> Tensor:
    """Return the natural log-probability of each target, [n] fp32; target: [n] int64, others as for `chunked_loss`."""
    criterion, size = CrossEntropy(target), max(8, chunk_of(hidden.device) // project(hidden[:1]).shape[-1])
    found = [-criterion.parts(project(hidden[rows]), rows)[0].squeeze(1) for rows in _chunks(hidden, size)]
    return torch.cat(found)


def _chunks(hidden: Tensor, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def used_by(project: Project, hidden: Tensor, parameters: Iterable[Tensor]) -> tuple[list[Tensor], int]:
    """Return which of `parameters` `project` uses, and the size of the vocabulary, by projecting one row."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    logits = project(hidden[:1].detach())
    if not (wanted and logits.requires_grad):
        return [], logits.shape[-1]
    found = torch.autograd.grad(logits.sum(), wanted, allow_unused=True)
    return [p for p, gradient in zip(wanted, found, strict=True) if gradient is not None], logits.shape[-1]


class _ChunkedLoss(torch.autograd.Function):
    """The loss and, in the same pass, its gradients, which `backward` only hands out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        project: Project,
        criterion: Criterion,
        settings: tuple[float, int],
        *parameters: Tensor,
    ) -> Tensor:
        weight, size = settings
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for rows in _chunks(hidden, size):
            states = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = project(states)
            loss, wanted = criterion(logits.detach(), rows, weight)
            total += loss
            first, *rest = torch.autograd.grad(logits, (states, *parameters), wanted.to(logits.dtype))
            gradient[rows] = first
            for already, addend in zip(sums, rest, strict=True):
                already.add_(addend)
        ctx.gradients = (gradient, *(s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)))
        return total * weight

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outer
        gradients: tuple[Tensor, ...] = ctx.gradients
        if scale.device.type != "cpu" or float(scale) != 1.0:
            gradients = tuple(g * scale.to(g.dtype) for g in gradients)
        return gradients[0], None, None, None, *gradients[1:]
