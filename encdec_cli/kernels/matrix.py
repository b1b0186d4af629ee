"""Matrices packed for products with few rows, as a step of decoding has them; see `products.c`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import Parameter

from encdec_cli.kernels.build import function, library, panel

SHARED_OUT = 1 << 24
"""From this many multiplications on, 40 microseconds in 8 bits and 130 in fp32, work is shared out over threads."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_PLAIN = (Tensor, Parameter)
_DIVISORS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 32}


class Struct(ctypes.Structure):
    """`struct matrix` of the C functions."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "depth", "outputs", "panels")),
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "scales", "offsets")),
    )


class Matrix:
    """A matrix [outputs, inputs] and its bias, which no longer change.

    Args:
        weight: [outputs, inputs], float32, bfloat16, or int8 for levels of -127 to 127.
        bias: [outputs], or None.
        scales: [outputs], what one level of an output's weights stands for; of int8 alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> None:
        self.outputs, self.inputs = weight.shape
        self.panels = -(-self.outputs // panel())
        self._dtype = weight.dtype
        self._call = function("product")
        in_a_word = 4 // weight.element_size()
        depth = self.inputs // in_a_word
        by_panel = self._padded(weight).view(self.panels, panel(), depth, in_a_word)
        kept = {"weights": by_panel.transpose(1, 2).contiguous()}
        if bias is not None:
            kept["bias"] = self._padded(bias.float())
        if scales is not None:
            kept["scales"] = self._padded(scales.float())
            # Levels of rows come without a sign, 128 more than they are.
            kept["offsets"] = self._padded(weight.sum(1, dtype=torch.int32) * 128)
        self._kept = kept
        places = {name: tensor.data_ptr() for name, tensor in kept.items()}
        sizes = {"depth": depth, "outputs": self.outputs, "panels": self.panels}
        self.struct = Struct(kind=KINDS[weight.dtype], **sizes, **places)
        """What the C functions read."""
        self._place = ctypes.addressof(self.struct)

    def product(self, x: Tensor) -> Tensor:
        """Map x [..., inputs] to [..., outputs]: of float32 or bfloat16, which the matrix is too unless it is int8."""
        if self._dtype not in (x.dtype, torch.int8):
            raise TypeError(f"a product of {x.dtype} with a matrix of {self._dtype}")
        if x.shape[-1] != self.inputs:
            raise ValueError(f"a product of {x.shape[-1]} columns with a matrix of {self.inputs}")
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], self.outputs))
        rows = x.numel() // self.inputs

        places = (x.data_ptr(), rows, self._place, None, out.data_ptr())
        parts = shares(self.panels, rows * self._kept["weights"].numel())
        together([partial(self._call, *places, *part, False, x.dtype == torch.bfloat16) for part in parts])
        return out

    def _padded(self, x: Tensor) -> Tensor:
        """Return x [outputs, …] with as many rows as the panels have outputs."""
        padded = x.new_zeros((self.panels * panel(), *x.shape[1:]))
        padded[: self.outputs] = x.detach()
        return padded


def alike(*tensors: Tensor | None) -> bool:
    """Return whether there are C functions and they take these: on a CPU, all float32 or all bfloat16."""
    first = tensors[0]
    if first is None or first.dtype not in (torch.float32, torch.bfloat16):
        return False
    for one in tensors:
        if one is not None and (type(one) not in _PLAIN or one.dtype != first.dtype or one.device.type != "cpu"):
            return False
    return library() is not None


def can_pack(dtype: torch.dtype, inputs: int) -> bool:
    """Return whether this machine multiplies by a `Matrix` of this type with so many inputs."""
    found = library()
    if found is None or dtype not in KINDS:
        return False
    return inputs % _DIVISORS[dtype] == 0 and bool(found.has_product(KINDS[dtype]))


def shares(count: int, multiplications: int) -> list[tuple[int, int]]:
    """Return from where to where each thread is to work, of `count` things that can be done apart."""
    threads = max(1, min(torch.get_num_threads(), count)) if multiplications > SHARED_OUT else 1
    return [(count * part // threads, count * (part + 1) // threads) for part in range(threads)]


def together(calls: Sequence[Callable[[], object]]) -> None:
    """Call C functions, each on a thread of its own if there are several: they release the interpreter."""
    if len(calls) == 1:
        calls[0]()
        return
    works = [_pool().submit(call) for call in calls]
    try:
        for work in works:
            work.result()
    finally:  # after Ctrl-C, too: whoever called owns the memory
        wait(works)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())
