"""A trainer in this process, for tests that look inside a run or disturb it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from encdec_cli.recipe import load
from encdec_cli.training.data import prepared_data
from encdec_cli.training.signals import Stop
from encdec_cli.training.trainer import Setting, Trainer


def trainer(recipe: Path, run: Path, *overrides: str, say: Callable[[str], None] = str, device: str = "cpu") -> Trainer:
    """What `encdec train RECIPE OVERRIDES --output RUN` would let run; the caller holds no lock and gets no signals."""
    torch.set_num_threads(1)
    loaded = load(recipe, ["train.precision=fp32", *overrides])
    data, _ = prepared_data(loaded, run, say)
    return Trainer(Setting(loaded, data, run, device, Stop(), say))


def losses(recipe: Path, run: Path, *overrides: str, device: str = "cpu") -> list[float]:
    """The loss of every update of a run."""
    found: list[float] = []
    trainer(recipe, run, *overrides, device=device).run(lambda step, loss, tokens, best: found.append(loss))
    return found


def ignore(step: int, loss: float, tokens: int, best: float | None) -> None:
    """Show nothing."""
