"""A loss or a gradient that is not finite never reaches the weights, and what is done about it is exact."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from encdec_cli.bundle import checkpoint
from encdec_cli.errors import NonFiniteError, StoppedError
from encdec_cli.training.trainer import Trainer
from tests.conftest import log_lines
from tests.trainers import ignore, trainer

SMALL = ("train.steps=14", "train.accumulate=2", "train.tokens=128", "train.validate_every=0", "train.log_every=1")
SEED = 1_000_003


def poisoned(made: Trainer, updates: set[int], value: float, in_loss: bool = True, part: int = 1) -> Trainer:
    """Let one micro-batch of some updates have a loss, or else a gradient, that is `value`."""
    clean = made.gradients.of

    def of(batches, weight, seed, numbers):
        for number, (loss, gradient) in enumerate(clean(batches, weight, seed, numbers)):
            bad = number == part and seed - SEED in updates
            if bad and not in_loss:
                gradient[3].view(-1)[0] = value
            yield (value if bad and in_loss else loss), gradient

    made.gradients.of = of
    return made


def masters(made: Trainer, step: int) -> dict[str, torch.Tensor]:
    state = checkpoint.load(made.checkpoints, step).tensors
    return {name: value for name, value in state.items() if name.startswith("master.")}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(run: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "clock"} for line in log_lines(run)]


@pytest.fixture(scope="module")
def clean(corpus, tmp_path_factory) -> Trainer:
    """A run that nothing disturbed, with a checkpoint of every update."""
    made = trainer(corpus, tmp_path_factory.mktemp("clean") / "run", *SMALL, "train.save_every=1", "train.keep=99")
    made.run(ignore)
    return made


@pytest.mark.parametrize(
    ("step", "value", "in_loss"), [(2, math.nan, True), (9, math.inf, False), (13, -math.inf, False)]
)
def test_it_stops_before_the_update_with_the_batch_and_its_rows(corpus, clean, tmp_path, value, step, in_loss):
    made = poisoned(trainer(corpus, tmp_path / "run", *SMALL, "train.save_every=1"), {step}, value, in_loss)
    with pytest.raises(NonFiniteError) as caught:
        made.run(ignore)
    said = str(caught.value)
    number = 2 * (step - 1) + 1  # the second micro-batch of its update
    epoch, position = divmod(number, len(made.sampler))
    rows = made.sampler.batch(epoch, position)
    assert said.startswith(f"update {step}: ")
    assert f"from batch {position + 1} of epoch {epoch + 1} (" in said
    assert f"examples {', '.join(str(row + 1) for row in rows[:8])}" in said
    assert "counted from 1 as the corpus has them" in said
    assert checkpoint.steps(made.checkpoints) == [saved for saved in (step - 2, step - 1) if saved]
    assert equal(masters(made, step - 1), masters(clean, step - 1))


def test_the_command_ends_with_exit_code_7(forks, corpus, tmp_path):
    done = forks("train", corpus, "--output", tmp_path / "run", "train.rate=1e30", "train.warmup=0", "train.clip=0")
    assert done.wait() == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert "train.on_nan=skip" in done.stderr


def test_skip_leaves_the_update_out_and_nothing_else(corpus, clean, tmp_path):
    overrides = (*SMALL, "train.on_nan=skip", "train.save_every=1", "train.keep=99")
    made = poisoned(trainer(corpus, tmp_path / "run", *overrides), {6}, math.nan)
    made.run(ignore)
    assert equal(masters(made, 5), masters(clean, 5))
    assert equal(masters(made, 6), masters(made, 5))
    assert not equal(masters(made, 7), masters(made, 6))
    assert made.progress.skipped == [6]
    assert made.progress.order == clean.progress.order
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines if line["event"] == "non_finite"] == [6]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14]
    assert all(math.isfinite(line["loss"]) for line in lines if line["event"] == "train")


def test_too_many_in_a_row_are_the_end(corpus, tmp_path):
    overrides = (*SMALL, "train.on_nan=skip", "train.steps=40")
    made = poisoned(trainer(corpus, tmp_path / "run", *overrides), {2, *range(4, 20)}, math.nan)
    with pytest.raises(NonFiniteError, match=r"update 13: .*10 in a row"):
        made.run(ignore)
    assert made.progress.skipped == [2, *range(4, 13)]


def test_rollback_takes_the_weights_back_and_the_data_forward(corpus, clean, tmp_path):
    overrides = (*SMALL, "train.on_nan=rollback", "train.save_every=5", "train.keep=99")
    made = poisoned(trainer(corpus, tmp_path / "run", *overrides), {8}, math.inf, in_loss=False)
    before, own = {}, made.gradients.of

    def watched(batches, weight, seed, numbers):
        before[seed - SEED] = {f"master.{name}": value.clone() for name, value in made.optimizer.masters().items()}
        return own(batches, weight, seed, numbers)

    made.gradients.of = watched
    made.run(ignore)
    assert equal(before[8], masters(clean, 7))
    assert equal(before[9], masters(clean, 5))
    assert made.progress.skipped == [8]
    assert made.progress.order == clean.progress.order


def test_rollback_without_a_checkpoint_stops(corpus, tmp_path):
    made = poisoned(trainer(corpus, tmp_path / "run", *SMALL, "train.on_nan=rollback"), {3}, math.nan)
    with pytest.raises(NonFiniteError, match="no checkpoint yet"):
        made.run(ignore)


def broken_at(made: Trainer, updates: set[int], how: type[BaseException]) -> Callable[..., None]:
    """Interrupt after some updates, by a signal or as kill -9 would: with nothing saved."""

    def show(step: int, *_: object) -> None:
        if step in updates:
            updates.discard(step)
            if how is StoppedError:
                made.setting.stop.signal = signal.SIGTERM
            else:
                raise how

    return show


@pytest.mark.parametrize(
    ("on_nan", "how"), [("skip", StoppedError), ("rollback", StoppedError), ("rollback", KeyboardInterrupt)]
)
def test_interrupted_around_it_the_run_ends_with_the_same_bytes(corpus, tmp_path, on_nan, how):
    overrides = (*SMALL, f"train.on_nan={on_nan}", "train.save_every=5")
    bad = {8, 12}
    unbroken = poisoned(trainer(corpus, tmp_path / "unbroken", *overrides), bad, math.nan)
    unbroken.run(ignore)
    left = {3, 7, 9, 13}
    while True:
        made = poisoned(trainer(corpus, tmp_path / "broken", *overrides), bad, math.nan)
        try:
            made.run(broken_at(made, left, how))
        except how:
            continue
        break
    assert not left
    assert made.progress == unbroken.progress
    assert equal(masters(made, 14), masters(unbroken, 14))
    assert log(tmp_path / "broken") == log(tmp_path / "unbroken")


def test_skipping_keeps_the_checkpoint_from_before_it(corpus, tmp_path):
    overrides = (*SMALL, "train.on_nan=skip", "train.save_every=1", "train.keep=2")
    made = poisoned(trainer(corpus, tmp_path / "run", *overrides), set(range(4, 15)), math.nan)
    with pytest.raises(NonFiniteError) as caught:
        made.run(ignore)
    assert checkpoint.steps(made.checkpoints) == [3, 11, 12]
    assert "the last checkpoint is of update 12, the last from before updates were left out of 3: delete" in str(
        caught.value
    )
    last = log(tmp_path / "run")[-1]
    assert (last["step"], last["done"]) == (13, "stopped")
    assert last["where"].startswith("batch ")


def test_before_the_first_checkpoint_none_is_called_good(corpus, tmp_path):
    made = poisoned(trainer(corpus, tmp_path / "run", *SMALL), {2}, math.nan)
    with pytest.raises(NonFiniteError, match="nothing was saved yet"):
        made.run(ignore)
