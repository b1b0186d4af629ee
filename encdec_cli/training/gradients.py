"""The gradient of one update: its micro-batches in turn, or side by side on the cores of a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from encdec_cli.data.batch import Batch
from encdec_cli.models.dropout import drawing
from encdec_cli.models.model import Model
from encdec_cli.training.objective import Objective

Gradient = tuple[float, tuple[Tensor | None, ...]]
"""The summed loss of a micro-batch in nats, and a gradient for each parameter, None where it is not used."""


class Gradients:
    """Computes micro-batches of one model; call `close` in the end.

    On a CPU as many micro-batches as there are threads are computed at a time, if the model allows it
    (`Model.side_by_side`), and the threads are shared out: two threads with a small micro-batch each are 1.3 times as
    fast as two threads that share every operation (a model of width 128, 1,024 tokens; with 2,048 tokens and width 256
    it makes no difference). A micro-batch does not depend on its neighbours, so neither does the update. Their memory
    adds up.

    Args:
        model: in any mode; it is put into training mode.
        parameters: those that learn.
        objective: what is differentiated.
        most: micro-batches of an update.
    """

    def __init__(self, model: Model, parameters: Sequence[nn.Parameter], objective: Objective, most: int) -> None:
        self.model = model
        self.parameters = parameters
        self.objective = objective
        self.threads = torch.get_num_threads()
        together = model.side_by_side and parameters[0].device.type == "cpu"
        self.workers = min(most, self.threads) if together else 1
        self._each = self.threads // self.workers
        self._pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(self._each,))

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown()

    def of(
        self, batches: Sequence[Batch], weight: float, seed: int, numbers: Sequence[int] | None = None
    ) -> Iterator[Gradient]:
        """Yield loss and gradient of each micro-batch, in order.

        Args:
            batches: with targets; on the model's device.
            weight: what the loss is multiplied by for the gradient; the loss is returned without it.
            seed: of dropout; micro-batch i of the update draws from a stream of its own.
            numbers: the places of the batches in the update, where other processes have the others.
        """
        self.model.train()
        numbered = zip(range(len(batches)) if numbers is None else numbers, batches, strict=True)
        jobs = iter([(batch, weight, (seed * 1_000_003 + number) % (1 << 63)) for number, batch in numbered])
        if self.workers == 1:
            for job in jobs:
                torch.manual_seed(job[2])  # for a model that draws from there
                yield self._one(*job)
            return
        while group := list(islice(jobs, self.workers)):
            with self._few_threads():
                done = list(self._pool.map(lambda job: self._one(*job), group))
            while done:  # given away one by one, so that no gradient outlives its use
                yield done.pop(0)

    def _one(self, batch: Batch, weight: float, seed: int) -> Gradient:
        with drawing(seed):
            loss = self.objective(self.model, batch, self.parameters, weight)
        gradients: Any = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return float(loss.detach()) / weight, gradients

    @contextmanager
    def _few_threads(self) -> Iterator[None]:
        """Some libraries know one number of threads for the whole process, whichever thread last set it."""
        torch.set_num_threads(self._each)
        try:
            yield
        finally:
            torch.set_num_threads(self.threads)
