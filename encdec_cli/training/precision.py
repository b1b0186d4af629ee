"""The number format of training: fp32, or bf16 parameters whose fp32 masters the optimizer keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Precision:
    """The type of the model's parameters, activations and gradients; sums and masters are always fp32."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Its name in a recipe: fp32 or bf16."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def apply(self, model: nn.Module) -> None:
        """Cast the model in place. Build the `Optimizer` first: its masters are then the uncast weights."""
        model.to(self.dtype)


def choose(name: str, device: torch.device | str) -> Precision:
    """Return what a recipe's `train.precision` names: fp32, bf16, or with `auto` bf16 where the device is fast at it.

    The choice depends on the instructions of the device and on nothing measured, so it is the same in every run.
    """
    if name == "auto":
        name = "bf16" if fast_bf16(torch.device(device)) else "fp32"
    return Precision({"fp32": torch.float32, "bf16": torch.bfloat16}[name])


def fast_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions that multiply bf16 matrices."""
    if device.type == "cuda":
        # Emulated bf16, which torch also counts as supported, would be slower than fp32.
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return _torch_reports_bf16() or _linux_reports_bf16()
    return False


def _torch_reports_bf16() -> bool:
    # Private names: any of them may be missing from a version of torch.
    amx = hasattr(torch.cpu, "_is_amx_tile_supported") and torch.cpu._is_amx_tile_supported()
    avx = hasattr(torch.cpu, "_is_avx512_bf16_supported") and torch.cpu._is_avx512_bf16_supported()
    return bool(amx or avx)


def _linux_reports_bf16() -> bool:
    try:
        lines = _CPU_INFO.read_text(encoding="ascii", errors="replace").split("\n")
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return "amx_bf16" in flags or "avx512_bf16" in flags
