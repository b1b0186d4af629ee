"""The gradient of one update: its micro-batches in turn, or side by side on the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from encdec_cli.data.batch import Batch
from encdec_cli.errors import ResourceError
from encdec_cli.models.dropout import drawing
from encdec_cli.models.model import Model
from encdec_cli.training.meter import Reading, read
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

    A micro-batch for which there is not enough memory is computed in halves, and these in halves, down to single
    examples: the gradient is the same but for rounding and dropout. It then depends on the memory of the machine, and
    a run that is started again elsewhere may differ in the last bits.

    Args:
        model: in any mode; it is put into training mode.
        parameters: those that learn.
        objective: what is differentiated.
        most: micro-batches of an update.
        say: is given a sentence for each size of micro-batch that had to be halved.
    """

    def __init__(
        self,
        model: Model,
        parameters: Sequence[nn.Parameter],
        objective: Objective,
        most: int,
        say: Callable[[str], object] = str,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.objective = objective
        self.say = say
        self._halved: set[tuple[int, ...]] = set()
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
                yield self._tried(job) or self._in_halves(*job)
            return
        while group := list(islice(jobs, self.workers)):
            with self._few_threads():
                done = list(self._pool.map(self._tried, group))
            for job in group:  # given away one by one, so that no gradient outlives its use
                yield done.pop(0) or self._in_halves(*job)  # by now without neighbours

    def read(self, batch: Batch) -> Reading:
        """Count what loss and gradient of a micro-batch take, and forget them."""
        loss_of = partial(self.objective, self.model, batch, self.parameters, 1.0)
        return read(self.model, loss_of, partial(torch.autograd.grad, inputs=self.parameters, allow_unused=True))

    def _tried(self, job: tuple[Batch, float, int]) -> Gradient | None:
        """Return loss and gradient of a micro-batch; None if there is not enough memory."""
        if self.workers == 1:
            torch.manual_seed(job[2])  # for a model that draws from there
        try:
            return self._one(*job)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Here, where the error no longer holds what was computed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _in_halves(self, batch: Batch, weight: float, seed: int) -> Gradient:
        """Return loss and gradient of a micro-batch that does not fit; ResourceError if one example does not."""
        rows = len(batch.rows)
        if rows == 1:
            raise alone_too_large(batch)
        size = (*batch.source.shape, batch.known_target.shape[1])
        if size not in self._halved:
            self._halved.add(size)
            self.say(f"out of memory for {rows} examples ({shapes_of(batch)}): computed in halves; lower train.tokens")
        parts = batch.take(0, rows // 2), batch.take(rows // 2, rows)
        jobs = [(part, weight, (seed * 1_000_003 + 1 + number) % (1 << 63)) for number, part in enumerate(parts)]
        return _sum(*(self._tried(job) or self._in_halves(*job) for job in jobs))

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


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory, of a device or of the machine, is not enough."""
    words = ("can't allocate memory", "not enough memory", "CUDA out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(each in str(error) for each in words)


def alone_too_large(batch: Batch) -> ResourceError:
    """Return the error for a micro-batch of one example, which cannot be cut."""
    return ResourceError(
        f"out of memory for training example {batch.rows[0] + 1} alone ({shapes_of(batch)}); use a smaller model, "
        "lower text.max_source and text.max_target, or take a larger machine."
    )


def shapes_of(batch: Batch) -> str:
    """Return the shapes of a micro-batch in words."""
    return f"source {list(batch.source.shape)}, target {list(batch.known_target.shape)}"


def _sum(a: Gradient, b: Gradient) -> Gradient:
    pairs = zip(a[1], b[1], strict=True)
    return a[0] + b[0], tuple(y if x is None else x if y is None else x + y for x, y in pairs)
