"""The one linear layer of the package, so that a bundle can be loaded with another kind of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """A linear map with the weight [outputs, inputs] and, unless switched off, a bias [outputs].

    The weight starts Xavier-uniform (Glorot and Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html)
    times `gain`, the bias at zero. A loader may put any module with the same call in its place.
    """

    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)
        nn.init.xavier_uniform_(self.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., inputs] to [..., outputs]."""
        return F.linear(x, self.weight, self.bias)
