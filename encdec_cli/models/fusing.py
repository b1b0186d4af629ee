"""From the modules of a layer, once their matrices are packed, to the kernel that computes all of it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from encdec_cli.kernels.layer import DecoderLayer, EncoderLayer, Norm, fits
from encdec_cli.models.layers import FeedForward, FusedLayerNorm, Residual, RMSNorm
from encdec_cli.models.packed import PackedLinear

Kernel = TypeVar("Kernel", EncoderLayer, DecoderLayer)


def kernel_of(
    kind: type[Kernel], heads: int, maps: Mapping[str, nn.Module], inner: FeedForward, residuals: Sequence[Residual]
) -> Kernel | None:
    """Return a kernel for a layer; None unless its matrices are packed and their sizes are known to it.

    maps: the linear maps of the attentions, by the names of `struct layer`; residuals: as the kernel's norms.
    """
    maps = {**maps, "inner": inner.inner, "outer": inner.outer}
    matrices = {name: one.matrix for name, one in maps.items() if isinstance(one, PackedLinear)}
    if len(matrices) < len(maps) or not fits(heads, matrices):
        return None
    norms = [_norm(residual.norm) for residual in residuals]
    return kind(heads, residuals[0].pre, inner.activation, norms, matrices)


def _norm(norm: nn.Module) -> Norm:
    # Detached, so that the numbers stay where the kernel looks, whatever becomes of the parameter.
    if isinstance(norm, RMSNorm):
        return Norm(norm.weight.detach(), None, norm.eps, centred=False)
    if isinstance(norm, FusedLayerNorm):
        return Norm(norm.weight.detach(), None if norm.bias is None else norm.bias.detach(), norm.eps, centred=True)
    raise TypeError(f"no kernel knows a {type(norm).__name__}")
