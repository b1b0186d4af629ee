"""A whole layer of an encoder, or of a decoder for one new token of every row, in one call; see `layer.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encdec_cli.kernels import MOST_KEYS, WIDTH
from encdec_cli.kernels.build import function
from encdec_cli.kernels.matrix import SHARED_OUT, Matrix, Struct

ACTIVATIONS = ("relu", "gelu", "swiglu")
BLOCK = 256
"""About so many rows of an encoder pass through a layer together."""
LONGEST = 64
"""Longer sources are faster with torch's attention."""
_MATRICES = ("joined", "output", "query", "cross_output", "inner", "outer")


@dataclass
class Norm:
    """LayerNorm if `centred`, else RMSNorm."""

    weight: Tensor
    """[dim]"""
    bias: Tensor | None
    """[dim]"""
    epsilon: float
    centred: bool


@dataclass
class Written:
    """What the rows have written so far, and look at."""

    keys: Tensor
    """[rows / beam, heads, room, width], dense, like `values`: the stores, which get the new ones from `place` on."""
    values: Tensor
    place: int
    beam: int
    """Rows that have a store together."""
    bias: Tensor | None
    """What to add to scores, [rows / beam or 1, 1, beam, room]; None if nothing is masked."""
    turns: Tensor | None
    """Sines and cosines of the new position, [1, 2, width / 2]; None without rotary positions."""


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *(("epsilon", ctypes.c_float), ("centred", ctypes.c_int32)),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "width", "feed_forward", "activation", "pre")),
        ("norms", _Norm * 3),
        *((name, Struct) for name in _MATRICES),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *(("rows", ctypes.c_int64), ("x", ctypes.c_void_p), ("scratch", ctypes.c_void_p)),
        *((name, ctypes.c_int64) for name in ("beam", "room", "place")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "bias")),
        ("bias_strides", ctypes.c_int64 * 2),
        ("turns", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("source_rows", "source_length")),
        *((name, ctypes.c_void_p) for name in ("source_keys", "source_values", "source_bias")),
        ("block", ctypes.c_int64),
    )


class _Kernel:
    """The weights of a layer, which no longer change, as the C functions read them."""

    def __init__(
        self, heads: int, pre: bool, activation: str, norms: Sequence[Norm], matrices: Mapping[str, Matrix]
    ) -> None:
        self._kept = (list(norms), list(matrices.values()))
        self._dtype = norms[0].weight.dtype
        self._dim = matrices["joined"].inputs
        self._weights = sum(one.inputs * one.outputs for one in matrices.values())
        self._width = 2 * self._dim + max(3 * self._dim, matrices["inner"].outputs)
        """Of what a row needs on the way."""
        sizes = (heads, self._dim // heads, matrices["outer"].inputs, ACTIVATIONS.index(activation), pre)
        self._layer = _Layer(*sizes, norms=(_Norm * 3)(*map(_norm, norms)))
        for name, matrix in matrices.items():
            setattr(self._layer, name, matrix.struct)
        self._place = ctypes.addressof(self._layer)

    def _takes(self, x: Tensor) -> bool:
        """Return whether one thread is enough for x [.., dim], and it lies as it must."""
        if x.dtype != self._dtype or torch.is_grad_enabled() or not x.is_contiguous():
            return False
        return x.numel() // self._dim * self._weights <= SHARED_OUT or torch.get_num_threads() == 1


class EncoderLayer(_Kernel):
    """Attention of a source to itself and a feed-forward, of short sources.

    Args:
        heads: of the attention.
        pre: whether each part begins with its norm; else it ends with it.
        activation: one of ACTIVATIONS.
        norms: of the attention, and, the last, of the feed-forward.
        matrices: by the names of `struct layer`.
    """

    def takes(self, x: Tensor, bias: Tensor | None) -> bool:
        """Return whether it computes this; arguments as of the call."""
        short = 0 < x.shape[1] <= LONGEST
        return short and (bias is None or bias.is_contiguous()) and self._takes(x)

    def __call__(self, x: Tensor, bias: Tensor | None, turns: Tensor | None) -> Tensor:
        """Compute the layer in the place of x [sentences, src_len, dim], which is returned.

        bias: [sentences, 1, 1, src_len] to add to scores; None if nothing is masked. turns: sines and cosines of the
        positions, [src_len, 2, width / 2]; None without rotary positions.
        """
        length = x.shape[1]
        block = length * min(max(1, BLOCK // length), len(x))
        scratch = x.new_empty(block * self._width)
        step = _Step(len(x) * length, x.data_ptr(), scratch.data_ptr(), source_rows=length, block=block)
        step.source_bias = None if bias is None else bias.data_ptr()
        step.turns = None if turns is None else turns.data_ptr()
        function("encoder_layer")(self._place, ctypes.addressof(step), x.dtype == torch.bfloat16)
        return x


class DecoderLayer(_Kernel):
    """Attention to what was written and to the source, and a feed-forward, for one new token of every row.

    Args:
        heads: of both attentions.
        pre: whether each part begins with its norm; else it ends with it.
        activation: one of ACTIVATIONS.
        norms: of the attention to what was written, of that to the source, of the feed-forward.
        matrices: by the names of `struct layer`.
    """

    def takes(self, x: Tensor, sources: tuple[Tensor, Tensor], room: int) -> bool:
        """Return whether it computes this; room: that of the stores, else as of the call."""
        keys, values = sources
        if max(room, keys.shape[2]) > MOST_KEYS:
            return False
        return keys.is_contiguous() and values.is_contiguous() and self._takes(x)

    def __call__(
        self, x: Tensor, written: Written, sources: tuple[Tensor, Tensor], source_bias: Tensor | None
    ) -> Tensor:
        """Compute the layer in the place of x [rows, 1, dim], which is returned.

        sources: keys and values [sentences, heads, src_len, width]; source_bias: [sentences, 1, 1, src_len] to add to
        scores; None if nothing is masked.
        """
        rows, bias = len(x), written.bias
        scratch = x.new_empty(rows * self._width)
        step = _Step(rows, x.data_ptr(), scratch.data_ptr())
        step.beam, step.room, step.place = written.beam, written.keys.shape[2], written.place
        step.keys, step.values = written.keys.data_ptr(), written.values.data_ptr()
        if bias is not None:
            step.bias = bias.data_ptr()
            step.bias_strides[0] = bias.stride(0) if len(bias) > 1 else 0
            step.bias_strides[1] = bias.stride(2)
        step.turns = None if written.turns is None else written.turns.data_ptr()
        step.source_keys, step.source_values = (one.data_ptr() for one in sources)
        step.source_rows, step.source_length = rows // len(sources[0]), sources[0].shape[2]
        step.source_bias = None if source_bias is None else source_bias.data_ptr()
        function("decoder_layer")(self._place, ctypes.addressof(step), x.dtype == torch.bfloat16)
        return x


def fits(heads: int, matrices: Mapping[str, Matrix]) -> bool:
    """Return whether the C functions know such sizes; heads and matrices as of the layers."""
    return not any(width % WIDTH for width in (matrices["joined"].inputs // heads, matrices["outer"].inputs))


def _norm(norm: Norm) -> _Norm:
    bias = None if norm.bias is None else norm.bias.data_ptr()
    return _Norm(norm.weight.data_ptr(), bias, norm.epsilon, norm.centred)
