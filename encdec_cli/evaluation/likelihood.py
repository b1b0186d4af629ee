"""How likely a model finds given targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.data.batch import collate
from encdec_cli.decoding.force import score_targets
from encdec_cli.evaluation.metrics import FloatArray
from encdec_cli.text.example import Example

_BATCH = 64


def likelihoods(
    bundle: Bundle, examples: Sequence[Example], targets: Sequence[str], longest: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return the natural log-probability of each target given its example, and its tokens including EOS.

    Both arrays are [examples]. Sources longer than the model reads are cut; targets after `longest` tokens, if given.
    """
    most = bundle.longest_source
    sources = [bundle.source.encode(bundle.task.source(example))[:most] for example in examples]
    ids = [
        bundle.target.encode(bundle.task.target(Example(example.source, target, example.record)))[:longest]
        for example, target in zip(examples, targets, strict=True)
    ]
    totals, counts = np.zeros(len(ids)), np.array([len(target) + 1.0 for target in ids])
    order = sorted(range(len(ids)), key=lambda row: (len(ids[row]), len(sources[row])))
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = collate([sources[row] for row in rows], [ids[row] for row in rows], rows).to(bundle.device)
        scores = score_targets([bundle.model], batch.source, batch.source_mask, batch.known_target)
        totals[rows] = scores.double().sum(1).cpu().numpy()
    return totals, counts
