"""Adafactor (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235): Adam's second moment in next to no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encdec_cli.training.distributed import Ranks
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

    unshared: ClassVar[frozenset[str]] = frozenset(["columns"])

    weight_decay: float = 0.0
    """Of tensors of two dimensions or more, apart from the gradient."""

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        """Return means of squares: of rows [rows, 1] and columns [1, columns] of a matrix, else of each weight."""
        if master.dim() != 2:
            return {"square": torch.zeros_like(master)}
        return {"rows": torch.zeros_like(master[:, :1]), "columns": master.new_zeros(1, master.shape[1])}

    def update(self, weights: Sequence[Weight], rate: float, updates: int, ranks: Ranks) -> None:
        """Change the masters; see `Rule`. Of a matrix in shares its means are summed, and the size of its step."""
        share, what = (updates + 1) ** -_SLOWING, f"the step after {updates} updates"
        means = {w.name: self._advance_rows(w, share) for w in weights if "rows" in w.moments}
        ranks.sum(what, [mean for w in weights if w.rows is not None for mean in means.get(w.name, ())])
        norms: list[tuple[Weight, Tensor, Tensor]] = []
        for weight in weights:
            if weight.master.dim() >= 2:
                weight.master.mul_(1 - rate * self.weight_decay)
            step = self._mean_square(weight, share, means.get(weight.name)).rsqrt_()
            if weight.gradient is not None:
                # In the place of the gradient: all steps are needed at a time.
                step = torch.mul(step, weight.gradient, out=weight.gradient)
                norms.append((weight, step, torch.linalg.vector_norm(step)))
        partial = [norm.square_() for weight, _, norm in norms if weight.rows is not None]
        ranks.sum(what, partial)
        for square in partial:
            square.sqrt_()
        for weight, step, norm in norms:
            size = norm / weight.parameter.numel() ** 0.5
            weight.master.sub_(step.div_((size / _LARGEST).clamp_(min=1.0)), alpha=rate)

    @staticmethod
    def _advance_rows(weight: Weight, share: float) -> tuple[Tensor, Tensor]:
        """Replace a share of the rows' means; return the new means of columns, and that of all rows' means, [1, 1].

        Of some rows only: what they add to those means.
        """
        squares = _squares(weight)
        rows = weight.moments["rows"].lerp_(squares.mean(1, keepdim=True), share)
        if weight.rows is None:
            return squares.mean(0, keepdim=True), rows.mean().view(1, 1)
        count = len(weight.parameter)
        return squares.sum(0, keepdim=True) / count, rows.sum(0, keepdim=True) / count

    @staticmethod
    def _mean_square(weight: Weight, share: float, new: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the mean square of each weight's gradient, in new memory, after a share of it is replaced.

        new: of a matrix what `_advance_rows` returns, of all its rows.
        """
        if new is None:
            return weight.moments["square"].lerp_(_squares(weight), share).clone()
        # A row of padding or of a token never seen has next to nothing, and its product with a column may be too small
        # for a number.
        columns = weight.moments["columns"].lerp_(new[0], share)
        return torch.mul(weight.moments["rows"] / new[1], columns).clamp_(min=_SMALLEST)


def _squares(weight: Weight) -> Tensor:
    gradient = weight.gradient if weight.gradient is not None else torch.zeros_like(weight.master)
    return gradient.square().add_(_SMALLEST)
