"""The choice of the number format of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from encdec_cli.training import precision

CPU = torch.device("cpu")


def without_torch_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)


def test_names_are_obeyed_on_every_machine() -> None:
    assert precision.choose("fp32", CPU).dtype == torch.float32
    assert precision.choose("bf16", CPU).dtype == torch.bfloat16


@pytest.mark.parametrize("flag", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_auto_is_bf16_where_torch_reports_the_instructions(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    without_torch_flags(monkeypatch)
    monkeypatch.setattr(precision, "_CPU_INFO", Path("/nonexistent"))
    monkeypatch.setattr(torch.cpu, flag, lambda: True, raising=False)
    assert precision.choose("auto", CPU).dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, flag, lambda: False, raising=False)
    assert precision.choose("auto", CPU).dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx512f avx512_bf16 gfni", torch.bfloat16),
        ("fpu amx_tile amx_bf16", torch.bfloat16),
        ("fpu avx2 avx512f not_avx512_bf16", torch.float32),
    ],
)
def test_auto_reads_the_flags_of_linux_where_torch_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, dtype: torch.dtype
) -> None:
    without_torch_flags(monkeypatch)
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(precision, "_CPU_INFO", info)
    assert precision.choose("auto", CPU).dtype == dtype


def test_auto_is_fp32_on_a_device_we_know_nothing_of() -> None:
    assert precision.choose("auto", "meta").dtype == torch.float32
