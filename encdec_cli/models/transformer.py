"""The Transformer (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), with the choices the field has added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from encdec_cli.kernels.packing import Packing, Rows
from encdec_cli.models.checkpointing import checkpointed
from encdec_cli.models.dropout import Dropout
from encdec_cli.models.layers import Activation, NormKind, NormOrder, make_norm
from encdec_cli.models.linear import Linear, any_rows, linear
from encdec_cli.models.masks import mask_bias
from encdec_cli.models.model import Memory, Model
from encdec_cli.models.positions import Learned, Rotary, Sinusoidal
from encdec_cli.models.remembered import Ancestry, KeysValues
from encdec_cli.models.transformer_layers import (
    DecoderLayer,
    EncoderLayer,
    TransformerState,
    decode_whole,
    encode_whole,
)

_PAD = 0
"""The id of padding."""
SHARED_ROWS = 8
"""Most rows of a sentence that share a store of keys and values: attention to it grows with their square."""


def _final_norm(config: Transformer.Config) -> nn.Module:
    # Post-norm layers end with a norm of their own.
    return make_norm(config.norm, config.d_model, config.bias) if config.norm_order == "pre" else nn.Identity()


class Transformer(Model):
    """Encoder and decoder of attention layers; `Config` says which of the field's variants.

    Linear layers start Xavier-uniform with zero biases; embeddings, learned positions and an output matrix of its
    own start normal with standard deviation d_model ** -0.5, the embedding of padding at zero.
    """

    side_by_side = can_checkpoint = can_compile = can_divide = True

    @dataclass
    class Config:
        """The keys of a recipe's `model` section for `name: transformer`. Raises ValueError where they do not fit."""

        encoder_layers: int = 6
        """Layers of the encoder."""
        decoder_layers: int = 6
        """Layers of the decoder."""
        d_model: int = 512
        """Width of the states between layers, and of the embeddings."""
        heads: int = 8
        """Attention heads in every layer; they share d_model equally."""
        feed_forward: int = 2048
        """Inner width of the feed-forwards."""
        dropout: float = 0.1
        """Dropout on the embeddings and on what every sublayer adds."""
        attention_dropout: float = 0.0
        """Dropout on attention weights."""
        activation_dropout: float = 0.0
        """Dropout inside the feed-forwards, after the activation."""
        norm_order: NormOrder = "pre"
        """Norm before each sublayer (`pre`, trains more easily) or after it (`post`, as in the first paper)."""
        norm: NormKind = "layer"
        """LayerNorm or RMSNorm."""
        activation: Activation = "relu"
        """Activation of the feed-forwards; swiglu has three matrices where the others have two."""
        positions: Literal["sinusoidal", "learned", "rotary"] = "sinusoidal"
        """How a token knows where it stands; only `learned` has a greatest length."""
        max_positions: int = 1024
        """Most tokens of a source or a target with learned positions."""
        tie: Literal["none", "decoder", "all"] = "all"
        """Which embeddings share a matrix: target and output (`decoder`), or these and the source (`all`)."""
        scale_embeddings: bool = True
        """Multiply embeddings by the square root of d_model."""
        bias: bool = True
        """Whether linear layers and LayerNorms have biases."""

        def __post_init__(self) -> None:
            for field in fields(self):
                value = getattr(self, field.name)
                if type(field.default) is int and value < 1:
                    raise ValueError(f"{field.name}: {value} must be at least 1")
                if type(field.default) is float and not 0 <= value < 1:
                    raise ValueError(f"{field.name}: {value} must be at least 0 and below 1")
            if self.d_model % self.heads:
                raise ValueError(f"d_model ({self.d_model}) must be a multiple of heads ({self.heads})")
            if self.positions == "sinusoidal" and self.d_model % 2:
                raise ValueError(f"d_model ({self.d_model}) must be even with sinusoidal positions")
            if self.positions == "rotary" and (self.d_model // self.heads) % 2:
                raise ValueError(
                    f"d_model / heads ({self.d_model} / {self.heads} = {self.d_model // self.heads}) must be even "
                    "with rotary positions"
                )

    def __init__(self, config: Transformer.Config, source_vocab: int, target_vocab: int) -> None:
        super().__init__()
        if config.tie == "all" and source_vocab != target_vocab:
            raise ValueError(
                f"tie: all needs one vocabulary for both sides, but the source has {source_vocab} tokens and the "
                f"target {target_vocab}; share the vocabulary, or use tie: decoder"
            )
        self.config = config
        self.max_positions = config.max_positions if config.positions == "learned" else None
        # A shared matrix has one name and one place, so that a saved model holds it once.
        self.target_embedding = self._embedding(target_vocab)
        self.source_embedding = None if config.tie == "all" else self._embedding(source_vocab)
        self.output = None
        if config.tie == "none":
            self.output = Linear(config.d_model, target_vocab, bias=False)
            nn.init.normal_(self.output.weight, std=config.d_model**-0.5)
        self.rotary = Rotary(config.d_model // config.heads) if config.positions == "rotary" else None
        self.source_positions = self._positions()
        self.target_positions = self._positions()
        self.dropout = Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_norm = _final_norm(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = _final_norm(config)
        self._encode_whole: Callable[..., Tensor] = encode_whole
        self._decode_whole: Callable[..., tuple[Tensor, Tensor, Tensor]] = decode_whole

    def _embedding(self, vocab: int) -> nn.Embedding:
        embedding = nn.Embedding(vocab, self.config.d_model, padding_idx=_PAD)
        with torch.no_grad():
            nn.init.normal_(embedding.weight, std=self.config.d_model**-0.5)[0].zero_()
        return embedding

    def _positions(self) -> nn.Module | None:
        if self.config.positions == "sinusoidal":
            return Sinusoidal(self.config.d_model)
        if self.config.positions == "learned":
            return Learned(self.config.max_positions, self.config.d_model)
        return None  # rotary positions act inside the attention

    def _embed(self, tokens: Tensor, embedding: nn.Embedding, positions: nn.Module | None, start: int) -> Tensor:
        x: Tensor = embedding(tokens)
        if self.config.scale_embeddings:
            x = x * self.config.d_model**0.5
        return x if positions is None else positions(x, start)

    def can_pack(self, dtype: torch.dtype, device: str) -> bool:
        """Return True on a CPU whose products are our own: torch's want few shapes, and attention on a GPU wants rows.

        A subclass must say itself that its layers take packed rows, and that `forward` does what its steps do.
        """
        return type(self) is Transformer and device == "cpu" and any_rows(dtype, self.config.d_model)

    def forward(self, source: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        """Return hidden states [sentences, tgt_len, dim] for all target positions; zeros for padding if it packs.

        Every source and every target has a token.
        """
        if not self.packs:
            return super().forward(source, mask, target)
        packing = Packing(Rows(target.ne(_PAD)), Rows(mask))
        x = self.dropout(packing.keys.pack(self._embed_source(source)))
        state = self._state(self._read(x, Packing(packing.keys, packing.keys)), 1)
        state.packing = packing
        x = self._embed(target, self.target_embedding, self.target_positions, 0)
        return packing.queries.unpack(self._written(self.dropout(packing.queries.pack(x)), state))

    def _embed_source(self, source: Tensor) -> Tensor:
        embedding = self.target_embedding if self.source_embedding is None else self.source_embedding
        return self._embed(source, embedding, self.source_positions, 0)

    def encode(self, source: Tensor, mask: Tensor) -> Memory:
        """Read source [sentences, src_len]; raise ValueError if it is longer than learned positions reach."""
        x = self.dropout(self._embed_source(source))
        return Memory(self._read(x, mask_bias(mask, x.dtype, self.compiled)), mask)

    def _read(self, x: Tensor, mask: Tensor | Packing | None) -> Tensor:
        """Return what the encoder makes of embedded sources."""
        for layer in self.encoder:
            x = layer(x, mask, self.rotary, self._encoding if torch.is_grad_enabled() else None)
        states: Tensor = self.encoder_norm(x)
        return states

    def _encoding(self, layer: EncoderLayer, x: Tensor, bias: Tensor | Packing | None, rotary: Rotary | None) -> Tensor:
        """Compute an encoder's layer as this model trains."""
        if self.checkpointing:
            return checkpointed(layer, lambda x: (self._encode_whole(layer, x, bias, rotary),), x)[0]
        return self._encode_whole(layer, x, bias, rotary)

    def _decoding(
        self,
        layer: DecoderLayer,
        x: Tensor,
        source: tuple[Tensor, Tensor],
        mask: Tensor | Packing | None,
        rotary: Rotary | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute a decoder's layer as this model trains; see `decode_whole`."""

        def compute(x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self._decode_whole(layer, x, (keys, values), mask, rotary)

        return checkpointed(layer, compute, x, *source) if self.checkpointing else compute(x, *source)  # type: ignore[return-value]

    def start(self, memory: Memory, beam: int = 1) -> TransformerState:
        """Compute every layer's keys and values of the source, once for each sentence."""
        state = self._state(memory.states, beam)
        state.mask = mask_bias(memory.mask, memory.states.dtype, self.compiled)
        return state

    def _state(self, read: Tensor, beam: int) -> TransformerState:
        layers = [layer for layer in self.decoder if isinstance(layer, DecoderLayer)]
        return TransformerState(
            beam=beam,
            ancestry=Ancestry(beam if beam <= SHARED_ROWS else 1),
            caches=[KeysValues() for _ in layers],
            sources=[layer.cross.read(read) for layer in layers],
            mask=None,
        )

    def decode(self, tokens: Tensor, state: TransformerState) -> Tensor:  # type: ignore[override]
        """Read tokens [rows, new] after the state's; return [rows, new, dim]. Raises ValueError as `encode`."""
        x = self._embed(tokens, self.target_embedding, self.target_positions, state.length)
        return self._written(self.dropout(x), state)

    def _written(self, x: Tensor, state: TransformerState) -> Tensor:
        """Return what the decoder makes of the next embedded tokens."""
        mask = state.ancestry.extend(x.shape[1], x)
        trains = torch.is_grad_enabled() and state.beam == 1 and state.length == x.shape[1]
        for number, layer in enumerate(self.decoder):
            x = layer(x, state, number, self.rotary, mask, through=self._decoding if trains else None)
        hidden: Tensor = self.decoder_norm(x)
        return hidden

    def attention(self, tokens: Tensor, state: TransformerState) -> Iterator[Tensor]:  # type: ignore[override]
        """Yield each layer's attention to the source, [rows, heads, new, src_len], for tokens [rows, new]."""
        x = self.dropout(self._embed(tokens, self.target_embedding, self.target_positions, state.length))
        mask = state.ancestry.extend(tokens.shape[1], x)
        for number, layer in enumerate(self.decoder):
            x, weights = layer(x, state, number, self.rotary, mask, shows=True)
            yield weights

    def compile_layers(self) -> None:
        """Compile what training does of a layer, for batches of any shape, once for all layers."""
        from torch.fx.experimental import _config  # noqa: PLC0415 - it imports the compiler

        _config.use_duck_shape = False  # or sizes that are equal in the first batch would have to be so in all
        self.compiled = True
        self._encode_whole = torch.compile(encode_whole, dynamic=True)
        self._decode_whole = torch.compile(decode_whole, dynamic=True)

    def units(self) -> list[nn.Module]:
        """Return the layers, and before them what reads the source for those of the decoder, ahead of their turn."""
        readers = [layer.cross.joined for layer in self.decoder if isinstance(layer, DecoderLayer)]
        return [*readers, *self.encoder, *self.decoder]

    def untie(self) -> None:
        """Give the output layer a copy of the target embedding, if it shares that."""
        if self.output is None:
            weight = self.target_embedding.weight
            self.output = Linear(weight.shape[1], weight.shape[0], bias=False).to(weight)
            self.output.weight.data.copy_(weight.data)

    def project(self, hidden: Tensor) -> Tensor:
        """Return logits [n, vocab] of hidden [n, dim], by the target embedding if it is tied."""
        if self.output is None:
            return linear(hidden, self.target_embedding.weight)
        logits: Tensor = self.output(hidden)
        return logits
