"""What attention remembers between steps: keys and values of what was written, and who has written what."""

from __future__ import annotations

import torch
from torch import Tensor

from encdec_cli.models.masks import bias_of, least

ROOM = 8
"""Stores of keys and values grow by this many positions."""


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
        past[:, before:after] = bias_of(own, like.dtype)
        self._bias = past
        if new == 1:
            return past.view(-1, 1, self.beam, past.shape[1])
        places = torch.arange(new, device=like.device)
        earlier = own[:, None] & (places.repeat_interleave(self.beam) <= places[:, None])  # [rows, new, new x beam]
        seen = past[:, None].repeat(1, new, 1)
        seen[:, :, before:after] = bias_of(earlier, like.dtype)
        return seen.view(-1, 1, self.beam * new, past.shape[1])

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue row rows[i]."""
        if self._bias is not None and self.beam > 1:
            self._bias = self._bias.index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forget all positions but the first `length` of every row."""
        self.length = min(self.length, length)
        if self._bias is not None:
            self._bias[:, self.length * self.beam :] = least(self._bias.dtype)

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
        bias = like.new_full((len(like), self.room * self.beam), least(like.dtype))
        if self._bias is not None:
            bias[:, : start * self.beam] = self._bias[:, : start * self.beam]
        return bias


def _causal_bias(new: int, length: int, room: int, like: Tensor) -> Tensor:
    """Return what lets the last `new` of `length` positions see those before them: [1, 1, new, room]."""
    places = torch.arange(room, device=like.device)
    last = torch.arange(length - new, length, device=like.device)
    return bias_of(places <= last[:, None], like.dtype)[None, None]


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
