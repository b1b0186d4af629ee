"""What decoding needs of the memory, told from a few short outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.generation.lines import Options
from encdec_cli.generation.search import Job, Search
from encdec_cli.text.vocabulary import UNK
from encdec_cli.training.meter import Meter

Shape = tuple[int, int, int]
"""Sentences, tokens of each source, tokens of each output."""
_READING: tuple[Shape, ...] = ((8, 32, 1), (16, 32, 1), (8, 64, 1))
_WRITING: tuple[Shape, ...] = ((4, 8, 24), (8, 8, 24), (4, 16, 24), (4, 8, 48))
"""What is tried, so small that it takes no time; the encoder's worst moment is another than the decoder's."""


def decoding_peak(bundle: Bundle, options: Options, lengths: Sequence[tuple[int, int]]) -> int:
    """Predict the most bytes alive, beside the weights, while sources are decoded.

    A sentence needs some bytes, and some for each token read and written; small batches tell how many. An output is
    taken to be as long as the reference: those that go on are few, and the rows of the others are given up.

    lengths: tokens of each source and its reference, without EOS.
    """
    reading, writing = (_bytes_of_parts(bundle, options, tried) for tried in (_READING, _WRITING))
    shapes = list(_shapes(options, lengths))
    peaks = [np.dot(_parts((rows, read, 1)), reading) for rows, read, _ in shapes]
    return round(float(max([*peaks, *(np.dot(_parts(shape), writing) for shape in shapes)], default=0)))


def _bytes_of_parts(bundle: Bundle, options: Options, tried: Sequence[Shape]) -> NDArray[np.float64]:
    """Return how many bytes belong to each of `_parts`."""
    peaks = [_peak(bundle, options, shape) for shape in tried]
    parts: NDArray[np.float64] = np.linalg.lstsq(np.array([_parts(shape) for shape in tried]), np.array(peaks))[0]
    return parts


def _parts(shape: Shape) -> tuple[int, ...]:
    rows, read, written = shape
    return 1, rows, rows * read, rows * written


def _peak(bundle: Bundle, options: Options, shape: Shape) -> int:
    """Return the most bytes alive while outputs of just such a length are written."""
    rows, read, written = shape
    search = Search([bundle], replace(options.strategy, min_length=written, max_length=written), options.n_best)
    meter = Meter()
    with meter:
        search([Job([UNK] * read)] * rows)
    return meter.peak


def _shapes(options: Options, lengths: Sequence[tuple[int, int]]) -> Iterator[Shape]:
    """Yield the shape of each batch, longest sources first, as they are decoded."""
    left = sorted(lengths, reverse=True)
    while left:
        batch = left[: options.fitting(left[0][0])]
        yield len(batch), left[0][0], 1 + max(written for _, written in batch)
        left = left[len(batch) :]
