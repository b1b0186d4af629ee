"""Summarization: a long text in, a short one out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from encdec_cli.errors import UsageError
from encdec_cli.tasks.task import Task, optional_text, text_field
from encdec_cli.text.example import Example


@dataclass
class Summarization(Task):
    """From a document to its summary.

    The encoder reads the document as one paragraph, cut after `max_words` words: what matters most tends to
    stand first, and the cost of reading grows faster than the length.
    """

    metrics: ClassVar[tuple[str, ...]] = ("rouge",)

    max_words: int = 400
    """Words of the document the encoder reads, from its beginning; 0 reads all."""

    def __post_init__(self) -> None:
        if self.max_words < 0:
            raise UsageError(f"max_words: {self.max_words} must be 0 (no limit) or more.")

    def from_record(self, record: dict[str, Any]) -> Example:
        """Turn a JSON object into an example: `source` or `document`, and perhaps `target` or `summary`."""
        return Example(text_field(record, "source", "document"), optional_text(record, "target", "summary"), record)

    def source(self, example: Example) -> str:
        """Return the first words of the document, joined by single spaces."""
        words = example.source.split()
        return " ".join(words[: self.max_words] if self.max_words else words)
