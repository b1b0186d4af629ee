"""Energy, where the machine tells it: RAPL on Linux for processors, nvidia-smi for NVIDIA's GPUs."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Measures the energy that a device draws; other programs on it count as well.

    Args:
        device: a GPU, which is asked for its power now and then, or a CPU, whose packages count their energy.
        powercap: where Linux shows the counters.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self._packages = [] if device.type == "cuda" else sorted(powercap.glob("intel-rapl:[0-9]*"))
        self._packages = [package for package in self._packages if package.name.count(":") == 1]
        self._last = {package: self._microjoules(package) for package in self._packages}
        self._gpu = ""
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            self._gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._since = time.monotonic()

    def joules(self) -> float | None:
        """Return the energy since the last call, or since the meter was made; None where nothing tells it."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        if self._gpu:
            watts = self._gpu_watts()
            return None if watts is None else watts * seconds
        readings = {package: self._microjoules(package) for package in self._packages}
        known = [
            (package, old, new)
            for package, new in readings.items()
            if new is not None
            if (old := self._last[package]) is not None
        ]
        self._last = readings
        if not known:
            return None
        return sum(new - old if new >= old else new - old + self._range(package) for package, old, new in known) / 1e6

    def _microjoules(self, package: Path) -> int | None:
        with suppress(OSError, ValueError):  # often only root may read it
            return int((package / "energy_uj").read_text())
        return None

    def _range(self, package: Path) -> int:
        """Return after how many microjoules a counter begins again."""
        with suppress(OSError, ValueError):
            return int((package / "max_energy_range_uj").read_text())
        return 0

    def _gpu_watts(self) -> float | None:
        command = ["nvidia-smi", f"--id={self._gpu}", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            return float(subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout)  # noqa: S603
        return None
