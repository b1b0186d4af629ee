"""An update whose loss or gradient is not finite is never made; `train.on_nan` says how the run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from encdec_cli.data.batch import Batch
from encdec_cli.recipe import Train
from encdec_cli.training.gradients import shapes_of
from encdec_cli.training.layout import Computing

MOST = 10
"""Updates left out in a row, or going back to one checkpoint, after which the run stops whatever the recipe says."""
_SHOWN = 8


def culprits(
    gradients: Computing, batches: Sequence[Batch], weight: float, seed: int, numbers: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the numbers of the micro-batches whose loss is not finite, and of those whose gradient is not.

    Computes each again, as `Gradients.of` did with the same arguments. Gradients may be sums over several processes'
    micro-batches, losses are of one.
    """
    by_loss, by_gradient = [], []
    for number, (loss, gradient) in zip(numbers, gradients.of(batches, weight, seed, numbers), strict=True):
        if not math.isfinite(loss):
            by_loss.append(number)
        if not all(bool(part.isfinite().all()) for part in gradient if part is not None):
            by_gradient.append(number)
    return by_loss, by_gradient


def named(batches: Iterable[tuple[int, int, Batch]], every_line: bool) -> str:
    """Return batches, each with its epoch and its place in it, and their examples in words.

    every_line: whether every example of the corpus was kept, so that the numbers are those of its lines.
    """
    parts = []
    for epoch, position, batch in batches:
        rows = ", ".join(str(row + 1) for row in batch.rows[:_SHOWN])
        more = f" … ({len(batch.rows)} in all)" if len(batch.rows) > _SHOWN else ""
        parts.append(
            f"batch {position + 1} of epoch {epoch + 1} ({shapes_of(batch)}) with the training examples {rows}{more}"
        )
    counted = "as the corpus has them" if every_line else "of those that were kept when the data was prepared"
    return f"{'; '.join(parts)}, counted from 1 {counted}"


def anchor(train: Train, steps: Iterable[int]) -> int | None:
    """Return the newest of the checkpoints of these updates that a run has which no signal ever stopped, or None."""
    every = [number for number in (train.save_every, train.validate_every) if number]
    return max((step for step in steps if any(step % number == 0 for number in every)), default=None)


def before_row(steps: Iterable[int], skipped: Sequence[int], last: int) -> int | None:
    """Return the newest of the checkpoints of these updates from before the row of updates left out that `last` ends.

    What made them so may have been learned just before: those saved since then may be ruined. None if `last` was made.
    """
    left_out, first = set(skipped), last
    while first in left_out:
        first -= 1
    return None if first == last else max((step for step in steps if step <= first), default=None)


def stopped(what: str, reason: str, steps: Sequence[int], skipped: Sequence[int], step: int) -> str:
    """Return what a run says that stops at update `step`, whose checkpoints are of `steps`."""
    newest, before = max(steps, default=None), before_row(steps, [*skipped, step], step)
    saved = "nothing was saved yet" if newest is None else f"the last checkpoint is of update {newest}"
    if before is not None and before != newest:
        saved += f", the last from before updates were left out of {before}: delete the later ones to go back to it"
    return (
        f"{what}; no update was made with it, and {saved}; {reason}; lower train.rate, raise train.warmup, or use "
        "train.precision=fp32."
    )


def reason_to_stop(train: Train, step: int, skipped: Sequence[int], back_to: int | None) -> str | None:
    """Return why the run must not go on after update `step` was left out, or None.

    Args:
        skipped: updates that were left out before, oldest first.
        back_to: the checkpoint that a rollback would take.
    """
    if train.on_nan == "stop":
        return "train.on_nan=skip or rollback would go on without it"
    if train.on_nan == "rollback" and back_to is None:
        return "there is no checkpoint yet to go back to"
    since = step - MOST if train.on_nan == "skip" else back_to or 0
    if sum(number > since for number in skipped) < MOST - 1:
        return None
    return f"{MOST} in a row" if train.on_nan == "skip" else f"the {MOST}th since the checkpoint of update {back_to}"
