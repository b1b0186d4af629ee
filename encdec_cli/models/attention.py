"""Attention to what was written and to the source."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec_cli import kernels
from encdec_cli.kernels import attention as training
from encdec_cli.kernels.packing import Packing
from encdec_cli.models.dropout import apart, dropout_of_part
from encdec_cli.models.heads import split_heads
from encdec_cli.models.linear import Linear
from encdec_cli.models.masks import bias_of, mask_bias
from encdec_cli.models.parts import ColumnParallelLinear, Part, RowParallelLinear
from encdec_cli.models.positions import Rotary
from encdec_cli.models.remembered import Ancestry, KeysValues
from encdec_cli.models.softmax import softmax

FEW_SCORES = 4096
"""Below this many attention weights a call is dominated by its overhead, where one fused kernel is best."""
FEW_QUERIES = 16
"""Up to this many queries, as in a step of decoding, a fused kernel cannot make use of its blocks."""
KERNEL_QUERIES = 40
"""Up to this many queries our own kernel is the fastest."""
MANY_SCORES = 2**27
"""Above this many attention weights the memory to hold them matters more than speed."""
SHARED_OUT = 2**22
"""From this many multiplications on several threads are better than our kernel, which has one."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | Packing | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    part: Part | None = None,
) -> Tensor:
    """Return softmax(query key^T / sqrt(head_dim)) value, [rows, heads, queries, head_dim]: the only attention here.

    Args:
        query: [rows, heads, queries, head_dim].
        key: [rows, heads, keys, head_dim].
        value: like key.
        mask: broadcastable to [rows, heads, queries, keys]; True where a query may look, or numbers to be added;
            or which places of the only row belong together.
        causal: the last query sees every key, the one before it all but the last, and so on.
        dropout: probability of dropping an attention weight.
        part: whose heads these are, if processes share them; None if they are all.
    """
    if isinstance(mask, Packing):
        return _packed(query, key, value, mask, causal, dropout, part)
    if mask is not None and mask.dtype == torch.bool:
        mask = bias_of(mask, query.dtype)
    if query.shape[2] == 1:
        causal = False
    if not dropout and not _is_training(query, key, value) and _by_kernel(query, key, value, mask, causal):
        return kernels.attend(query, key, value, mask)
    if not dropout and training.can_attend(query, key, value, mask, causal):
        return training.attend(query, key, value, mask, causal)
    return _by_torch(query, key, value, mask, causal, dropout, part)


def _packed(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool, dropout: float, part: Part | None
) -> Tensor:
    if not dropout and training.can_attend_packed(query, key, value, packing):
        return training.attend(query, key, value, None, causal, packing)
    read, seen = packing.queries, packing.keys
    query, key, value = (
        rows.unpack(one.transpose(1, 2)).transpose(1, 2) for rows, one in ((read, query), (seen, key), (seen, value))
    )
    mixed = attend(query, key, value, mask_bias(seen.mask, query.dtype), causal, dropout, part)
    return read.pack(mixed.transpose(1, 2)).transpose(1, 2)


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float, part: Part | None
) -> Tensor:
    if _by_matmul(query, key, value, dropout):
        weights = _weights(query, key, _with_causal(query, key, mask, causal))
        return dropout_of_part(weights, dropout, part, 1) @ value
    if causal and (mask is not None or query.shape[2] != key.shape[2]):
        mask, causal = _with_causal(query, key, mask, causal), False
    with apart(part, query.device):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, dropout_p=dropout)


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool:
    # Measured with one thread on Zen 5, a step of 128 sentences, 4 heads, head_dim 64, us by it / by products of
    # matrices: 5 queries, 15 keys bf16 190 / 392, fp32 226 / 578; 5 queries, 80 keys of which a fifth is seen 351 / 701
    # and 571 / 2,439; 1 query, 15 keys 51 / 236 and 62 / 146. Of an encoder, ms: 320 sentences of 20 places
    # bf16 2.8 / 5.0, fp32 2.5 / 6.0; 128 of 40 3.3 / 3.8 and 4.8 / 6.1; 64 of 64 4.1 / 3.1 and 5.4 / 4.9. The
    # rest goes through training's kernel, ms by that / by torch: 128 sentences of 30 places, head_dim 32, causal bf16
    # 0.9 / 1.7, fp32 1.2 / 4.9; 64 of 64, head_dim 64 2.5 / 2.9 and 2.9 / 4.9; 16 of 200 4.5 / 18 and 4.8 / 9.8.
    if query.device.type != "cpu":
        return False  # before shapes are asked for, which a compiler for a GPU would hold on to
    if causal or query.shape[2] > KERNEL_QUERIES:
        return False
    if query.numel() * key.shape[2] > SHARED_OUT and torch.get_num_threads() > 1:
        return False
    return kernels.can_attend(query, key, value, mask)


def _by_matmul(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    # Measured with one thread on Zen 4 (avx512_bf16), 128 rows, 4 heads, head_dim 64, lengths 16 / 32 / 64 in ms,
    # explicit v. scaled_dot_product_attention:
    #   bf16 forward + backward  6.1 / 9.4 / 24 v. 48 / 61 / 93     bf16 forward  3.0 / 3.7 / 8.8 v. 3.8 / 6.7 / 16
    #   fp32 forward + backward  10 / 26 / 61 v. 8.3 / 20 / 53      fp32 forward  1.8 / 8.0 / 27 v. 2.2 / 6.1 / 16
    # A decoding step, 64 sentences, 5 queries, head_dim 32, keys 15 / 40 / 75: fp32 0.25 / 0.36 / 0.69 v. 0.58 / 0.49 /
    # 0.94, bf16 0.39 / 0.48 / 0.65 v. 0.87 / 0.83 / 1.1; of one sentence bf16 0.13 v. 0.07.
    if query.device.type != "cpu":
        return False
    if dropout > 0:
        return True  # the fused kernel has no dropout on a CPU, and ours is the cheaper one
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    if scores > MANY_SCORES:
        return False
    if _is_training(query, key, value):
        return query.dtype == torch.bfloat16
    return scores >= FEW_SCORES and (query.dtype == torch.bfloat16 or query.shape[2] <= FEW_QUERIES)


def _is_training(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return softmax(scores if mask is None else scores + mask)


def _with_causal(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    if not causal:
        return mask
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    ahead = bias_of(seen, query.dtype)
    return ahead if mask is None else mask + ahead


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with one matrix for queries, keys and values."""

    def __init__(self, dim: int, heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        # Xavier of the joined matrix has the bound that fairseq gives to each of the three.
        self.joined = Linear(dim, 3 * dim, bias)
        self.output = Linear(dim, dim, bias)
        self.part: Part | None = None
        """Which of the heads these are, if processes share them."""

    def divide(self, part: Part) -> None:
        """Keep some of the heads; see `Divisible`."""
        self.part, self.heads = part, part.of(self.heads, "heads")
        self.joined, self.output = ColumnParallelLinear(self.joined, part, 3), RowParallelLinear(self.output, part)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Packing | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
        cache: KeysValues | None = None,
        ancestry: Ancestry | None = None,
    ) -> Tensor:
        """Attend from x [rows, new, dim] to x and, if there is a `cache`, to the positions before it, which keeps them.

        `ancestry` has been extended by the new positions, and `mask` is what it returned: the rows of a sentence are
        one longer sequence. Returns [rows, new, dim].
        """
        rows, new, _ = x.shape
        beam, start = (ancestry.beam, ancestry.length - new) if ancestry is not None else (1, 0)
        joined: Tensor = self.joined(x)
        if rotary is None and (beam == 1 or new == 1):
            query, key, value = split_heads(joined.view(rows // beam, beam * new, -1), 3, self.heads)
        else:
            query, key, value = split_heads(joined, 3, self.heads)
            if rotary is not None:
                places = mask.queries if isinstance(mask, Packing) else start
                query, key = rotary(query, places), rotary(key, places)
            query = _together(query, beam, row_by_row=True)
            key, value = _together(key, beam), _together(value, beam)
        if cache is not None and ancestry is not None:
            key, value = cache.append(key, value, start * beam, ancestry.room * beam)
        mixed = attend(query, key, value, mask, causal, self.dropout if self.training else 0.0, self.part)
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(rows, new, -1))
        return output


def _together(x: Tensor, beam: int, row_by_row: bool = False) -> Tensor:
    """Make one sequence of the rows of a sentence: [rows, heads, new, n] to [sentences, heads, new x beam, n].

    Position after position, so that the last ones can be forgotten; or row by row, as queries and outputs stand.
    """
    if beam == 1:
        return x
    rows, heads, new, width = x.shape
    order = (0, 2, 1, 3, 4) if row_by_row else (0, 2, 3, 1, 4)
    return x.view(-1, beam, heads, new, width).permute(order).reshape(rows // beam, heads, beam * new, width)


class CrossAttention(nn.Module):
    """Attention to the source, with one matrix for the source's keys and values."""

    def __init__(self, dim: int, heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        # The gains give all three the bound sqrt(1.5 / dim), as in self-attention.
        self.query = Linear(dim, dim, bias, gain=0.5**0.5)
        self.joined = Linear(dim, 2 * dim, bias, gain=0.75**0.5)
        self.output = Linear(dim, dim, bias)
        self.part: Part | None = None
        """As of `SelfAttention`."""

    def divide(self, part: Part) -> None:
        """Keep some of the heads; see `Divisible`."""
        self.part, self.heads = part, part.of(self.heads, "heads")
        self.query, self.joined = ColumnParallelLinear(self.query, part), ColumnParallelLinear(self.joined, part, 2)
        self.output = RowParallelLinear(self.output, part)

    def read(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [sentences, heads, src_len, head_dim] of states [sentences, src_len, dim]."""
        joined: Tensor = self.joined(states)
        keys, values = split_heads(joined, 2, self.heads)
        if torch.is_grad_enabled():
            return keys, values
        # Read in every step of decoding: as the kernel, or the products with queries and with weights, want them.
        if kernels.usable(keys):
            return keys.contiguous(), values.contiguous()
        return keys.transpose(2, 3).contiguous().transpose(2, 3), values.contiguous()

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | Packing | None) -> Tensor:
        """Attend from x [rows, new, dim] to a source; the rows of a sentence are one longer query."""
        dropout = self.dropout if self.training else 0.0
        mixed = attend(self._queries(x, keys), keys, values, mask, dropout=dropout, part=self.part)
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
        return output

    def weights(self, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Return the weights [rows, heads, new, src_len] with which `forward` mixes the source, in float32."""
        weights = _weights(self._queries(x, keys).float(), keys.float(), mask)
        # From one long query a sentence to one query a row.
        sentences, heads, _, length = weights.shape
        return weights.view(sentences, heads, -1, x.shape[1], length).transpose(1, 2).flatten(0, 1)

    def _queries(self, x: Tensor, keys: Tensor) -> Tensor:
        query: Tensor = self.query(x)
        return query.view(len(keys), -1, self.heads, keys.shape[-1]).transpose(1, 2)
