"""Linear layers with weights of 8 bits, for decoding on a CPU.

Weights are quantised once for each output, activations for each row as they come, both symmetric, so a row does not
depend on its batch mates (vector-wise quantisation: Dettmers et al. 2022, section 2, https://arxiv.org/abs/2208.07339).
Products of integers are exact, whatever the size of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encdec_cli import kernels
from encdec_cli.models.linear import Linear
from encdec_cli.models.model import Model

LEVELS = 127
"""The largest 8-bit number in use; -128 has no opposite."""
LEAST_WEIGHTS = 1 << 16
"""Smaller matrices stay as they are: quantising their input costs what the product saves."""
# Measured with one thread on Zen 4, 320 rows, inputs x outputs, ms of 8 bits / bf16 / fp32: 128 x 384 0.18 / 0.17 /
# 0.32, 256 x 768 0.44 / 0.64 / 1.3, 256 x 1024 0.63 / 0.84 / 1.9, 1024 x 256 0.68 / 0.90 / 1.8.
_SMALLEST = 1e-20


class QuantisedLinear(nn.Module):
    """A linear map whose weight [outputs, inputs] is kept in 8 bits.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        with torch.no_grad():
            self._scale = weight.float().abs().amax(1).clamp_(min=_SMALLEST).div_(LEVELS)
            levels = (weight.float() / self._scale[:, None]).round_().to(torch.int8)
        # No buffers: what is packed for the processor is nothing that a state dict could hold.
        self._packed = _ops().qlinear_prepack(levels, None)
        self._zero = torch.zeros(len(weight), dtype=torch.int32)
        self._bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., inputs] to [..., outputs], of x's type."""
        flat = x.reshape(-1, x.shape[-1])
        if self._fits(flat):
            unsigned, scale = kernels.quantise(flat)
            products = self._multiply(unsigned, x.dtype)
            kernels.rescale(products, scale, self._bias)
            return products.view(*x.shape[:-1], -1)
        # In the type of x, so that the last product is one of equal types; the levels make good what it is rounded by.
        scale = flat.abs().amax(1, keepdim=True).clamp_(min=_SMALLEST).div_(LEVELS)
        levels = (flat.float() / scale.float()).round_().to(torch.int8)
        # The kernels of most processors want numbers without a sign: 128 more, which is then the zero point.
        unsigned = levels.view(torch.uint8).bitwise_xor_(128)
        products = self._multiply(unsigned, x.dtype).mul_(scale)
        if self._bias is not None:
            products.add_(self._bias)
        return products.view(*x.shape[:-1], -1)

    def _fits(self, x: Tensor) -> bool:
        alike = (x,) if self._bias is None else (x, self._bias)
        odd = x.shape[1] % kernels.WIDTH or self._scale.shape[0] % kernels.WIDTH or not x.is_contiguous()
        return not odd and kernels.usable(*alike)

    def _multiply(self, unsigned: Tensor, dtype: torch.dtype) -> Tensor:
        products: Tensor = _ops().qlinear_pointwise(
            *(unsigned, 1.0, 128, self._packed, self._scale, self._zero, None),
            *(1.0, 0, dtype, "none", [], ""),
        )
        return products


@torch.inference_mode()
def supported() -> bool:
    """Return whether this build of torch multiplies 8-bit matrices: those for x86 do."""
    try:
        return bool(torch.equal(QuantisedLinear(torch.eye(16), None)(torch.eye(16)), torch.eye(16)))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def quantise(model: Model) -> None:
    """Keep the large matrices of a model on a CPU in 8 bits, the output layer among them; it can learn no more."""
    model.untie()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear) and child.weight.numel() >= LEAST_WEIGHTS:
                setattr(module, name, QuantisedLinear(child.weight, child.bias))


def _ops() -> Any:
    # A private interface of torch, used in this one place and tried out by `supported`.
    return torch.ops.onednn
