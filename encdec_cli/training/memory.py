"""What training needs of the memory, told before the first update, for any model.

Loss and gradient of a few rows of the largest micro-batch are computed while every tensor is counted. What is alive at
the worst moment grows evenly with the positions, of which most rows have equally many, so two such samples tell of the
whole. On a CPU the C library keeps more than is alive; how much is measured once, on the larger sample. Where processes
gather weights, gloo keeps buffers as large as these; then both samples are measured, to tell what does not grow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from encdec_cli.data.bands import Ints
from encdec_cli.data.batch import Batch
from encdec_cli.models.model import Model
from encdec_cli.models.parts import held
from encdec_cli.training.distributed import shared_cores
from encdec_cli.training.flops import lengths, positions
from encdec_cli.training.layout import Computing
from encdec_cli.training.loss import chunk_of
from encdec_cli.training.optimizer import Optimizer

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
_FEW = 512
"""Tokens of a sample that are enough to be told from what every batch costs."""
_MORE_HOLES = 1.1
"""The whole batch, over many updates, wastes more than the sample: by how much, as a rule."""
_MOST_WASTE = 3.0
"""What a sample of a tiny model tells beyond that is no rule."""
_USUAL_WASTE = 0.35
"""Where the system does not tell the peak of a process; measured are 0.1 to 0.45."""


@dataclass(frozen=True)
class Need:
    """Bytes that training holds at its worst moment, by what they are for."""

    program: int
    """What the process has without any of the following: Python, torch, the data; on a GPU a teacher, for example."""
    weights: int
    """Parameters and buffers of the model."""
    optimizer: int
    """fp32 masters and moments."""
    gradients: int
    """fp32 sums over the micro-batches of an update."""
    activations: int
    """Of the micro-batches computed together: activations, their own gradients, one chunk of logits."""
    waste: int
    """What the allocator keeps and nobody uses."""
    saving: int
    """The whole weights in fp32 that the first of several processes brings together to validate or to keep a model."""
    validation: int
    """What decodes the validation examples, when gradients and activations are gone."""

    @property
    def growth(self) -> int:
        """What is still to come when model and optimizer stand."""
        return max(self.gradients + self.activations + self.waste, self.saving + self.validation)

    @property
    def total(self) -> int:
        """The worst moment of all."""
        return self.program + self.weights + self.optimizer + self.growth


@dataclass(frozen=True)
class Forecast:
    """Predicts what a run needs, from the parts that decide it."""

    gradients: Computing
    optimizer: Optimizer
    accumulate: int
    """Micro-batches of an update that this process computes."""
    vocabulary: int
    """Of the target."""
    load: Callable[[Ints], Batch]
    """Makes a micro-batch, on the device, of training examples."""
    copy: Model
    """What is judged and published: the model itself, or a copy if that is shared out."""
    decoding: int = 0
    """The most bytes alive while the validation examples are decoded."""

    def need(self, rows: Ints) -> Need:
        """Predict what updates take whose largest micro-batch has these examples, as `Sampler.cut` orders them."""
        model, parameters = self.gradients.model, self.gradients.parameters
        whole = self.load(rows)
        few, more = (whole.take(0, count) for count in self._sizes(whole))
        first, second = self.gradients.read(few), self.gradients.read(more)
        small, larger, largest = (self._positions(batch) for batch in (few, more, whole))
        further = (largest - small) / max(1, larger - small)
        # Which of both phases is the worse one may change with the rows; each grows evenly.
        phases = (first.forward, second.forward), (first.backward, second.backward)
        peak = max(one + round(further * (other - one)) for one, other in phases)
        device = parameters[0].device
        always, share = self._waste((few, first.peak), (more, second.peak)) if device.type == "cpu" else (0, 0.0)
        model_bytes = [*model.parameters(), *model.buffers(), *self.copy.parameters(), *self.copy.buffers()]
        state = list(self.optimizer.state().values())
        weights = _bytes(model_bytes)
        sums = 4 * sum(held(parameter).numel() for parameter in parameters)
        together = self.gradients.workers
        activations = together * peak
        if self.accumulate <= together:  # the sums are made after the last activation is gone
            activations = max(0, activations - sums)
        optimizer = _bytes([*model_bytes, *state]) - weights  # a parameter in fp32 is its own master
        reset_peak()
        return Need(
            program=max(0, _held_now(device) - weights - optimizer),
            weights=weights,
            optimizer=optimizer,
            gradients=sums,
            activations=activations,
            waste=always + round(share * (activations + sums)),
            saving=self._whole() if device.type == "cpu" else 0,
            # Measured: what decodes wastes as much as a sample does, with all that a sample keeps.
            validation=round((1 + share + always / (together * second.peak)) * self.decoding),
        )

    def _positions(self, batch: Batch) -> int:
        return positions(*lengths(batch), self.gradients.model.packs)

    def _whole(self) -> int:
        """Return the bytes of the weights in fp32, in the process that has a whole copy of a model in shares."""
        if self.copy is self.gradients.model:
            return 0
        return 4 * sum(parameter.numel() for parameter in self.copy.parameters() if not parameter.is_meta)

    def _sizes(self, batch: Batch) -> tuple[int, int]:
        """Return the rows of two samples. Both fill two chunks of logits, which stand together, if the batch does."""
        written = batch.target_lengths.cumsum(0)
        total, tokens = int(written[-1]), max(_FEW, 2 * chunk_of(batch.source.device) // self.vocabulary + 1)
        if total < tokens:
            tokens = min(_FEW, total // 4)
        rows = len(batch.rows)
        few = min(rows, max(2, 1 + int((written < tokens).sum())))  # the first two hold the longest sides
        return few, min(rows, 3 * few)

    def _waste(self, few: tuple[Batch, int], more: tuple[Batch, int]) -> tuple[int, float]:
        """Return what a process takes beyond what is alive: so many bytes always, and such a share of the rest.

        few, more: samples and the most bytes that are alive with each.
        """
        together = self.gradients.workers
        small = None
        if any(held(parameter) is not parameter for parameter in self.gradients.parameters):
            self._beyond(*few)  # the first time more is allocated
            small = self._beyond(*few)
        large = self._beyond(*more)
        if large is None:
            return 0, _USUAL_WASTE
        if small is None:
            always, share = 0.0, large / (together * more[1])
        else:
            share = max(0.0, (large - small) / max(1, together * (more[1] - few[1])))
            always = max(0.0, large - share * together * more[1])
        return round(_MORE_HOLES * always), min(_MOST_WASTE, max(0.0, _MORE_HOLES * share))

    def _beyond(self, batch: Batch, peak: int) -> int | None:
        """Return by how many bytes a process grows beyond what is alive, by computing some micro-batches for real."""
        together = self.gradients.workers
        before = reset_peak()
        for _ in range(2):  # the second time finds holes that the first one left
            for _ in self.gradients.of([batch] * together, 1.0, 0):
                pass
        return peak_resident() - before - together * peak if before else None


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = [held(tensor).untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _held_now(device: torch.device) -> int:
    return resident() if device.type == "cpu" else torch.cuda.memory_allocated(device)


def resident() -> int:
    """Return the bytes of memory that this process has now; 0 where the system does not tell."""
    return _status("VmRSS")


def peak_resident() -> int:
    """Return the most bytes that this process has had."""
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        lines = _STATUS.read_text().split("\n")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)


def reset_peak() -> int:
    """Give what is free back to the system and start the peak anew; return what is left, 0 if that is impossible."""
    with suppress(AttributeError, OSError):  # the C library of GNU has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")
    except OSError:
        return 0
    return resident()


def available(device: torch.device) -> int:
    """Return the bytes that this process can still get on a device; 0 where the system does not tell.

    Processes that share a machine have equal parts of its main memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_free_memory()]
    for limit, usage in _CGROUPS:
        with suppress(OSError, ValueError):  # no such file, or no limit: "max"
            found.append(int(limit.read_text()) - int(usage.read_text()))
    return max(0, min((bytes_ for bytes_ in found if bytes_ is not None), default=0)) // shared_cores()


def _free_memory() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().split("\n"):
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    return None
