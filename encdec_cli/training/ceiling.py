"""The speed of this machine's matrix products and memory: what no model can exceed, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

_SIDE = {"cpu": 1024, "cuda": 8192}
"""Of square matrices, large enough to be fast and small enough to be quick."""
_SECONDS = 0.2
_STEADY = 20
"""Repetitions that bring nothing better before the best one is believed: other work on the machine takes its turns."""
_PATIENCE = 5
"""How many times the seconds such a search may take."""


def matrix_ceiling(dtype: torch.dtype, device: torch.device, seconds: float = _SECONDS) -> float:
    """Return the FLOPs a second of a large product of matrices of `dtype` (int8: operations), the best of many."""
    side = _SIDE.get(device.type, _SIDE["cpu"])
    if dtype == torch.int8:
        from encdec_cli.models.packed import quantised  # noqa: PLC0415 - for `encdec bench` alone

        layer, x = quantised(torch.rand(side, side), None), torch.rand(side, side)
        return 2 * side**3 / _best(lambda: layer(x), device, seconds)
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best(lambda: torch.mm(a, b, out=out), device, seconds)


def memory_bandwidth(device: torch.device, seconds: float = _SECONDS) -> float:
    """Return the bytes a second that a copy between two large tensors reads and writes."""
    a = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / _best(lambda: b.copy_(a), device, seconds)


@torch.inference_mode()
def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the seconds of the fastest of many repetitions; the first one, which makes things, does not count."""
    best, since, passed = math.inf, -1, 0.0
    begin = time.perf_counter()
    while passed < seconds or (since < _STEADY and passed < _PATIENCE * seconds) or best == math.inf:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        since, passed = since + 1, now - begin
        if since and now - start < best:
            best, since = now - start, 0
    return best
