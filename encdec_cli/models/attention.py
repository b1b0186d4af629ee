"""Attention to what was written and to the source, and what both remember between steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec_cli import kernels
from encdec_cli.kernels import attention as training
from encdec_cli.models.dropout import apart, dropout_of_part
from encdec_cli.models.heads import split_heads
from encdec_cli.models.linear import Linear
from encdec_cli.models.parts import ColumnParallelLinear, Part, RowParallelLinear
from encdec_cli.models.positions import Rotary
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
ROOM = 8
"""Stores of keys and values grow by this many positions."""


def mask_bias(mask: Tensor, dtype: torch.dtype, always: bool = False) -> Tensor | None:
    """Return what to add to attention scores [sentences, 1, 1, src_len] for mask [sentences, src_len].

    None if nothing is masked, unless it is `always` asked for. The number is finite: a row that may look nowhere looks
    everywhere, without NaN.
    """
    # On a GPU the question would cost a synchronisation.
    if not always and mask.device.type == "cpu" and bool(mask.all()):
        return None
    return _bias(mask, dtype)[:, None, None, :]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    part: Part | None = None,
) -> Tensor:
    """Return softmax(query key^T / sqrt(head_dim)) value, [rows, heads, queries, head_dim]: the only attention here.

    Args:
        query: [rows, heads, queries, head_dim].
        key: [rows, heads, keys, head_dim].
        value: like key.
        mask: broadcastable to [rows, heads, queries, keys]; True where a query may look, or numbers to be added.
        causal: the last query sees every key, the one before it all but the last, and so on.
        dropout: probability of dropping an attention weight.
        part: whose heads these are, if processes share them; None if they are all.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = _bias(mask, query.dtype)
    if query.shape[2] == 1:
        causal = False
    if not dropout and not _is_training(query, key, value) and _by_kernel(query, key, value, mask, causal):
        return kernels.attend(query, key, value, mask)
    if not dropout and training.can_attend(query, key, value, mask, causal):
        return training.attend(query, key, value, mask, causal)
    return _by_torch(query, key, value, mask, causal, dropout, part)


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


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, _least(dtype))


def _least(dtype: torch.dtype) -> float:
    # Half of the least number, so that two of them still have a finite sum.
    return torch.finfo(dtype).min / 2


def _with_causal(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    if not causal:
        return mask
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    ahead = _bias(seen, query.dtype)
    return ahead if mask is None else mask + ahead


class Ancestry:
    """Which of the positions that the rows of a sentence have written each of them may look at.

    The rows of a sentence share one store of keys and values; when a row becomes the continuation of another, its
    view of the store changes and nothing in the store moves. What is asked for beyond the first call covers the room
    of the store too, where nobody looks.
    """

    def __init__(self, beam: int) -> None:
        self.beam = beam
        self.length = 0
        """Positions so far."""
        self.room = 0
        """Positions that the stores have room for; always as many as there are while gradients are recorded."""
        self._bias: Tensor | None = None
        """What to add to attention scores, [rows, beam x room]; [1, room] where each row is alone in its store."""

    def extend(self, new: int, like: Tensor) -> Tensor | None:
        """Add `new` positions for every row; return the bias of their queries, [sentences, 1, beam x new, beam x room].

        None where all positions are new, and merely causal. With one row a sentence the bias is that of all rows,
        [1, 1, new, room]. like: [rows, ...], for type and device.
        """
        start, self.length = self.length, self.length + new
        if start == 0 or torch.is_grad_enabled():
            self.room = self.length
        elif self.length > self.room:
            self.room = -(-self.length // ROOM) * ROOM
        if self.beam == 1:
            if start == 0:
                return None
            if new > 1 or torch.is_grad_enabled():
                return _causal_bias(new, self.length, self.room, like)
            return self._opened(like)
        rows = torch.arange(len(like), device=like.device) % self.beam
        owners = torch.arange(self.beam, device=like.device).repeat(new)  # position after position
        own = owners == rows[:, None]  # [rows, new x beam]
        past = self._widened(start, like)
        before, after = start * self.beam, self.length * self.beam
        past[:, before:after] = _bias(own, like.dtype)
        self._bias = past
        if new == 1:
            return past.view(-1, 1, self.beam, past.shape[1])
        places = torch.arange(new, device=like.device)
        earlier = own[:, None] & (places.repeat_interleave(self.beam) <= places[:, None])  # [rows, new, new x beam]
        seen = past[:, None].repeat(1, new, 1)
        seen[:, :, before:after] = _bias(earlier, like.dtype)
        return seen.view(-1, 1, self.beam * new, past.shape[1])

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue row rows[i]."""
        if self._bias is not None and self.beam > 1:
            self._bias = self._bias.index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forget all positions but the first `length` of every row."""
        self.length = min(self.length, length)
        if self._bias is not None:
            self._bias[:, self.length * self.beam :] = _least(self._bias.dtype)

    def _opened(self, like: Tensor) -> Tensor:
        """Return the bias of the last position of every row, [1, 1, 1, room], in which it is new."""
        if self._bias is None or self._bias.shape[1] != self.room:
            self._bias = _causal_bias(1, self.length, self.room, like)[0, 0]
        self._bias[:, : self.length] = 0
        return self._bias[None, None]

    def _widened(self, start: int, like: Tensor) -> Tensor:
        """Return the bias of the `start` positions so far, as wide as the room."""
        if self._bias is not None and self._bias.shape[1] == self.room * self.beam:
            return self._bias
        bias = like.new_full((len(like), self.room * self.beam), _least(like.dtype))
        if self._bias is not None:
            bias[:, : start * self.beam] = self._bias[:, : start * self.beam]
        return bias


def _causal_bias(new: int, length: int, room: int, like: Tensor) -> Tensor:
    """Return what lets the last `new` of `length` positions see those before them: [1, 1, new, room]."""
    places = torch.arange(room, device=like.device)
    last = torch.arange(length - new, length, device=like.device)
    return _bias(places <= last[:, None], like.dtype)[None, None]


class KeysValues:
    """The keys and values of one layer, for all positions so far.

    The first ones are kept as they are: training copies nothing and gradients flow. Room for more is made only when a
    second call comes, and lies at the end of the store: so what is read is one block of memory for each sentence and
    head, which products of matrices want.
    """

    def __init__(self) -> None:
        self.stores: tuple[Tensor, ...] = ()
        """Keys and values, [sentences, heads, room, head_dim] each; empty before the first call."""
        self._own = False
        """Whether the stores are ours to write into."""

    def append(self, keys: Tensor, values: Tensor, start: int, room: int) -> tuple[Tensor, Tensor]:
        """Add keys and values [sentences, heads, new, head_dim] after `start`; return the stores, `room` long."""
        end = start + keys.shape[2]
        if start == 0 and room == end:
            self.stores, self._own = (keys, values), False
        elif torch.is_grad_enabled():
            # Writing into the store would spoil what earlier steps saved for their gradients.
            old = (store[:, :, :start] for store in self.stores)
            self.stores = tuple(torch.cat(pair, dim=2) for pair in zip(old, (keys, values), strict=True))
        else:
            stores = self.reserve(start, room, (len(keys), keys.shape[1], keys.shape[3]), keys)
            for store, new in zip(stores, (keys, values), strict=True):
                store[:, :, start:end] = new
        all_keys, all_values = self.stores
        return all_keys, all_values

    def reserve(self, used: int, room: int, shape: tuple[int, int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stores, `room` long, for who writes what comes after the `used` positions so far.

        shape: [sentences, heads, head_dim]; like: for type and device.
        """
        if used == 0:
            sentences, heads, width = shape
            self.stores = tuple(like.new_zeros((sentences, heads, room, width)) for _ in range(2))
            self._own = True
        elif self.stores[0].shape[2] != room or not self._own:
            self._make_room(used, room)
        keys, values = self.stores
        return keys, values

    def keep(self, sentences: Tensor) -> None:
        """Let the stores of these sentences (or rows) stay, in this order; they are copied. [n] int64."""
        self.stores = tuple(store.index_select(0, sentences) for store in self.stores)
        self._own = True

    def _make_room(self, used: int, room: int) -> None:
        rows, heads, _, width = self.stores[0].shape
        old = self.stores
        self.stores, self._own = tuple(store.new_empty((rows, heads, room, width)) for store in old), True
        for store, before in zip(self.stores, old, strict=True):
            store[:, :, :used] = before[:, :, :used]
            store[:, :, used:] = 0  # nothing times what happens to be there must be nothing


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
        mask: Tensor | None = None,
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
                query, key = rotary(query, start), rotary(key, start)
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

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
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
