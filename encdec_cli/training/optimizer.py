"""fp32 master weights, whatever the type of the model's own parameters, and the rules that change them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from encdec_cli.errors import BundleError
from encdec_cli.models.parts import Piece, held
from encdec_cli.training.distributed import Ranks


@dataclass
class Weight:
    """One parameter with what the optimizer remembers about it; all but the parameter in fp32."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)
    """By the names that its rule gives them."""
    average: Tensor | None = None
    """The moving average of the master, where one is kept."""
    gradient: Tensor | None = None
    rows: slice | None = None
    """Which rows of the parameter these are, if processes share it (`parallel.shard`); None if this one has all."""
    part: Piece | None = None
    """Which part of the model's weight the parameter is, if processes share layers (`parallel.tensor`), else None."""

    def state(self) -> dict[str, Tensor]:
        """Return what is saved of it, by name."""
        kept = {"master": self.master, "ema": self.average, **self.moments}
        return {f"{kind}.{self.name}": tensor for kind, tensor in kept.items() if tensor is not None}

    @property
    def shared(self) -> bool:
        """Whether other processes have other numbers of the model's weight."""
        return self.rows is not None or self.part is not None

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Yield what this process has of `state()`; nothing if it has all."""
        piece = self.part
        if self.rows is not None:
            piece = (piece or Piece.whole(self.parameter.shape)).narrow(0, self.rows.start, self.rows.stop)
        if piece is not None:
            yield from ((name, piece.of_means(tensor.shape)) for name, tensor in self.state().items())


class Rule(Protocol):
    """How masters follow gradients."""

    unshared: ClassVar[frozenset[str]]
    """The moments that every process has whole where it has some rows only of a weight; the others have its rows."""

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        """Return what it remembers of a weight before the first update, by name."""

    def update(self, weights: Sequence[Weight], rate: float, updates: int, ranks: Ranks) -> None:
        """Change the masters, and the moments, by the gradients, which may be overwritten; see `Optimizer.step`.

        A weight without a gradient counts as one whose gradient is zero. `updates` have been done before.
        """


class Optimizer:
    """Updates fp32 master weights and copies them to the parameters.

    One update is `collect()` for each micro-batch, then `clip()`, then `step()`. A parameter that stays fp32 is its
    own master. Build it when the model is on its device, has its initial weights and still is fp32, and cast the
    model afterwards (`Precision.apply`): so the masters keep the full precision of those weights.

    Args:
        rules: each with the named parameters that follow it. Those that need no gradient have masters alone, so that
            their full precision is kept and saved too.
        ema: share of a moving average of the masters that stays at an update; 0 keeps no average.
        parts: what those parameters are that are parts of a model's weights, by name (`parallel.tensor`).
    """

    def __init__(
        self,
        rules: Iterable[tuple[Rule, Iterable[tuple[str, nn.Parameter]]]],
        ema: float = 0.0,
        parts: Mapping[str, Piece] | None = None,
    ) -> None:
        self.updates = 0
        """Updates done."""
        self.ema = ema
        self._groups: list[tuple[Rule, list[Weight]]] = []
        self._frozen: list[Weight] = []
        for rule, parameters in rules:
            named = [_new_weight(name, parameter, (parts or {}).get(name)) for name, parameter in parameters]
            self._frozen += [weight for weight in named if not weight.parameter.requires_grad]
            weights = [weight for weight in named if weight.parameter.requires_grad]
            for weight in weights:
                weight.moments = rule.moments(weight.master)
                weight.average = weight.master.clone() if ema else None
            if weights:
                self._groups.append((rule, weights))
        self._weights = [weight for _, weights in self._groups for weight in weights]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in the order in which `collect` takes their gradients."""
        return [weight.parameter for weight in self._weights]

    @torch.no_grad()
    def collect(self, gradients: Iterable[Tensor | None]) -> None:
        """Add gradients, one for each of `parameters`, in fp32 to those of earlier micro-batches."""
        new: list[tuple[Tensor, Tensor]] = []
        old: list[tuple[Tensor, Tensor]] = []
        for weight, gradient in zip(self._weights, gradients, strict=True):
            if gradient is None:
                continue
            if weight.gradient is None:
                weight.gradient = torch.empty_like(gradient, dtype=torch.float32)
                new.append((weight.gradient, gradient))
            else:
                old.append((weight.gradient, gradient))
        # All at once: on a GPU hundreds of small kernels take longer to start than to run.
        if new:
            sums, addends = zip(*new, strict=True)
            torch._foreach_copy_(sums, addends)
        if old:
            sums, addends = zip(*old, strict=True)
            torch._foreach_add_(sums, addends)

    def gradients(self) -> Iterator[Tensor]:
        """Yield the collected gradients, zeros where there is none, to be summed in place over processes.

        Those of shared weights are sums already.
        """
        for weight in self._weights:
            if weight.gradient is None:
                weight.gradient = torch.zeros_like(weight.master)
            if weight.rows is None:
                yield weight.gradient

    @torch.no_grad()
    def clip(
        self, limit: float = 0.0, total: Callable[[float], float] = float, data: int = 1, tensor: int = 1
    ) -> float:
        """Scale the collected gradients to a global norm of at most `limit` (0: no limit); return the norm before.

        If the norm is infinite or not a number nothing is scaled, and `step` must not be called.

        Args:
            limit: see above.
            total: returns the sum of a number over all processes.
            data: how many of them have all rows, if these are not shared.
            tensor: how many of them have all of a weight that is not divided.
        """
        gradients = [weight.gradient for weight in self._weights if weight.gradient is not None]
        if not gradients:
            return 0.0
        norms = torch.stack(torch._foreach_norm(gradients))
        if any(weight.shared for weight in self._weights):
            own = [weight for weight in self._weights if weight.gradient is not None]
            copies = [(data if w.rows is None else 1) * (tensor if w.part is None else 1) for w in own]
            norm = float((norms * torch.tensor(copies).to(norms).rsqrt()).norm())
            norm = math.sqrt(total(norm * norm))
        else:
            norm = float(norms.norm())
        if limit and math.isfinite(norm) and norm + 1e-6 > limit:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, rate: float, ranks: Ranks | None = None) -> None:
        """Update the masters with the collected gradients, copy them to the parameters, forget the gradients.

        ranks: the processes that share the weights; None: this one alone.
        """
        for rule, weights in self._groups:
            rule.update(weights, rate, self.updates, ranks or Ranks())
        self.updates += 1
        self._average()
        self.forget()
        _publish(self._weights)

    def _average(self) -> None:
        # The mean of all masters so far, each weighted by `ema` to the power of its age: that is Adam's correction of
        # an average that starts at zero (https://arxiv.org/abs/1412.6980, section 3), without the zeros.
        kept = [(weight.average, weight.master) for weight in self._weights if weight.average is not None]
        if kept:
            averages, masters = zip(*kept, strict=True)
            torch._foreach_lerp_(averages, masters, (1 - self.ema) / (1 - self.ema**self.updates))

    def forget(self) -> None:
        """Forget the collected gradients; the weights stay as they are."""
        for weight in self._weights:
            weight.gradient = None

    def pieces(self) -> dict[str, Piece]:
        """Return the names in `state()` of which this process has a piece only, and which."""
        shared = {name: piece for w in (*self._weights, *self._frozen) for name, piece in w.pieces()}
        for rule, own in self._groups:
            for name in (f"{moment}.{weight.name}" for moment in rule.unshared for weight in own):
                shared.pop(name, None)
        return shared

    def masters(self) -> dict[str, Tensor]:
        """Return the fp32 weights by the names of their parameters; no copies."""
        return {weight.name: weight.master for weight in (*self._weights, *self._frozen)}

    def averages(self) -> dict[str, Tensor]:
        """Return the moving averages by the names of their parameters, none if none are kept; no copies."""
        return {weight.name: weight.average for weight in self._weights if weight.average is not None}

    @contextmanager
    def averages_in_use(self) -> Iterator[None]:
        """Let the model compute with the averages, if they are kept; there must be no `step` meanwhile.

        A model whose weights are shared out is left as it is: its averages are gathered, see `Layout.weights`.
        """
        whole = [weight for weight in self._weights if weight.rows is None]
        own = [(weight.parameter, weight.parameter.data) for weight in whole]
        try:
            for weight in whole:
                if weight.average is not None:
                    weight.parameter.data = weight.average.to(weight.parameter.dtype)
            yield
        finally:
            for parameter, data in own:
                parameter.data = data

    def state(self) -> dict[str, Tensor]:
        """Return all that `load` needs, as named tensors that `step` goes on changing: save them, or copy them.

        The names are `step`, `master.<parameter>`, `ema.<parameter>` if averages are kept, and `<moment>.<parameter>`
        for what the rule remembers.
        """
        named: dict[str, Tensor] = {"step": torch.tensor(self.updates)}
        for weight in (*self._weights, *self._frozen):
            named |= weight.state()
        return named

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a `state()`, exactly. Raises BundleError, and changes nothing, if it is of another model."""
        own = self.state()
        if own.keys() != state.keys():
            name = sorted(own.keys() ^ state.keys())[0]
            verb = "lacks" if name in own else "holds"
            raise BundleError(f"optimizer state: {verb} '{name}'; it belongs to another model, start a new run.")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                raise BundleError(
                    f"optimizer state: '{name}' is {state[name].dtype} {list(state[name].shape)}, expected "
                    f"{tensor.dtype} {list(tensor.shape)}; it belongs to another model, start a new run."
                )
        self.updates = int(state["step"])
        for weight in (*self._weights, *self._frozen):
            for name, tensor in weight.state().items():
                tensor.copy_(state[name])
        self.forget()
        _publish([*self._weights, *self._frozen])


def _new_weight(name: str, parameter: nn.Parameter, part: Piece | None) -> Weight:
    own, rows = _own(parameter)
    return Weight(name, parameter, own.detach().float(), rows=rows, part=part)


def _own(parameter: Any) -> tuple[Tensor, slice | None]:
    """Return what this process has of a parameter, and which rows these are; None if it has all of them."""
    own = held(parameter)
    if own is parameter:
        return own, None
    mesh = parameter.device_mesh
    most = -(-len(parameter) // mesh.size())
    begin = min(len(parameter), most * mesh.get_local_rank())
    return own, slice(begin, begin + len(own))


def _publish(weights: Sequence[Weight]) -> None:
    """Copy masters to the parameters that are not their own masters."""
    others = [w for w in weights if w.rows is None and w.parameter.data_ptr() != w.master.data_ptr()]
    if others:
        torch._foreach_copy_([weight.parameter for weight in others], [weight.master for weight in others])
