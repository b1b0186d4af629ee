"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["inverse_sqrt", "cosine", "linear", "constant"]
"""The names that a recipe's `train.schedule` may have."""


def learning_rate(step: int, kind: Schedule, peak: float, warmup: int, steps: int) -> float:
    """Return the rate of update `step`, which counts from 1.

    The rate grows in equal steps to `peak` at step `warmup`. Afterwards `inverse_sqrt` falls with the square root
    of the step (https://arxiv.org/abs/1706.03762), `cosine` falls along half a cosine to 0 at `steps`
    (https://arxiv.org/abs/1608.03983), `linear` falls along a line to 0 at `steps`, and `constant` stays.
    """
    if step <= warmup:
        return peak * step / warmup
    if kind == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / step)
    if kind == "constant":
        return peak
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    return peak * left if kind == "linear" else peak * 0.5 * (1 - math.cos(math.pi * left))
