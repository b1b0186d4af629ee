"""How fast a recipe trains here: some updates on its data, of which nothing is kept."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

from encdec_cli.training.trainer import Trainer


@dataclass(frozen=True)
class Pace:
    """The speed of training."""

    tokens_per_second: float
    """Target tokens, EOS counted, padding not."""
    flops_per_second: float
    """Of the model, as `train` counts them."""


def training_pace(trainer: Trainer, seconds: float) -> Pace:
    """Train for some seconds, at least two updates after one to warm up, and forget it with the trainer."""
    trainer.train = replace(trainer.train, log_every=sys.maxsize)  # no disk in what is measured
    trainer.compile()
    updates = trainer.updates()
    trainer.update(next(updates), lambda *_: None)
    tokens, flops = trainer.progress.tokens, trainer.progress.flops
    begin, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - begin < seconds:
        trainer.update(next(updates), lambda *_: None)
        done += 1
    took = time.perf_counter() - begin
    trainer.close()
    return Pace((trainer.progress.tokens - tokens) / took, (trainer.progress.flops - flops) / took)
