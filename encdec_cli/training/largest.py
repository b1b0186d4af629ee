"""The largest micro-batch of a run: what it needs, and whether it works, asked before the first update."""

from __future__ import annotations

from encdec_cli.training.memory import Forecast, Need
from encdec_cli.training.trainer import Trainer


def need(trainer: Trainer, tokens: int = 0) -> Need:
    """Predict the memory of training by computing parts of its largest micro-batch, and of a validation.

    tokens: of a micro-batch, if they are to be other than the run's. Every process must ask at once.
    """
    ranks, train = trainer.ranks, trainer.train
    sampler = trainer.sampler_of(tokens) if tokens else trainer.sampler
    vocabulary = len(trainer.setting.data.target.vocabulary)
    decoding = ranks.first_does("the forecast of memory", lambda: trainer.validation.peak(trainer.bundle))
    return Forecast(
        gradients=trainer.gradients,
        optimizer=trainer.optimizer,
        accumulate=len(ranks.share(range(train.accumulate))),
        vocabulary=vocabulary,
        load=trainer.first,
        copy=trainer.bundle.model,
        decoding=decoding if ranks.first else 0,
    ).need(trainer.largest(sampler))


def try_largest(trainer: Trainer) -> tuple[int, int, int]:
    """Run the largest micro-batches and decode one batch of the longest sources, then forget both.

    Returns the number of weights, of those that learn, and of micro-batches in an epoch. Raises what training would
    raise.
    """
    gradients = trainer.gradients
    trainer.compile()
    largest = trainer.first(trainer.largest(trainer.sampler))
    list(gradients.of([largest] * gradients.workers, 1.0, 0))
    trainer.close()
    if trainer.ranks.first:
        trainer.validation.try_longest(trainer.bundle)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in trainer.bundle.model.parameters()]
    learning = sum(size for size, learns in sizes if learns)
    return sum(size for size, _ in sizes), learning, len(trainer.sampler)
