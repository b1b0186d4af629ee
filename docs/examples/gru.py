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
    """What the decoder remembers of each row: its own vector, and the source."""

    hidden: Tensor  # [1, rows, dim]
    memory: Memory

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue row rows[i]."""
        self.hidden = self.hidden[:, rows]
        self.memory = Memory(self.memory.states[rows], self.memory.mask[rows])


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
        states, mask = (part.repeat_interleave(beam, dim=0) for part in (memory.states, memory.mask))
        last = mask.sum(dim=1) - 1
        return GruState(states[torch.arange(len(last), device=last.device), last][None], Memory(states, mask))

    def decode(self, tokens: Tensor, state: GruState) -> Tensor:
        """Write, then look at the source."""
        written, state.hidden = self.writer(self.target(tokens), state.hidden.contiguous())
        states, mask = state.memory.states[:, None], state.memory.mask[:, None, None]
        return written + attend(written[:, None], states, states, mask)[:, 0]

    def project(self, hidden: Tensor) -> Tensor:
        """Return the logits."""
        return self.output(hidden)
