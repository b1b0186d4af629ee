"""Floating-point operations and live bytes of a piece of work, counted operation by operation, for any model."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from encdec_cli.models.dropout import drawing
from encdec_cli.models.model import Model


def _linear_flops(x: Sequence[int], weight: Sequence[int]) -> int:
    return 2 * math.prod(x) * weight[0]


_MISSING: dict[str, tuple[Callable[..., int], int]] = {
    "mkldnn::_linear_pointwise": (_linear_flops, 2),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (sdpa_flop_count, 3),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (sdpa_backward_flop_count, 4),
}
"""What torch's own table lacks: a formula, and of how many tensors it wants the shapes."""


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside its block every operation of this thread is counted; those of the backward pass too.

    FLOPs are those of matrix products, attention and convolutions, by torch's own formulas. Bytes are those of tensors
    that operations of the block made; what a kernel needs inside itself is not seen.

    Args:
        changing: whether storages change their size, as those of gathered weights do: then all tensors that are empty
            now, or not there yet, count with the size that they have at each time.
    """

    def __init__(self, changing: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.peak = 0
        """The most bytes that were alive at a time."""
        self.live = 0
        """The bytes that are alive now."""
        self._known: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}
        self._changing = changing
        if changing:
            self._note((each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)), ours=False)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, which takes seconds and 100 MB, to keep it away from here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        kwargs = kwargs or {}
        self._note((*args, *kwargs.values()), ours=self._changing)
        result = func(*args, **kwargs)
        self._note((result,), ours=True)
        if self._changing:
            self._look_again()
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        elif func._schema.name in _MISSING:
            formula, count = _MISSING[func._schema.name]
            self.flops += formula(*(tensor.shape for tensor in args[:count]))
        return result

    def _note(self, values: Iterable[Any], ours: bool) -> None:
        for tensor in _tensors(values):
            if tensor.layout is not torch.strided:  # it has no storage of its own
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known and (ours or storage.nbytes()):
                self._known[key] = weakref.ref(storage, self._forgetter(key))
                if ours:  # an argument that was not known is older than the block
                    self._sizes[key] = storage.nbytes()
                    self.live += self._sizes[key]
                    self.peak = max(self.peak, self.live)

    def _look_again(self) -> None:
        for key, size in list(self._sizes.items()):  # what dies meanwhile leaves it
            storage = self._known[key]() if key in self._known else None
            if storage is not None and storage.nbytes() != size:
                self._sizes[key] = storage.nbytes()
                self.live += self._sizes[key] - size
        self.peak = max(self.peak, self.live)

    def _forgetter(self, key: int) -> Callable[[Any], None]:
        def forget(_reference: Any) -> None:
            del self._known[key]
            self.live -= self._sizes.pop(key, 0)

        return forget


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@dataclass(frozen=True)
class Reading:
    """What loss and gradient of one micro-batch took."""

    flops: int
    saved: int
    """Bytes kept from the forward pass for the backward pass."""
    forward: int
    """Bytes alive at the worst moment until the loss is known, beside the weights and the batch."""
    backward: int
    """The same from there on."""

    @property
    def peak(self) -> int:
        """Bytes alive at the worst moment of all."""
        return max(self.forward, self.backward)


def read(
    model: Model,
    loss_of: Callable[[], Tensor],
    differentiate: Callable[[Tensor], object],
    changing: bool = False,
) -> Reading:
    """Compute loss and gradient of a micro-batch and throw both away; the model is left as it was, in training mode.

    changing: see `Meter`.
    """
    model.train()
    with _undisturbed(model), drawing(0), Meter(changing) as meter:
        loss = loss_of()
        saved, forward, meter.peak = meter.live, meter.peak, meter.live
        differentiate(loss)
        del loss
    return Reading(meter.flops, saved, forward, meter.peak)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Give back buffers and random numbers as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
