"""Which process has what of the model: all of it each, a share (`training/sharding.py`) or a part of every layer
(`training/tensor_parallel.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.checkpoint import Checkpoint
from encdec_cli.data.batch import Batch
from encdec_cli.errors import ResourceError
from encdec_cli.models.model import Model
from encdec_cli.models.parts import Cut, Part, Piece
from encdec_cli.recipe import Recipe
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.gradients import Gradient, Gradients
from encdec_cli.training.lora import merged
from encdec_cli.training.meter import Reading
from encdec_cli.training.objective import Objective
from encdec_cli.training.optimizer import Optimizer
from encdec_cli.training.precision import Precision
from encdec_cli.training.room import Room


class Computing(Protocol):
    """Computes micro-batches; see `Gradients`."""

    model: Model
    parameters: Sequence[nn.Parameter]
    workers: int

    def close(self) -> None:
        """End what was started for it."""

    def of(
        self, batches: Sequence[Batch], weight: float, seed: int, numbers: Sequence[int] | None = None
    ) -> Iterator[Gradient]:
        """Yield loss and gradient of each micro-batch, in order."""

    def read(self, batch: Batch) -> Reading:
        """Count what loss and gradient of a micro-batch take, and forget them."""


class Layout(Protocol):
    """How the processes of a run hold its model."""

    even: bool
    """Whether all processes must have equally many micro-batches."""

    def whole(self, model: Model, precision: Precision) -> Model:
        """Keep of an fp32 model on its device what this process trains; return one to judge and publish.

        It is the same model, or with shares another one, and only the first process has that. Cast it after the
        optimizer is built.
        """

    def gradients(self, model: Model, parameters: Sequence[nn.Parameter], objective: Objective, most: int) -> Computing:
        """Return what computes micro-batches, at most so many side by side, for these parameters; see `Gradients`."""

    def alone(self) -> AbstractContextManager[None]:
        """Let each process compute with the model by itself inside the block, without gradients.

        Every process must enter it.
        """

    def weights(self, model: Model, optimizer: Optimizer, whole: Model) -> Callable[[], dict[str, Tensor]]:
        """Bring the weights into the whole model; return what gives them at full precision to the first process.

        Every process must call it.
        """

    def save(self, folder: Path, own: Checkpoint, pieces: Mapping[str, Piece]) -> None:
        """Commit a checkpoint of what each process has.

        pieces: by name, those tensors of which this process has a piece only.
        """


class Replicated:
    """Every process has the whole model, and all have the same."""

    even = False

    def __init__(self, ranks: Ranks, say: Callable[[str], None]) -> None:
        self.ranks = ranks
        self.say = say

    def whole(self, model: Model, precision: Precision) -> Model:
        """Return the model itself; see `Layout`."""
        return model

    def gradients(self, model: Model, parameters: Sequence[nn.Parameter], objective: Objective, most: int) -> Gradients:
        """Return what computes micro-batches, side by side where it can be; see `Layout`."""
        return Gradients(model, parameters, objective, most, self.say)

    def alone(self) -> AbstractContextManager[None]:
        """Do nothing; see `Layout`."""
        return nullcontext()

    def weights(self, model: Model, optimizer: Optimizer, whole: Model) -> Callable[[], dict[str, Tensor]]:
        """Return what gives the weights of the optimizer, and buffers as the model has them; see `Layout`."""

        def named() -> dict[str, Tensor]:
            values = optimizer.masters() | optimizer.averages()
            others = {name: value for name, value in model.state_dict().items() if name not in values}
            in_full = {name: value.float() if value.is_floating_point() else value for name, value in others.items()}
            return merged(model, in_full | values)

        return named

    def save(self, folder: Path, own: Checkpoint, pieces: Mapping[str, Piece]) -> None:
        """Let the first process write it, if all have the same; see `Layout`."""
        what = f"the checkpoint after update {own.progress.step}"
        check_same(self.ranks, what, own.tensors.values())
        self.ranks.first_does(what, lambda: checkpoint.save(folder, own))


def check_same(ranks: Ranks, what: str, tensors: Iterable[Tensor], among_peers: bool = False) -> None:
    """Raise ResourceError unless all processes, or those with the same part of the model, have the same tensors."""
    group, count = (ranks.peers, ranks.data) if among_peers else (None, ranks.world)
    if count > 1:
        mark = _mark(tensors)
        if ranks.total(what, mark, group) != mark * count:
            raise ResourceError(
                f"process {ranks.rank}: the processes have come to different weights; nothing was saved since the last "
                "checkpoint. Use machines of one kind with the same versions, and start all again."
            )


def save_in_parts(
    ranks: Ranks, folder: Path, own: Checkpoint, mine: dict[str, Tensor], pieces: Mapping[str, Piece], parts: int
) -> None:
    """Let each of the first `parts` processes write what is `mine`; commit when all have written."""
    what = f"the checkpoint after update {own.progress.step}"
    with checkpoint.saving(folder, own) if ranks.first else nullcontext() as temporary:
        place = Path(ranks.first_does(what, lambda: str(temporary)))
        if ranks.rank < parts:
            checkpoint.write_part(place, mine, ranks.rank, parts, pieces)
        ranks.meet(what)


def _mark(tensors: Iterable[Tensor]) -> int:
    """Return a number below 2^40 that equal bits give on every machine, whatever the order in which it adds."""
    words = [t.contiguous().view(torch.int32) for t in tensors if t.dtype == torch.float32]
    return sum(int(each.sum(dtype=torch.int64)) for each in words) % (1 << 40)


def whole_of(model: Model, ranks: Ranks) -> Model:
    """Return a copy of a model, of which only the first process's takes memory."""
    if ranks.first:
        return deepcopy(model)
    known = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return deepcopy(model, known).to("meta")


def part_of(ranks: Ranks) -> Part:
    """Return the part of every layer that is this process's."""

    def add(tensor: Tensor) -> None:
        ranks.step()
        dist.all_reduce(tensor, group=ranks.mates)

    return Part(ranks.place, ranks.tensor, add)


def _brought_together(own: Tensor, cut: Cut, ranks: Ranks) -> Tensor:
    """Return the whole of what the mates of the first process have of a weight, to that; to others what they have."""
    if ranks.rank >= ranks.tensor:
        return own
    parts = [torch.empty_like(own) for _ in range(ranks.tensor)] if ranks.first else None
    dist.gather(own.contiguous(), parts, group=ranks.mates)
    return own if parts is None else cut.joined(parts)


def gathered(
    weights: Iterable[tuple[str, Tensor]], parts: Mapping[str, tuple[Cut, Part]], ranks: Ranks, whole: Model
) -> dict[str, Tensor]:
    """Return the weights in fp32 in the memory of the first process, tensor by tensor, and load its whole model."""
    named = {}
    with ranks.computing("gathering the weights"):
        for name, value in weights:
            full = _brought_together(value, parts[name][0], ranks) if name in parts else value
            if ranks.first:
                named[name] = (full.float() if full.is_floating_point() else full).cpu()
    if ranks.first:
        whole.load_state_dict(named)
    return named


def make_layout(recipe: Recipe, ranks: Ranks, run: Path, say: Callable[[str], None]) -> Layout:
    """Return the layout of the run in a folder; one process alone has all. `say` is given what this one has met."""
    if ranks.world == 1 or not (recipe.parallel.shard or ranks.tensor > 1):
        return Replicated(ranks, say)
    room = Room(run, ranks, say)
    # Each takes seconds.
    if recipe.parallel.shard:
        from encdec_cli.training.sharding import Sharded  # noqa: PLC0415

        return Sharded(ranks, room)
    from encdec_cli.training.tensor_parallel import Divided  # noqa: PLC0415

    return Divided(ranks, room)
