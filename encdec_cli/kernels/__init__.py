"""Inner loops of decoding, and of training between its products, in C, for CPUs; `build` compiles them.

Where there is no compiler, or it fails, every function here is left aside by its callers, which then do the same with
torch's operators in two to four times the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from encdec_cli.kernels.attention import fit
from encdec_cli.kernels.build import CHUNK as CHUNK
from encdec_cli.kernels.build import function
from encdec_cli.kernels.build import library as library
from encdec_cli.kernels.build import wide as wide
from encdec_cli.kernels.matrix import alike, shares, together

WIDTH = 32
"""What rows are made of a multiple of."""
MOST_CANDIDATES = 64
"""They are kept sorted by insertion."""
MOST_KEYS = 1 << 12
"""Weights of a query stand on the stack."""
_COST = 64
"""What a number of a row costs, in multiplications of a product."""


class _Attention(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("sentences", "heads", "queries", "keys", "width")) + tuple(
        (name, ctypes.c_int64 * count) for name, count in (("query", 3), ("key", 3), ("value", 3), ("bias", 2))
    )


def usable(*tensors: Tensor | None) -> bool:
    """Return whether the functions below take these tensors: on a CPU, of one type, without gradients.

    But for `attend`, tensors must be contiguous, which is not asked here.
    """
    return not torch.is_grad_enabled() and alike(*tensors)


def learnable(*tensors: Tensor | None) -> bool:
    """Return whether functions that have gradients take these tensors: on a CPU, of one type, contiguous."""
    if torch.compiler.is_compiling() or not alike(*tensors) or not wide():
        return False
    return all(one is None or one.is_contiguous() for one in tensors)


def scan(logits: Tensor, banned: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Return the log of the sum of exponentials [rows] and the maximum of each CHUNK of tokens, both float32.

    Banned tokens become -inf in between. logits: [rows, vocab], dense.
    """
    rows, vocab = logits.shape
    normaliser = torch.empty(rows, dtype=torch.float32)
    maxima = torch.empty((rows, -(-vocab // CHUNK)), dtype=torch.float32)
    bans, bf16 = (ctypes.c_int64 * len(banned))(*banned), logits.dtype == torch.bfloat16
    calls = []
    for first, last in shares(rows, _COST * logits.numel()):
        to = (normaliser.data_ptr() + 4 * first, maxima.data_ptr() + 4 * first * maxima.shape[1])
        row = logits.data_ptr() + first * vocab * logits.element_size()
        calls.append(
            partial(function("scan"), row, last - first, vocab, *to, ctypes.addressof(bans), len(banned), bf16)
        )
    together(calls)
    return normaliser, maxima


def candidates(
    logits: Tensor, normaliser: Tensor, maxima: Tensor, totals: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the totals, rows and tokens of each sentence's k best continuations, best first, [sentences, k] each.

    Equal ones: lowest row first, then lowest token. logits, normaliser, maxima: as `scan` takes and gives them;
    totals: [sentences, beam] float32; k: at most MOST_CANDIDATES and beam x vocab.
    """
    sentences, beam = totals.shape
    values = torch.empty((sentences, k), dtype=torch.float32)
    parents, tokens = torch.empty((2, sentences, k), dtype=torch.int64).unbind(0)
    totals = totals.contiguous()
    given = [one.data_ptr() for one in (logits, normaliser, maxima, totals)]
    places = [one.data_ptr() for one in (values, parents, tokens)]
    function("candidates")(*given, sentences, beam, logits.shape[1], k, *places, logits.dtype == torch.bfloat16)
    return values, parents, tokens


def part(
    best: tuple[Tensor, Tensor, Tensor], before: Tensor, width: int, eos: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, int]:
    """Return what goes on of the best continuations, what ends, and what happened, as bits.

    best: totals, rows and tokens as `candidates` gives them; before: totals so far [slots, width]. What goes on is the
    first `width` of each slot that do not end, [slots, width] each; what ends, [slots, width] bool, is looked for
    among the first `width`. Bits: 1 if any ends, 2 if nothing is left to a slot that had something, 4 if a row
    changes its place.
    """
    slots, k = best[0].shape
    totals = torch.empty((slots, width), dtype=torch.float32)
    parents, tokens = torch.empty((2, slots, width), dtype=torch.int64).unbind(0)
    ending = torch.empty((slots, width), dtype=torch.bool)
    given = [one.data_ptr() for one in (*best, before)]
    places = [one.data_ptr() for one in (totals, parents, tokens, ending)]
    found: int = function("part")(*given, slots, k, width, eos, *places)
    return (totals, parents, tokens), ending, found


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool) -> Tensor | None:
    """Return LayerNorm (`centred`) or RMSNorm of x [..., width]; None if `usable` or a shape says no.

    weight, bias: [width].
    """
    width = x.shape[-1]
    if not usable(x, weight, bias) or width % WIDTH or not x.is_contiguous():
        return None
    out, bf16 = torch.empty_like(x), x.dtype == torch.bfloat16
    given = (weight.data_ptr(), None if bias is None else bias.data_ptr(), epsilon, centred)
    calls = []
    for first, last in shares(x.numel() // width, _COST * x.numel()):
        start = first * width * x.element_size()
        places = (x.data_ptr() + start, last - first, width, *given, out.data_ptr() + start)
        calls.append(partial(function("norm"), *places, bf16))
    together(calls)
    return out


def can_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Return whether `attend` takes these, which broadcast nothing but the bias."""
    return key.shape[2] <= MOST_KEYS and fit(query, key, value, bias, WIDTH) and usable(query, key, value, bias)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(query key^T / sqrt(head_dim) + bias) value, [rows, heads, queries, head_dim].

    query, key, value: [rows, heads, places, head_dim], the last dimension dense and a multiple of WIDTH; at most
    MOST_KEYS keys. bias: [rows or 1, 1, queries or 1, keys]; keys where it is below -1e37 are not looked at.
    """
    rows, heads, queries, width = query.shape
    out = query.new_empty((rows, queries, heads, width))
    sizes = _Attention(rows, heads, queries, key.shape[2], width)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        setattr(sizes, name, tensor.stride()[:3])
    if bias is not None:
        sizes.bias = tuple(bias.stride(place) if bias.shape[place] > 1 else 0 for place in (0, 2))
    given = (query.data_ptr(), key.data_ptr(), value.data_ptr(), None if bias is None else bias.data_ptr())
    function("attend")(*given, out.data_ptr(), ctypes.byref(sizes), query.dtype == torch.bfloat16)
    return out.transpose(1, 2)
