"""What `encdec generate` writes: results go to stdout, a line at a time, through here."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from encdec_cli.cli import schema

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.cli.fail_on import FailOn
    from encdec_cli.generation.lines import Candidate, Generated, Options


def write_line(line: str) -> None:
    """Write a line at once, whoever waits for it; halves of surrogate pairs become U+FFFD."""
    from encdec_cli.text.options import without_surrogates

    sys.stdout.buffer.write(without_surrogates(line).encode() + b"\n")
    sys.stdout.buffer.flush()


def others(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of an input record that are not those of the schema `name`."""
    ours = schema.own_fields(name)
    return {key: value for key, value in record.items() if key not in ours}


@dataclass
class Writer:
    """Writes the outputs for lines, and notes those that --fail-on names."""

    bundle: Bundle
    options: Options
    scores: bool
    """Whether columns tell scores."""
    as_json: bool
    watch: FailOn

    def __call__(self, number: int, result: Generated) -> None:
        """Write the result of line `number`, counted from 1."""
        from encdec_cli.generation.flags import flags

        found = flags(self.bundle, result) if self.as_json or self.watch.named else []
        write_line(self._record(number, result, found) if self.as_json else self._columns(result))
        self.watch.note(number, [*result.troubles, *found])

    def _columns(self, result: Generated) -> str:
        columns = []
        several = self.scores or self.options.n_best > 1 or self.options.head is not None
        for candidate in result.candidates:
            score = candidate.score if candidate.rerank_score is None else candidate.rerank_score
            columns += [f"{score:.4f}"] if self.scores else []
            # A TAB of the text would be read as a column's end.
            columns += [candidate.text.replace("\t", " ") if several else candidate.text]
            columns += [candidate.alignment] if candidate.alignment is not None else []
        return "\t".join(columns)

    def _record(self, number: int, result: Generated, flags: list[str]) -> str:
        """Return the record of a line as `record.schema.json` describes it: the input's own fields, then ours."""
        record = {"id": number, **others(result.example.record, schema.RECORD)}
        outputs = [_output(candidate) for candidate in result.candidates]
        record |= outputs[0] if outputs else {"text": "", "score": 0.0, "token_scores": []}
        record |= {"status": result.status, "flags": flags}
        if self.options.n_best > 1:
            record["candidates"] = outputs
        return json.dumps(record, ensure_ascii=False)


def _output(candidate: Candidate) -> dict[str, Any]:
    scores = {"score": candidate.score, "rerank_score": candidate.rerank_score}
    rounded = {key: round(score, 6) for key, score in scores.items() if score is not None}
    output = {"text": candidate.text, **rounded, "token_scores": [round(s, 6) for s in candidate.token_scores]}
    return output if candidate.alignment is None else output | {"alignment": candidate.alignment}


def write_all(results: Generator[Generated, None, None], write: Writer) -> int:
    """Write the results of all lines, whose generator is closed in the end; return how many sources were cut."""
    cut = 0
    with closing(results):
        for number, result in enumerate(results, start=1):
            cut += result.truncated
            write(number, result)
    return cut
