"""The interface of this house: what an encoder hands over, what a decoder remembers, what a model does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from encdec_cli.errors import UsageError


@dataclass
class Memory:
    """What an encoder hands to a decoder."""

    states: Tensor
    """[sentences, src_len, dim]"""
    mask: Tensor
    """[sentences, src_len]; True where there is a token."""


class State(Protocol):
    """What a decoder remembers between steps: a value, owned by whoever called `Model.start`.

    Row i is one hypothesis. The `beam` rows of a sentence stand together.
    """

    def reorder(self, rows: Tensor) -> None:
        """Let new row i continue old row rows[i].

        There may be fewer rows than before, but always `beam` for every sentence that goes on, all of them
        continuing rows of one and the same old sentence. rows: [new_rows], int64.
        """


@runtime_checkable
class Croppable(Protocol):
    """A state that can also go back, as speculative decoding asks of it."""

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length` of every row."""


class Model(nn.Module):
    """An encoder and a decoder. Built from `(config, source_vocab, target_vocab)`; it never sees strings.

    A subclass nests a dataclass `Config`, whose fields are the keys of the recipe's `model` section.
    """

    side_by_side: ClassVar[bool] = False
    """Whether several threads may train it at once: nothing is kept on the module in a forward pass, no buffer
    changes, and all that is random comes from `models.dropout`."""
    can_checkpoint: ClassVar[bool] = False
    """Whether `checkpointing` is heeded."""
    can_compile: ClassVar[bool] = False
    """Whether it has `compile_layers`, which makes training go through torch's compiler, decoding as before."""
    compiled: bool = False
    """Whether that has been called."""
    can_divide: ClassVar[bool] = False
    """Whether `parallel.tensor` may share out its layers: those of its modules that are `models.parts.Divisible` become
    parts of themselves, and all others are computed by every process."""
    packs: bool = False
    """Whether `forward` is to compute no padding; who trains sets it where `can_pack` allows it."""
    checkpointing: bool = False
    """Whether training keeps only what enters a layer and computes the rest a second time; see
    `models.checkpointing`."""
    max_positions: int | None = None
    """Most tokens of a source or a target, EOS or BOS included; None if there is no limit."""

    @abstractmethod
    def encode(self, source: Tensor, mask: Tensor) -> Memory:
        """Read sources. source: [sentences, src_len] ids; mask: the same shape, True where there is a token."""

    @abstractmethod
    def start(self, memory: Memory, beam: int = 1) -> State:
        """Return the state before the first token, for `beam` rows a sentence."""

    @abstractmethod
    def decode(self, tokens: Tensor, state: State) -> Tensor:
        """Read the next tokens of every row and advance the state.

        tokens: [rows, new]; returns hidden states [rows, new, dim]. Training, prefill and a single step are
        the same call: only the number of new tokens differs.
        """

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """Return logits [n, vocab] of hidden states [n, dim]. The output layer; it is called in chunks."""

    def attention(self, tokens: Tensor, state: State) -> Iterator[Tensor]:
        """Read the next tokens as `decode` does, and yield how each layer looks at the source meanwhile.

        tokens: [rows, new]; yields [rows, heads, new, src_len] float32 for each decoder layer, from the first on:
        position t is where the model looks to predict the token after t. A row of it sums to 1, with nothing
        where the source is masked. Who stops early spares the layers that follow, and leaves the state unfit for
        more. Optional: raises UsageError for a model that has none.
        """
        raise UsageError(f"this model ({type(self).__name__}) has no attention to show.")

    def can_pack(self, dtype: torch.dtype, device: str) -> bool:
        """Return whether `packs` is heeded, and pays, where the model is computed in this type on this device."""
        return False

    def compile_layers(self) -> None:
        """Compile what training repeats, and set `compiled`; the numbers may change in the last bits."""
        raise NotImplementedError

    def units(self) -> Sequence[nn.Module]:
        """Return the large modules, the inner ones first, each used by its call alone.

        Where weights are shared out over processes (`parallel.shard`) they are gathered one at a time, and all that
        stands in none of them for the whole pass. Optional: without any, the whole model is gathered. What a
        unit gives for gradients to flow through must be among what its call returns, and `checkpointed` used inside it.
        """
        return ()

    def untie(self) -> None:
        """Give the output layer a matrix of its own where it shares one, so that it can be replaced apart.

        For models that share none there is nothing to do.
        """

    def forward(self, source: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        """Return hidden states [sentences, tgt_len, dim] for all target positions at once."""
        return self.decode(target, self.start(self.encode(source, mask)))
