"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): steps of equal size in every direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from encdec_cli.training.distributed import Ranks
from encdec_cli.training.optimizer import Weight

_ITERATIONS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz step in the text above; singular values end between 0.7 and 1.2."""


@dataclass(frozen=True)
class Muon:
    """Steps by the momentum of the gradient with its singular values made equal, for matrices inside a network.

    A matrix whose longer side is a multiple of its shorter one is treated as the square blocks it consists of: the
    joined queries, keys and values of a layer are three maps, and equal shapes are one batched product. The step has
    the size that Adam's usually has (0.2 times the rate a weight; Liu et al. 2025, https://arxiv.org/abs/2502.16982,
    equation 4), so one rate serves both.
    """

    unshared: ClassVar[frozenset[str]] = frozenset()

    decay: float = 0.95
    """Of the average of the gradient."""
    weight_decay: float = 0.0
    """How strongly weights are pulled to zero, apart from the gradient."""
    dtype: torch.dtype = torch.float32
    """Of the products; bf16 is enough."""

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        """Return the average of the gradient."""
        return {"momentum": torch.zeros_like(master)}

    def update(self, weights: Sequence[Weight], rate: float, updates: int, ranks: Ranks) -> None:
        """Change the masters; see `Rule`. Of matrices in shares each process gets some whole, and gives their steps."""
        whole: dict[torch.Size, list[tuple[Weight, Tensor]]] = {}
        shared: dict[torch.Size, list[tuple[Weight, Tensor]]] = {}
        for weight, direction in zip(weights, self._directions(weights), strict=True):
            if weight.rows is None:
                whole.setdefault(square_blocks(direction).shape[1:], []).append((weight, direction))
            else:
                shared.setdefault(weight.parameter.shape, []).append((weight, direction))
        for shape, members in whole.items():
            blocks = [square_blocks(direction) for _, direction in members]
            steps = torch.split(orthogonalised(torch.cat(blocks), self.dtype), [len(each) for each in blocks])
            self._move([square_blocks(weight.master) for weight, _ in members], list(steps), shape, rate)
        for shape, members in shared.items():
            square = square_blocks(torch.empty(shape, device="meta")).shape[1:]
            rows = [direction for _, direction in members]
            found = self._shared_steps(rows, shape[0], ranks, f"the step after {updates} updates")
            self._move([weight.master for weight, _ in members], found, square, rate)

    def _move(self, masters: list[Tensor], steps: list[Tensor], shape: torch.Size, rate: float) -> None:
        torch._foreach_mul_(masters, 1 - rate * self.weight_decay)
        torch._foreach_sub_(masters, steps, alpha=0.2 * max(shape) ** 0.5 * rate)

    def _shared_steps(self, directions: Sequence[Tensor], length: int, ranks: Ranks, what: str) -> list[Tensor]:
        """Return this process's rows of the steps for its rows of some matrices of equal shapes, `length` rows each."""
        each, most = (-(-count // ranks.world) for count in (len(directions), length))
        columns = directions[0].shape[1]
        sent = directions[0].new_zeros(ranks.world * each, most, columns)
        for place, direction in zip(sent, directions, strict=False):
            place[: len(direction)] = direction
        # To each process its matrices: [processes, each, most, columns]; what comes has the processes' rows of ours.
        came = ranks.exchange(what, sent.view(ranks.world, each, most, columns))
        matrices = came.transpose(0, 1).reshape(each, -1, columns)
        blocks = [square_blocks(matrix[:length]) for matrix in matrices]
        steps = orthogonalised(torch.cat(blocks), self.dtype)
        for block, step in zip(blocks, torch.split(steps, [len(block) for block in blocks]), strict=True):
            block.copy_(step)
        back = ranks.exchange(what, matrices.view(each, ranks.world, most, columns).transpose(0, 1).contiguous())
        return [step[: len(own)] for step, own in zip(back.flatten(0, 1), directions, strict=False)]

    def _directions(self, weights: Sequence[Weight]) -> Sequence[Tensor]:
        momenta = [weight.moments["momentum"] for weight in weights]
        gradients = [w.gradient if w.gradient is not None else torch.zeros_like(w.master) for w in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - self.decay)
        return torch._foreach_lerp(gradients, momenta, self.decay)  # Nesterov's look ahead


def square_blocks(matrix: Tensor) -> Tensor:
    """View a matrix as the square blocks [blocks, side, side] along its longer side, or as one block [1, m, n]."""
    rows, columns = matrix.shape
    if rows % columns == 0:
        return matrix.view(-1, columns, columns)
    if columns % rows == 0:
        return matrix.view(rows, -1, rows).transpose(0, 1)
    return matrix.unsqueeze(0)


def orthogonalised(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U V^T for each block U S V^T of [blocks, m, n], in fp32, by Newton-Schulz steps in `dtype`."""
    a, b, c = _QUINTIC
    tall = blocks.shape[1] > blocks.shape[2]
    x = (blocks / (blocks.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    x = x.mT if tall else x
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = (x.mT if tall else x).float()
    return result
