"""Back-translation: real targets without a source, and sources that a model of the other direction writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from encdec_cli.corpora.files import file_facts
from encdec_cli.corpora.synthetic import Synthetic
from encdec_cli.errors import UsageError
from encdec_cli.text.example import Example
from encdec_cli.text.lines import LineReport, read_lines


@dataclass(kw_only=True)
class Backtranslation(Synthetic):
    """Real pairs, and lines of the target language with what reverse models write for them as the source.

    Sennrich et al. 2016, https://arxiv.org/abs/1511.06709; sampling (`strategy: sampling`) often gives better sources
    than a beam (Edunov et al. 2018, https://arxiv.org/abs/1808.09381), and a tag makes up for most of the difference
    (Caswell et al. 2019, https://arxiv.org/abs/1906.06442).
    """

    writes_sources: ClassVar[bool] = True

    monolingual: list[Path]
    """Files with a text of the target language a line, plain or gzip."""
    tag: str = "<BT>"
    """What a written source begins with, a token of its own, so that the model can tell it from a real one; empty for
    nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.monolingual:
            raise UsageError("monolingual: empty; name files with lines of the target language.")
        self._report = LineReport()

    def asked(self) -> Iterator[Example]:
        """Yield the lines of the files that are not blank."""
        self._report = LineReport()
        for path in self.monolingual:
            yield from (Example(line) for line in read_lines(path, self._report) if line.strip())

    def pair(self, asked: Example, output: str) -> Example:
        """Return the output, after the tag, as the source of the real line."""
        return Example(f"{self.tag} {output}" if self.tag else output, asked.source)

    def symbols(self) -> tuple[str, ...]:
        """Return the tag."""
        return (self.tag,) if self.tag else ()

    def asked_mark(self) -> str:
        """Return size and time of change of the files."""
        return json.dumps([file_facts(path) for path in self.monolingual])

    def notes(self) -> list[str]:
        """Return those of the pairs, and the oddities of the lines."""
        return [*super().notes(), *(f"monolingual: {said}" for said in self._report.sentences())]
