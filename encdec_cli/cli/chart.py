"""A curve in characters, for a terminal and for a file alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The dots of a braille character, by row and column."""


def chart(points: Sequence[tuple[float, float]], title: str, width: int = 72, height: int = 8) -> list[str]:
    """Return lines of at most `width` columns, `height` of them the curve through the points (x, y), x rising.

    Each character holds 2 x 4 dots; a column of dots shows the mean of its points, or what lies between its
    neighbours'. The vertical axis reaches from the smallest such mean to the largest.
    """
    if not points:
        return []
    label = max(len(f"{y:.4g}") for _, y in points)
    columns = 2 * max(1, width - label - 2)
    first, last = points[0][0], points[-1][0]
    groups: dict[int, list[float]] = {}
    for x, y in points:
        groups.setdefault(min(columns - 1, int((x - first) / ((last - first) or 1) * columns)), []).append(y)
    means = {column: sum(values) / len(values) for column, values in groups.items()}
    low, high = min(means.values()), max(means.values())
    rows = 4 * height
    cells = [[0x2800] * (columns // 2) for _ in range(height)]
    for column, mean in _between(means):
        row = round((high - mean) / ((high - low) or 1) * (rows - 1))
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    ends = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    lines = [
        f"{ends.get(row, ''):>{label}} │{''.join(map(chr, cells[row])).rstrip(chr(0x2800))}" for row in range(height)
    ]
    return [title, *lines, f"{'':>{label}} └ {first:,.0f} … {last:,.0f}"]


def _between(means: dict[int, float]) -> Iterator[tuple[int, float]]:
    """Yield column and mean, and a straight line over columns that have none."""
    columns = sorted(means)
    yield columns[0], means[columns[0]]
    for begin, end in pairwise(columns):
        for column in range(begin + 1, end + 1):
            yield column, means[begin] + (means[end] - means[begin]) * (column - begin) / (end - begin)
