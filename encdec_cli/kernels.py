"""Inner loops of decoding in C (`kernels.c`), for CPUs: compiled by the machine's own compiler at their first use.

The compiler is `cc`, or what the environment variable CC names; an empty CC asks for none. Where there is no compiler,
or it fails, every function here is left aside by its callers, which then do the same with torch's operators in two to
four times the time. What is compiled is kept in the user's cache folder, under a digest of all that decides it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor
from torch.nn import Parameter

from encdec_cli.atomic import cache_folder, write_file
from encdec_cli.errors import ResourceError

SOURCE = Path(__file__).with_suffix(".c")
# Nothing that lets sums change their order: rows must not depend on how many there are.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w", "-DCHUNK=64")
CHUNK = int(FLAGS[-1].split("=")[1])
"""Logits under one maximum."""
WIDTH = 32
"""What rows are made of a multiple of."""
MOST_CANDIDATES = 64
"""They are kept sorted by insertion."""
MOST_KEYS = 1 << 12
"""Weights of a query stand on the stack."""
SMALL = 1 << 17
"""Numbers that one thread does in some 20 microseconds."""
_ONE_AT_A_TIME = Lock()
_PLAIN = (Tensor, Parameter)
_TYPES = (torch.float32, torch.bfloat16)


class _Attention(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("sentences", "heads", "queries", "keys", "width")) + tuple(
        (name, ctypes.c_int64 * count) for name, count in (("query", 3), ("key", 3), ("value", 3), ("bias", 2))
    )


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions; None where they cannot be compiled."""
    with _ONE_AT_A_TIME:
        try:
            return _loaded()
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):  # no home, no room, no compiler …
            return None


def _loaded() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler:
        return None
    facts = [SOURCE.read_text(), *FLAGS, *compiler, platform.machine(), _processor()]
    kept = cache_folder() / f"kernels-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    with suppress(OSError):
        return _with_types(ctypes.CDLL(str(kept)))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / kept.name
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, timeout=120, stdin=subprocess.DEVNULL, capture_output=True)  # noqa: S603
        found = _with_types(ctypes.CDLL(str(made)))
        with suppress(ResourceError):  # then the next process compiles again
            write_file(kept, made.read_bytes())
        return found


def usable(*tensors: Tensor) -> bool:
    """Return whether the functions below take these tensors: on a CPU, of one type, without gradients.

    They compute on one thread: where there are more, they take only what is not worth sharing out. But for `attend`,
    tensors must be contiguous, which is not asked here.
    """
    first = tensors[0]
    if first.device.type != "cpu" or torch.is_grad_enabled() or first.dtype not in _TYPES:
        return False
    if first.numel() > SMALL and torch.get_num_threads() > 1:
        return False
    for one in tensors:
        if type(one) not in _PLAIN or one.dtype != first.dtype or one.device.type != "cpu":
            return False
    return library() is not None


def scan(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of the sum of exponentials [rows] and the maximum of each CHUNK of tokens, both float32.

    logits: [rows, vocab], dense.
    """
    rows, vocab = logits.shape
    normaliser = torch.empty(rows, dtype=torch.float32)
    maxima = torch.empty((rows, -(-vocab // CHUNK)), dtype=torch.float32)
    places = (normaliser.data_ptr(), maxima.data_ptr())
    _call("scan", logits.data_ptr(), rows, vocab, *places, logits.dtype == torch.bfloat16)
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
    _call("candidates", *given, sentences, beam, logits.shape[1], k, *places, logits.dtype == torch.bfloat16)
    return values, parents, tokens


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return 128 + round(x / scale) as uint8 and the scales that make 127 of the largest of each row, float32 [rows].

    x: [rows, width], dense; width: a multiple of WIDTH.
    """
    levels, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0], dtype=torch.float32)
    _call("quantise", x.data_ptr(), *x.shape, levels.data_ptr(), scales.data_ptr(), x.dtype == torch.bfloat16)
    return levels, scales


def rescale(x: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """Make x scales[:, None] + bias of x, which is as `quantise` takes it. scales: [rows] float32; bias: [width]."""
    added = None if bias is None else bias.data_ptr()
    _call("rescale", x.data_ptr(), *x.shape, scales.data_ptr(), added, x.dtype == torch.bfloat16)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool) -> Tensor | None:
    """Return LayerNorm (`centred`) or RMSNorm of x [..., width]; None if `usable` or a shape says no.

    weight, bias: [width].
    """
    width = x.shape[-1]
    if not (usable(x, weight) if bias is None else usable(x, weight, bias)) or width % WIDTH or not x.is_contiguous():
        return None
    out = torch.empty_like(x)
    given = (weight.data_ptr(), None if bias is None else bias.data_ptr(), epsilon, centred)
    _call("norm", x.data_ptr(), x.numel() // width, width, *given, out.data_ptr(), x.dtype == torch.bfloat16)
    return out


def can_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Return whether `attend` takes these, which broadcast nothing but the bias."""
    if key.shape != value.shape or key.shape[:2] != query.shape[:2] or key.shape[2] > MOST_KEYS:
        return False
    if query.shape[3] % WIDTH or query.stride(3) + key.stride(3) + value.stride(3) != 3:
        return False
    if bias is None:
        return usable(query, key, value)
    fits = bias.dim() == 4 and bias.shape[1] == 1 and bias.shape[3] == key.shape[2] and bias.stride(3) == 1
    return fits and usable(query, key, value, bias)


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
    _call("attend", *given, out.data_ptr(), ctypes.byref(sizes), query.dtype == torch.bfloat16)
    return out.transpose(1, 2)


def _call(name: str, *arguments: object) -> None:
    getattr(library(), name)(*arguments)


def _with_types(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, types in {
        "scan": [pointer, number, number, pointer, pointer],
        "candidates": [pointer] * 4 + [number] * 4 + [pointer] * 3,
        "quantise": [pointer, number, number, pointer, pointer],
        "rescale": [pointer, number, number, pointer, pointer],
        "norm": [pointer, number, number, pointer, pointer, ctypes.c_float, flag, pointer],
        "attend": [pointer] * 6,
    }.items():
        function = getattr(found, name)
        function.argtypes, function.restype = [*types, flag], None  # type: ignore[misc]
    return found


def _processor() -> str:
    """Return what tells processors apart for a compiler; machines may share a home."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()
