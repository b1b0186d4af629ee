"""What a model is judged by while it learns: its loss on held-out targets, and a metric on what it decodes."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.config import parse_component
from encdec_cli.data.batch import collate
from encdec_cli.data.prepare import Prepared
from encdec_cli.data.sampler import Sampler
from encdec_cli.errors import DataError, StoppedError
from encdec_cli.evaluation.metrics import Metric, score, try_out
from encdec_cli.generation.lines import Options, first_text, generate
from encdec_cli.models.packed import packed
from encdec_cli.recipe import Recipe
from encdec_cli.registry import metrics
from encdec_cli.text.windows import full_windows
from encdec_cli.training.decoding_peak import decoding_peak
from encdec_cli.training.loss import log_probs, real_rows
from encdec_cli.training.meter import Meter
from encdec_cli.training.signals import Stop

_TOKENS = 4096


class Validation:
    """The held-out split of a run, ready to judge a model.

    Raises UsageError at once if the recipe's metric is unknown, before any time is spent on training, and DataError
    if validation is asked for but nothing is held out.
    """

    def __init__(self, data: Prepared, recipe: Recipe, device: str) -> None:
        self.metric: Metric = parse_component(recipe.train.metric, metrics, "train.metric")
        self.device = device
        self.options = Options(recipe.decoding.config)
        lines = recipe.train.valid_lines
        examples = list(data.examples("valid"))
        self.examples = examples[:lines] if lines else examples
        self.store = data.store("valid")
        self.data_hash = data.data_hash
        self._never_decodes = self.metric.needs_model or not recipe.train.validate_every
        self._peak: int | None = None
        if recipe.train.validate_every and not len(self.store):
            raise DataError(
                "data: no validation example; give the data section a `valid` split, or set train.validate_every=0, "
                "which keeps the last model."
            )

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is a better one."""
        return self.metric.higher_is_better

    def score(self, scores: dict[str, float]) -> float:
        """Return the number of `run` by which models are compared: the metric's first."""
        return scores[self.metric.names[0]]

    def run(self, bundle: Bundle, stop: Stop) -> dict[str, float] | None:
        """Return loss and scores by name; None if a signal came before they were complete."""
        bundle.model.eval()
        try:
            scores = {"loss": self._loss(bundle, stop)}
            if not self.metric.needs_model:
                scores |= self._decoded(bundle, stop)
        except StoppedError:
            return None
        if self.metric.needs_model:
            scores[self.metric.names[0]] = float(torch.tensor(scores["loss"], dtype=torch.float64).exp())
        return scores

    @torch.inference_mode()
    def _loss(self, bundle: Bundle, stop: Stop) -> float:
        """Return the mean negative log-probability, in nats, of a target token, EOS included."""
        total, tokens = 0.0, 0
        model = bundle.model
        lengths = self.store.source_lengths, self.store.target_lengths
        longest = int(max(lengths[0].max(), lengths[1].max())) + 1
        for rows in Sampler(*lengths, max(_TOKENS, longest), self.data_hash, 0).batches(0):
            _leave(stop)
            batch = collate(*self.store.gather(rows), rows.tolist()).to(self.device)
            target = batch.known_target
            hidden = model(batch.source, batch.source_mask, batch.decoder_input)
            real, labels = real_rows(hidden, target[:, 1:])
            total -= float(log_probs(real, model.project, labels).sum())
            tokens += len(labels)
        return total / tokens

    def peak(self, bundle: Bundle) -> int:
        """Predict the most bytes alive, beside the weights, while the examples are decoded; 0 if they never are."""
        if self._never_decodes:
            return 0
        if self._peak is None:
            try_out(self.metric)  # what it imports is then there before anybody looks at what the process has
            lengths = zip(self.store.source_lengths.tolist(), self.store.target_lengths.tolist(), strict=True)
            with Meter() as meter:
                ready = self._ready(bundle)
            self._peak = meter.live + decoding_peak(ready, self.options, list(lengths)[: len(self.examples)])
        return self._peak

    def try_longest(self, bundle: Bundle) -> None:
        """Decode one batch of the longest sources."""
        longest = sorted(self.examples, key=lambda example: -len(example.source))[: self.options.batch]
        list(generate([self._ready(bundle)], [longest], self.options))

    def _ready(self, bundle: Bundle) -> Bundle:
        """Return the bundle with a model that decodes fast."""
        bundle.model.eval()
        return replace(bundle, model=packed(bundle.model))

    def _decoded(self, bundle: Bundle, stop: Stop) -> dict[str, float]:
        hypotheses: list[str] = []
        windows = full_windows(self.examples, self.options.window)
        for result in generate([self._ready(bundle)], windows, self.options):
            _leave(stop)
            hypotheses.append(first_text(result))
        references = [[example.target or "" for example in self.examples]]
        values = score(self.metric, self.metric.statistics(hypotheses, references))
        return dict(zip(self.metric.names, values, strict=True))


def finite(scores: dict[str, float]) -> dict[str, float | None]:
    """Return scores as JSON can hold them: one that is not finite becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def _leave(stop: Stop) -> None:
    if stop:
        raise stop.error("stopped in validation.")
