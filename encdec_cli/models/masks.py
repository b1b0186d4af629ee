"""What is added to attention scores, so that nobody looks where nobody may."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_bias(mask: Tensor, dtype: torch.dtype, always: bool = False) -> Tensor | None:
    """Return what to add to attention scores [sentences, 1, 1, src_len] for mask [sentences, src_len].

    None if nothing is masked, unless it is `always` asked for. The number is finite: a row that may look nowhere looks
    everywhere, without NaN.
    """
    # On a GPU the question would cost a synchronisation.
    if not always and mask.device.type == "cpu" and bool(mask.all()):
        return None
    return bias_of(mask, dtype)[:, None, None, :]


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a mask is True, and elsewhere what leaves no weight; of the mask's shape."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, least(dtype))


def least(dtype: torch.dtype) -> float:
    """Return what leaves no weight: half of the least number, so that two of them still have a finite sum."""
    return torch.finfo(dtype).min / 2
