"""The training loop: update, sometimes log, validate and save; every part of its state is in `Progress`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from encdec_cli import atomic
from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.bundle import Bundle, build_model
from encdec_cli.bundle.checkpoint import Checkpoint, Progress
from encdec_cli.bundle.run import FACTS, recover
from encdec_cli.data.bands import Ints
from encdec_cli.data.batch import Batch
from encdec_cli.data.prepare import Prepared
from encdec_cli.data.sampler import Sampler
from encdec_cli.errors import NonFiniteError
from encdec_cli.generation.flags import usual_ratios
from encdec_cli.recipe import Recipe, Train
from encdec_cli.registry import Plugin
from encdec_cli.training import flops, nonfinite, precision, resume
from encdec_cli.training.account import Account, work
from encdec_cli.training.compiling import compiles
from encdec_cli.training.data import check_lengths
from encdec_cli.training.distributed import Ranks
from encdec_cli.training.feed import Feed
from encdec_cli.training.initial import take_weights
from encdec_cli.training.keeper import Keeper
from encdec_cli.training.layout import make_layout
from encdec_cli.training.learning import freeze
from encdec_cli.training.log import Log
from encdec_cli.training.lora import adapt, check_start
from encdec_cli.training.objective import make_objective
from encdec_cli.training.rules import hidden_matrices, make_optimizer
from encdec_cli.training.schedule import learning_rate
from encdec_cli.training.signals import Stop
from encdec_cli.training.tensorboard import Board
from encdec_cli.training.validation import Validation

T = TypeVar("T")
Show = Callable[[int, float, int, "float | None"], None]
"""Is told of each update: its number, loss per target token, target tokens, and the best validation score."""

Job = tuple[Sequence[Batch], float, int, Sequence[int]]  # what `Gradients.of` is given


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
    say_own: Callable[[str], None] | None = None
    """Is given what this process alone has met; `say` if there is none."""


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
            for sentence in take_weights(model, setting.recipe, setting.init_from, source, target):
                setting.say(sentence)
        adapt(model, setting.recipe.lora)
        freeze(model, self.train.freeze)
        self.model = model
        model.checkpointing = self.train.checkpointing
        self.store = setting.data.store("train")
        self.sampler = self.sampler_of(int(self.train.tokens))  # `auto` has been settled
        self.say_own = setting.say_own or setting.say
        self.layout = make_layout(setting.recipe, self.ranks, setting.run, self.say_own)
        check_lengths(setting.data, model)
        chosen = precision.choose(self.train.precision, setting.device)
        self.bundle = Bundle(setting.recipe, model, source, target, plugins=setting.plugins)
        compiled = compiles(setting.recipe, model, setting.device)
        model.packs = not compiled and model.can_pack(chosen.dtype, setting.device)
        self.objective = make_objective(self.bundle, self.store, setting.device, chosen.dtype)
        if self.layout.even:
            _ = self.formula  # which, as objective and inner matrices, shares of a model do not tell
        inner = hidden_matrices(model) if self.train.optimizer == "muon" else ()
        self.bundle.model = whole = self.layout.whole(model, chosen)
        self.feed = Feed(replace(self.bundle, model=model), setting.data, setting.device, self.layout.alone)
        self.optimizer = make_optimizer(model, self.train, inner, chosen.dtype)
        chosen.apply(whole)
        self.precision = chosen.name
        # What is compiled takes its micro-batches in turn: it draws from torch's own seed.
        most = 1 if compiled else len(self.ranks.share(range(self.train.accumulate)))
        self.gradients = self.layout.gradients(model, self.optimizer.parameters, self.objective, most)
        self.validation = Validation(setting.data, setting.recipe, setting.device)
        computing = self.precision, setting.device, self.ranks.world
        how = {"compiled": compiled, "packed": model.packs}
        self.facts = resume.facts(setting.recipe, setting.data.data_hash, *computing) | how
        self.checkpoints = setting.run / "checkpoints"
        self._unsaved = False
        path = setting.run / "log.jsonl"
        self.log = Log(path, Board(path) if self.train.tensorboard else None)
        known = {"length_ratios": usual_ratios(self.store.source_lengths, self.store.target_lengths)}
        told = setting.stop, setting.say, self._write_log
        self.keeper = Keeper(setting.run, self.train, self.validation, known, *told)
        self._resume()
        machine = torch.device(setting.device), chosen.dtype
        who = self.ranks.world, setting.say
        self.account = Account(setting.run, setting.recipe.cost, *machine, self.progress, *who)

    @cached_property
    def formula(self) -> flops.Formula:
        """What the FLOPs of a micro-batch are, from its shape."""
        sizes = [len(side.vocabulary) for side in (self.setting.data.source, self.setting.data.target)]
        outputs = 1 + self.setting.recipe.risk.samples
        return flops.find(self.model, self.objective, sizes, self.setting.device, outputs)

    def run(self, show: Show) -> None:
        """Train until nothing is left to do. A signal saves first and raises StoppedError."""
        self.compile()
        with closing(self):
            self._run(show)

    def close(self) -> None:
        """Let the threads end that compute and that read ahead."""
        self.gradients.close()
        self.feed.close()

    def _run(self, show: Show) -> None:
        self.setting.stop.at_once = False
        progress = self.progress
        if self.ranks.first:
            atomic.write_file(self.run_folder / FACTS, atomic.json_bytes(self.facts))
            self.account.clock(progress)  # what came before is paid for too, but is no part of the speed
        updates = self.updates()
        while not progress.finished:
            if self._due(self.train.validate_every) and progress.validated < progress.step:
                self._validate()
            stop = self.ranks.total(f"update {progress.step}", bool(self.setting.stop.signal)) > 0
            over = not stop and self._is_over()
            if over:
                self._finish()
            if self._unsaved and (self._must_save() or stop):
                self._save()
            if stop:
                where = f"saved at update {progress.step}; the same command continues"
                raise self.setting.stop.error(f"stopped by a signal; {where}.")
            if not over:
                self.update(next(updates), show)

    def updates(self) -> Iterator[Sequence[Ints]]:
        """Yield the micro-batches of each update from here on, after the feed is told those of the one after it."""
        updates = self.sampler.updates(self.progress.step, self.train.accumulate)
        for step, (batches, upcoming) in enumerate(pairwise(updates), self.progress.step + 2):
            for number in self.ranks.share(range(len(upcoming))) if step <= self.train.steps else ():
                self.feed.expect(upcoming[number], step)
            yield batches

    def largest(self, sampler: Sampler) -> Ints:
        """Return the examples of the micro-batch that keeps the most in memory."""
        return sampler.cut(self.formula.heaviest(*sampler.lengths()))

    def compile(self) -> None:
        """Compile, if the run is to; from the same examples whenever it goes on, since its bits follow from those."""
        if not self.facts["compiled"] or self.model.compiled:
            return
        largest = self.first(self.largest(self.sampler))
        self.model.compile_layers()
        for batch in (largest, largest.take(0, 1)):  # with one row some sums are another program
            list(self.gradients.of([batch], 1.0, 0))

    def sampler_of(self, tokens: int) -> Sampler:
        """Return the order of micro-batches of so many tokens each."""
        lengths = self.store.source_lengths, self.store.target_lengths
        return Sampler(*lengths, tokens, self.setting.data.data_hash, self.train.seed)

    def first(self, rows: Ints) -> Batch:
        """Return some examples as a micro-batch of no update."""
        return self.feed(rows, 0)

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return step > 0 and every > 0 and (step % every == 0 or step >= self.train.steps)

    def _must_save(self) -> bool:
        """A validation is always followed by a checkpoint: that is what makes its bundle the run's model."""
        progress = self.progress
        return self._due(self.train.save_every) or progress.finished or progress.validated == progress.step

    @property
    def is_early(self) -> bool:
        """Whether validations have not become better for as long as `train.patience` bears, before the last update."""
        return 0 < self.train.patience <= self.progress.stale and self.progress.step < self.train.steps

    def _is_over(self) -> bool:
        return self.is_early or self.progress.step >= self.train.steps

    def update(self, batches: Sequence[Ints], show: Show) -> None:
        """One update: the gradient of the mean loss over all target tokens of all micro-batches, then a step."""
        progress, step = self.progress, self.progress.step + 1
        what, numbers = self.ranks.begin(f"update {step}"), self.ranks.share(range(len(batches)))
        loaded = [self.feed(batches[number], step) for number in numbers]
        tokens, *counts = self._count(what, loaded)
        loss = 0.0
        # A seed of its own for each update: no random state has to be saved.
        job = loaded, 1 / tokens, self.train.seed * 1_000_003 + step, numbers
        for part, gradient in self.gradients.of(*job):
            self.optimizer.collect(gradient)
            loss += part
        loss = self.ranks.total(what, loss, self.ranks.peers)
        self.ranks.sum(what, self.optimizer.gradients(), self.ranks.peers)
        copies = self.ranks.data, self.ranks.tensor
        norm = self.optimizer.clip(self.train.clip, partial(self.ranks.total, what), *copies)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._leave_out(f"loss {loss}, gradient norm {norm}", batches, job)
            return
        rate = learning_rate(step, self.train.schedule, self.train.rate, self.train.warmup, self.train.steps)
        self.optimizer.step(rate, self.ranks)
        self._passed(batches)
        progress.tokens += tokens
        progress.loss += loss
        progress.loss_tokens += tokens
        progress.flops += counts[0]
        progress.positions += counts[1]
        progress.real += counts[2]
        show(step, loss / tokens, tokens, progress.best)
        if step % self.train.log_every == 0 or step == self.train.steps:
            self._log_training(rate, norm)

    def _count(self, what: str, batches: Sequence[Batch]) -> list[int]:
        """Return target tokens, FLOPs, positions and real tokens of an update, of all processes; EOS is a token."""
        counts = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            source, target = flops.lengths(batch)
            positions = [flops.positions(source, target, packed) for packed in (self.model.packs, True)]
            new = [int(target.sum()), self.formula.flops_of(source, target), *positions]
            counts += torch.tensor(new, dtype=torch.float64)
        self.ranks.sum(what, [counts], self.ranks.peers)
        return [int(count) for count in counts.tolist()]

    def _passed(self, batches: Sequence[Ints]) -> None:
        """Note that the update with these examples is behind us."""
        progress = self.progress
        progress.step += 1
        progress.order = hashlib.sha256(progress.order.encode() + np.concatenate(batches).tobytes()).hexdigest()
        self._unsaved = True

    def _leave_out(self, found: str, batches: Sequence[Ints], job: Job) -> None:
        """Go on after an update whose gradient is not finite, as `train.on_nan` says, or raise NonFiniteError.

        A rollback takes the weights back and the data forward: with the same data it would end at the same place.
        """
        progress, train, step = self.progress, self.train, self.progress.step + 1
        self.optimizer.forget()
        bad = torch.zeros((2, len(batches)), dtype=torch.float64)
        for flags, numbers in zip(bad, nonfinite.culprits(self.gradients, *job), strict=True):
            flags[numbers] = 1
        self.ranks.sum(f"update {step}", [bad])
        by_loss, by_gradient = (flags.nonzero().flatten().tolist() for flags in bad)
        parts = by_loss or by_gradient or range(len(batches))
        first = progress.step * train.accumulate
        places = [(*divmod(first + part, len(self.sampler)), self.feed(batches[part], step)) for part in parts]
        counts = self.setting.data.facts["splits"]["train"]
        where = nonfinite.named(places, counts["read"] == counts["kept"])
        what, saved = f"update {step}: {found}, from {where}", checkpoint.steps(self.checkpoints)
        back_to, tell = nonfinite.anchor(train, saved), partial(self._write_log, "non_finite", step=step)
        reason = nonfinite.reason_to_stop(train, step, progress.skipped, back_to)
        if reason is not None:  # nothing is saved: what came before may be what ruined the weights
            self._let_first("the log", partial(tell, {"found": found, "where": where, "done": "stopped"}))
            raise NonFiniteError(nonfinite.stopped(what, reason, saved, progress.skipped, step))
        if train.on_nan == "rollback" and back_to is not None:
            self._take(checkpoint.load(self.checkpoints, back_to, self.optimizer.pieces()).tensors)
        done = "left out" if train.on_nan == "skip" else f"left out, with all updates after {back_to}"
        self.setting.say(f"{what}; {done}")
        progress.skipped.append(step)
        self._passed(batches)
        self._let_first("the log", partial(tell, {"found": found, "where": where, "done": done}))

    def _log_training(self, rate: float, norm: float) -> None:
        progress = self.progress
        fields = {
            "epoch": self.sampler.place(progress.step, self.train.accumulate)[0],
            "loss": progress.loss / progress.loss_tokens,
            "rate": rate,
            "norm": norm,
            "order": progress.order[:16],
            **work(progress),
        }
        self._let_first("the log", partial(self._write_log, "train", fields))
        progress.loss, progress.loss_tokens = 0.0, 0

    def _validate(self) -> None:
        with self.optimizer.averages_in_use():
            weights = self.layout.weights(self.model, self.optimizer, self.bundle.model)
            judge = partial(self.keeper.judge, self.bundle, self.progress, weights)
            self._unsaved |= self._let_first("the validation", judge)

    def _finish(self) -> None:
        weights = self.layout.weights(self.model, self.optimizer, self.bundle.model)

        def finish() -> bool:
            self._spend()
            return self.keeper.finish(self.bundle, self.progress, weights)

        if self._let_first("the end of training", finish):
            self._unsaved = self.progress.finished = True

    def _let_first(self, what: str, work: Callable[[], T]) -> T:
        """Let the first process do what reads or writes the run's files; what it makes of `Progress` is then all's."""

        def done() -> tuple[T, dict[str, Any]]:
            return work(), asdict(self.progress)

        result, progress = self.ranks.first_does(f"{what} after update {self.progress.step}", done)
        vars(self.progress).update(progress)
        return result

    def _write_log(self, event: str, fields: Mapping[str, Any], step: int | None = None) -> None:
        self.log.write(self.progress.step if step is None else step, event, fields, self._spend())
        self.progress.log_lines += 1

    def _spend(self) -> dict[str, Any]:
        """Note what was spent, for the models that will be kept too; return the log's `clock`."""
        clock = self.account.clock(self.progress)
        self.bundle.spent = self.account.told()
        return clock

    def _save(self) -> None:
        state = self.optimizer.state() | {
            f"buffer.{name}": value for name, value in self.model.named_buffers() if name in self.model.state_dict()
        }
        self.ranks.first_does("the log", self.log.sync)
        self.layout.save(self.checkpoints, Checkpoint(self.progress, state, self.facts), self.optimizer.pieces())
        self._let_first("the checkpoint", self._publish)
        self._unsaved = False

    def _publish(self) -> None:
        self.keeper.publish(self.progress)
        self.account.clock(self.progress)

    def _resume(self) -> None:
        step = self._let_first("the start", self._recover)
        if step is None:
            check_start(self.setting.recipe.lora, self.setting.init_from is not None)
            return
        found = checkpoint.read(self.checkpoints, step, self.optimizer.pieces())
        resume.check(found.facts, self.facts, self.run_folder, self.log.noting(self.setting.say))
        self.progress = found.progress
        self.progress.finished = found.progress.finished and self._is_over()
        self._let_first("the start", self._go_on)
        self._take(found.tensors)
        if not self.progress.finished:
            self.setting.say(f"going on from update {self.progress.step} of {self.train.steps}")
            if self.setting.init_from is not None:
                self.setting.say("note: --init-from does nothing now: the run has weights of its own")

    def _recover(self) -> int | None:
        """Bring the folder in order; return the update of the newest whole checkpoint."""
        for folder in (self.checkpoints, self.keeper.folder):
            checkpoint.recover(folder)
        recover(self.run_folder)
        step = checkpoint.newest(self.checkpoints, self.setting.say)
        if step is None:
            self.keeper.check_start()
            self.log.keep(0)
        return step

    def _go_on(self) -> None:
        self.progress.log_lines = self.log.keep(self.progress.log_lines, self.setting.say)
        self.keeper.forget_lost(self.progress)
        self.keeper.publish(self.progress)

    def _take(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights, moments and buffers of a checkpoint."""
        buffers = {name.removeprefix("buffer."): t for name, t in state.items() if name.startswith("buffer.")}
        self.model.load_state_dict(buffers, strict=False)
        self.optimizer.load({name: t for name, t in state.items() if not name.startswith("buffer.")})
