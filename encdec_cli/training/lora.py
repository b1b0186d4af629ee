"""Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685): small matrices learn beside frozen ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec_cli.errors import UsageError
from encdec_cli.models.linear import Linear, linear
from encdec_cli.recipe import Lora
from encdec_cli.training.learning import matching


class LoraLinear(nn.Module):
    """A linear map with the weight W + scale * B A, of which `adapt` lets A and B learn alone.

    Its weight and bias keep the names that they had in the linear layer. A starts as in the authors' code, B at zero.

    Args:
        linear: whose weight [outputs, inputs] and bias are taken over.
        rank: of B A; A is [rank, inputs], B is [outputs, rank].
        scale: see above.
    """

    def __init__(self, linear: Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.weight.shape[1]))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0], rank))
        self.scale = scale
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., inputs] to [..., outputs]."""
        return linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def adapt(model: nn.Module, lora: Lora) -> None:
    """Freeze a model and let small matrices learn beside its linear layers; with rank 0 leave it as it is.

    Raises UsageError for a pattern that matches nothing.
    """
    if not lora.rank:
        return
    whole = matching(lora.whole, dict(model.named_parameters()), "lora.whole", "parameter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in whole)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name in matching(lora.targets, linear, "lora.targets", "linear layer"):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoraLinear(linear[name], lora.rank, lora.alpha / lora.rank))


def check_start(lora: Lora, starts: bool) -> None:
    """Raise UsageError if the model that is to be adapted has learned nothing: it `starts` from no other."""
    if lora.rank and not starts:
        raise UsageError("lora.rank: what is adapted must have learned before; name it with --init-from.")


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the fp32 weights of `model`, by name, as those of the model that it was before `adapt`."""
    result = dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            a, b = result.pop(f"{name}.lora_a"), result.pop(f"{name}.lora_b")
            result[f"{name}.weight"] = torch.addmm(result[f"{name}.weight"], b, a, alpha=module.scale)
    return result
