"""`encdec generate --score` and `--alignments`: pairs in, log-probabilities out; which words belong together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.decoding.attention import Head
    from encdec_cli.generation.lines import Options
    from encdec_cli.generation.scoring import Scored
    from encdec_cli.tasks.task import Task
    from encdec_cli.text.example import Example

BEST = "best"
_HEAD = re.compile(r"(\d+)(?:\.(\d+))?", re.ASCII)


def check_head(named: str) -> None:
    """Raise UsageError for what is no value of --alignments, whatever the model."""
    from encdec_cli.errors import UsageError

    if named != BEST and not _HEAD.fullmatch(named):
        raise UsageError(f"--alignments {named}: expected {BEST}, a decoder layer such as 3, or a head of one, 3.1.")


def choose_head(bundle: Bundle, named: str) -> Head:
    """Return the head of `--alignments`: LAYER, LAYER.HEAD, or the one that agrees best on the validation split."""
    from encdec_cli.decoding.attention import Head, heads
    from encdec_cli.errors import UsageError

    counts = heads(bundle.model)
    match = _HEAD.fullmatch(named)
    if match is None:
        return _best_head(bundle)
    layer, head = int(match[1]), None if match[2] is None else int(match[2])
    if layer >= len(counts):
        raise UsageError(f"--alignments {named}: the model's {len(counts)} decoder layers are 0 to {len(counts) - 1}.")
    if head is not None and head >= counts[layer]:
        raise UsageError(
            f"--alignments {named}: the {counts[layer]} heads of layer {layer} are 0 to {counts[layer] - 1}."
        )
    return Head(layer, head)


def _best_head(bundle: Bundle) -> Head:
    from encdec_cli.cli import console
    from encdec_cli.errors import DataError
    from encdec_cli.generation.alignment import best_head

    try:
        head, pairs = best_head(bundle, bundle.recipe.data.config.read("valid"))
    except DataError as error:
        raise DataError(
            f"--alignments {BEST} looks for a head on the recipe's validation split: {str(error).rstrip('.')}; name a "
            "head, such as --alignments 3.1."
        ) from error
    console.say(
        f"alignments: {'layer' if head.head is None else 'head'} {head} agrees best with IBM Model 1 on {pairs:,} "
        f"validation pairs; --alignments {head} spares this search"
    )
    return head


def refuse_search(
    beam: int | None,
    strategy: str | None,
    n_best: int,
    scores: bool,
    workers: int | None,
    rerank: str | None,
    fail_on: str | None,
) -> None:
    """Raise UsageError if a flag was given that says how to search, which scoring does not."""
    from encdec_cli.errors import UsageError

    given = {"--beam": beam, "--strategy": strategy, "--n-best": n_best > 1, "--scores": scores, "--workers": workers}
    given |= {"--rerank": rerank, "--fail-on": fail_on}
    useless = [flag for flag, value in given.items() if value]
    if useless:
        raise UsageError(f"--score searches for nothing; leave {' and '.join(useless)} out.")


def read_pair(task: Task, line: str) -> Example:
    """Return the example of a line in which the target stands after the last TAB."""
    source, tab, target = line.rpartition("\t")
    example = task.read(source)
    example.target = target if tab else None
    return example


def with_targets(examples: Iterable[Example], file: Path | None) -> Iterator[Example]:
    """Yield the examples; raise DataError at the first without a target, naming its line."""
    from encdec_cli.errors import DataError

    for number, example in enumerate(examples, start=1):
        if example.target is None:
            raise DataError(
                f"{file or 'stdin'}:{number}: there is no target to score; expected source, TAB and target, or with "
                "--json a record that holds both."
            )
        yield example


def write_scores(
    bundles: Sequence[Bundle],
    windows: Iterable[Sequence[Example]],
    as_json: bool,
    options: Options,
) -> int:
    """Write a line for each pair, and say what they add up to; return how many sources were cut.

    Of the options those count that say nothing of a search: batch, exact, ensemble and head.
    """
    from encdec_cli.cli import console
    from encdec_cli.cli.output import write_line
    from encdec_cli.generation.scoring import perplexity, score

    lines, tokens, log_probability, cut = 0, 0, 0.0, 0
    found = score(bundles, windows, options.batch, options.exact, options.head, options.ensemble)
    for lines, result in enumerate(found, start=1):
        write_line(_json_line(lines, result) if as_json else _text_line(result))
        tokens += len(result.tokens)
        log_probability += result.log_probability
        cut += result.truncated
    if lines:
        console.say(
            f"scored {lines:,} {'line' if lines == 1 else 'lines'} of {tokens:,} tokens: log-probability "
            f"{log_probability / tokens:.4f} per token, perplexity {perplexity(log_probability, tokens):.4f}"
        )
    return cut


def _text_line(result: Scored) -> str:
    """Return the columns of a line: log-probability, tokens, perplexity, and the alignment if there is one."""
    from encdec_cli.generation.scoring import perplexity

    tokens = len(result.tokens)
    columns = [f"{result.log_probability:.4f}", str(tokens), f"{perplexity(result.log_probability, tokens):.4f}"]
    return "\t".join(columns if result.alignment is None else [*columns, result.alignment])


def _json_line(number: int, result: Scored) -> str:
    """Return the record of a line: the input's own fields, then ours, which win where names clash."""
    from encdec_cli.cli import schema
    from encdec_cli.cli.output import others
    from encdec_cli.generation.scoring import perplexity

    record: dict[str, Any] = {
        "id": number,
        **others(result.example.record, schema.SCORE),
        "log_probability": _number(result.log_probability),
        "perplexity": _number(perplexity(result.log_probability, len(result.tokens))),
        "tokens": result.tokens,
        "token_scores": [_number(score) for score in result.token_scores],
        "status": "truncated" if result.truncated else "ok",
    }
    if result.alignment is not None:
        record["alignment"] = result.alignment
    return json.dumps(record, ensure_ascii=False)


def _number(value: float) -> float | None:
    """Return a number as JSON can hold it; infinity, which it cannot, as null."""
    return round(value, 6) if math.isfinite(value) else None
