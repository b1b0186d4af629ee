"""How likely a model finds given targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.evaluation.metrics import FloatArray
from encdec_cli.generation.scoring import score
from encdec_cli.text.example import Example


def likelihoods(
    bundle: Bundle, examples: Sequence[Example], targets: Sequence[str], longest: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return the natural log-probability of each target given its example, and its tokens including EOS.

    Both arrays are [examples]. Sources longer than the model reads are cut; targets after `longest` tokens, if given,
    else a target that is longer than a model with learned positions reads is a DataError.
    """
    pairs = [Example(example.source, target, example.record) for example, target in zip(examples, targets, strict=True)]
    found = [(one.log_probability, len(one.tokens)) for one in score([bundle], [pairs], longest=longest)]
    totals, counts = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return totals, counts
