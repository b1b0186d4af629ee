"""What a run has cost: FLOPs and padding, which every repetition repeats, and time, energy and money, which none does.

The first stand in `Progress`, in the log and in what bundles tell of themselves. The others stand in the log's clock
and in `spent.json`, the run's and each model's, and are added up over all processes that worked at the run: what a
killed one did after its last checkpoint is paid for too, and told as repeated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from encdec_cli import atomic
from encdec_cli.bundle.checkpoint import Progress
from encdec_cli.bundle.run import SPENT
from encdec_cli.errors import BundleError
from encdec_cli.recipe import Cost
from encdec_cli.training.ceiling import matrix_ceiling
from encdec_cli.training.energy import EnergyMeter

_PATIENCE = 5.0
"""Seconds of training before the ceiling is measured: a short run does not wait for it."""
_CORE_WATTS = 12.0
"""Of a busy core, where nobody knows better: what Green Algorithms takes for any processor.

Lannelongue, Grealey, Inouye 2021, https://doi.org/10.1002/advs.202100707; its table has 4 to 24 watts.
"""
_PAID = {
    "kwh": "{:.3g} kWh",
    "kwh_estimated": "about {:.3g} kWh",
    "price": "{:.2f} to pay",
    "co2_grams": "{:.3g} g CO2",
}
_NOTHING = {"seconds": 0.0, "cpu_seconds": 0.0, "updates": 0, "flops": 0, "joules": 0.0}


def work(progress: Progress) -> dict[str, Any]:
    """Return what a run has done so far, equal in every repetition."""
    return {"tokens": progress.tokens, "flops": progress.flops, "padding": _padding(progress)}


def _padding(progress: Progress) -> float:
    """Return the share of padding among the positions of both sides that the model has computed."""
    return round(1 - progress.real / progress.positions, 4) if progress.positions else 0.0


class Account:
    """Counts what one process spends on a run, and adds it to what others have.

    Args:
        run: the folder of the run.
        cost: the recipe's section.
        device: on which training runs.
        dtype: of its matrix products.
        progress: what was done before.
        processes: how many do the work together.
        say: is told if what was spent before cannot be read.
    """

    def __init__(
        self,
        run: Path,
        cost: Cost,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
        processes: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.path = run / SPENT
        self.cost = cost
        self.device = device
        self.dtype = dtype
        self.processes = processes
        self.energy = EnergyMeter(device)
        self.ceiling = 0.0
        """FLOPs a second of large matrix products; 0 before it is measured."""
        self.spent = self._before(progress, say)
        self._begin = self._last = time.perf_counter()
        self._cpu_seconds = time.process_time()
        self._tokens, self._flops, self._updates = progress.tokens, progress.flops, progress.step

    def _before(self, progress: Progress, say: Callable[[str], None] | None) -> dict[str, Any]:
        if not self.path.exists():
            return dict(_NOTHING)
        try:
            found = atomic.read_json(self.path)
        except BundleError:
            found = None
        told = found if isinstance(found, dict) else {}
        known = {name: value for name in _NOTHING if isinstance(value := told.get(name), int | float)}
        if not all(map(math.isfinite, known.values())) or "seconds" not in known:
            if say is not None:
                say(f"note: {self.path}: damaged; what the run had cost before is not known and does not count")
            return dict(_NOTHING)
        return _NOTHING | {"flops": progress.flops} | known  # of before they were counted here: those of the updates

    def clock(self, progress: Progress) -> dict[str, Any]:
        """Note what was spent since the last call; return all that the log tells of time and money."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        tokens, flops = progress.tokens - self._tokens, progress.flops - self._flops
        self.spent["seconds"] += seconds
        self.spent["updates"] += progress.step - self._updates
        self.spent["flops"] += flops
        if self.device.type == "cpu":
            cpu_seconds = time.process_time()
            self.spent["cpu_seconds"] += self.processes * (cpu_seconds - self._cpu_seconds)
            self._cpu_seconds = cpu_seconds
        # Each process has a GPU of its own; the counters of a processor are those of the whole machine.
        self.spent["joules"] += (self.energy.joules() or 0.0) * (self.processes if self.device.type == "cuda" else 1)
        self._tokens, self._flops, self._updates = progress.tokens, progress.flops, progress.step
        atomic.write_file(self.path, atomic.json_bytes(self.told()))
        if not self.ceiling and now - self._begin > _PATIENCE:
            self.ceiling = self.processes * matrix_ceiling(self.dtype, self.device)
            self._last, self._cpu_seconds = time.perf_counter(), time.process_time()
        return {
            "seconds": round(now - self._begin, 1),
            "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
            "mfu": round(flops / seconds / self.ceiling, 4) if tokens and self.ceiling else None,
            "spent": self.total(),
        }

    def told(self) -> dict[str, float]:
        """Return what `spent.json` holds: what was counted, and what follows from it."""
        return self.spent | self.total()

    def total(self) -> dict[str, float]:
        """Return what the run has cost up to the last call of `clock`; what is not known is left out."""
        hours, measured = self.spent["seconds"] / 3600, self.spent["joules"] / 3.6e6
        energy = self.cost.watts * hours / 1000 or measured
        estimated = 0.0 if energy else _CORE_WATTS * self.spent["cpu_seconds"] / 3.6e6
        found = {
            "hours": hours,
            "kwh": energy,
            "kwh_measured": measured,
            "kwh_estimated": estimated,
            "price": self.cost.price_per_hour * hours,
            "co2_grams": self.cost.carbon_intensity * (energy or estimated),
        }
        return {name: round(value, 6) for name, value in found.items() if value}

    def sentence(self, progress: Progress) -> str:
        """Return what the run has cost as one line for people."""
        rate = f" ({self._rate():.0%} of the machine's ceiling)" if self.ceiling else ""
        words = [
            f"{self.spent['seconds'] / 60:.1f} minutes",
            f"{progress.flops / 1e12:,.3g} TFLOP{rate}",
            f"{_padding(progress):.1%} padding",
        ]
        repeated = self.spent["updates"] - progress.step
        words += [f"{repeated} updates done again after a kill"] if repeated > 0 else []
        return "spent: " + ", ".join(words + self._paid())

    def brief(self, progress: Progress) -> list[str]:
        """Return the same in a few words each, the most telling first."""
        rate = [f"{self._rate():.0%} of ceiling"] if self.ceiling else []
        return [*rate, f"{_padding(progress):.1%} padding", *self._paid()]

    def _rate(self) -> float:
        """Return how much of the ceiling has been reached in all the time that is known."""
        return float(self.spent["flops"] / self.spent["seconds"] / self.ceiling)

    def _paid(self) -> list[str]:
        total = self.total()
        return [words.format(total[name]) for name, words in _PAID.items() if name in total]
