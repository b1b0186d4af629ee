"""What a micro-batch costs a model: the number that training makes small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from encdec_cli.data.batch import Batch
from encdec_cli.models.model import Model
from encdec_cli.recipe import Train
from encdec_cli.training.loss import real_rows, token_loss


class Objective(Protocol):
    """The loss of a micro-batch, a sum over its target tokens in nats."""

    def __call__(self, model: Model, batch: Batch, parameters: Sequence[nn.Parameter], weight: float) -> Tensor:
        """Return `weight` times the summed loss, a scalar to be differentiated.

        Args:
            model: in training mode.
            batch: with targets, on the model's device.
            parameters: those that learn.
            weight: 1 / (target tokens of the whole update), so that micro-batches add up to the mean of its tokens.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Label-smoothed cross-entropy of each target token, given those before it."""

    smoothing: float

    def __call__(self, model: Model, batch: Batch, parameters: Sequence[nn.Parameter], weight: float) -> Tensor:
        """Return `weight` times the summed loss; see `Objective`."""
        target = batch.known_target
        hidden = model(batch.source, batch.source_mask, target[:, :-1])
        rows, labels = real_rows(hidden, target[:, 1:])
        loss, _ = token_loss(rows, model.project, labels, self.smoothing, parameters, weight=weight)
        return loss


def make_objective(train: Train) -> Objective:
    """Return the objective of a recipe."""
    return CrossEntropy(train.label_smoothing)
