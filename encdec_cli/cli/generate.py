"""`encdec generate`: lines in, lines out."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from encdec_cli.cli.options import DeviceOption, PluginOption, StrategyOption

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.decoding.hypothesis import Strategy
    from encdec_cli.generation.lines import Generated, Options
    from encdec_cli.tasks.task import Task
    from encdec_cli.text.example import Example
    from encdec_cli.text.lines import LineReport


class Precision(str, Enum):
    """The numbers that models compute with."""

    fp32 = "fp32"
    bf16 = "bf16"
    auto = "auto"


FileArgument = Annotated[
    Path | None, typer.Argument(metavar="FILE", help="Input, plain or .gz. [default: stdin]", show_default=False)
]
ModelsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Bundle or run; repeat for an ensemble. [default: $ENCDEC_MODEL, else the newest run]",
    ),
]
BeamOption = Annotated[int | None, typer.Option("--beam", metavar="N", min=1, help="Hypotheses kept for each line.")]
NBestOption = Annotated[int, typer.Option("--n-best", metavar="N", min=1, help="Outputs a line, separated by TAB.")]
ScoresOption = Annotated[bool, typer.Option("--scores", help="Put the score and a TAB before each output.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object a line; input lines that begin with { are records.")
]
BatchOption = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Most lines decoded together.")]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=1, help="Processes that decode on a CPU. [default: one a core]"),
]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="Decode each line alone: no bit depends on batches, threads or neighbours.")
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        "--precision", metavar="|".join(Precision), help="bf16 is faster where the machine multiplies it fast."
    ),
]


def generate(
    file: FileArgument = None,
    model: ModelsOption = None,
    beam: BeamOption = None,
    strategy: StrategyOption = None,
    n_best: NBestOption = 1,
    scores: ScoresOption = False,
    as_json: JsonOption = False,
    batch: BatchOption = 64,
    workers: WorkersOption = None,
    exact: ExactOption = False,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = Precision.fp32,
    plugin: PluginOption = None,
) -> None:
    """Write the model's output for each line: one line out per line in, in order, as batches finish.

    An empty line gives an empty line. Works in a pipeline, on an endless pipe and as a co-process.
    """
    from encdec_cli.cli import console
    from encdec_cli.cli.models import load_bundles
    from encdec_cli.errors import UsageError
    from encdec_cli.generation.lines import WINDOW_BATCHES, Options
    from encdec_cli.generation.lines import generate as decode
    from encdec_cli.text.lines import LineReport
    from encdec_cli.text.options import without_surrogates
    from encdec_cli.text.windows import arriving_windows, full_windows
    from encdec_cli.training.machine import decoding_workers

    if workers and device != "cpu":
        raise UsageError(f"--workers {workers}: only a CPU is shared by processes; leave it out.")
    bundles = load_bundles(model or [], device, plugin or [], precision.value)
    chosen = choose_strategy(bundles[0], strategy, beam, n_best)
    options = Options(chosen, n_best, batch, workers or decoding_workers(device), exact)
    report = LineReport()
    examples = _examples(_reader(bundles[0].task, chosen, as_json), file, report)
    size = batch * WINDOW_BATCHES
    windows = full_windows(examples, size) if _is_complete(file) else arriving_windows(examples, size)
    line = _json_line if as_json else _text_line
    cut = ignored = 0
    with closing(decode(bundles, windows, options)) as results:
        for number, result in enumerate(results, start=1):
            cut += result.truncated
            ignored += not chosen.reads_constraints and "constraints" in result.example.record
            sys.stdout.buffer.write(without_surrogates(line(number, result, options, scores)).encode() + b"\n")
            sys.stdout.buffer.flush()
    _tell(report, cut, bundles[0].longest_source)
    if ignored:
        console.warn(f"the constraints of {ignored:,} records were not read; --strategy constrained reads them")


def _tell(report: LineReport, cut: int, most: int) -> None:
    from encdec_cli.cli import console

    for sentence in report.sentences():
        console.warn(sentence)
    if cut:
        lines = "1 line was" if cut == 1 else f"{cut:,} lines were"
        console.warn(f"{lines} longer than the {most:,} tokens that the model reads, and cut")


def choose_strategy(bundle: Bundle, named: str | None, beam: int | None, n_best: int = 1) -> Strategy:
    """Return the strategy of --strategy, else the recipe's, with the beam of --beam."""
    from encdec_cli.config import parse_component
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import strategies

    chosen: Strategy = parse_component(named, strategies, "--strategy") if named else bundle.recipe.decoding.config
    if beam is not None:
        chosen = _with_beam(chosen, beam)
    elif named and "beam=" not in named and n_best > chosen.beam:
        chosen = _with_beam(chosen, n_best)
    if n_best > chosen.beam:
        raise UsageError(f"--n-best {n_best}: the search keeps {chosen.beam} hypotheses a line; give --beam {n_best}.")
    return chosen


def _with_beam(strategy: Strategy, beam: int) -> Strategy:
    from dataclasses import replace

    from encdec_cli.errors import UsageError

    try:
        return replace(strategy, beam=beam)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _is_complete(file: Path | None) -> bool:
    """Whether all input lies ready, so that waiting for a full window costs nobody anything."""
    if (file is not None and str(file) != "-") or sys.stdin is None:
        return True
    return stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode)


def _examples(reader: Callable[[str], Example], file: Path | None, report: LineReport) -> Iterator[Example]:
    from encdec_cli.errors import DataError
    from encdec_cli.text.lines import read_lines

    for number, line in enumerate(read_lines(file, report), start=1):
        try:
            yield reader(line)
        except (ValueError, DataError, RecursionError) as error:
            reason = str(error).rstrip(".")
            if line.lstrip().startswith("{"):
                reason = f"not a record this task can read ({reason}); a line that begins with {{ must be a JSON object"
            raise DataError(
                f"{file or 'stdin'}:{number}: {reason}, and the lines before this one have been written."
            ) from error


def _reader(task: Task, strategy: Strategy, as_json: bool) -> Callable[[str], Example]:
    """Return what makes an example of a line; with its constraints, if the strategy reads them."""
    from encdec_cli.generation.phrases import constraints_of_columns, constraints_of_record

    def read(line: str) -> Example:
        if as_json and line.lstrip().startswith("{"):
            example = task.from_record(json.loads(line, parse_float=_number, parse_constant=_number))
            if strategy.reads_constraints:
                example.constraints = constraints_of_record(example.record)
        elif strategy.reads_constraints and not task.uses_tabs:
            source, *columns = line.split("\t")
            example = task.read(source)
            example.constraints = constraints_of_columns(columns)
        else:
            example = task.read(line)
        return example

    return read


def _number(text: str) -> float:
    """Read a number of a record. NaN and Infinity are not JSON, and 1e999 would be written as Infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON; write null")
    return value


def _text_line(number: int, result: Generated, options: Options, scores: bool) -> str:
    columns = []
    several = scores or options.n_best > 1
    for candidate in result.candidates:
        columns += [f"{candidate.score:.4f}"] if scores else []
        # A TAB of the text would be read as a column's end.
        columns += [candidate.text.replace("\t", " ") if several else candidate.text]
    return "\t".join(columns)


def _json_line(number: int, result: Generated, options: Options, scores: bool) -> str:
    """Return the record of a line: the input's own fields, then ours, which win where names clash."""
    record: dict[str, Any] = {"id": number, **result.example.record}
    outputs = [
        {"text": c.text, "score": round(c.score, 6), "token_scores": [round(s, 6) for s in c.token_scores]}
        for c in result.candidates
    ]
    record |= outputs[0] if outputs else {"text": "", "score": 0.0, "token_scores": []}
    record["status"] = result.status
    if options.n_best > 1:
        record["candidates"] = outputs
    return json.dumps(record, ensure_ascii=False)
