"""Translation: pairs of sentences, with a tag for the target language if one model writes several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from encdec_cli.errors import DataError, UsageError
from encdec_cli.registry import nearest
from encdec_cli.tasks.task import Task
from encdec_cli.text.example import Example


@dataclass
class Translation(Task):
    """From one language to another.

    With `tag`, the encoder reads `<2de> ` before the text (https://arxiv.org/abs/1611.04558). Which tag: the
    one the line begins with, else the record's `target_language`, else that of the recipe.
    """

    metrics: ClassVar[tuple[str, ...]] = ("bleu", "chrf")

    source_language: str = ""
    """Code of the language read, such as `en`; for people."""
    target_language: str = ""
    """Code of the language written, such as `de`."""
    tag: bool = False
    """Put `<2de>` before the source, so that one model can write several languages."""
    languages: list[str] = field(default_factory=list)
    """Further target languages, each with a tag of its own."""

    def __post_init__(self) -> None:
        codes = self._codes()
        if self.tag and not codes:
            raise UsageError("tag: needs target_language, the language the tag names.")
        for code in codes:
            if not code or not code.replace("-", "").replace("_", "").isalnum():
                key = "target_language" if code == self.target_language else "languages"
                raise UsageError(f"{key}: '{code}' is no language code; expected one such as de or pt-BR.")

    def _codes(self) -> list[str]:
        return [code for code in dict.fromkeys([self.target_language, *self.languages]) if code]

    def source(self, example: Example) -> str:
        """Return the text, with its tag if the task has tags. DataError if the record's language has none."""
        if not self.tag or example.source.startswith(self.symbols()):
            return example.source
        code = example.record.get("target_language", self._codes()[0])
        if code not in self._codes():
            known = self._codes()
            raise DataError(f"target_language '{code}': not among {', '.join(known)}{nearest(str(code), known)}.")
        return f"<2{code}> {example.source}"

    def may_copy(self) -> bool:
        """Tell whether both languages are known to be the same."""
        return bool(self.source_language) and self.source_language == self.target_language

    def symbols(self) -> tuple[str, ...]:
        """Return the tags."""
        return tuple(f"<2{code}>" for code in self._codes()) if self.tag else ()
