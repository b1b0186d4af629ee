"""Gradients of a model that processes hold in shares or parts: each micro-batch is computed by all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from encdec_cli.data.batch import Batch
from encdec_cli.models.dropout import drawing
from encdec_cli.models.model import Model
from encdec_cli.models.parts import held
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.gradients import Gradient
from encdec_cli.training.meter import Reading, read
from encdec_cli.training.objective import Objective
from encdec_cli.training.room import Room

Work = Callable[[], Tensor]


class CollectiveGradients:
    """Computes micro-batches in turn and gives this process's own rows of the gradients.

    Its calls are those of `Gradients`; every process must ask for as many micro-batches.

    Args:
        model: what this process has of it.
        around: does the work that it is given, the loss of a micro-batch, where the model can be called.
        parameters: those that learn.
        objective: what is differentiated.
        ranks: all processes.
        room: how large a micro-batch may be.
    """

    workers = 1

    def __init__(
        self,
        model: Model,
        around: Callable[[Work], Tensor],
        parameters: Sequence[nn.Parameter],
        objective: Objective,
        ranks: Ranks,
        room: Room,
    ) -> None:
        self.model = model
        self.around = around
        self.parameters = parameters
        self.objective = objective
        self.ranks = ranks
        self.room = room

    def close(self) -> None:
        """Do nothing: there are no threads."""

    def of(
        self, batches: Sequence[Batch], weight: float, seed: int, numbers: Sequence[int] | None = None
    ) -> Iterator[Gradient]:
        """Yield the loss of each micro-batch of this process, and the sum of gradients it is part of."""
        self.model.train()
        for number, batch, pieces in zip(numbers or range(len(batches)), batches, self.room.cut(batches), strict=True):
            own_seed = (seed * 1_000_003 + number) % (1 << 63)
            torch.manual_seed(own_seed)  # for a model, or a device, that draws from there
            total = 0.0
            for place, piece in enumerate(pieces):
                piece_seed = (own_seed * 1_000_003 + place) % (1 << 63) if place else own_seed
                # A piece without rows takes part with a loss of nothing: the others wait for it.
                total += self._add(piece or batch.take(0, 1), weight if piece else 0.0, piece_seed)
            yield total, tuple(self._taken())

    def _add(self, batch: Batch, weight: float, seed: int) -> float:
        """Add the gradients of a micro-batch to those that the parameters have; return its loss, 0 without weight."""
        # Compiling takes one process longer than another.
        with self.room.watched(batch), self.ranks.computing("a micro-batch", patient=self.model.compiled):
            with drawing(seed):
                loss = self._loss(batch, weight)
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()) / weight if weight else 0.0

    def read(self, batch: Batch) -> Reading:
        """Count what loss and gradient of a micro-batch take in this process, and forget them; all must ask at once."""
        with self.ranks.computing("the forecast of memory"):
            # Twice: what was gathered is now and then given back later.
            once, again = (
                read(self.model, partial(self._loss, batch, 1.0), self._differentiate, changing=True) for _ in range(2)
            )
        return min(once, again, key=lambda reading: reading.peak)

    def _loss(self, batch: Batch, weight: float) -> Tensor:
        return self.around(partial(self.objective, self.model, batch, Gathered(self.model), weight))

    def _differentiate(self, loss: Tensor) -> list[Tensor | None]:
        loss.backward()  # type: ignore[no-untyped-call]
        return self._taken()

    def _taken(self) -> list[Tensor | None]:
        """Take the gradients from the parameters, this process's rows of them."""
        gradients = [None if p.grad is None else held(p.grad) for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients


class Gathered:
    """The parameters as they are when somebody looks: those of a gathered unit are whole."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __iter__(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()
