"""C functions as operators of torch: whoever counts or profiles what torch does sees them then."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Operator = tuple[str, Callable[..., Any], Callable[..., int]]
"""A schema, what computes it on a CPU, and its FLOPs from the shapes of what it is given."""
# Torch takes each but once, and several threads may need one first.
_ONE_AT_A_TIME = Lock()


def operators(*wanted: Operator) -> Any:
    """Return torch's operators of this package, among which these are from now on."""
    with _ONE_AT_A_TIME:
        for one in wanted:
            _registered(*one)
    return torch.ops.encdec


@cache
def _registered(schema: str, work: Callable[..., Any], flops: Callable[..., int]) -> Any:
    """Register an operator for as long as what is returned lives, which the cache keeps."""
    ours: Any = torch.library.Library("encdec", "FRAGMENT")  # type: ignore[no-untyped-call]
    name = schema.split("(", maxsplit=1)[0]
    ours.define(schema)
    ours.impl(name, work, "CPU")
    register_flop_formula(getattr(torch.ops.encdec, name))(flops)
    return ours
