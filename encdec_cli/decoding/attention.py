"""Where a model looks in the source while it writes a known output, and which token comes from which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from encdec_cli.models.model import Model
from encdec_cli.text.vocabulary import BOS, EOS, PAD


@dataclass(frozen=True)
class Head:
    """What alignments are read from."""

    layer: int
    """Decoder layer, counted from 0."""
    head: int | None = None
    """Attention head of the layer, counted from 0; None for the mean of its heads."""

    def __str__(self) -> str:
        return str(self.layer) if self.head is None else f"{self.layer}.{self.head}"


@torch.inference_mode()
def heads(model: Model) -> list[int]:
    """Return the number of heads of each decoder layer. Raises UsageError for a model without attention."""
    device = next(model.parameters()).device
    source, target = torch.tensor([[EOS]], device=device), torch.tensor([[BOS, EOS]], device=device)
    return [weights.shape[1] for weights in layers(model, source, source != PAD, target)]


def layers(model: Model, source: Tensor, mask: Tensor, target: Tensor, beam: int = 1) -> Iterator[Tensor]:
    """Yield the attention of each decoder layer, [rows, heads, tgt_len - 1, src_len] float32.

    Place t belongs to target[:, t + 1]: it is the attention of the position before that token, which predicts it.

    source, mask: [sentences, src_len]; target: [rows, tgt_len], BOS + tokens + EOS, padded on the right;
    the `beam` rows of a sentence stand together. Raises UsageError for a model without attention.
    """
    return model.attention(target[:, :-1], model.start(model.encode(source, mask), beam))


@torch.inference_mode()
def align(model: Model, head: Head, source: Tensor, mask: Tensor, target: Tensor, beam: int = 1) -> Tensor:
    """Return the place in the source that each token of `target` after BOS comes from: [rows, tgt_len - 1] int64.

    That is where the head looks most while it predicts the token. Arguments as for `layers`.
    """
    weights = next(islice(layers(model, source, mask, target, beam), head.layer, None))
    return (weights.mean(1) if head.head is None else weights[:, head.head]).argmax(-1)
