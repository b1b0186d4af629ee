"""The training loop: update, sometimes log, validate and save; every part of its state is in `Progress`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.bundle import Bundle, build_model
from encdec_cli.bundle.checkpoint import Checkpoint, Progress
from encdec_cli.bundle.run import recover
from encdec_cli.data.batch import Batch, collate
from encdec_cli.data.prepare import Prepared
from encdec_cli.data.sampler import Ints, Sampler
from encdec_cli.errors import NonFiniteError, UsageError
from encdec_cli.generation.flags import usual_ratios
from encdec_cli.recipe import Recipe, Train
from encdec_cli.registry import Plugin
from encdec_cli.training import precision, resume
from encdec_cli.training.clock import Clock
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.initial import take_weights
from encdec_cli.training.keeper import Keeper
from encdec_cli.training.layout import make_layout
from encdec_cli.training.log import Log
from encdec_cli.training.objective import make_objective
from encdec_cli.training.rules import make_optimizer
from encdec_cli.training.schedule import learning_rate
from encdec_cli.training.signals import Stop
from encdec_cli.training.validation import Validation

T = TypeVar("T")
Show = Callable[[int, float, int, "float | None"], None]
"""Is told of each update: its number, loss per target token, target tokens, and the best validation score."""


@dataclass
class Setting:
    """What a run is made of."""

    recipe: Recipe
    data: Prepared
    run: Path
    device: str
    stop: Stop
    say: Callable[[str], None]
    """Is given sentences for the user."""
    plugins: Sequence[Plugin] = ()
    init_from: Bundle | None = None
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train together."""


class Trainer:
    """One run: from its newest checkpoint, or from the start, to its end."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ranks = setting.ranks
        self.train: Train = setting.recipe.train
        self.run_folder = setting.run
        self.progress = Progress()
        source, target = setting.data.source, setting.data.target
        torch.manual_seed(self.train.seed)
        model = build_model(setting.recipe, len(source.vocabulary), len(target.vocabulary)).to(setting.device)
        if setting.init_from is not None:
            take_weights(model, setting.init_from, source, target)
        self.model = model
        self.layout = make_layout(setting.recipe.parallel.shard, self.ranks)
        chosen = precision.choose(self.train.precision, setting.device)
        whole = self.layout.whole(model, chosen)
        self.bundle = Bundle(setting.recipe, whole, source, target, plugins=setting.plugins)
        self.store = setting.data.store("train")
        self.optimizer = make_optimizer(model, self.train, self._load(np.array([0])), chosen.dtype)
        chosen.apply(whole)
        self.precision = chosen.name
        lengths = self.store.source_lengths, self.store.target_lengths
        self.sampler = Sampler(*lengths, self.train.tokens, setting.data.data_hash, self.train.seed)
        self._check_positions()
        self._check_share()
        most = len(self.ranks.share(range(self.train.accumulate)))
        self.gradients = self.layout.gradients(model, self.optimizer.parameters, make_objective(self.train), most)
        self.validation = Validation(setting.data, setting.recipe, setting.device)
        self.facts = resume.facts(setting.recipe, setting.data.data_hash, self.precision, self.ranks.world)
        self.checkpoints = setting.run / "checkpoints"
        self._unsaved = False
        self.log = Log(setting.run / "log.jsonl")
        self.clock = Clock()
        known = {"length_ratios": usual_ratios(*lengths)}
        told = setting.stop, setting.say, self._write_log
        self.keeper = Keeper(setting.run, self.train, self.validation, known, *told)
        self._resume()

    def run(self, show: Show) -> None:
        """Train until nothing is left to do. A signal saves first and raises StoppedError."""
        with closing(self.gradients):
            self._run(show)

    def _run(self, show: Show) -> None:
        self.setting.stop.at_once = False
        progress = self.progress
        updates = self.sampler.updates(progress.step, self.train.accumulate)
        while not progress.finished:
            if self._due(self.train.validate_every) and progress.validated < progress.step:
                self._validate()
            stop = self.ranks.total(f"update {progress.step}", bool(self.setting.stop)) > 0
            over = not stop and self._is_over()
            if over:
                self._finish()
            if self._unsaved and (self._must_save() or stop):
                self._save()
            if stop:
                where = f"saved at update {progress.step}; the same command continues"
                raise self.setting.stop.error(f"stopped by a signal; {where}.")
            if not over:
                self._update(next(updates), show)

    def _check_positions(self) -> None:
        stores = (self.store, self.setting.data.store("valid"))
        lengths = [each for store in stores for each in (store.source_lengths, store.target_lengths)]
        longest = 1 + max(int(each.max(initial=0)) for each in lengths)
        most = self.model.max_positions
        if most is not None and longest > most:
            raise UsageError(
                f"model.max_positions: {most} positions, but the longest example has {longest} tokens; raise "
                "it, or lower text.max_source and text.max_target."
            )

    def _check_share(self) -> None:
        """Every process must have a part of every update; equal parts are best."""
        parts, world = self.train.accumulate, self.ranks.world
        if parts < world:
            raise UsageError(
                f"train.accumulate: {world} processes cannot share an update of {parts} micro-batches; it must be a "
                f"multiple of {world}, with a smaller train.tokens if the update is to stay as large as it was."
            )
        if parts % world and self.layout.even:
            raise UsageError(f"train.accumulate: with parallel.shard it must be a multiple of {world}, the processes.")
        if parts % world:
            self.setting.say(f"note: {parts} micro-batches an update, {world} processes: some wait for the others")

    def try_largest(self) -> tuple[int, int]:
        """Run the largest micro-batches and decode one batch of the longest sources, then forget both.

        Returns the number of weights and of micro-batches in an epoch. Raises what training would raise.
        """
        batches = self.sampler.batches(0)
        for lengths in (self.store.target_lengths, self.store.source_lengths):
            sizes = [len(rows) * int(lengths[rows].max() + 1) ** 2 for rows in batches]
            largest = self._load(batches[sizes.index(max(sizes))])
            list(self.gradients.of([largest] * self.gradients.workers, 1.0, 0))
        self.gradients.close()
        if self.ranks.first:
            self.validation.try_longest(self.bundle)
        return sum(parameter.numel() for parameter in self.model.parameters()), len(batches)

    def _load(self, rows: Ints) -> Batch:
        return collate(*self.store.gather(rows), rows.tolist()).to(self.setting.device)

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return step > 0 and every > 0 and (step % every == 0 or step >= self.train.steps)

    def _must_save(self) -> bool:
        """A validation is always followed by a checkpoint: that is what makes its bundle the run's model."""
        progress = self.progress
        return self._due(self.train.save_every) or progress.finished or progress.validated == progress.step

    def _is_over(self) -> bool:
        patience = self.train.patience
        return self.progress.step >= self.train.steps or 0 < patience <= self.progress.stale

    def _update(self, batches: Sequence[Ints], show: Show) -> None:
        """One update: the gradient of the mean loss over all target tokens of all micro-batches, then a step."""
        progress, step = self.progress, self.progress.step + 1
        numbers = self.ranks.share(range(len(batches)))
        loaded = [self._load(batches[number]) for number in numbers]
        tokens = sum(int(self.store.target_lengths[rows].sum()) + len(rows) for rows in batches)  # EOS counts
        loss = 0.0
        # A seed of its own for each update: no random state has to be saved.
        for part, gradient in self.gradients.of(loaded, 1 / tokens, self.train.seed * 1_000_003 + step, numbers):
            self.optimizer.collect(gradient)
            loss += part
        loss = self.ranks.total(f"update {step}", loss)
        self.ranks.sum(f"update {step}", self.optimizer.gradients())
        norm = self.optimizer.clip(self.train.clip, partial(self.ranks.total, f"update {step}"))
        self._check_finite(loss, norm, step, batches)
        rate = learning_rate(step, self.train.schedule, self.train.rate, self.train.warmup, self.train.steps)
        self.optimizer.step(rate)
        self._unsaved = True
        progress.step = step
        progress.tokens += tokens
        progress.loss += loss
        progress.loss_tokens += tokens
        show(step, loss / tokens, tokens, progress.best)
        if step % self.train.log_every == 0:
            self._log_training(rate, norm)

    def _check_finite(self, loss: float, norm: float, step: int, batches: Sequence[Ints]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        rows = ", ".join(str(row) for batch in batches for row in batch[:5].tolist())
        raise NonFiniteError(
            f"update {step}: loss {loss}, gradient norm {norm}; the weights are untouched and the last checkpoint is "
            f"good (update {max(checkpoint.steps(self.checkpoints), default=0)}). First training examples of the "
            f"update: {rows} …; lower train.rate, raise train.warmup, or use train.precision=fp32."
        )

    def _log_training(self, rate: float, norm: float) -> None:
        progress = self.progress
        fields = {
            "epoch": self.sampler.place(progress.step, self.train.accumulate)[0],
            "loss": progress.loss / progress.loss_tokens,
            "rate": rate,
            "norm": norm,
            "tokens": progress.tokens,
        }
        self._write_log("train", fields)
        progress.loss, progress.loss_tokens = 0.0, 0

    def _validate(self) -> None:
        weights = self.layout.weights(self.model, self.optimizer, self.bundle.model)

        def judge() -> bool:
            return self.keeper.judge(self.bundle, self.progress, weights)

        self._unsaved |= self._let_first("the validation", judge)

    def _let_first(self, what: str, work: Callable[[], T]) -> T:
        """Let the first process do what reads or writes the run's files; what it makes of `Progress` is then all's."""

        def done() -> tuple[T, dict[str, Any]]:
            return work(), asdict(self.progress)

        result, progress = self.ranks.first_does(f"{what} after update {self.progress.step}", done)
        vars(self.progress).update(progress)
        return result

    def _finish(self) -> None:
        weights = self.layout.weights(self.model, self.optimizer, self.bundle.model)

        def finish() -> bool:
            return self.keeper.finish(self.bundle, self.progress, weights)

        if self._let_first("the end of training", finish):
            self._unsaved = self.progress.finished = True

    def _write_log(self, event: str, fields: Mapping[str, Any]) -> None:
        if self.ranks.first:
            self.log.write(self.progress.step, event, fields, self.clock.fields(self.progress.tokens))
        self.progress.log_lines += 1

    def _save(self) -> None:
        state = self.optimizer.state() | {
            f"buffer.{name}": value for name, value in self.model.named_buffers() if name in self.model.state_dict()
        }

        if self.ranks.first:
            self.log.sync()
        own = Checkpoint(self.progress, state, self.facts)
        self.layout.save(self.checkpoints, own, self.optimizer.rows())
        self._let_first("the checkpoint", partial(self.keeper.publish, self.progress))
        self._unsaved = False

    def _resume(self) -> None:
        step = self._let_first("the start", self._recover)
        if step is None:
            return
        found = checkpoint.read(self.checkpoints, step, self.optimizer.rows())
        resume.check(found.facts, self.facts, self.run_folder, self.setting.say)
        self.progress = found.progress
        self.progress.finished = found.progress.finished and self._is_over()
        self._let_first("the start", self._go_on)
        buffers = {n.removeprefix("buffer."): t for n, t in found.tensors.items() if n.startswith("buffer.")}
        self.model.load_state_dict(buffers, strict=False)
        self.optimizer.load({n: t for n, t in found.tensors.items() if not n.startswith("buffer.")})
        if not self.progress.finished:
            self.setting.say(f"going on from update {self.progress.step} of {self.train.steps}")

    def _recover(self) -> int | None:
        """Bring the folder in order; return the update of the newest whole checkpoint."""
        for folder in (self.checkpoints, self.keeper.folder):
            checkpoint.recover(folder)
        recover(self.run_folder)
        step = checkpoint.newest(self.checkpoints, self.setting.say)
        if step is None:
            self.log.keep(0)
        return step

    def _go_on(self) -> None:
        self.log.keep(self.progress.log_lines)
        self.keeper.forget_lost(self.progress)
        self.keeper.publish(self.progress)
