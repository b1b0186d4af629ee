"""The training loop: update, sometimes log, validate and save; every part of its state is in `Progress`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encdec_cli import atomic
from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.bundle import Bundle, average, build_model
from encdec_cli.bundle.checkpoint import Checkpoint, Progress, step_name
from encdec_cli.bundle.run import point, recover
from encdec_cli.data.batch import Batch, collate
from encdec_cli.data.prepare import Prepared
from encdec_cli.data.sampler import Ints, Sampler
from encdec_cli.errors import BundleError, NonFiniteError, UsageError
from encdec_cli.generation.flags import usual_ratios
from encdec_cli.recipe import Recipe, Train
from encdec_cli.registry import Plugin
from encdec_cli.training import precision, resume
from encdec_cli.training.gradients import Gradients
from encdec_cli.training.initial import take_weights
from encdec_cli.training.log import Log
from encdec_cli.training.rules import make_optimizer
from encdec_cli.training.schedule import learning_rate
from encdec_cli.training.signals import Stop
from encdec_cli.training.validation import Validation, finite

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


class Clock:
    """What a line of the log tells of time: it differs in every repetition of a run."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._tokens: int | None = None

    def fields(self, tokens: int) -> dict[str, Any]:
        """Return seconds since the process began to train, and target tokens a second since the last call."""
        now = time.perf_counter()
        speed = (tokens - self._tokens) / (now - self._last) if self._tokens is not None else None
        self._last, self._tokens = now, tokens
        return {"seconds": round(now - self._start, 1), "tokens_per_second": round(speed, 1) if speed else None}


class Trainer:
    """One run: from its newest checkpoint, or from the start, to its end."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.train: Train = setting.recipe.train
        self.run_folder = setting.run
        self.progress = Progress()
        source, target = setting.data.source, setting.data.target
        torch.manual_seed(self.train.seed)
        model = build_model(setting.recipe, len(source.vocabulary), len(target.vocabulary)).to(setting.device)
        if setting.init_from is not None:
            take_weights(model, setting.init_from, source, target)
        self.bundle = Bundle(setting.recipe, model, source, target, plugins=setting.plugins)
        self.model = model
        chosen = precision.choose(self.train.precision, setting.device)
        self.store = setting.data.store("train")
        self.optimizer = make_optimizer(model, self.train, self._load(np.array([0])), chosen.dtype)
        chosen.apply(model)
        self.precision = chosen.name
        lengths = self.store.source_lengths, self.store.target_lengths
        self.sampler = Sampler(*lengths, self.train.tokens, setting.data.data_hash, self.train.seed)
        self._check_positions()
        self.gradients = Gradients(model, self.optimizer.parameters, self.train.label_smoothing, self.train.accumulate)
        self.validation = Validation(setting.data, setting.recipe, setting.device)
        self.facts = resume.facts(setting.recipe, setting.data.data_hash, self.precision)
        self.checkpoints = setting.run / "checkpoints"
        self.bundles = setting.run / "bundles"
        self._unsaved = False
        self.log = Log(setting.run / "log.jsonl")
        self.clock = Clock()
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
            if self._is_over():
                self._finish()
            if self._unsaved and (self._must_save() or self.setting.stop):
                self._save()
            if self.setting.stop:
                where = f"saved at update {progress.step}; the same command continues"
                raise self.setting.stop.error(f"stopped by a signal; {where}.")
            if not progress.finished:
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
        if self.setting.stop:
            return False
        patience = self.train.patience
        return self.progress.step >= self.train.steps or 0 < patience <= self.progress.stale

    def _update(self, batches: Sequence[Ints], show: Show) -> None:
        """One update: the gradient of the mean loss over all target tokens of all micro-batches, then a step."""
        progress, step = self.progress, self.progress.step + 1
        loaded = [self._load(rows) for rows in batches]
        tokens = sum(int(self.store.target_lengths[rows].sum()) + len(rows) for rows in batches)  # EOS counts
        loss = 0.0
        # A seed of its own for each update: no random state has to be saved.
        for part, gradient in self.gradients.of(loaded, 1 / tokens, self.train.seed * 1_000_003 + step):
            self.optimizer.collect(gradient)
            loss += part
        norm = self.optimizer.clip(self.train.clip)
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
        """Decode and score the validation set; keep the bundle if it is the best or wanted for averaging."""
        progress = self.progress
        scores = self.validation.run(self.bundle, self.setting.stop)
        if scores is None:  # interrupted: done again when the run goes on
            return
        self._unsaved = True
        progress.validated = progress.step
        score = self.validation.score(scores)
        self._write_log("valid", scores)
        better = self._is_better(score)
        progress.stale = 0 if better else progress.stale + 1
        if better:
            progress.best, progress.model = score, step_name(progress.step)
        if self.train.average > 1:
            progress.kept = [*progress.kept, progress.step][-self.train.average :]
        if better or progress.step in progress.kept:
            self._keep_bundle(scores)
        mark = " (best)" if better else ""
        listed = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.setting.say(f"update {progress.step}: {listed}{mark}")

    def _is_better(self, score: float) -> bool:
        best = self.progress.best
        if best is None or not math.isfinite(score):
            return math.isfinite(score)
        return score > best if self.validation.higher_is_better else score < best

    def _keep_bundle(self, scores: dict[str, float]) -> None:
        self.bundle.facts = self._model_facts(scores, [])
        self.bundle.save_weights(self.bundles / step_name(self.progress.step), self._weights())

    def _model_facts(self, scores: dict[str, float], averaged: list[int]) -> dict[str, Any]:
        facts = {"step": self.progress.step, "scores": finite(scores), "averaged": averaged}
        return facts | {"length_ratios": usual_ratios(self.store.source_lengths, self.store.target_lengths)}

    def _publish(self) -> None:
        """Let `bundle` name the best model; then delete old checkpoints, and models that no checkpoint refers to.

        Called after a checkpoint is committed: the link never names a bundle that going on would write again.
        """
        link = self.run_folder / "bundle"
        if self.progress.model:
            point(link, self.bundles / self.progress.model)
        checkpoint.drop(self.checkpoints, self.train.keep)
        if self.bundles.is_dir():
            wanted = {*checkpoint.models(self.checkpoints), link.resolve().name}
            for old in self.bundles.iterdir():
                if old.name not in wanted:
                    atomic.remove_folder(old)

    def _weights(self) -> dict[str, Tensor]:
        """The weights at full precision: those of the optimizer, and buffers as the model has them."""
        state = {
            name: value.float() if value.is_floating_point() else value
            for name, value in self.model.state_dict().items()
        }
        return state | self.optimizer.masters()

    def _finish(self) -> None:
        """Try the average of the kept bundles; it becomes the run's model if it scores better."""
        progress = self.progress
        if len(progress.kept) > 1:
            self._try_average()
        if self.setting.stop:
            return
        if not progress.model:  # never judged, or never a number: the last model is the one
            self._keep_bundle({})
            progress.model = step_name(progress.step)
        self._unsaved = progress.finished = True

    def _try_average(self) -> None:
        progress = self.progress
        weights = average([self.bundles / step_name(step) for step in progress.kept])
        candidate = Bundle.load(self.bundles / step_name(progress.kept[-1]), self.setting.device)
        candidate.model.load_state_dict(weights)
        candidate.plugins = self.setting.plugins
        scores = self.validation.run(candidate, self.setting.stop)
        if scores is None:
            return
        self._write_log("average", {"of": progress.kept, **scores})
        score = self.validation.score(scores)
        better = self._is_better(score)
        listed = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        verdict = "best" if better else "not better, left out"
        self.setting.say(f"average of {len(progress.kept)} checkpoints: {listed} ({verdict})")
        if better:
            candidate.facts = self._model_facts(scores, progress.kept)
            progress.best, progress.model = score, f"average_{progress.step:08d}"
            candidate.save_weights(self.bundles / progress.model, weights)

    def _write_log(self, event: str, fields: dict[str, Any]) -> None:
        self.log.write(self.progress.step, event, fields, self.clock.fields(self.progress.tokens))
        self.progress.log_lines += 1

    def _check_bundles(self) -> None:
        """Forget models of the checkpoint that are damaged or gone; without the best one, judge anew."""
        progress = self.progress
        names = [name for name in {progress.model, *map(step_name, progress.kept)} if name]
        lost = {name for name in names if not self._is_whole(self.bundles / name)}
        progress.kept = [step for step in progress.kept if step_name(step) not in lost]
        if progress.model in lost:
            progress.best, progress.model, progress.validated, progress.finished = None, "", -1, False

    def _is_whole(self, bundle: Path) -> bool:
        try:
            atomic.verify(bundle)
        except BundleError as error:
            self.setting.say(f"a model of this run is lost and will be replaced: {error}")
            return False
        return True

    def _save(self) -> None:
        state = self.optimizer.state() | {
            f"buffer.{name}": value for name, value in self.model.named_buffers() if name in self.model.state_dict()
        }
        self.log.sync()
        checkpoint.save(self.checkpoints, Checkpoint(self.progress, state, self.facts))
        self._unsaved = False
        self._publish()

    def _resume(self) -> None:
        for folder in (self.checkpoints, self.bundles):
            checkpoint.recover(folder)
        recover(self.run_folder)
        say = self.setting.say
        found = checkpoint.load_newest(self.checkpoints, say)
        if found is None:
            self.log.keep(0)
            return
        resume.check(found.facts, self.facts, self.run_folder, say)
        self.log.keep(found.progress.log_lines)
        self.progress = found.progress
        self.progress.finished = found.progress.finished and self._is_over()
        self._check_bundles()
        self._publish()
        buffers = {n.removeprefix("buffer."): t for n, t in found.tensors.items() if n.startswith("buffer.")}
        self.model.load_state_dict(buffers, strict=False)
        self.optimizer.load({n: t for n, t in found.tensors.items() if not n.startswith("buffer.")})
        if not self.progress.finished:
            say(f"going on from update {self.progress.step} of {self.train.steps}")
