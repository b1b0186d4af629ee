"""Label-smoothed cross-entropy of hidden states, whose logits never stand in memory whole.

The rows are projected in chunks, and each chunk's gradient is computed while its logits are still in the cache. The
idea is that of Cut Cross-Entropy (https://arxiv.org/abs/2411.09009) and of Liger's fused linear cross-entropy
(https://arxiv.org/abs/2410.10989), here for any output layer; label smoothing is https://arxiv.org/abs/1512.00567.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from encdec_cli.text.vocabulary import PAD

Project = Callable[[Tensor], Tensor]
"""An output layer: hidden states [n, dim] to logits [n, vocab], each row by itself."""

CHUNK = 4 << 20
"""Logits that stand in memory at a time: 16 MB of fp32, in the last cache of most machines, and under the 32 MB from
which the C library asks the system for fresh pages each time (8 M were 15 % slower, 16 M 40 %, in bf16)."""


def real_rows(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Select the positions that have a target: hidden [rows, len, dim] to [n, dim], target [rows, len] to [n]."""
    places = (target.reshape(-1) != PAD).nonzero().squeeze(1)
    return hidden.flatten(0, 1).index_select(0, places), target.reshape(-1).index_select(0, places)


def token_loss(
    hidden: Tensor,
    project: Project,
    target: Tensor,
    smoothing: float,
    parameters: Sequence[Tensor],
    weight: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Tensor, int]:
    """Return `weight` times the sum of the label-smoothed cross-entropies in nats, and the number of tokens.

    The loss is that of `F.cross_entropy(project(hidden), target, label_smoothing=smoothing, reduction="sum")`, and so
    is its gradient. With `weight` = 1 / (tokens of the whole update) the gradients of micro-batches add up to that of
    their mean token.

    Args:
        hidden: [n, dim], real positions only (see `real_rows`); fp32 or bf16.
        project: the output layer; called on chunks of rows.
        target: [n], int64.
        smoothing: the share of probability spread evenly over the vocabulary.
        parameters: every tensor that `project` may use; others among them are harmless.
        weight: what the loss, and so its gradient, is multiplied by.
        chunk: the number of logits that stand in memory at a time.
    """
    if target.numel() == 0:
        return hidden.float().sum() * 0.0, 0
    used, vocab = used_by(project, hidden, parameters)
    size = max(8, chunk // vocab)
    if torch.is_grad_enabled() and (used or hidden.requires_grad):
        settings = (smoothing, weight, size)
        loss: Tensor = _ChunkedLoss.apply(hidden, target, project, settings, *used)  # type: ignore[no-untyped-call]
        return loss, target.numel()
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(target), size):
        rows = slice(start, start + size)
        total += _losses(project(hidden[rows]), target[rows], smoothing)[0]
    return total * weight, target.numel()


def used_by(project: Project, hidden: Tensor, parameters: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Return which of `parameters` `project` uses, and the size of the vocabulary, by projecting one row."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    logits = project(hidden[:1].detach())
    if not (wanted and logits.requires_grad):
        return [], logits.shape[-1]
    found = torch.autograd.grad(logits.sum(), wanted, allow_unused=True)
    return [p for p, gradient in zip(wanted, found, strict=True) if gradient is not None], logits.shape[-1]


def _losses(logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss, exp(logits - their maximum) [n, vocab] and its row sums [n, 1], all in fp32."""
    # One fp32 copy, used in place from here on: the output layer's own backward may need the logits themselves.
    scores = logits.detach().to(torch.float32, copy=True)
    wanted = scores.gather(1, target.unsqueeze(1))
    mean = scores.mean(1, keepdim=True) if smoothing else torch.zeros_like(wanted)
    maximum = scores.amax(1, keepdim=True)
    scores.sub_(maximum).exp_()
    normaliser = scores.sum(1, keepdim=True)
    losses = normaliser.log() + maximum - (1 - smoothing) * wanted - smoothing * mean
    return losses.sum(), scores, normaliser


class _ChunkedLoss(torch.autograd.Function):
    """The loss and, in the same pass, its gradients, which `backward` only hands out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target: Tensor,
        project: Project,
        settings: tuple[float, float, int],
        *parameters: Tensor,
    ) -> Tensor:
        smoothing, weight, size = settings
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for start in range(0, len(target), size):
            rows, labels = hidden[start : start + size].detach().requires_grad_(), target[start : start + size]
            with torch.enable_grad():
                logits = project(rows)
            loss, scores, normaliser = _losses(logits, labels, smoothing)
            total += loss
            # Softmax minus the smoothed target, times the weight.
            scores.mul_(weight / normaliser)
            if smoothing:
                scores.sub_(smoothing * weight / scores.shape[1])
            wanted = labels.unsqueeze(1)
            scores.scatter_add_(1, wanted, scores.new_full(wanted.shape, (smoothing - 1) * weight))
            first, *rest = torch.autograd.grad(logits, (rows, *parameters), scores.to(logits.dtype))
            gradient[start : start + size] = first
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
