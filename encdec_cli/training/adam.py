"""Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980) and AdamW (https://arxiv.org/abs/1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from encdec_cli.training.distributed import Ranks
from encdec_cli.training.optimizer import Weight


@dataclass(frozen=True)
class Adam:
    """Steps by the mean gradient over the root of its mean square.

    torch's fused kernels are called as functions: they are 3 times as fast as its foreach version on a CPU, and the
    classes of `torch.optim` import the compiler, which takes more than a second.
    """

    unshared: ClassVar[frozenset[str]] = frozenset()

    decoupled: bool = True
    """Whether the decay acts on the weights apart from the gradient, as in AdamW."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the averages of the gradient and of its square."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Applies to tensors of two dimensions or more; biases and the gains of norms are never decayed."""

    def moments(self, master: Tensor) -> dict[str, Tensor]:
        """Return the averages of the gradient and of its square."""
        return {"moment1": torch.zeros_like(master), "moment2": torch.zeros_like(master)}

    def update(self, weights: Sequence[Weight], rate: float, updates: int, ranks: Ranks) -> None:
        """Change the masters; see `Rule`."""
        for is_matrix, decay in ((True, self.weight_decay), (False, 0.0)):
            group = [weight for weight in weights if (weight.master.dim() >= 2) == is_matrix]
            if group:
                self._update(group, decay, rate, updates)

    def _update(self, weights: Sequence[Weight], decay: float, rate: float, updates: int) -> None:
        (adamw if self.decoupled else adam)(
            [weight.master for weight in weights],
            [w.gradient if w.gradient is not None else torch.zeros_like(w.master) for w in weights],
            [weight.moments["moment1"] for weight in weights],
            [weight.moments["moment2"] for weight in weights],
            [],
            [torch.tensor(float(updates), device=weight.master.device) for weight in weights],
            fused=all(weight.master.device.type in ("cpu", "cuda") for weight in weights),
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=decay,
            eps=self.epsilon,
            maximize=False,
        )
