"""Filters of sampling: they set the weights of some tokens to 0, never those of all.

Weights [rows, n] are probabilities but for a factor for each row; 0 is a token that has been filtered before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encdec_cli.decoding.scorer import pack

FIRST_LOOK = 256
"""Tokens sorted at first; all of them only where these do not hold the mass."""
TOLERANCE = 1e-6
"""What lies this little below a bound has reached it: probabilities are float32."""


def fewest(weights: Tensor, total: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Keep the first tokens of each row whose mass reaches a share of the total.

    weights: [rows, n] float64, those to keep first; total: [rows, 1]. Returns the weights, and [rows, 1] whether the
    n tokens hold the mass.
    """
    goal = (share - TOLERANCE) * total
    mass = weights.cumsum(-1)
    # A token stays if those before it have not reached the goal; the first always stays.
    before = mass - weights
    before[:, 0] = -1
    return weights.masked_fill(before >= goal, 0), mass[:, -1:] >= goal


def min_p(weights: Tensor, share: float) -> Tensor:
    """Keep the tokens that have at least a share of the best one's probability.

    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", https://arxiv.org/abs/2407.01082.
    """
    return weights.masked_fill(weights < (share - TOLERANCE * share) * weights.amax(-1, keepdim=True), 0)


def typical(weights: Tensor, tokens: Tensor, share: float) -> Tensor:
    """Keep the fewest tokens of a mass whose surprise, -log p, is nearest to the entropy of the row.

    Meister et al. 2022, "Locally Typical Sampling", https://arxiv.org/abs/2202.00666.
    tokens: [rows, n]; of equals, the lowest comes first.
    """
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    chances = weights / total.clamp(min=torch.finfo(torch.float64).tiny)
    distance = (chances.log() + torch.special.entr(chances).sum(-1, keepdim=True)).abs()
    keys = pack(-distance.float(), tokens)
    for k in (min(FIRST_LOOK, keys.shape[1]), keys.shape[1]):
        order = keys.topk(k).indices
        kept, reached = fewest(weights.gather(1, order).double(), total, share)
        if bool(reached.all()):
            break
    return torch.zeros_like(weights).scatter_(1, order, kept.to(weights.dtype))


def epsilon(weights: Tensor, least: float) -> Tensor:
    """Keep the tokens of at least this probability, and always the best.

    Hewitt, Manning, Liang 2022, "Truncation Sampling as Language Model Desmoothing", https://arxiv.org/abs/2210.15191.
    """
    bound = (least - TOLERANCE * least) * weights.sum(-1, keepdim=True, dtype=torch.float64)
    return weights.masked_fill(weights < bound.minimum(weights.amax(-1, keepdim=True).double()), 0)
