"""Teacher forcing: the log-probability that models give to a known output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from encdec_cli.decoding.hypothesis import Hypothesis
from encdec_cli.decoding.scorer import normalise
from encdec_cli.models.model import Model
from encdec_cli.text.vocabulary import BOS, EOS, PAD

POSITIONS = 256
"""Positions projected at a time, so that the logits of a batch never stand whole."""


def as_targets(found: Sequence[Sequence[Hypothesis]], beam: int, device: torch.device) -> Tensor:
    """Return hypotheses as known outputs: [sentences x beam, tgt_len], BOS + tokens (+ EOS if finished), padded.

    A sentence with fewer than `beam` of them is filled up with rows of BOS alone.
    """
    targets = []
    for hypotheses in found:
        targets += [[BOS, *one.tokens, *[EOS] * one.finished] for one in hypotheses]
        targets += [[BOS]] * (beam - len(hypotheses))
    width = max(2, *map(len, targets))  # so that there is a token to predict
    return torch.tensor([target + [PAD] * (width - len(target)) for target in targets], device=device)


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
