"""Attention to what was written and to the source, and what both remember between steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec_cli.models.dropout import dropout as drop
from encdec_cli.models.linear import Linear
from encdec_cli.models.positions import Rotary
from encdec_cli.models.softmax import softmax

FEW_SCORES = 4096
"""Below this many attention weights a call is dominated by its overhead, where one fused kernel is best."""
MANY_SCORES = 2**27
"""Above this many attention weights the memory to hold them matters more than speed."""


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return what to add to attention scores [sentences, 1, 1, src_len] for mask [sentences, src_len].

    None if nothing is masked. The number is finite: a row that may look nowhere looks everywhere, without NaN.
    """
    if mask.device.type == "cpu" and bool(mask.all()):  # on a GPU the question would cost a synchronisation
        return None
    return _bias(mask, dtype)[:, None, None, :]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Return softmax(query key^T / sqrt(head_dim)) value, [rows, heads, queries, head_dim]: the only attention here.

    Args:
        query: [rows, heads, queries, head_dim].
        key: [rows, heads, keys, head_dim].
        value: like key.
        mask: broadcastable to [rows, heads, queries, keys]; True where a query may look, or numbers to be added.
        causal: the last query sees every key, the one before it all but the last, and so on.
        dropout: probability of dropping an attention weight.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = _bias(mask, query.dtype)
    causal = causal and query.shape[2] > 1
    if _by_matmul(query, key, value, dropout):
        return _matmul_attention(query, key, value, _with_causal(query, key, mask, causal), dropout)
    if causal and (mask is not None or query.shape[2] != key.shape[2]):
        mask, causal = _with_causal(query, key, mask, causal), False
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, dropout_p=dropout)


def _by_matmul(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    # Measured with one thread on Zen 4 (avx512_bf16), 128 rows, 4 heads, head_dim 64, lengths 16 / 32 / 64 in ms,
    # explicit v. scaled_dot_product_attention:
    #   bf16 forward + backward  6.1 / 9.4 / 24 v. 48 / 61 / 93     bf16 forward  3.0 / 3.7 / 8.8 v. 3.8 / 6.7 / 16
    #   fp32 forward + backward  10 / 26 / 61 v. 8.3 / 20 / 53      fp32 forward  1.8 / 8.0 / 27 v. 2.2 / 6.1 / 16
    # One decoding step of 320 rows with 40 keys: bf16 6.0 v. 8.6, fp32 5.1 v. 5.4; of 5 rows: bf16 0.13 v. 0.07.
    if query.device.type != "cpu":
        return False
    if dropout > 0:
        return True  # the fused kernel has no dropout on a CPU, and ours is the cheaper one
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    if query.dtype != torch.bfloat16 or scores > MANY_SCORES:
        return False
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return needs_grad or scores >= FEW_SCORES


def _matmul_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return drop(softmax(scores), dropout) @ value


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    # Half of the least number, so that two of them still have a finite sum.
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min / 2)


def _with_causal(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    if not causal:
        return mask
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    ahead = _bias(seen, query.dtype)
    return ahead if mask is None else mask + ahead


class KeysValues:
    """The keys and values of one layer, for all positions so far.

    The first ones are kept as they are: training copies nothing and gradients flow. Room is made, twice what is
    needed, only when a second call comes.
    """

    def __init__(self) -> None:
        self.length = 0
        self._stores: tuple[Tensor, ...] = ()
        self._spares: tuple[Tensor, ...] = ()

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [rows, heads, new, head_dim]; return those of all positions."""
        start, self.length = self.length, self.length + keys.shape[2]
        if start == 0:
            self._stores = (keys, values)
        elif torch.is_grad_enabled() and (keys.requires_grad or self._stores[0].requires_grad):
            # Writing into the store would spoil what earlier steps saved for their gradients.
            old = (store[:, :, :start] for store in self._stores)
            self._stores = tuple(torch.cat(pair, dim=2) for pair in zip(old, (keys, values), strict=True))
        else:
            if self._stores[0].shape[2] < self.length or not self._spares:
                self._make_room(start)
            for store, new in zip(self._stores, (keys, values), strict=True):
                store[:, :, start : self.length] = new
        all_keys, all_values = (store[:, :, : self.length] for store in self._stores)
        return all_keys, all_values

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue row rows[i]; only the used part is copied."""
        if self.length == 0:
            return
        used = [store[:, :, : self.length] for store in self._stores]
        room = not self._spares or len(rows) > len(self._spares[0])
        if room or (torch.is_grad_enabled() and self._stores[0].requires_grad):
            self._stores, self._spares = tuple(store.index_select(0, rows) for store in used), ()
            return
        targets = tuple(spare[: len(rows)] for spare in self._spares)
        for target, store in zip(targets, used, strict=True):
            torch.index_select(store, 0, rows, out=target[:, :, : self.length])
        # The two sets take turns, which spares an allocation in every step.
        self._stores, self._spares = targets, tuple(store[: len(rows)] for store in self._stores)

    def crop(self, length: int) -> None:
        """Forget all positions but the first `length`."""
        self.length = min(self.length, length)
        if self.length == 0:  # the next keys are kept as they are, whatever their number
            self._stores, self._spares = (), ()

    def _make_room(self, used: int) -> None:
        rows, heads, _, width = self._stores[0].shape
        shape = (rows, heads, max(16, 2 * self.length), width)
        old = self._stores
        self._stores = tuple(store.new_empty(shape) for store in old)
        self._spares = tuple(store.new_empty(shape) for store in old)
        for store, before in zip(self._stores, old, strict=True):
            store[:, :, :used] = before[:, :, :used]


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with one matrix for queries, keys and values."""

    def __init__(self, dim: int, heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        # Xavier of the joined matrix has the bound that fairseq gives to each of the three.
        self.joined = Linear(dim, 3 * dim, bias)
        self.output = Linear(dim, dim, bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KeysValues | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Attend from x [rows, new, dim] to the positions in `cache` and to x; returns [rows, new, dim]."""
        rows, new, dim = x.shape
        joined: Tensor = self.joined(x)
        query, key, value = joined.view(rows, new, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if rotary is not None:
            start = cache.length if cache is not None else 0
            query, key = rotary(query, start), rotary(key, start)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = attend(query, key, value, mask, causal, self.dropout if self.training else 0.0)
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(rows, new, dim))
        return output


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

    def read(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [sentences, heads, src_len, head_dim] of states [sentences, src_len, dim]."""
        sentences, length, _ = states.shape
        joined: Tensor = self.joined(states)
        keys, values = joined.view(sentences, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return keys, values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from x [rows, new, dim] to a source; the rows of a sentence are one longer query."""
        query: Tensor = self.query(x)
        query = query.view(len(keys), -1, self.heads, keys.shape[-1]).transpose(1, 2)
        mixed = attend(query, keys, values, mask, dropout=self.dropout if self.training else 0.0)
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(x.shape))
        return output
