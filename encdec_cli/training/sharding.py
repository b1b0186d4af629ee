"""A share of weights, gradients and optimizer state for each process, gathered part by part: PyTorch's FSDP2.

Zhao et al. 2023, https://arxiv.org/abs/2304.11277, after ZeRO (https://arxiv.org/abs/1910.02054): every process keeps
some rows of each fp32 weight. A unit of the model is gathered, in the type of the computation, when it is used, and
its gradients go as sums to those who keep the rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from encdec_cli.bundle.checkpoint import Checkpoint
from encdec_cli.models.model import Model
from encdec_cli.models.parts import Piece, divide, parts_of
from encdec_cli.training.collective import CollectiveGradients
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.layout import gathered, part_of, save_in_parts, whole_of
from encdec_cli.training.lora import merged
from encdec_cli.training.objective import Objective
from encdec_cli.training.optimizer import Optimizer
from encdec_cli.training.precision import Precision
from encdec_cli.training.room import Room


class Sharded:
    """Every process has some rows of each weight."""

    even = True

    def __init__(self, ranks: Ranks, room: Room) -> None:
        self.ranks, self.room = ranks, room
        self._parts: Collection[str] = ()
        if ranks.tensor > 1:
            ranks.divide()

    def whole(self, model: Model, precision: Precision) -> Model:
        """Leave this process its rows of the model; return a whole copy, without memory except in the first process."""
        copy = whole_of(model, self.ranks)
        if self.ranks.tensor > 1:
            divide(model, part_of(self.ranks))
            self._parts = parts_of(model).keys()
        self._root = Root(model)
        share_out(self._root, self.ranks, precision)
        return copy

    def gradients(
        self, model: Model, parameters: Sequence[nn.Parameter], objective: Objective, most: int
    ) -> CollectiveGradients:
        """Return what computes micro-batches in turn; see `Layout`."""
        return CollectiveGradients(model, self._root, parameters, objective, self.ranks, self.room)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Gather all weights inside the block; see `Layout`."""
        root, *units = [module for module in self._root.modules() if isinstance(module, FSDPModule)]
        with self.ranks.computing("gathering the weights"), torch.no_grad():
            self._root(_nothing)
            for unit in units:
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()
            root.reshard()

    def weights(self, model: Model, optimizer: Optimizer, whole: Model) -> Callable[[], dict[str, Tensor]]:
        """Gather the weights, or their averages, in the memory of the first process, tensor by tensor; see `Layout`."""
        averages, state = optimizer.averages(), model.state_dict().items()
        own = ((name, _whole(value, averages.get(name))) for name, value in state)
        named = gathered(own, parts_of(model), self.ranks, whole)
        return lambda: merged(whole, named)

    def save(self, folder: Path, own: Checkpoint, pieces: Mapping[str, Piece]) -> None:
        """Let each process write its rows, and the first the rest; commit when all have written."""
        # Of what is no part of a layer all mates have the same rows.
        shared = [name for name in pieces if self.ranks.place == 0 or name.partition(".")[2] in self._parts]
        mine = {name: tensor for name, tensor in own.tensors.items() if self.ranks.first or name in shared}
        save_in_parts(self.ranks, folder, own, mine, pieces, self.ranks.world)


def _whole(weight: Tensor, rows: Tensor | None) -> Tensor:
    """Gather a weight, or instead of its own rows those that are given; one that has no rows is whole."""
    if not isinstance(weight, DTensor):
        return weight
    if rows is not None:
        layout = weight.device_mesh, weight.placements
        weight = DTensor.from_local(rows, *layout, shape=weight.shape, stride=weight.stride())
    return weight.full_tensor()


def _step_at_gradient(ranks: Ranks, tensor: object) -> None:
    if isinstance(tensor, Tensor) and tensor.requires_grad:
        tensor.register_hook(ranks.step)  # type: ignore[no-untyped-call]


def _nothing() -> None:
    return None


class Root(nn.Module):
    """What stands around a model in shares: while it is called, what is in none of the model's units is gathered.

    So an objective may call whichever methods of the model it likes. It must be called before any of its units.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Tensor | None]) -> Tensor | None:
        """Return what `work` does, such as the loss of a micro-batch."""
        return work()


def share_out(root: Root, ranks: Ranks, precision: Precision) -> None:
    """Leave this process its rows of a model's weights, gathered in the type of the computation."""
    # It warns of views that are changed in place; no layer here changes what another returned.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    device = next(root.parameters()).device.type
    peers = ranks.peers
    mesh = init_device_mesh(device, (ranks.world,)) if peers is None else DeviceMesh.from_group(peers, device)
    # Inputs are of that type already; to cast them would copy the lists among them, which a layer may add to.
    policy = MixedPrecisionPolicy(precision.dtype, torch.float32, cast_forward_inputs=False)
    for buffer in root.buffers():
        buffer.data = buffer.to(precision.dtype) if buffer.is_floating_point() else buffer
    for unit in (*root.model.units(), root):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        # A step before it is gathered, forwards and backwards, and one before its gradients are summed.
        unit.register_forward_pre_hook(ranks.step, prepend=True)
        unit.register_forward_hook(lambda _unit, _given, found: _step_at_gradient(ranks, found), prepend=True)
        unit.register_forward_pre_hook(lambda _unit, given: _step_at_gradient(ranks, given[0]))
    for module in root.modules():
        if isinstance(module, FSDPModule):  # sums, not means: the loss is already that of the whole update
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
