"""Every layer shared out over neighbouring processes (`models/parts.py`), and what they have brought together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from encdec_cli.bundle.checkpoint import Checkpoint
from encdec_cli.models.model import Model
from encdec_cli.models.parts import Piece, divide, parts_of
from encdec_cli.training.collective import CollectiveGradients, Work
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.layout import check_same, gathered, part_of, save_in_parts, whole_of
from encdec_cli.training.objective import Objective
from encdec_cli.training.optimizer import Optimizer
from encdec_cli.training.precision import Precision
from encdec_cli.training.room import Room


class Divided:
    """Every process has a part of each layer, and all of what stands between the layers."""

    even = True

    def __init__(self, ranks: Ranks, room: Room) -> None:
        self.ranks, self.room = ranks, room
        ranks.divide()

    def whole(self, model: Model, precision: Precision) -> Model:
        """Leave this process its part of the model; return a whole copy, without memory except in the first process."""
        self._precision = precision
        copy = whole_of(model, self.ranks)
        divide(model, part_of(self.ranks))
        return copy

    def gradients(
        self, model: Model, parameters: Sequence[nn.Parameter], objective: Objective, most: int
    ) -> CollectiveGradients:
        """Return what computes micro-batches in turn; see `Layout`."""
        self._precision.apply(model)
        return CollectiveGradients(model, _as_it_is, parameters, objective, self.ranks, self.room)

    def alone(self) -> AbstractContextManager[None]:
        """Do nothing but wait for the others: the mates compute together whatever they compute; see `Layout`."""
        return self.ranks.computing("the model")

    def weights(self, model: Model, optimizer: Optimizer, whole: Model) -> Callable[[], dict[str, Tensor]]:
        """Bring the weights together in the memory of the first process, tensor by tensor; see `Layout`."""
        own = model.state_dict() | optimizer.masters() | optimizer.averages()
        named = gathered(own.items(), parts_of(model), self.ranks, whole)
        return lambda: named

    def save(self, folder: Path, own: Checkpoint, pieces: Mapping[str, Piece]) -> None:
        """Let the first process and its mates write their parts, if all peers have the same; see `Layout`."""
        what = f"the checkpoint after update {own.progress.step}"
        check_same(self.ranks, what, own.tensors.values(), among_peers=True)
        check_same(self.ranks, what, (tensor for name, tensor in own.tensors.items() if name not in pieces))
        mine = {name: tensor for name, tensor in own.tensors.items() if self.ranks.first or name in pieces}
        save_in_parts(self.ranks, folder, own, mine, pieces, self.ranks.tensor)


def _as_it_is(work: Work) -> Tensor:
    return work()
