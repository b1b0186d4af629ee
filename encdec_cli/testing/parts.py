"""Parts of a model, as processes that share its layers have them, in threads of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from encdec_cli.models.model import Model
from encdec_cli.models.parts import Part, divide

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds after which a part that waits for a sum gives up: another does not ask for it."""


class Meeting:
    """What so many threads sum, each in its place."""

    def __init__(self, places: int) -> None:
        self._barrier = Barrier(places)
        self._tensors = [torch.empty(0)] * places

    def part(self, place: int) -> Part:
        """Return the part of the thread at a place."""

        def add(tensor: Tensor) -> None:
            self._tensors[place] = tensor.clone()
            self._barrier.wait(PATIENCE)
            total = torch.stack(self._tensors).sum(0)
            self._barrier.wait(PATIENCE)
            tensor.copy_(total)

        return Part(place, len(self._tensors), add)


def in_parts(model: Model, places: int, compute: Callable[[Model], T]) -> list[tuple[Model, T]]:
    """Return each part of a model, which is left as it is, and what `compute` makes of it.

    Raises UsageError if the model cannot be divided so.
    """
    meeting = Meeting(places)
    models = [copy.deepcopy(model) for _ in range(places)]
    for place, own in enumerate(models):
        divide(own, meeting.part(place))
    with ThreadPoolExecutor(places) as pool:
        return list(zip(models, pool.map(compute, models), strict=True))
