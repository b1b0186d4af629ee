"""Token-level knowledge distillation: at every position a student learns the distribution of a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import ClassVar

import torch
from torch import Tensor, nn

from encdec_cli.bundle.bundle import Bundle, load_alike
from encdec_cli.data.batch import Batch, before
from encdec_cli.models.model import Model
from encdec_cli.training.loss import Criterion, CrossEntropy, Project, chunked_loss, real_rows


@dataclass(frozen=True)
class Distillation:
    """Label-smoothed cross-entropy, mixed with the divergence from a teacher's distributions.

    The word-level distillation of Kim and Rush 2016 (https://arxiv.org/abs/1606.07947, section 3.1), with the
    temperature of Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): see `Divergence`.
    """

    teacher: Model
    """In evaluation mode; it reads and writes the student's ids."""
    smoothing: float
    prior: Tensor | None
    """[vocab]: how the smoothing spreads; None: evenly."""
    weight: float
    temperature: float
    _turn: Lock = field(default_factory=Lock)

    def __call__(self, model: Model, batch: Batch, parameters: Iterable[nn.Parameter], weight: float) -> Tensor:
        """Return `weight` times the summed loss; see `Objective`."""
        target = batch.known_target
        rows, labels = real_rows(model(batch.source, batch.source_mask, batch.decoder_input), target[:, 1:])
        # Micro-batches are computed side by side; not every model can be.
        with torch.no_grad(), nullcontext() if self.teacher.side_by_side else self._turn:
            hidden, _ = real_rows(self.teacher(batch.source, batch.source_mask, before(target)), target[:, 1:])
        base = CrossEntropy(labels, self.smoothing, self.prior)
        criterion = Divergence(base, hidden, self.teacher.project, self.weight, self.temperature)
        return chunked_loss(rows, model.project, criterion, parameters, weight)


@dataclass(frozen=True)
class Divergence:
    """(1 - weight) times a criterion, plus weight x T² times KL(teacher, student) in nats, both at temperature T.

    T² keeps the gradient's size (Hinton et al. 2015, section 2.1).
    """

    group: ClassVar[int] = 1

    base: Criterion
    hidden: Tensor
    """[n, dim]: the teacher's states for all rows."""
    project: Project
    """The teacher's output layer."""
    weight: float
    temperature: float

    def __call__(self, logits: Tensor, rows: slice, weight: float) -> tuple[Tensor, Tensor]:
        """Return loss and gradient; see `Criterion`."""
        logits = logits.float()  # and so is the gradient, to which more is added
        total, gradient = self.base(logits, rows, weight * (1 - self.weight))
        with torch.no_grad():
            wanted = self.project(self.hidden[rows]).float().div(self.temperature).log_softmax(1)
        found = logits.div(self.temperature).log_softmax(1)
        chances = wanted.exp()
        divergence = (chances * (wanted - found)).sum() * self.temperature**2
        # By the logits: T² times softmax minus the teacher's, over T.
        gradient.add_(found.exp_().sub_(chances), alpha=weight * self.weight * self.temperature)
        return (1 - self.weight) * total + self.weight * divergence, gradient


def with_teacher(bundle: Bundle, path: Path, prior: Tensor | None, dtype: torch.dtype) -> Distillation:
    """Return the objective of a bundle whose recipe names the teacher at `path`.

    prior: as of `Distillation`. dtype: of the teacher. Raises BundleError unless it reads and writes the same ids.
    """
    section = bundle.recipe.teacher
    teacher = load_alike("teacher", path, bundle, dtype).model.requires_grad_(False)
    smoothing = bundle.recipe.train.label_smoothing
    return Distillation(teacher, smoothing, prior, section.weight, section.temperature)
