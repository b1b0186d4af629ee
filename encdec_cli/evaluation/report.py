"""Several metrics on several references, against a baseline or not: one structured result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from encdec_cli.errors import UsageError
from encdec_cli.evaluation.metrics import FloatArray, Metric, Setting, score
from encdec_cli.evaluation.significance import Interval, Resampling, interval, paired_p_values, resampled_scores

_FEW = 5
"""Differing lines up to which no valid test can reach p < 0.05: 2 / 2**5 is more."""


@dataclass(kw_only=True)
class Outputs:
    """What is evaluated; all sequences run over the same segments, at least one (see `check_lengths`)."""

    references: Sequence[Sequence[str]]
    """One sequence of lines for each reference stream."""
    hypotheses: Sequence[str] | None = None
    """The lines to score; None if only metrics that need the model are asked for."""
    baseline: Sequence[str] | None = None
    """The lines of another system, for the paired test."""
    likelihoods: tuple[FloatArray, FloatArray] | None = None
    """Natural log-probability [segments] of each first reference under the model, and its tokens with EOS."""
    baseline_likelihoods: tuple[FloatArray, FloatArray] | None = None
    """Likewise under another model, for the paired test."""


@dataclass(kw_only=True)
class Score:
    """One number, how sure it is, and what it depends on."""

    name: str
    value: float
    low: float | None = None
    """Lower end of the 95 % bootstrap interval."""
    high: float | None = None
    mean: float | None = None
    """Mean of the bootstrap resamples; sacreBLEU prints it as μ."""
    baseline: float | None = None
    baseline_low: float | None = None
    baseline_high: float | None = None
    p_value: float | None = None
    test: str | None = None
    """The paired test behind the p-value: randomization or bootstrap."""
    higher_is_better: bool = True
    signature: str = ""
    explanation: str = ""

    def line(self) -> str:
        """Return the score as one line: name, value, interval, baseline, p-value, signature."""
        parts = [f"{self.name} = {self.brief()}"]
        if self.baseline is not None:
            parts += [f"(baseline {self.baseline:.2f}", *_span(self.baseline_low, self.baseline_high)]
            parts[-1] += ")" if self.p_value is None else f", p = {self.p_value:.4f})"
        return " ".join([*parts, self.signature])

    def brief(self) -> str:
        """Return the number and its interval."""
        return " ".join([f"{self.value:.2f}", *_span(self.low, self.high)])

    def difference(self) -> str:
        """Return how much the number differs from the baseline's, and the p-value; empty without a baseline."""
        if self.baseline is None:
            return ""
        return f"{self.value - self.baseline:+.2f}" + ("" if self.p_value is None else f", p = {self.p_value:.4f}")


def _span(low: float | None, high: float | None) -> list[str]:
    return [] if low is None or high is None else [f"[{low:.2f}, {high:.2f}]"]


@dataclass(kw_only=True)
class Report:
    """The result of an evaluation."""

    segments: int
    references: int
    scores: list[Score]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object; numbers that JSON cannot hold (infinity) become null."""
        return {
            "segments": self.segments,
            "references": self.references,
            "scores": [{key: _finite(value) for key, value in asdict(entry).items()} for entry in self.scores],
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        """Return one line for each number, with interval and signature."""
        return [entry.line() for entry in self.scores]

    def score_lines(self) -> list[str]:
        """Return the numbers alone, one a line."""
        return [f"{entry.value:.2f}" for entry in self.scores]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(metrics: Sequence[Metric], outputs: Outputs, resampling: Resampling) -> Report:
    """Compute all metrics, their intervals, and with a baseline their paired tests.

    Raises UsageError if a metric lacks what it needs.
    """
    report = Report(segments=len(outputs.references[0]), references=len(outputs.references), scores=[])
    for metric in metrics:
        system = _statistics(metric, outputs, outputs.hypotheses, outputs.likelihoods)
        report.scores += _scores(metric, outputs, system, resampling)
        report.warnings += [*_warnings(metric, outputs, resampling), *metric.doubts(system)]
    if outputs.baseline is not None and outputs.hypotheses is not None:
        report.warnings += _difference_warnings(outputs.hypotheses, outputs.baseline)
    report.warnings = list(dict.fromkeys(report.warnings))
    return report


def _scores(metric: Metric, outputs: Outputs, system: FloatArray, resampling: Resampling) -> list[Score]:
    others = outputs.baseline, outputs.baseline_likelihoods
    paired = others[metric.needs_model] is not None
    baseline = _statistics(metric, outputs, *others) if paired else None
    tested = paired and not metric.no_resampling
    columns: dict[str, Sequence[Any]] = {"name": metric.names, "value": score(metric, system)}
    spans = _intervals(metric, system, resampling)
    columns |= {key: [vars(span)[key] for span in spans] for key in ("low", "high", "mean") if spans}
    if baseline is not None:
        columns["baseline"] = score(metric, baseline)
        spans = _intervals(metric, baseline, resampling)
        columns |= {f"baseline_{key}": [vars(span)[key] for span in spans] for key in ("low", "high") if spans}
        if tested:
            columns["p_value"] = paired_p_values(metric, system, baseline, resampling)
            columns["test"] = [resampling.test] * len(metric.names)
    signature = metric.signature(_setting(metric, outputs, resampling, tested))
    return [
        Score(
            **dict(zip(columns, row, strict=True)),
            higher_is_better=metric.higher_is_better,
            signature=signature,
            explanation=metric.explain(),
        )
        for row in zip(*columns.values(), strict=True)
    ]


def _statistics(
    metric: Metric, outputs: Outputs, lines: Sequence[str] | None, likelihoods: tuple[FloatArray, FloatArray] | None
) -> FloatArray:
    if metric.needs_model:
        if likelihoods is None:
            raise UsageError(f"{metric.names[0]} needs the model's probabilities: evaluate a model, not a file.")
        return metric.model_statistics(*likelihoods)
    if lines is None:
        raise UsageError(f"{metric.names[0]} needs hypotheses; give them, or let the model write them.")
    return metric.statistics(lines, outputs.references)


def _intervals(metric: Metric, statistics: FloatArray, resampling: Resampling) -> list[Interval]:
    if metric.no_resampling or not resampling.resamples:
        return []
    return [interval(samples) for samples in resampled_scores(metric, statistics, resampling).T]


def _setting(metric: Metric, outputs: Outputs, resampling: Resampling, tested: bool) -> Setting:
    references = len(outputs.references)
    resamples = 0 if metric.no_resampling else resampling.resamples
    trials = resampling.trials if tested and resampling.test == "randomization" else 0
    seed = resampling.seed if resamples or trials else None
    return Setting(references=references, resamples=resamples, trials=trials, seed=seed)


def _warnings(metric: Metric, outputs: Outputs, resampling: Resampling) -> list[str]:
    found = [] if outputs.hypotheses is None else metric.warnings(outputs.hypotheses, outputs.references)
    if metric.no_resampling and (resampling.resamples or outputs.baseline is not None):
        found.append(metric.no_resampling)
    if metric.needs_model and outputs.baseline is not None and outputs.baseline_likelihoods is None:
        found.append(f"{metric.names[0]} has no baseline: a file of lines has no probabilities.")
    return found


def _difference_warnings(hypotheses: Sequence[str], baseline: Sequence[str]) -> list[str]:
    different = sum(ours != theirs for ours, theirs in zip(hypotheses, baseline, strict=True))
    if not different:
        return ["the hypotheses and the baseline are the same lines; p-values mean nothing."]
    if different <= _FEW:
        return [
            f"only {different} of {len(hypotheses)} lines differ from the baseline: too few for a test; "
            "do not trust a small p-value."
        ]
    return []
