"""Teacher forcing: the log-probability that models give to a known output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from encdec_cli.decoding.ensemble import MEAN, Ensemble, for_each
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
def score_targets(
    models: Sequence[Model],
    source: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    target: Tensor,
    ensemble: Ensemble = MEAN,
) -> Tensor:
    """Return the natural log-probability of every token of `target` after BOS: [sentences, tgt_len - 1] float32.

    Column i belongs to target[:, i + 1]; padding gets 0. Several models are averaged as `ensemble` says.

    source: [sentences, src_len] ids, or one such tensor for each model; mask: likewise, True where there is a token;
    target: [sentences, tgt_len], BOS + tokens + EOS, padded on the right.
    """
    wanted = target[:, 1:]
    real = wanted != PAD
    tokens = wanted[real]
    read = zip(models, for_each(models, source), for_each(models, mask), strict=True)
    hidden = [model(ids, present, target[:, :-1])[real] for model, ids, present in read]
    parts = []
    for start in range(0, tokens.shape[0], POSITIONS):
        part = slice(start, start + POSITIONS)
        logits = [model.project(states[part]) for model, states in zip(models, hidden, strict=True)]
        parts.append(_of_tokens(logits, tokens[part], ensemble))
    scores = torch.zeros(wanted.shape, device=target.device)
    if parts:
        scores[real] = torch.cat(parts)
    return scores


def _of_tokens(logits: Sequence[Tensor], tokens: Tensor, ensemble: Ensemble) -> Tensor:
    """Return the log-probability of one token in each row. logits: [n, vocab] of each model; tokens: [n]."""
    column = tokens[:, None]
    if len(logits) == 1:
        return logits[0].gather(1, column).squeeze(1).float() - normalise(logits[0])[0]
    return ensemble.log_probs(logits).gather(1, column).squeeze(1)
