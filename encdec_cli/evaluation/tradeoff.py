"""Quality against speed: what a model's settings of decoding cost and bring, and which of them is worth it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.evaluation.metrics import Metric, score
from encdec_cli.generation.lines import Options, first_text, generate
from encdec_cli.text.example import Example
from encdec_cli.text.windows import full_windows


@dataclass(frozen=True)
class Point:
    """One way to decode, measured."""

    precision: str
    beam: int
    batch: int
    """Most sentences decoded together."""
    workers: int
    lines_per_second: float
    score: float


def timed(bundle: Bundle, options: Options, examples: Sequence[Example]) -> tuple[list[str], float]:
    """Decode the examples twice; return the best output of each, and how many were decoded in a second of the second.

    The first time starts workers, makes kernels and takes memory.
    """
    windows = list(full_windows(examples, options.window))
    results = generate([bundle], windows * 2, options)
    for _ in examples:
        next(results)
    begin = time.perf_counter()
    texts = [first_text(result) for result in results]
    return texts, len(examples) / (time.perf_counter() - begin)


def measure(bundle: Bundle, precision: str, options: Options, examples: Sequence[Example], metric: Metric) -> Point:
    """Decode the examples and score them."""
    texts, rate = timed(bundle, options, examples)
    (value, *_) = score(metric, metric.statistics(texts, [[example.target or "" for example in examples]]))
    return Point(precision, options.strategy.beam, options.batch, options.workers, rate, value)


def on_front(point: Point, points: Sequence[Point], higher_is_better: bool) -> bool:
    """Tell whether no other point is as fast and as good, and one of both more so."""
    sign = 1 if higher_is_better else -1
    ours = (point.lines_per_second, sign * point.score)
    rivals = [(other.lines_per_second, sign * other.score) for other in points]
    return not any(fast >= ours[0] and good >= ours[1] and (fast, good) != ours for fast, good in rivals)


def fastest_within(points: Sequence[Point], within: float, higher_is_better: bool) -> Point:
    """Return the fastest point whose score is at most `within` worse than the best one's."""
    best = (max if higher_is_better else min)(point.score for point in points)
    good = [point for point in points if abs(point.score - best) <= within]
    return max(good, key=lambda point: point.lines_per_second)


def best_at_least(points: Sequence[Point], rate: float, higher_is_better: bool) -> Point | None:
    """Return the point with the best score, the fastest of those, that decodes so many lines a second; None if none."""
    sign = 1 if higher_is_better else -1
    fast = [point for point in points if point.lines_per_second >= rate]
    return max(fast, key=lambda point: (sign * point.score, point.lines_per_second), default=None)
