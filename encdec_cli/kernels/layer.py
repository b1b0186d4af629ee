"""A whole layer of an encoder, or of a decoder for one new token of every row, in one call; see `layer.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from encdec_cli.kernels import MOST_KEYS, WIDTH
from encdec_cli.kernels.build import function
from encdec_cli.kernels.matrix import Matrix, Struct, shares, together

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
    """The weights of a layer, which no longer change, as the C functions read them.

    Args:
        heads: of its attentions.
        pre: whether each part begins with its norm; else it ends with it.
        activation: one of ACTIVATIONS.
        norms: of the attention to the layer's own sequence, of that to the source (not read in an encoder), of the
            feed-forward.
        matrices: by the names of `struct layer`.
    """

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
        """Return whether x [.., dim] is of the type of the weights, and lies as it must."""
        return x.dtype == self._dtype and x.is_contiguous() and x.numel() > 0 and not torch.is_grad_enabled()

    def _shares(self, sentences: int, x: Tensor) -> list[tuple[int, int]]:
        """Return which of the sentences each thread is to compute."""
        return shares(sentences, x.numel() // self._dim * self._weights)

    def _call(self, name: str, steps: Sequence[_Step]) -> None:
        bf16 = self._dtype == torch.bfloat16
        together([partial(function(name), self._place, ctypes.addressof(step), bf16) for step in steps])


class EncoderLayer(_Kernel):
    """Attention of a source to itself and a feed-forward, of short sources."""

    def takes(self, x: Tensor, bias: Tensor | None) -> bool:
        """Return whether it computes this; arguments as of the call."""
        short = 0 < x.shape[1] <= LONGEST
        return short and (bias is None or bias.is_contiguous()) and self._takes(x)

    def __call__(self, x: Tensor, bias: Tensor | None, turns: Tensor | None) -> Tensor:
        """Compute the layer in the place of x [sentences, src_len, dim], which is returned.

        bias: [sentences, 1, 1, src_len] to add to scores; None if nothing is masked. turns: sines and cosines of the
        positions, [src_len, 2, width / 2]; None without rotary positions.
        """
        length, steps = x.shape[1], []
        parts = self._shares(len(x), x)
        block = length * min(max(1, BLOCK // length), len(x))
        scratch = x.new_empty((len(parts), block * self._width))
        for part, (first, last) in enumerate(parts):
            step = _Step((last - first) * length, x[first].data_ptr(), scratch[part].data_ptr(), source_rows=length)
            step.block = min(block, step.rows)
            step.source_bias = None if bias is None else bias[first].data_ptr()
            step.turns = None if turns is None else turns.data_ptr()
            steps.append(step)
        self._call("encoder_layer", steps)
        return x


class DecoderLayer(_Kernel):
    """Attention to what was written and to the source, and a feed-forward, for one new token of every row."""

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
        bias, each, steps = written.bias, len(x) // len(sources[0]), []
        scratch = x.new_empty((len(x), self._width))
        for first, last in self._shares(len(sources[0]), x):
            row, store = first * each, first * each // written.beam
            step = _Step((last - first) * each, x[row].data_ptr(), scratch[row].data_ptr())
            step.beam, step.room, step.place = written.beam, written.keys.shape[2], written.place
            step.keys, step.values = written.keys[store].data_ptr(), written.values[store].data_ptr()
            if bias is not None:
                alike = len(bias) == 1
                step.bias = bias[0 if alike else store].data_ptr()
                step.bias_strides[0] = 0 if alike else bias.stride(0)
                step.bias_strides[1] = bias.stride(2)
            step.turns = None if written.turns is None else written.turns.data_ptr()
            step.source_keys, step.source_values = (one[first].data_ptr() for one in sources)
            step.source_rows, step.source_length = each, sources[0].shape[2]
            step.source_bias = None if source_bias is None else source_bias[first].data_ptr()
            steps.append(step)
        self._call("decoder_layer", steps)
        return x


def fits(heads: int, matrices: Mapping[str, Matrix]) -> bool:
    """Return whether the C functions know such sizes; heads and matrices as of the layers."""
    return not any(width % WIDTH for width in (matrices["joined"].inputs // heads, matrices["outer"].inputs))


def _norm(norm: Norm) -> _Norm:
    bias = None if norm.bias is None else norm.bias.data_ptr()
    return _Norm(norm.weight.data_ptr(), bias, norm.epsilon, norm.centred)
