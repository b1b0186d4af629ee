"""Sequence-level knowledge distillation: the targets are what a teacher writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from encdec_cli.corpora.synthetic import Synthetic
from encdec_cli.text.example import Example


@dataclass(kw_only=True)
class Distilled(Synthetic):
    """A corpus's training sources, each with what teachers write for it (Kim and Rush 2016).

    https://arxiv.org/abs/1606.07947, section 3.2. `rerank: "oracle,metric=bleu"` takes of each beam the output that is
    nearest to the real target, which is their sequence-level interpolation (section 3.3). `encdec distill` makes such
    a corpus of a student's recipe.
    """

    real: int = 0
    """How often each real pair is seen in an epoch, beside those with the teachers' targets."""

    def asked(self) -> Iterator[Example]:
        """Yield the real training examples."""
        yield from self.corpus.config.read("train")

    def asked_mark(self) -> str:
        """Return what changes with the real corpus."""
        return f"{self.corpus.cls.__module__} {self.corpus.config.fingerprint()}"

    def pair(self, asked: Example, output: str) -> Example:
        """Return the real example with the output as its target."""
        return Example(asked.source, output, asked.record)
