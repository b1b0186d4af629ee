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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from encdec_cli.cli.options import DeviceOption, PluginOption, RerankOption, StrategyOption

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.decoding.hypothesis import Strategy
    from encdec_cli.generation.lines import Candidate, Generated, Options
    from encdec_cli.text.example import Example
    from encdec_cli.text.lines import LineReport


class Precision(str, Enum):
    """The numbers that models compute with."""

    fp32 = "fp32"
    bf16 = "bf16"
    auto = "auto"


class Average(str, Enum):
    """What is averaged over the models of an ensemble."""

    probabilities = "probabilities"
    log_probabilities = "log-probabilities"


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
EnsembleOption = Annotated[
    Average, typer.Option("--ensemble", metavar="|".join(Average), help="What is averaged over several models.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", metavar="N,N,…", help="What each --model counts in the average. [default: all alike]"),
]
BeamOption = Annotated[int | None, typer.Option("--beam", metavar="N", min=1, help="Hypotheses kept for each line.")]
NBestOption = Annotated[int, typer.Option("--n-best", metavar="N", min=1, help="Outputs a line, separated by TAB.")]
ScoresOption = Annotated[bool, typer.Option("--scores", help="Put the score and a TAB before each output.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object a line; input lines that begin with { are records.")
]
ScoreOption = Annotated[
    bool,
    typer.Option(
        "--score",
        help="Write nothing new: tell how likely the target is that stands after each line's last TAB, as natural "
        "log-probability, tokens and perplexity.",
    ),
]
AlignmentsOption = Annotated[
    str | None,
    typer.Option(
        "--alignments",
        metavar="best|LAYER|LAYER.HEAD",
        help="Add word alignments, i-j pairs counted from 0, after each output: from the attention of the head that "
        "agrees best on the validation split, of a decoder layer, or of a head.",
    ),
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
    ensemble: EnsembleOption = Average.probabilities,
    weights: WeightsOption = None,
    beam: BeamOption = None,
    strategy: StrategyOption = None,
    rerank: RerankOption = None,
    n_best: NBestOption = 1,
    scores: ScoresOption = False,
    as_json: JsonOption = False,
    score: ScoreOption = False,
    alignments: AlignmentsOption = None,
    batch: BatchOption = 64,
    workers: WorkersOption = None,
    exact: ExactOption = False,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = Precision.fp32,
    plugin: PluginOption = None,
) -> None:
    """Write the model's output for each line: one line out per line in, in order, as batches finish.

    An empty line gives an empty line. Works in a pipeline, on an endless pipe and as a co-process. With --score
    nothing is written anew: each line is a source, a TAB and a target, and the model tells how likely that is.
    """
    from encdec_cli.cli import scoring
    from encdec_cli.cli.models import choose_ensemble, decode, load_bundles
    from encdec_cli.cli.output import write_line
    from encdec_cli.errors import UsageError
    from encdec_cli.generation.lines import Options
    from encdec_cli.text.lines import LineReport
    from encdec_cli.training.machine import decoding_workers

    if workers and device != "cpu":
        raise UsageError(f"--workers {workers}: only a CPU is shared by processes; leave it out.")
    if score:
        scoring.refuse_search(beam, strategy, n_best, scores, workers, rerank)
    average = choose_ensemble(ensemble.value, weights)
    bundles = load_bundles(model or [], device, plugin or [], precision.value)
    head = scoring.choose_head(bundles[0], alignments) if alignments else None
    report = LineReport()
    windows = _windows(bundles[0], file, as_json, score, batch, report)
    if score:
        cut = scoring.write_scores(bundles, windows, as_json, batch, exact, average, head)
        _tell(report, cut, min(bundle.longest_source for bundle in bundles))
        return
    chosen = choose_strategy(bundles[0], strategy, beam, n_best)
    options = Options(chosen, n_best, batch, workers or decoding_workers(device), exact, average, head)
    line = _json_line if as_json else _text_line
    cut = 0
    with closing(decode(bundles, windows, options, rerank)) as results:
        for number, result in enumerate(results, start=1):
            cut += result.truncated
            write_line(line(number, result, options, scores))
    _tell(report, cut, min(bundle.longest_source for bundle in bundles))


def _tell(report: LineReport, cut: int, most: int) -> None:
    from encdec_cli.cli import console

    for sentence in report.sentences():
        console.warn(sentence)
    if cut:
        lines = "1 line was" if cut == 1 else f"{cut:,} lines were"
        console.warn(f"{lines} longer than the {most:,} tokens that the model reads, and cut")


def choose_strategy(bundle: Bundle, named: str | None, beam: int | None, n_best: int = 1) -> Strategy:
    """Return the strategy of --strategy, else the recipe's, with the beam of --beam."""
    from dataclasses import replace

    from encdec_cli.config import parse_component
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import strategies

    chosen: Strategy = parse_component(named, strategies, "--strategy") if named else bundle.recipe.decoding.config
    if beam is None and named and "beam=" not in named and n_best > chosen.beam:
        beam = n_best
    if beam is not None:
        try:
            chosen = replace(chosen, beam=beam)
        except ValueError as error:
            raise UsageError(f"a beam of {beam} does not suit the strategy: {error}") from error
    if n_best > chosen.beam:
        raise UsageError(f"--n-best {n_best}: the search keeps {chosen.beam} hypotheses a line; give --beam {n_best}.")
    return chosen


def _is_complete(file: Path | None) -> bool:
    """Whether all input lies ready, so that waiting for a full window costs nobody anything."""
    if (file is not None and str(file) != "-") or sys.stdin is None:
        return True
    return stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode)


def _windows(
    bundle: Bundle, file: Path | None, as_json: bool, score: bool, batch: int, report: LineReport
) -> Iterator[list[Example]]:
    """Yield the input as it is to be sorted and decoded, or scored, together."""
    from encdec_cli.cli import scoring
    from encdec_cli.generation.lines import WINDOW_BATCHES
    from encdec_cli.text.windows import arriving_windows, full_windows

    read = partial(scoring.read_pair, bundle.task) if score else bundle.task.read
    examples = _examples(bundle, file, as_json, report, read)
    if score:
        examples = scoring.with_targets(examples, file)
    size = batch * WINDOW_BATCHES
    return full_windows(examples, size) if _is_complete(file) else arriving_windows(examples, size)


def _examples(
    bundle: Bundle, file: Path | None, as_json: bool, report: LineReport, read: Callable[[str], Example]
) -> Iterator[Example]:
    from encdec_cli.errors import DataError
    from encdec_cli.text.lines import read_lines

    for number, line in enumerate(read_lines(file, report), start=1):
        if not (as_json and line.lstrip().startswith("{")):
            yield read(line)
            continue
        try:
            yield bundle.task.from_record(json.loads(line, parse_float=_number, parse_constant=_number))
        except (ValueError, DataError, RecursionError) as error:
            reason = str(error).rstrip(".")
            raise DataError(
                f"{file or 'stdin'}:{number}: not a record this task can read ({reason}); a line that begins with {{ "
                "must be a JSON object, and the lines before this one have been written."
            ) from error


def _number(text: str) -> float:
    """Read a number of a record. NaN and Infinity are not JSON, and 1e999 would be written as Infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON; write null")
    return value


def _text_line(number: int, result: Generated, options: Options, scores: bool) -> str:
    columns = []
    several = scores or options.n_best > 1 or options.head is not None
    for candidate in result.candidates:
        score = candidate.score if candidate.rerank_score is None else candidate.rerank_score
        columns += [f"{score:.4f}"] if scores else []
        # A TAB of the text would be read as a column's end.
        columns += [candidate.text.replace("\t", " ") if several else candidate.text]
        columns += [candidate.alignment] if candidate.alignment is not None else []
    return "\t".join(columns)


def _json_line(number: int, result: Generated, options: Options, scores: bool) -> str:
    """Return the record of a line: the input's own fields, then ours, which win where names clash."""
    record: dict[str, Any] = {"id": number, **result.example.record}
    outputs = [_output(candidate) for candidate in result.candidates]
    record |= outputs[0] if outputs else {"text": "", "score": 0.0, "token_scores": []}
    record["status"] = result.status
    if options.n_best > 1:
        record["candidates"] = outputs
    return json.dumps(record, ensure_ascii=False)


def _output(candidate: Candidate) -> dict[str, Any]:
    scores = {"score": candidate.score, "rerank_score": candidate.rerank_score}
    rounded = {key: round(score, 6) for key, score in scores.items() if score is not None}
    output = {"text": candidate.text, **rounded, "token_scores": [round(s, 6) for s in candidate.token_scores]}
    return output if candidate.alignment is None else output | {"alignment": candidate.alignment}
