"""Models for tests of the search: one whose probabilities are written in the test, and a tiny recurrent one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.models.model import Memory, Model
from encdec_cli.models.transformer import Transformer
from encdec_cli.text.vocabulary import EOS

A, B, C = 4, 5, 6
VOCAB = 7

Table = Mapping[tuple[int, ...], Mapping[int, float]]
"""Prefix without BOS -> token -> probability; after a prefix that is not in it comes EOS."""


class ScriptedState:
    """Which sentence each row belongs to, and what it has written; checks the contract of `State.reorder`."""

    def __init__(self, owners: list[int], beam: int) -> None:
        self.owners = owners
        self.beam = beam
        self.prefixes: list[tuple[int, ...]] = [()] * len(owners)
        self.blocks = [row // beam for row in range(len(owners))]
        self.sizes = [len(owners)]

    def reorder(self, rows: Tensor) -> None:
        chosen = rows.tolist()
        assert len(chosen) % self.beam == 0
        for start in range(0, len(chosen), self.beam):
            assert len({row // self.beam for row in chosen[start : start + self.beam]}) == 1
        self.owners = [self.owners[row] for row in chosen]
        self.prefixes = [self.prefixes[row] for row in chosen]
        self.sizes.append(len(chosen))

    def crop(self, length: int) -> None:
        self.prefixes = [prefix[:length] for prefix in self.prefixes]


class Scripted(Model):
    """A model that looks probabilities up; the first source token, less 4, says in which table."""

    def __init__(self, *tables: Table | Callable[[tuple[int, ...]], Sequence[float]]) -> None:
        super().__init__()
        self.tables = tables
        self.states: list[ScriptedState] = []

    def encode(self, source: Tensor, mask: Tensor) -> Memory:
        return Memory(source[..., None].float(), mask)

    def start(self, memory: Memory, beam: int = 1) -> ScriptedState:
        owners = [int(first) - 4 for first in memory.states[:, 0, 0] for _ in range(beam)]
        self.states.append(ScriptedState(owners, beam))
        return self.states[-1]

    def decode(self, tokens: Tensor, state: ScriptedState) -> Tensor:
        rows = []
        for row, new in enumerate(tokens.tolist()):
            hidden = []
            for token in new:
                state.prefixes[row] = (*state.prefixes[row], token)
                hidden.append(self._row(state.owners[row], state.prefixes[row][1:]))
            rows.append(hidden)
        return torch.tensor(rows)

    def project(self, hidden: Tensor) -> Tensor:
        return hidden

    def _row(self, owner: int, prefix: tuple[int, ...]) -> list[float]:
        table = self.tables[owner]
        if callable(table):
            return list(table(prefix))
        chances = table.get(prefix, {EOS: 1.0})
        assert math.isclose(sum(chances.values()), 1.0)
        return [math.log(chances[token]) if token in chances else -math.inf for token in range(VOCAB)]


class RecurrentState:
    """Hidden states of the rows after every token, so that they can go back."""

    def __init__(self, hidden: Tensor) -> None:
        self.past = [hidden]

    def reorder(self, rows: Tensor) -> None:
        self.past = [hidden[rows] for hidden in self.past]

    def crop(self, length: int) -> None:
        del self.past[length + 1 :]


class TinyGru(Model):
    """A random recurrent model: real arithmetic, no cache."""

    def __init__(self, vocab: int = 150, dim: int = 16, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocab, dim)
        self.cell = nn.GRUCell(dim, dim)
        self.output = nn.Linear(dim, vocab)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.6)
        self.eval()

    def encode(self, source: Tensor, mask: Tensor) -> Memory:
        return Memory(self.embedding(source) * mask[..., None], mask)

    def start(self, memory: Memory, beam: int = 1) -> RecurrentState:
        mean = memory.states.sum(1) / memory.mask.sum(1, keepdim=True)
        return RecurrentState(mean.repeat_interleave(beam, 0).tanh())

    def decode(self, tokens: Tensor, state: RecurrentState) -> Tensor:
        for column in tokens.unbind(1):
            state.past.append(self.cell(self.embedding(column), state.past[-1]))
        return torch.stack(state.past[-tokens.shape[1] :], 1)

    def project(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)


def tiny_transformer(vocab: int = 150, seed: int = 1, dim: int = 16) -> Transformer:
    """Return a random Transformer whose outputs are neither endless nor all alike."""
    torch.manual_seed(seed)
    config = Transformer.Config(encoder_layers=1, decoder_layers=2, d_model=dim, heads=2, feed_forward=32)
    model = Transformer(config, vocab, vocab)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def pad(lines: Sequence[Sequence[int]], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids [sentences, src_len] and their mask, with more padding if asked."""
    width = max(len(line) for line in lines) + extra
    ids = torch.tensor([[*line, *([0] * (width - len(line)))] for line in lines])
    mask = torch.tensor([[True] * len(line) + [False] * (width - len(line)) for line in lines])
    return ids, mask


def bounds(sentences: int, maximum: int | Sequence[int], minimum: int | Sequence[int] = 0) -> Limits:
    """Return the limits, from one number for all sentences or one for each."""
    low = [minimum] * sentences if isinstance(minimum, int) else list(minimum)
    high = [maximum] * sentences if isinstance(maximum, int) else list(maximum)
    return Limits(torch.tensor(low), torch.tensor(high))


def run(
    strategy: Strategy,
    models: Model | Sequence[Model],
    maximum: int | Sequence[int] = 10,
    minimum: int | Sequence[int] = 0,
    lines: Sequence[Sequence[int]] | None = None,
    rules: Sequence = (),
) -> list[list[Hypothesis]]:
    """Search with one model or an ensemble; a scripted model reads one line for each of its tables."""
    members = [models] if isinstance(models, Model) else list(models)
    if lines is None:
        lines = [[4 + i, EOS] for i in range(len(members[0].tables))]
    source, mask = pad(lines)
    stepper = Stepper(members, source, mask, strategy.rows)
    return strategy(stepper, bounds(len(lines), maximum, minimum), rules)
