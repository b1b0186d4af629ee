"""The same Transformer, its training step and its beam search as a user of plain PyTorch would write them.

The weights can be those of our model, so that both sides write the same output.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD, UNK, BOS, EOS = 0, 1, 2, 3


class PlainTransformer(nn.Module):
    """`nn.Transformer`, pre-norm, sinusoidal positions, one embedding for source, target and output."""

    def __init__(self, vocab: int, layers: int, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.transformer = nn.Transformer(dim, heads, layers, layers, inner, dropout, batch_first=True, norm_first=True)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoids(1024, dim))

    def drop_only_after_sublayers(self) -> None:
        """Switch off the dropout of attention weights and inside feed-forwards, which `nn.Transformer` also has."""
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout.p = 0.0

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        scaled = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(scaled + self.positions[start : start + tokens.shape[1]])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits [rows, tgt_len, vocab]."""
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device).isinf()
        padding = source == PAD
        hidden = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            tgt_key_padding_mask=target == PAD,
            memory_key_padding_mask=padding,
        )
        return F.linear(hidden, self.embedding.weight)


def sinusoids(length: int, dim: int) -> Tensor:
    """Return [length, dim]: sines in even columns, cosines in odd ones."""
    rates = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


class PlainTrainer:
    """One update after the other: whole logits, `nn.CrossEntropyLoss`, `torch.optim.Adam`, fused on a GPU.

    model: from source [rows, src_len] and what the decoder reads, [rows, tgt_len], to logits [rows, tgt_len, vocab].
    """

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        self.model = model.train()
        self.autocast = autocast
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=PAD)
        fused = next(model.parameters()).is_cuda or None
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=fused)

    def update(self, source: Tensor, target: Tensor) -> float:
        """Learn from one batch; source [rows, src_len], target [rows, tgt_len] from BOS to EOS."""
        self.optimizer.zero_grad()
        with torch.autocast(source.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.model(source, target[:, :-1])
            loss = self.loss(logits.flatten(0, 1), target[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())


class Decoder(Protocol):
    """What the search needs of a decoder."""

    def step(self, tokens: Tensor) -> Tensor:
        """Return logits [rows, vocab] after the prefix [rows, written]."""

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue row rows[i]."""


class Uncached:
    """Runs the decoder over the whole prefix in every step."""

    def __init__(self, model: PlainTransformer, source: Tensor, beam: int) -> None:
        self.model = model
        padding = source == PAD
        memory = model.transformer.encoder(model.embed(source), src_key_padding_mask=padding)
        self.memory = memory.repeat_interleave(beam, 0)
        self.padding = padding.repeat_interleave(beam, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Return logits [rows, vocab] after the prefix [rows, written]."""
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]).isinf()
        hidden = self.model.transformer.decoder(
            self.model.embed(tokens), self.memory, tgt_mask=causal, memory_key_padding_mask=self.padding
        )
        return F.linear(hidden[:, -1], self.model.embedding.weight)

    def reorder(self, rows: Tensor) -> None:
        """Do nothing: there is no cache, and rows stay within their sentence."""


class Cached:
    """Concatenates keys and values to a cache in every step, and reorders it by `index_select`."""

    def __init__(self, model: PlainTransformer, source: Tensor, beam: int) -> None:
        self.model = model
        padding = source == PAD
        memory = model.transformer.encoder(model.embed(source), src_key_padding_mask=padding)
        memory = memory.repeat_interleave(beam, 0)
        self.mask = ~padding.repeat_interleave(beam, 0)[:, None, None, :]
        self.layers = list(model.transformer.decoder.layers)
        self.cross = [self._keys_values(layer.multihead_attn, memory) for layer in self.layers]
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)

    def step(self, tokens: Tensor) -> Tensor:
        """Return logits [rows, vocab] after the prefix [rows, written], whose last token is new."""
        x = self.model.embed(tokens[:, -1:], tokens.shape[1] - 1)
        for number, layer in enumerate(self.layers):
            y = layer.norm1(x)
            keys, values = self._keys_values(layer.self_attn, y)
            old = self.cache[number]
            if old is not None:
                keys, values = torch.cat((old[0], keys), 2), torch.cat((old[1], values), 2)
            self.cache[number] = (keys, values)
            x = x + self._attend(layer.self_attn, y, keys, values, None)
            x = x + self._attend(layer.multihead_attn, layer.norm2(x), *self.cross[number], self.mask)
            x = x + layer.linear2(F.relu(layer.linear1(layer.norm3(x))))
        hidden = self.model.transformer.decoder.norm(x[:, -1])
        return F.linear(hidden, self.model.embedding.weight)

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue row rows[i]."""
        self.cache = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in filter(None, self.cache)]

    def _heads(self, attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)

    def _keys_values(self, attention: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor]:
        dim = attention.embed_dim
        keys, values = F.linear(x, attention.in_proj_weight[dim:], attention.in_proj_bias[dim:]).chunk(2, dim=-1)
        return self._heads(attention, keys), self._heads(attention, values)

    def _attend(
        self, attention: nn.MultiheadAttention, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        dim = attention.embed_dim
        query = self._heads(attention, F.linear(x, attention.in_proj_weight[:dim], attention.in_proj_bias[:dim]))
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
def beam_search(decoder: Decoder, sentences: int, beam: int, maximum: list[int]) -> list[list[int]]:
    """Return the best output of each sentence, by log-probability / length, EOS counted.

    As in fairseq: of the 2 x beam best continuations those among the first `beam` that end are hypotheses, the best
    `beam` others go on; a sentence is done with `beam` hypotheses or at its maximum, but its rows go on unused.
    """
    tokens = torch.full((sentences * beam, 1), BOS)
    totals = torch.full((sentences, beam), -math.inf)
    totals[:, 0] = 0.0
    found: list[list[tuple[float, list[int]]]] = [[] for _ in range(sentences)]
    done = [False] * sentences
    while True:
        log_probs = decoder.step(tokens).log_softmax(dim=-1)
        log_probs[:, [PAD, UNK, BOS]] = -math.inf
        vocab = log_probs.shape[1]
        sums = (totals.view(-1, 1) + log_probs).view(sentences, -1)
        best, places = sums.topk(2 * beam, dim=1)
        parents, words = places // vocab, places % vocab
        written = tokens.shape[1]  # counts BOS, so the new token is included
        rows, new, scores = [], [], []
        listed = zip(best.tolist(), parents.tolist(), words.tolist(), strict=True)
        for sentence, (row_totals, row_parents, row_words) in enumerate(listed):
            going = []
            for rank, (total, parent, word) in enumerate(zip(row_totals, row_parents, row_words, strict=True)):
                if word != EOS:
                    going.append((total, sentence * beam + parent, word))
                elif rank < beam and not done[sentence]:
                    prefix = tokens[sentence * beam + parent, 1:].tolist()
                    found[sentence].append((total / written, prefix))
            going = going[:beam]
            if not done[sentence] and (len(found[sentence]) >= beam or written > maximum[sentence]):
                done[sentence] = True
                _fill(found[sentence], tokens[sentence * beam : (sentence + 1) * beam], totals[sentence], beam)
            for total, row, word in going:
                rows.append(row)
                new.append(word)
                scores.append(total)
        if all(done):
            return [max(hypotheses)[1] for hypotheses in found]
        order = torch.tensor(rows)
        decoder.reorder(order)
        tokens = torch.cat((tokens.index_select(0, order), torch.tensor(new)[:, None]), dim=1)
        totals = torch.tensor(scores).view(sentences, beam)


def _fill(found: list[tuple[float, list[int]]], rows: Tensor, totals: Tensor, beam: int) -> None:
    """Fill the places that are left with outputs that were cut at the maximum."""
    length = max(1, rows.shape[1] - 1)
    ended = [tokens for _, tokens in found]
    for row, total in zip(rows[:, 1:].tolist(), totals.tolist(), strict=True):
        if len(found) < beam and row not in ended:
            found.append((total / length, row))
