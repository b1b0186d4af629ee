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
    ([3, 3], [7, 2]),
    ([3, 3], [7, 5]),
    ([7, 4], [5, 5]),
    ([7, 2], [5, 5]),
    ([5, 2], [5, 3]),
)
"""Source lengths and target lengths, EOS counted: enough to tell apart the terms of `features`."""


def features(source: Wholes, target: Wholes, starts: Sequence[int] | Wholes = (0,)) -> Wholes:
    """Return what the work of an encoder-decoder may grow with, for each batch: [batches, 12].

    Parts of it grow with padded rows, such as attention on a GPU, others with what is no padding, such as the output
    layer.

    Args:
        source: lengths of the examples of all batches, [examples]; EOS counted, as below.
        target: the same of the target.
        starts: where each batch begins.
    """
    ends = [*starts[1:], len(source)]
    rows = np.array(ends) - np.array(starts)
    longest = [np.maximum.reduceat(side, starts) for side in (source, target)]
    padded = [rows * term for term in _terms(*longest)]
    real = [np.add.reduceat(term, starts) for term in _terms(source, target)]
    return np.stack([rows // rows, rows, *padded, *real], 1)


def _terms(source: Wholes, target: Wholes) -> tuple[Wholes, ...]:
    return source, target, source * source, target * target, source * target


def lengths(batch: Batch) -> tuple[Wholes, Wholes]:
    """Return the tokens of source and target of each example, EOS counted, [rows] each."""
    # Together: on a GPU each question waits for what is computed.
    source, target = torch.stack((batch.source_mask.sum(1), batch.target_lengths)).cpu().numpy()
    return source, target


def positions(source: Wholes, target: Wholes, packed: bool) -> int:
    """Return how many positions are computed of a batch with these lengths; packed: without padding."""
    return int(source.sum() + target.sum()) if packed else len(source) * int(source.max() + target.max())


@dataclass(frozen=True)
class Formula:
    """FLOPs of one micro-batch, and bytes that its forward pass keeps; a factor for each of `features`."""

    flops: tuple[int, ...]
    saved: tuple[int, ...]

    def flops_of(self, source: Wholes, target: Wholes) -> int:
        """Return the FLOPs of loss and gradient of a batch with these `lengths`."""
        return int(features(source, target)[0] @ np.array(self.flops))

    def heaviest(self, source: Wholes, target: Wholes, starts: Wholes) -> int:
        """Return which of some batches, see `features`, keeps the most bytes."""
        return int((features(source, target, starts) @ np.array(self.saved)).argmax())


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
    for sample in (_SAMPLES[0], *_SAMPLES):  # the first time a model may make things that it keeps
        source, target = ([min(one, model.max_positions or one) for one in side] for side in sample)
        ids = [
            [list(islice(cycle(range(4, vocabulary)), length - 1)) for length in side]
            for vocabulary, side in zip(vocabularies, (source, target), strict=True)
        ]
        with _every_layer_kept(model):
            batch = collate(ids[0], ids[1], range(len(source))).to(device)
            readings.append(Gradients(model, learning, objective, 1).read(_with_all(batch, candidates)))
        rows.append(features(*lengths(batch))[0])
    flops, saved = zip(*((each.flops, each.saved) for each in readings[1:]), strict=True)
    return Formula(_solve(rows[1:], flops), _solve(rows[1:], saved))


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
