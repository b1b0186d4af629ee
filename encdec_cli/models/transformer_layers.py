"""The layers of the Transformer, and what its decoder remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from encdec_cli.kernels import layer as kernel
from encdec_cli.kernels.packing import Packing
from encdec_cli.models.attention import CrossAttention, SelfAttention
from encdec_cli.models.fusing import kernel_of
from encdec_cli.models.layers import FeedForward, Residual, make_norm
from encdec_cli.models.positions import Rotary
from encdec_cli.models.remembered import Ancestry, KeysValues

if TYPE_CHECKING:
    from encdec_cli.models.transformer import Transformer


def _residual(config: Transformer.Config) -> Residual:
    norm = make_norm(config.norm, config.d_model, config.bias)
    return Residual(norm, config.norm_order, config.dropout)


def _feed_forward(config: Transformer.Config) -> FeedForward:
    return FeedForward(config.d_model, config.feed_forward, config.activation, config.activation_dropout, config.bias)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward."""

    def __init__(self, config: Transformer.Config) -> None:
        super().__init__()
        self.attention = SelfAttention(config.d_model, config.heads, config.bias, config.attention_dropout)
        self.attention_residual = _residual(config)
        self.feed_forward = _feed_forward(config)
        self.feed_forward_residual = _residual(config)
        self._kernel: kernel.EncoderLayer | None = None
        """What computes all of it at once, if there is a kernel that does."""

    def fuse(self) -> None:
        """Take a kernel for all of the layer, now that its weights no longer change, if there is one for its sizes."""
        maps = {"joined": self.attention.joined, "output": self.attention.output}
        residuals = (self.attention_residual, self.attention_residual, self.feed_forward_residual)
        self._kernel = kernel_of(kernel.EncoderLayer, self.attention.heads, maps, self.feed_forward, residuals)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Packing | None,
        rotary: Rotary | None,
        through: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Map x [sentences, src_len, dim] to the same shape; mask as `mask_bias` makes it, or of packed x.

        Where a kernel does it, in the place of x. `through`, if given, computes it: from the layer, x, mask and rotary.
        """
        if through is not None:
            return through(self, x, mask, rotary)
        if self._kernel is not None and not isinstance(mask, Packing) and self._kernel.takes(x, mask):
            return self._kernel(x, mask, None if rotary is None else rotary.turns(0, x.shape[1], x))
        x = self.attention_residual(x, lambda y: self.attention(y, mask, rotary=rotary))
        output: Tensor = self.feed_forward_residual(x, self.feed_forward)
        return output


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, and a feed-forward."""

    def __init__(self, config: Transformer.Config) -> None:
        super().__init__()
        self.attention = SelfAttention(config.d_model, config.heads, config.bias, config.attention_dropout)
        self.attention_residual = _residual(config)
        self.cross = CrossAttention(config.d_model, config.heads, config.bias, config.attention_dropout)
        self.cross_residual = _residual(config)
        self.feed_forward = _feed_forward(config)
        self.feed_forward_residual = _residual(config)
        self._kernel: kernel.DecoderLayer | None = None
        """What computes all of it for one new token of every row, if there is a kernel that does."""

    def fuse(self) -> None:
        """Take a kernel for all of the layer, now that its weights no longer change, if there is one for its sizes."""
        own, cross, inner = self.attention, self.cross, self.feed_forward
        maps = {"joined": own.joined, "output": own.output, "query": cross.query, "cross_output": cross.output}
        residuals = (self.attention_residual, self.cross_residual, self.feed_forward_residual)
        self._kernel = kernel_of(kernel.DecoderLayer, own.heads, maps, inner, residuals)

    def _at_once(
        self, x: Tensor, state: TransformerState, layer: int, rotary: Rotary | None, mask: Tensor | None
    ) -> Tensor | None:
        """Return what `forward` does of one new token, by the kernel; None if it does not take this."""
        cache, ancestry, sources = state.caches[layer], state.ancestry, state.sources[layer]
        beam, place, room = ancestry.beam, ancestry.length - 1, ancestry.room * ancestry.beam
        if self._kernel is None or not self._kernel.takes(x, sources, room):
            return None
        keys, values = cache.reserve(place * beam, room, (len(x) // beam, *sources[0].shape[1::2]), x)
        turns = None if rotary is None else rotary.turns(place, place + 1, x)
        return self._kernel(x, kernel.Written(keys, values, place * beam, beam, mask, turns), sources, state.mask)

    def forward(
        self,
        x: Tensor,
        state: TransformerState,
        layer: int,
        rotary: Rotary | None,
        mask: Tensor | None = None,
        shows: bool = False,
        through: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map x [rows, new, dim] to the same shape, and add to what `state` keeps for layer number `layer`.

        mask: as `Ancestry.extend` gives it. If it `shows`, it returns the weights of the attention to the source, too,
        [rows, heads, new, src_len]. `through`, if given, computes the first tokens of every row, as `decode_whole`.
        """
        if through is not None:
            x, keys, values = through(self, x, state.sources[layer], state.seen, rotary)
            state.caches[layer].append(keys, values, 0, keys.shape[2])
            return x
        if x.shape[1] == 1 and not shows and (found := self._at_once(x, state, layer, rotary, mask)) is not None:
            return found
        cache, ancestry = state.caches[layer], state.ancestry
        keys, values = state.sources[layer]
        seen: list[Tensor] = []

        def look(y: Tensor) -> Tensor:
            if shows:
                seen.append(self.cross.weights(y, keys, state.mask))
            mixed: Tensor = self.cross(y, keys, values, state.seen)
            return mixed

        own = mask if state.packing is None else state.packing.among_queries
        x = self.attention_residual(x, lambda y: self.attention(y, own, mask is None, rotary, cache, ancestry))
        x = self.cross_residual(x, look)
        output: Tensor = self.feed_forward_residual(x, self.feed_forward)
        return (output, seen[0]) if shows else output


@dataclass
class TransformerState:
    """What the decoder remembers: what it wrote, for each row, and the source, once for each sentence."""

    beam: int
    """Rows a sentence."""
    ancestry: Ancestry
    """Which of the tokens so far each row has written, where the rows of a sentence share a store."""
    caches: list[KeysValues]
    """For each layer: keys and values of the tokens so far, of all rows of a sentence together or of each row."""
    sources: list[tuple[Tensor, Tensor]]
    """For each layer: keys and values of the source, [sentences, heads, src_len, head_dim]."""
    mask: Tensor | None
    """What to add to scores of source positions, [sentences, 1, 1, src_len]; None if nothing is masked."""
    packing: Packing | None = None
    """Which positions of the only row, and of the source, belong together where training packs them."""

    @property
    def seen(self) -> Tensor | Packing | None:
        """What says which positions of the source are seen."""
        return self.mask if self.packing is None else self.packing

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.ancestry.length

    def reorder(self, rows: Tensor) -> None:
        """Let new row i continue old row rows[i]; see `State`. The source moves only if sentences do."""
        self.ancestry.reorder(rows)
        sentences = rows[:: self.beam] // self.beam
        if self.ancestry.beam < self.beam:
            for cache in self.caches:
                cache.keep(rows)
        same = torch.arange(len(self.sources[0][0]), device=rows.device)
        if not torch.equal(sentences, same):
            self.sources = [
                (keys.index_select(0, sentences), values.index_select(0, sentences)) for keys, values in self.sources
            ]
            self.mask = self.mask.index_select(0, sentences) if self.mask is not None else None
            for cache in self.caches if self.ancestry.beam == self.beam else ():
                cache.keep(sentences)

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length` of every row."""
        self.ancestry.crop(length)


def encode_whole(layer: EncoderLayer, x: Tensor, mask: Tensor | Packing | None, rotary: Rotary | None) -> Tensor:
    """Compute an encoder's layer as training does: what `Transformer.compile_layers` compiles, once for all layers."""
    return layer.forward(x, mask, rotary)  # this is a part of the layer's call: what hooks do is done


def decode_whole(
    layer: nn.Module, x: Tensor, source: tuple[Tensor, Tensor], mask: Tensor | Packing | None, rotary: Rotary | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a decoder's layer for all positions at once; return its output, and its keys and values."""
    ancestry = Ancestry(1)
    packing, bias = (mask, None) if isinstance(mask, Packing) else (None, mask)
    state = TransformerState(1, ancestry, [KeysValues()], [source], bias, packing)
    output: Tensor = layer.forward(x, state, 0, rotary, ancestry.extend(x.shape[1], x))
    keys, values = state.caches[0].stores
    return output, keys, values
