"""Activation checkpointing: less memory, for a second forward pass.

Chen et al. 2016, https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from encdec_cli.models.dropout import repeatable


def checkpointed(layer: nn.Module, compute: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return `compute(*inputs)`, of which the inputs alone are kept; the backward pass computes it once more.

    The gradients are those of a plain call to the bit, dropout included. (`torch.utils.checkpoint` imports torch's
    compiler and does not know the streams of `models.dropout`.)

    Args:
        layer: the module whose parameters `compute` uses.
        compute: tensors to a tuple of tensors; it may be called twice, so what it changes elsewhere must not matter.
        inputs: all tensors that need a gradient and reach `compute`.

    Where weights are shared out over processes (`parallel.shard`) it must be used inside the layer's own call, where
    they are gathered; raises TypeError elsewhere.
    """
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    if parameters and all(hasattr(parameter, "to_local") for parameter in layer.parameters()):
        raise TypeError(f"{type(layer).__name__}: where weights are shared out, use it inside the layer's call")
    outputs: tuple[Tensor, ...] = _Checkpointed.apply(compute, len(inputs), *inputs, *parameters)  # type: ignore[no-untyped-call]
    return outputs


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., tuple[Tensor, ...]], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.compute, ctx.count = compute, count
        ctx.again = repeatable(tensors[0].device)
        ctx.save_for_backward(*tensors)
        # With gradients, so that the kernels are those of the second time; the graph is dropped at once.
        with torch.enable_grad():
            outputs = compute(*_fresh(tensors[:count]))
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        inputs, parameters = _fresh(tensors[: ctx.count]), tensors[ctx.count :]
        with torch.enable_grad(), ctx.again():
            outputs = ctx.compute(*inputs)
        wanted = [tensor for tensor in (*inputs, *parameters) if tensor.requires_grad]
        pairs = [(output, given) for output, given in zip(outputs, outer, strict=True) if output.requires_grad]
        gradients = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return None, None, *(next(gradients) if t.requires_grad else None for t in (*inputs, *parameters))


def _fresh(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
