"""Adafactor (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235): Adam's second moment in next to no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encdec_cli.training.optimizer import Weight

_SMALLEST = 1e-30
"""Added to squares, as in the paper's algorithm 4."""
_SLOWING = 0.8
"""The average of squares at update t forgets with t ** -0.8 (section 7.2)."""
_LARGEST = 1.0
"""Largest root mean square of a step before the rate; longer ones are shortened to it (section 6)."""


@dataclass(frozen=True)
class Adafactor:
    """Steps by the gradient over the root of its mean square, of which a matrix keeps the means of rows and columns.

    There is no average of the gradient. A step is `rate` times this quotient, as Adam's is, and not times the size of
    the weights as in section 8, so that one rate serves all optimizers.
    """

    elementwise: ClassVar[bool] = False

    weight_decay: float = 0.0
    """Of tensors of two dimensions or more, apart from the gradient."""

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        """Return means of squares: of rows [rows, 1] and columns [1, columns] of a matrix, else of each weight."""
        if master.dim() != 2:
            return {"square": torch.zeros_like(master)}
        return {"rows": torch.zeros_like(master[:, :1]), "columns": torch.zeros_like(master[:1])}

    def update(self, weights: Sequence[Weight], rate: float, updates: int) -> None:
        """Change the masters; see `Rule`."""
        share = (updates + 1) ** -_SLOWING
        for weight in weights:
            if weight.master.dim() >= 2:
                weight.master.mul_(1 - rate * self.weight_decay)
            step = self._mean_square(weight, share).rsqrt_()
            if weight.gradient is None:
                continue
            step.mul_(weight.gradient)
            size = torch.linalg.vector_norm(step) / step.numel() ** 0.5
            weight.master.sub_(step.div_((size / _LARGEST).clamp_(min=1.0)), alpha=rate)

    def _mean_square(self, weight: Weight, share: float) -> Tensor:
        """Return the mean square of each weight's gradient, in new memory, after a share of it is replaced."""
        gradient = weight.gradient if weight.gradient is not None else torch.zeros_like(weight.master)
        squares = gradient.square().add_(_SMALLEST)
        if "square" in weight.moments:
            return weight.moments["square"].lerp_(squares, share).clone()
        rows = weight.moments["rows"].lerp_(squares.mean(1, keepdim=True), share)
        columns = weight.moments["columns"].lerp_(squares.mean(0, keepdim=True), share)
        # A row of padding or of a token never seen has next to nothing, and its product with a column may be too small
        # for a number.
        return torch.mul(rows / rows.mean(), columns, out=squares).clamp_(min=_SMALLEST)
