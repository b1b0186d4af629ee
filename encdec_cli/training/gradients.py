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
from encdec_cli.training.loss import real_rows, token_loss

Gradient = tuple[float, tuple[Tensor | None, ...]]
"""The summed loss of a micro-batch in nats, and a gradient for each parameter that the loss depends on."""


class Gradients:
    """Computes micro-batches of one model; call `close` in the end.

    On a CPU as many micro-batches as there are threads are computed at a time, each by threads of its own: two
    threads with a micro-batch each are up to 1.4 times as fast as two threads that share every operation. The
    result of a micro-batch does not depend on its neighbours, so neither does that of an update.

    A model that draws from torch's own random numbers, which threads would share (a plugin with nn.Dropout), is
    computed in turn. `probe`, any batch, shows whether it does.
    """

    def __init__(
        self, model: Model, parameters: Sequence[nn.Parameter], smoothing: float, most: int, probe: Batch
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.smoothing = smoothing
        self.threads = torch.get_num_threads()
        device = parameters[0].device.type
        self.workers = min(most, self.threads) if device == "cpu" else 1
        if self.workers > 1 and self._draws_elsewhere(probe):
            self.workers = 1
        self._each = self.threads // self.workers
        self._pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(self._each,))

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown()

    def of(self, batches: Sequence[Batch], weight: float, seed: int) -> Iterator[Gradient]:
        """Yield loss and gradient of each micro-batch, in order.

        Args:
            batches: with targets; on the model's device.
            weight: what the loss is multiplied by for the gradient; the loss is returned without it.
            seed: of dropout; micro-batch i draws from a stream of its own.
        """
        self.model.train()
        jobs = iter([(batch, weight, seed * 1_000_003 + number) for number, batch in enumerate(batches)])
        if self.workers == 1:
            yield from (self._one(*job) for job in jobs)
            return
        while group := list(islice(jobs, self.workers)):  # no more gradients in memory than are computed together
            with self._few_threads():
                done = list(self._pool.map(lambda job: self._one(*job), group))
            yield from done

    def _one(self, batch: Batch, weight: float, seed: int) -> Gradient:
        target = batch.known_target
        with drawing(seed, batch.source.device):
            hidden = self.model(batch.source, batch.source_mask, target[:, :-1])
            rows, labels = real_rows(hidden, target[:, 1:])
            loss, _ = token_loss(rows, self.model.project, labels, self.smoothing, self.parameters, weight=weight)
            gradients: Any = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return float(loss.detach()) / weight, gradients

    def _draws_elsewhere(self, probe: Batch) -> bool:
        before = torch.get_rng_state()
        self.model.train()
        with torch.no_grad(), drawing(0, probe.source.device):
            seeded = torch.get_rng_state()
            self.model(probe.source, probe.source_mask, probe.known_target[:, :-1])
            drawn = not torch.equal(torch.get_rng_state(), seeded)
        torch.set_rng_state(before)
        return drawn

    @contextmanager
    def _few_threads(self) -> Iterator[None]:
        """Some libraries know one number of threads for the whole process, whichever thread last set it."""
        torch.set_num_threads(self._each)
        try:
            yield
        finally:
            torch.set_num_threads(self.threads)
