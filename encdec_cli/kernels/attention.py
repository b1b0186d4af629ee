"""Attention for training on a CPU, forward and backward; see `attention.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from encdec_cli.kernels.build import function, wide
from encdec_cli.kernels.matrix import alike, shares, together
from encdec_cli.kernels.operators import operators as known_operators
from encdec_cli.kernels.packing import Packing

WIDTH = 16
"""What the heads' width is a multiple of."""
MOST = 512
"""Queries or keys; beyond them what a head needs no longer stays in the cache."""
_TENSORS = ("query", "key", "value", "out", "query_change", "key_change", "value_change")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sentences", "heads", "queries", "keys", "width", "causal")),
        *((name, ctypes.c_int64 * 3) for name in _TENSORS),
        ("bias", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("query_at", "key_at", "value_at", "bias_at", "out_at", "sums_at")),
        *((name, ctypes.c_void_p) for name in ("query_change_at", "key_change_at", "value_change_at")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "key_starts")),
    )


def fit(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, multiple: int) -> bool:
    """Return whether shapes are those of attention, without broadcasting but of the bias, and what must be is dense."""
    rows, heads, queries, width = query.shape
    if key.shape != value.shape or key.shape != (rows, heads, key.shape[2], width) or width % multiple:
        return False
    if any(one.stride(3) != 1 for one in (query, key, value)):
        return False
    if bias is None:
        return True
    fits = bias.dim() == 4 and bias.stride(3) == 1 and bias.shape[1::2] == (1, key.shape[2])
    return fits and bias.shape[0] in (1, rows) and bias.shape[2] in (1, queries)


def can_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> bool:
    """Return whether `attend` takes these, each row a sentence."""
    if not _is_here(query, key, value, bias) or (bias is not None and bias.requires_grad):
        return False
    queries, keys = query.shape[2], key.shape[2]
    return 0 < queries <= MOST and (queries if causal else 1) <= keys <= MOST and fit(query, key, value, bias, WIDTH)


def can_attend_packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> bool:
    """Return whether `attend` takes these, packed."""
    if not _is_here(query, key, value) or query.shape[3] % WIDTH or max(packing.sizes[1:]) > MOST:
        return False
    return all(one.stride(3) == 1 for one in (query, key, value))


def _is_here(*tensors: Tensor | None) -> bool:
    return not torch.compiler.is_compiling() and alike(*tensors) and wide()


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, packing: Packing | None = None
) -> Tensor:
    """Return softmax(query key^T / sqrt(head_dim) + bias) value, [rows, heads, queries, head_dim], with its gradients.

    query, key, value: [rows, heads, places, head_dim], the last dimension dense and a multiple of WIDTH. bias: [rows or
    1, 1, queries or 1, keys]. causal: the last query sees every key, the one before it all but the last, and so on.
    packing: which places of the only row belong together; None if each row is a sentence. There is then no bias.
    """
    mixed: Tensor = _Attention.apply(query, key, value, bias, causal, packing)  # type: ignore[no-untyped-call]
    return mixed


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        causal: bool,
        packing: Packing | None,
    ) -> Tensor:
        if packing is None:
            sizes = [len(query) * query.shape[2] * key.shape[2], query.shape[2], key.shape[2]]
            ctx.shape = causal, None, None, sizes
        else:
            ctx.shape = causal, packing.queries.starts, packing.keys.starts, packing.sizes
        out, sums = operators().attend(query, key, value, bias, *ctx.shape)
        ctx.save_for_backward(query, key, value, bias, sums)
        mixed: Tensor = out.transpose(1, 2)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        *given, sums = ctx.saved_tensors
        query, key, value = operators().attend_backward(outer, *given, sums, *ctx.shape)
        return query, key, value, None, None, None


def operators() -> Any:
    """Return the operators of torch, `attend` and `attend_backward`; see `_forward` and `_backward`."""
    inputs = "Tensor query, Tensor key, Tensor value, Tensor? bias"
    shape = "bool causal, Tensor? query_starts, Tensor? key_starts, int[] sizes"
    gradients = "(Tensor, Tensor, Tensor)"
    return known_operators(
        (f"attend({inputs}, {shape}) -> (Tensor, Tensor)", _forward, _flops),
        (
            f"attend_backward(Tensor outer, {inputs}, Tensor sums, {shape}) -> {gradients}",
            _backward,
            _backward_flops,
        ),
    )


def _flops(query: Sequence[int], *others: Any, **_: Any) -> int:
    pairs: int = others[-1][0]
    return 4 * query[1] * query[3] * pairs  # a product for the scores and one for what they mix


def _backward_flops(_outer: Sequence[int], *others: Any, **_: Any) -> int:
    return 2 * _flops(*others)  # the scores that are computed a second time do not count


@dataclass
class _Shape:
    """What the operators are given beside tensors of places."""

    causal: bool
    query_starts: Tensor | None
    key_starts: Tensor | None
    sizes: Sequence[int]
    """See `Packing`."""


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *shape: Any) -> tuple[Tensor, Tensor]:
    rows, heads, queries, width = query.shape
    out = query.new_empty((rows, queries, heads, width))
    sums = torch.empty((rows, heads, queries, 2), dtype=torch.float32)
    _call(bias, _Shape(*shape), sums, query=query, key=key, value=value, out=out.transpose(1, 2))
    return out, sums


def _backward(
    outer: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sums: Tensor, *shape: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if outer.stride(3) != 1:
        outer = outer.contiguous()
    rows, heads, queries, width = query.shape
    keys = key.shape[2]
    # Side by side where one map has made them: its gradient is then all of this.
    if queries == keys:
        own, *others = query.new_empty((rows, queries, 3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        own = query.new_empty((rows, queries, heads, width)).transpose(1, 2)
        others = list(query.new_empty((rows, keys, 2, heads, width)).permute(2, 0, 3, 1, 4).unbind(0))
    changes = dict(zip(("query_change", "key_change", "value_change"), (own, *others), strict=True))
    _call(bias, _Shape(*shape), sums, query=query, key=key, value=value, out=outer, **changes)
    return own, others[0], others[1]


def _call(bias: Tensor | None, shape: _Shape, sums: Tensor, **tensors: Tensor) -> None:
    query = tensors["query"]
    rows, heads, _, width = query.shape
    call = _Call(rows, heads, *shape.sizes[1:], width, shape.causal)
    if shape.query_starts is not None and shape.key_starts is not None:
        rows = call.sentences = len(shape.query_starts) - 1
        call.query_starts, call.key_starts = shape.query_starts.data_ptr(), shape.key_starts.data_ptr()
    for name, tensor in tensors.items():
        setattr(call, name, tensor.stride()[:3])
        setattr(call, f"{name}_at", tensor.data_ptr())
    call.sums_at = sums.data_ptr()
    if bias is not None:
        call.bias_at = bias.data_ptr()
        call.bias = tuple(bias.stride(place) if bias.shape[place] > 1 else 0 for place in (0, 2))
    parts = shares(rows * heads, 2 * heads * width * shape.sizes[0])
    one = partial(function("attend_in_training"), ctypes.addressof(call))
    failed: list[int] = []
    together([partial(lambda *part: failed.append(one(*part)), *part, query.dtype == torch.bfloat16) for part in parts])
    if any(failed):
        raise MemoryError("attention: not enough memory")
