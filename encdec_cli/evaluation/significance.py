"""Bootstrap intervals and paired tests for any metric whose statistics add up over segments.

The random numbers are sacreBLEU's (numpy's default generator, one draw of all indices, seed 12345), so that for
its metrics intervals and p-values equal its own. For the others two things differ, because they would make a test
reject too often: ties count as evidence against a difference, and the bootstrap test is two-sided
(docs/metrics.md, "Tests").

Paired bootstrap: https://aclanthology.org/W04-3250; approximate randomization: https://aclanthology.org/W05-0908
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from encdec_cli.errors import UsageError
from encdec_cli.evaluation.metrics import FloatArray, Metric, score

_BLOCK = 1 << 22
"""Random numbers held at once."""
_ALIGNED = 32
"""numpy draws 32 booleans from one random word, so blocks of 32 rows continue the stream of one large draw."""
_TIE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals and paired tests are made."""

    resamples: int = 1000
    """Bootstrap resamples for intervals and for the paired bootstrap; 0 for no intervals."""
    test: Literal["randomization", "bootstrap"] = "randomization"
    """The paired test against a baseline: sacreBLEU's --paired-ar or --paired-bs."""
    trials: int = 10_000
    """Trials of the randomization test."""
    seed: int = 12345
    """Seed of all random numbers; sacreBLEU's default."""

    def __post_init__(self) -> None:
        if self.test == "bootstrap" and not self.resamples:
            raise UsageError("the paired bootstrap needs resamples; ask for at least one, or for the randomization.")
        if self.resamples < 0 or self.trials < 1 or self.seed < 0:
            raise UsageError("resamples and seed must not be negative, and trials must be at least 1.")


@dataclass(frozen=True)
class Interval:
    """A 95 % bootstrap percentile interval, and the mean of the resamples (sacreBLEU's μ)."""

    low: float
    high: float
    mean: float


def resampled_scores(metric: Metric, statistics: FloatArray, resampling: Resampling) -> FloatArray:
    """Return the scores [resamples, numbers] of corpora drawn from statistics [segments, k] with replacement.

    Two systems with equally many segments get the same draws.
    """
    segments = len(statistics)
    rows = statistics.astype(np.float32 if metric.as_sacrebleu else np.float64)
    generator = np.random.default_rng(resampling.seed)
    totals = np.empty((resampling.resamples, rows.shape[1]), dtype=rows.dtype)
    block = max(1, _BLOCK // segments)
    for start in range(0, resampling.resamples, block):
        end = min(start + block, resampling.resamples)
        draws = generator.choice(segments, size=(end - start, segments), replace=True)
        for sample, indices in enumerate(draws, start):
            totals[sample] = rows[indices].sum(axis=0)
    return metric.scores(totals)


def interval(samples: FloatArray) -> Interval:
    """Return the interval that leaves out one fortieth of the samples [resamples] on each side."""
    ordered = np.sort(samples)
    cut = len(ordered) // 40
    return Interval(float(ordered[cut]), float(ordered[len(ordered) - cut - 1]), float(ordered.mean(dtype=np.float64)))


def paired_p_values(
    metric: Metric, system: FloatArray, baseline: FloatArray, resampling: Resampling
) -> tuple[float, ...]:
    """Return the p-value of each number's difference between two systems on the same segments.

    Args:
        metric: whose statistics both are.
        system: statistics [segments, k].
        baseline: statistics [segments, k].
        resampling: the test, its size and its seed.
    """
    draw = _bootstrap_samples if resampling.test == "bootstrap" else _randomized_samples
    first, second = draw(metric, system, baseline, resampling)
    values = zip(score(metric, system), score(metric, baseline), first.T, second.T, strict=True)
    return tuple(
        _p_value(_statistic(metric, a - b, resampling), abs(ours - theirs), metric.as_sacrebleu)
        for ours, theirs, a, b in values
    )


def _statistic(metric: Metric, differences: FloatArray, resampling: Resampling) -> FloatArray:
    if resampling.test == "randomization":
        return np.abs(differences)
    if metric.as_sacrebleu:
        size = np.abs(differences)
        return np.asarray(size - size.mean())
    return np.asarray(np.abs(differences - differences.mean()))


def _p_value(statistic: FloatArray, real: float, as_sacrebleu: bool) -> float:
    # Where the null hypothesis makes many differences equal to the real one (exact match, say), leaving ties out
    # gives tiny p-values for nothing; sacreBLEU leaves them out. Where nothing ever differs that says nothing either.
    if real == 0 and not statistic.any():
        return 1.0
    extreme = statistic > real if as_sacrebleu else statistic >= real - _TIE
    return (int(extreme.sum()) + 1) / (len(statistic) + 1)


def _bootstrap_samples(
    metric: Metric, system: FloatArray, baseline: FloatArray, resampling: Resampling
) -> tuple[FloatArray, FloatArray]:
    return resampled_scores(metric, system, resampling), resampled_scores(metric, baseline, resampling)


def _randomized_samples(
    metric: Metric, system: FloatArray, baseline: FloatArray, resampling: Resampling
) -> tuple[FloatArray, FloatArray]:
    segments, width = system.shape
    both = np.concatenate([baseline, system], axis=1)
    generator = np.random.default_rng(resampling.seed)
    block = max(_ALIGNED, _BLOCK // segments // _ALIGNED * _ALIGNED)
    first, second = [], []
    for start in range(0, resampling.trials, block):
        size = (min(block, resampling.trials - start), segments)
        chosen = generator.integers(2, size=size, dtype=bool).astype(np.float64)
        kept, swapped = chosen @ both, (1.0 - chosen) @ both
        first.append(metric.scores(kept[:, :width] + swapped[:, width:]))
        second.append(metric.scores(swapped[:, :width] + kept[:, width:]))
    return np.concatenate(first), np.concatenate(second)
