"""FLOPs of a micro-batch as a formula of its shape, found by counting a few tiny ones: the same for every model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import numpy.typing as npt
import torch

from encdec_cli.data.batch import Batch, collate
from encdec_cli.models.model import Model
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.objective import Objective
from encdec_cli.training.risk import Judged

Wholes = npt.NDArray[np.int64]

_SAMPLES = (
    ([7], [3]),
    ([3], [3]),
    ([5], [3]),
    ([3], [5]),
    ([3], [7]),
    ([5], [5]),
    ([3, 3], [5, 5]),
    ([5, 5, 5], [3, 3, 3]),
)
"""Source lengths and target lengths, EOS counted: enough to tell the terms of `features` apart, but for padding."""
_PADDED = (([3, 3], [7, 2]), ([7, 4], [5, 5]), ([5, 5, 2], [3, 3, 3]))
"""The same for a model that computes it."""


def features(source: Wholes, target: Wholes, real: int) -> Wholes:
    """Return what the work of an encoder-decoder may grow with, [8].

    Args:
        source: positions that are computed of the source of each example, [rows]; EOS counted, as below.
        target: the same of the target.
        real: target tokens that are not padding: those that reach the output layer.
    """
    lengths = (source, target, source * source, target * target, source * target)
    return np.array([1, len(source), *(int(length.sum()) for length in lengths), real])


def computed(batch: Batch, packed: bool) -> tuple[Wholes, Wholes]:
    """Return how many positions of the source and of the target of each example are computed, [rows] each.

    packed: whether padding is none of them.
    """
    source, target = batch.source_mask.sum(1).cpu().numpy(), batch.target_lengths.cpu().numpy()
    return (source, target) if packed else (source * 0 + source.max(), target * 0 + target.max())


@dataclass(frozen=True)
class Formula:
    """FLOPs of one micro-batch, and bytes that its forward pass keeps; a factor for each of `features`."""

    packed: bool
    """Whether padding costs nothing."""

    flops: tuple[int, ...]
    saved: tuple[int, ...]

    def flops_of(self, batch: Batch) -> int:
        """Return the FLOPs of loss and gradient."""
        return int(np.array(self.flops) @ features(*computed(batch, self.packed), int(batch.target_lengths.sum())))

    def heaviest(self, shapes: npt.NDArray[np.integer]) -> int:
        """Return which of the batches of shapes [batches, 3] (rows, source, target) keeps the most bytes."""
        rows, source, target = shapes.T
        lengths = (source, target, source * source, target * target, source * target, target)
        return int((np.array(self.saved) @ [rows // rows, rows, *(rows * length for length in lengths)]).argmax())


@contextmanager
def _every_layer_kept(model: Model) -> Iterator[None]:
    checkpointing, model.checkpointing = model.checkpointing, False
    try:
        yield
    finally:
        model.checkpointing = checkpointing


def find(model: Model, objective: Objective, vocabularies: Sequence[int], device: str, candidates: int = 1) -> Formula:
    """Return the formula that fits what loss and gradient of some tiny micro-batches take.

    To compute layers again is no work of the model. Outputs that are judged are taken to be as long as the targets, and
    to draw them does not count.

    Args:
        model: those of its parameters count that learn.
        objective: with all that it asks for: a teacher, links, outputs that are judged.
        vocabularies: tokens of the source's and of the target's.
        device: the model's.
        candidates: for each source, the target among them, if the objective asks for them.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows, readings = [], []
    for lengths in (_SAMPLES[0], *_SAMPLES, *(() if model.packs else _PADDED)):  # at first things are made that stay
        source, target = ([min(one, model.max_positions or one) for one in side] for side in lengths)
        ids = [
            [list(islice(cycle(range(4, vocabulary)), length - 1)) for length in side]
            for vocabulary, side in zip(vocabularies, (source, target), strict=True)
        ]
        with _every_layer_kept(model):
            batch = collate(ids[0], ids[1], range(len(source))).to(device)
            readings.append(Gradients(model, learning, objective, 1).read(_with_all(batch, candidates)))
        rows.append(features(*computed(batch, model.packs), sum(target)))
    flops, saved = zip(*((each.flops, each.saved) for each in readings[1:]), strict=True)
    return Formula(model.packs, _solve(rows[1:], flops), _solve(rows[1:], saved))


def _with_all(batch: Batch, candidates: int) -> Batch:
    """Return the batch with whatever an objective may ask for."""
    target = batch.known_target
    links = torch.zeros(len(target), target.shape[1] - 1, batch.source.shape[1], device=target.device)
    outputs = target.unsqueeze(1).expand(-1, candidates, -1)
    costs = torch.zeros(outputs.shape[:2], device=target.device)
    return Judged(**{**vars(batch), "links": links}, candidates=outputs, costs=costs)


def _solve(rows: Sequence[Wholes], values: Sequence[int]) -> tuple[int, ...]:
    # What is counted are whole numbers: rounded, the factors are equal on every machine.
    solution = np.linalg.lstsq(np.stack(rows).astype(float), np.array(values, dtype=float), rcond=None)[0]
    return tuple(int(value) for value in np.rint(solution))
