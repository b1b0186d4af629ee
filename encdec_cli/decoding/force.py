"""Teacher forcing: the log-probability that models give to a known output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from encdec_cli.decoding.scorer import normalise
from encdec_cli.models.model import Model
from encdec_cli.text.vocabulary import PAD

POSITIONS = 256
"""Positions projected at a time, so that the logits of a batch never stand whole."""


@torch.inference_mode()
def score_targets(models: Sequence[Model], source: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Return the natural log-probability of every token of `target` after BOS: [sentences, tgt_len - 1] float32.

    Column i belongs to target[:, i + 1]; padding gets 0. Several models: the mean of their probabilities.

    source: [sentences, src_len] ids; mask: the same shape, True where there is a token;
    target: [sentences, tgt_len], BOS + tokens + EOS, padded on the right.
    """
    wanted = target[:, 1:]
    real = wanted != PAD
    tokens = wanted[real]
    hidden = [model(source, mask, target[:, :-1])[real] for model in models]
    parts = []
    for start in range(0, tokens.shape[0], POSITIONS):
        part = slice(start, start + POSITIONS)
        found = [_of_tokens(m.project(h[part]), tokens[part]) for m, h in zip(models, hidden, strict=True)]
        parts.append(found[0] if len(found) == 1 else torch.stack(found).logsumexp(0) - math.log(len(found)))
    scores = torch.zeros(wanted.shape, device=target.device)
    if parts:
        scores[real] = torch.cat(parts)
    return scores


def _of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of one token in each row. logits: [n, vocab]; tokens: [n]."""
    return logits.gather(1, tokens[:, None]).squeeze(1).float() - normalise(logits)[0]
