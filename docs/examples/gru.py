"""A model in one file: a GRU that reads the source and writes with attention to it (Luong et al. 2015).

encdec train recipe.yaml --plugin gru.py 'model={name: gru, hidden: 256}'
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from encdec_cli.models.attention import attend
from encdec_cli.models.model import Memory, Model
from encdec_cli.registry import models


@dataclass
class GruState:
    """What the decoder remembers: one vector a row, and the source once a sentence."""

    hidden: Tensor  # [1, rows, dim]
    memory: Memory
    beam: int

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue row rows[i]."""
        sentences = rows[:: self.beam] // self.beam
        self.hidden = self.hidden[:, rows]
        self.memory = Memory(self.memory.states[sentences], self.memory.mask[sentences])


@models.register("gru")
class Gru(Model):
    """One GRU reads, one writes; what the writer sees of the source is added to its state."""

    @dataclass
    class Config:
        """The keys of the recipe's `model` section."""

        hidden: int = 256
        """Width of the embeddings and of both GRUs."""

    def __init__(self, config: Config, source_vocab: int, target_vocab: int) -> None:
        super().__init__()
        self.source = nn.Embedding(source_vocab, config.hidden)
        self.target = nn.Embedding(target_vocab, config.hidden)
        self.reader = nn.GRU(config.hidden, config.hidden, batch_first=True)
        self.writer = nn.GRU(config.hidden, config.hidden, batch_first=True)
        self.output = nn.Linear(config.hidden, target_vocab)

    def encode(self, source: Tensor, mask: Tensor) -> Memory:
        """Read from left to right: padding stands on the right, so no token sees it."""
        return Memory(self.reader(self.source(source))[0], mask)

    def start(self, memory: Memory, beam: int = 1) -> GruState:
        """Begin with the state at the last token of each sentence."""
        last = memory.mask.sum(dim=1) - 1
        hidden = memory.states[torch.arange(len(last), device=last.device), last]
        return GruState(hidden.repeat_interleave(beam, dim=0)[None], memory, beam)

    def decode(self, tokens: Tensor, state: GruState) -> Tensor:
        """Write, then look at the source; the rows of a sentence are one longer query."""
        written, state.hidden = self.writer(self.target(tokens), state.hidden.contiguous())
        states, mask = state.memory.states[:, None], state.memory.mask[:, None, None]
        seen = attend(written.reshape(len(mask), 1, -1, written.shape[-1]), states, states, mask)
        return written + seen.reshape(written.shape)

    def project(self, hidden: Tensor) -> Tensor:
        """Return the logits."""
        return self.output(hidden)
