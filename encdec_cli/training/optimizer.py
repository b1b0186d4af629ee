"""Adam and AdamW over fp32 master weights, whatever the type of the model's own parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from encdec_cli.errors import BundleError


@dataclass(frozen=True)
class AdamSettings:
    """What the update rule needs beside the rate."""

    name: Literal["adam", "adamw"] = "adam"
    """`adam` (https://arxiv.org/abs/1412.6980), `adamw` with decoupled decay (https://arxiv.org/abs/1711.05101)."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the averages of the gradient and of its square."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Applies to tensors of two dimensions or more; biases and the gains of norms are never decayed."""


@dataclass
class _Weight:
    """One parameter with what the optimizer remembers about it; all but the parameter in fp32."""

    parameter: nn.Parameter
    master: Tensor
    moment1: Tensor
    moment2: Tensor
    steps: Tensor
    gradient: Tensor | None = None


class Optimizer:
    """Updates fp32 master weights and copies them to the parameters.

    One update is `collect()` after the backward pass of each micro-batch, then `clip()`, then `step()`. A parameter
    that stays fp32 is its own master. Build it when the model is on its device, has its initial weights and still is
    fp32, and cast the model afterwards (`Precision.apply`): so the masters keep the full precision of those weights.

    torch's fused kernels are called as functions: they are 3 times as fast as its foreach version on a CPU, and the
    classes of `torch.optim` import the compiler, which takes more than a second.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: AdamSettings) -> None:
        self.settings = settings
        self.updates = 0
        """Updates done."""
        self._weights = {name: _new_weight(p) for name, p in parameters if p.requires_grad}
        weights = list(self._weights.values())
        matrices = [weight for weight in weights if weight.master.dim() >= 2]
        vectors = [weight for weight in weights if weight.master.dim() < 2]
        self._groups = [(matrices, settings.weight_decay), (vectors, 0.0)]

    @torch.no_grad()
    def collect(self) -> None:
        """Take the parameters' gradients away and add them, in fp32, to those of earlier micro-batches."""
        for weight in self._weights.values():
            gradient, weight.parameter.grad = weight.parameter.grad, None
            if gradient is None:
                continue
            if weight.gradient is None:
                weight.gradient = gradient.float()
            else:
                weight.gradient += gradient

    @torch.no_grad()
    def clip(self, limit: float = 0.0) -> float:
        """Scale the collected gradients to a global norm of at most `limit` (0: no limit); return the norm before.

        If the norm is infinite or not a number nothing is scaled, and `step` must not be called.
        """
        gradients = [weight.gradient for weight in self._weights.values() if weight.gradient is not None]
        if not gradients:
            return 0.0
        norm = float(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm())
        if limit and math.isfinite(norm) and norm + 1e-6 > limit:
            for gradient in gradients:
                gradient.mul_(limit / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the masters with the collected gradients, copy them to the parameters, forget the gradients.

        A parameter without a gradient counts as one whose gradient is zero.
        """
        for weights, decay in self._groups:
            if weights:
                self._update(weights, decay, rate)
        self.updates += 1
        for weight in self._weights.values():
            weight.gradient = None
            _publish(weight)

    def discard(self) -> None:
        """Forget the collected gradients without an update."""
        for weight in self._weights.values():
            weight.gradient = weight.parameter.grad = None

    def _update(self, weights: list[_Weight], decay: float, rate: float) -> None:
        update = adamw if self.settings.name == "adamw" else adam
        update(
            [weight.master for weight in weights],
            [w.gradient if w.gradient is not None else torch.zeros_like(w.master) for w in weights],
            [weight.moment1 for weight in weights],
            [weight.moment2 for weight in weights],
            [],
            [weight.steps for weight in weights],
            fused=all(weight.master.device.type in ("cpu", "cuda") for weight in weights),
            amsgrad=False,
            beta1=self.settings.betas[0],
            beta2=self.settings.betas[1],
            lr=rate,
            weight_decay=decay,
            eps=self.settings.epsilon,
            maximize=False,
        )

    def masters(self) -> dict[str, Tensor]:
        """Return the fp32 weights by the names of their parameters; no copies."""
        return {name: weight.master for name, weight in self._weights.items()}

    def state(self) -> dict[str, Tensor]:
        """Return all that `load` needs, as named tensors that `step` goes on changing: save them, or copy them.

        The names are `master.<parameter>`, `moment1.<parameter>`, `moment2.<parameter>` and `step`.
        """
        named: dict[str, Tensor] = {"step": torch.tensor(self.updates)}
        for name, weight in self._weights.items():
            named.update(_named(name, weight))
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
        for name, weight in self._weights.items():
            for key, tensor in _named(name, weight).items():
                tensor.copy_(state[key])
            weight.steps.fill_(self.updates)
            weight.gradient = None
            _publish(weight)


def _new_weight(parameter: nn.Parameter) -> _Weight:
    master = parameter.detach().float()
    steps = torch.zeros((), dtype=torch.float32, device=master.device)
    return _Weight(parameter, master, torch.zeros_like(master), torch.zeros_like(master), steps)


def _named(name: str, weight: _Weight) -> dict[str, Tensor]:
    return {f"master.{name}": weight.master, f"moment1.{name}": weight.moment1, f"moment2.{name}": weight.moment2}


def _publish(weight: _Weight) -> None:
    if weight.parameter.data_ptr() != weight.master.data_ptr():
        weight.parameter.copy_(weight.master)
