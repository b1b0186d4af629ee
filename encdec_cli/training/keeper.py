"""The models of a run: each is judged, the best one is kept and published, an average is tried in the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from encdec_cli import atomic
from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.average import average
from encdec_cli.bundle.bundle import Bundle, read_facts
from encdec_cli.bundle.checkpoint import Progress, step_name
from encdec_cli.bundle.run import point
from encdec_cli.errors import BundleError
from encdec_cli.recipe import Train
from encdec_cli.training.account import work
from encdec_cli.training.nonfinite import anchor, before_row
from encdec_cli.training.signals import Stop
from encdec_cli.training.validation import Validation, finite

WriteLog = Callable[[str, Mapping[str, Any]], None]
"""Is given an event and its fields."""


class Keeper:
    """Judges and keeps the models of one run; what it decides stands in `Progress`, what it keeps below `bundles/`.

    Args:
        run: the run's folder.
        train: the recipe's section.
        validation: the judge.
        facts: what every bundle tells of the data.
        stop: interrupts a validation, which is then done again when the run goes on.
        say: is given sentences for the user.
        log: is given an event of the log and its fields.
    """

    def __init__(
        self,
        run: Path,
        train: Train,
        validation: Validation,
        facts: Mapping[str, Any],
        stop: Stop,
        say: Callable[[str], None],
        log: WriteLog,
    ) -> None:
        self.link = run / "bundle"
        self.folder = run / "bundles"
        self.checkpoints = run / "checkpoints"
        self.train = train
        self.validation = validation
        self.facts = facts
        self.stop = stop
        self.say = say
        self.log = log

    def judge(self, bundle: Bundle, progress: Progress, weights: Callable[[], dict[str, Tensor]]) -> bool:
        """Decode and score the validation set; keep the bundle if it is the best or wanted for averaging.

        weights: returns the full-precision weights, if they are to be kept. Returns False, and has changed nothing, if
        a signal came before the end.
        """
        scores = self.validation.run(bundle, self.stop)
        if scores is None:
            return False
        progress.validated = progress.step
        score = self.validation.score(scores)
        self.log("valid", {**scores, "tokens": progress.tokens})
        better, level = self._is_better(score, progress), score == progress.best
        progress.stale = 0 if better else progress.stale + 1
        if better or level:  # of equals the newest, which has learned the longest
            progress.best, progress.model = score, step_name(progress.step)
        if self.train.average > 1:
            progress.kept = self._kept(progress, score)
        if better or level or progress.step in progress.kept:
            self._keep(bundle, progress, scores, weights())
        mark = " (best)" if better else " (as good as the best)" if level else ""
        self.say(f"update {progress.step}: {_listed(scores)}{mark}")
        return True

    def finish(self, bundle: Bundle, progress: Progress, weights: Callable[[], dict[str, Tensor]]) -> bool:
        """Try the average of the kept bundles; it becomes the run's model if it scores better.

        Returns False if a signal came before the end.
        """
        if len(progress.kept) > 1:
            self._try_average(bundle, progress)
        if self.stop:
            return False
        if not progress.model:  # never judged, or never a number: the last model is the one
            self._keep(bundle, progress, {}, weights())
            progress.model = step_name(progress.step)
        return True

    def check_start(self) -> None:
        """Raise BundleError if there was a checkpoint once, which `bundle` tells: to start anew would delete models."""
        if self.link.is_symlink():
            raise BundleError(
                f"{self.checkpoints}: no checkpoint to go on from, but {self.folder} has models of this run; bring the "
                "checkpoints back, or start anew with --output FOLDER, or delete the folder of the run."
            )

    def publish(self, progress: Progress) -> None:
        """Let `bundle` name the best model; then delete old checkpoints, and models that no checkpoint refers to.

        Called after a checkpoint is committed: the link never names a bundle that going on would write again.
        """
        if progress.model:
            point(self.link, self.folder / progress.model)
        saved = checkpoint.steps(self.checkpoints)
        rolls = self.train.on_nan == "rollback"
        goal = anchor(self.train, saved) if rolls else before_row(saved, progress.skipped, progress.step)
        checkpoint.drop(self.checkpoints, self.train.keep, goal)
        if self.folder.is_dir():
            wanted = {*checkpoint.models(self.checkpoints), self.link.resolve().name}
            for old in self.folder.iterdir():
                if old.name not in wanted:
                    atomic.remove_folder(old)

    def forget_lost(self, progress: Progress) -> None:
        """Forget models of the checkpoint that are damaged or gone; without the best one, judge anew."""
        names = [name for name in {progress.model, *map(step_name, progress.kept)} if name]
        lost = {name for name in names if not self._is_whole(self.folder / name)}
        progress.kept = [step for step in progress.kept if step_name(step) not in lost]
        if progress.model in lost:
            progress.best, progress.model, progress.validated, progress.finished = None, "", -1, False

    def _is_better(self, score: float, progress: Progress) -> bool:
        if progress.best is None or not math.isfinite(score):
            return math.isfinite(score)
        return score > progress.best if self.validation.higher_is_better else score < progress.best

    def _kept(self, progress: Progress, score: float) -> list[int]:
        """Return which updates are kept for averaging, oldest first, after this one has its score."""
        steps = [*progress.kept, progress.step]
        if self.train.average_of == "best":
            scores = {step: self._score_of(step) for step in progress.kept} | {progress.step: score}
            sign = 1 if self.validation.higher_is_better else -1
            finite_ = [step for step in steps if math.isfinite(scores[step])]
            steps = sorted(finite_, key=lambda step: (sign * scores[step], step))
        return sorted(steps[-self.train.average :])

    def _score_of(self, step: int) -> float:
        score = read_facts(self.folder / step_name(step))["scores"].get(self.validation.metric.names[0])
        return math.nan if score is None else float(score)

    def _keep(self, bundle: Bundle, progress: Progress, scores: dict[str, float], weights: dict[str, Tensor]) -> None:
        bundle.facts = self._facts(progress, scores, [])
        bundle.save_weights(self.folder / step_name(progress.step), weights)

    def _facts(self, progress: Progress, scores: dict[str, float], averaged: list[int]) -> dict[str, Any]:
        told = {"step": progress.step, "scores": finite(scores), "averaged": averaged}
        return {**told, **self.facts, "work": work(progress)}

    def _try_average(self, bundle: Bundle, progress: Progress) -> None:
        kept = [self.folder / step_name(step) for step in progress.kept]
        candidate = average(kept, self.validation.device)
        candidate.plugins = bundle.plugins
        scores = self.validation.run(candidate, self.stop)
        if scores is None:
            return
        self.log("average", {"of": progress.kept, **scores})
        score = self.validation.score(scores)
        better = self._is_better(score, progress)
        verdict = "best" if better else "not better, left out"
        self.say(f"average of {len(progress.kept)} checkpoints: {_listed(scores)} ({verdict})")
        if better:
            candidate.facts, candidate.spent = self._facts(progress, scores, progress.kept), bundle.spent
            progress.best, progress.model = score, f"average_{progress.step:08d}"
            candidate.save_weights(self.folder / progress.model, candidate.model.state_dict())

    def _is_whole(self, bundle: Path) -> bool:
        try:
            atomic.verify(bundle)
        except BundleError as error:
            self.say(f"a model of this run is lost and will be replaced: {error}")
            return False
        return True


def _listed(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
