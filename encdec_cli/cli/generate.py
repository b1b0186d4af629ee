"""`encdec generate`: lines in, lines out."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encdec_cli.cli import schema as schemas
from encdec_cli.cli.options import DeviceOption, PluginOption, RerankOption, StrategyOption

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.decoding.hypothesis import Strategy
    from encdec_cli.text.lines import LineReport


class Precision(str, Enum):
    """The numbers that models compute with."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
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
BatchOption = Annotated[
    int | None,
    typer.Option("--batch", metavar="N", min=1, help="Most lines decoded together. [default: 640 / hypotheses a line]"),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        help="Processes that decode on a CPU, at most one a core. [default: one a core]",
    ),
]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="Decode each line alone: no bit depends on batches, threads or neighbours.")
]
FailOnOption = Annotated[
    str | None,
    typer.Option(
        "--fail-on",
        metavar="WORD,…",
        help="Exit with 3 in the end if a line has such a status or flag, such as truncated,loop.",
    ),
]
SchemaOption = Annotated[
    bool,
    typer.Option("--schema", help="Write the JSON Schema of the records of --json, or of --score --json, and exit."),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        "--precision",
        metavar="|".join(Precision),
        help="bf16 is faster where the machine multiplies it fast; int8 keeps matrices in 8 bits.",
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
    schema: SchemaOption = False,
    fail_on: FailOnOption = None,
    score: ScoreOption = False,
    alignments: AlignmentsOption = None,
    batch: BatchOption = None,
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
    if schema:
        typer.echo(schemas.text(schemas.SCORE if score else schemas.RECORD), nl=False)
        return
    from encdec_cli.cli import scoring
    from encdec_cli.cli.fail_on import FailOn
    from encdec_cli.cli.models import choose_ensemble, load_bundles

    if score:
        scoring.refuse_search(beam, strategy, n_best, scores, workers, rerank, fail_on)
    _check(workers, device, alignments, plugin or [], {"--strategy": strategy, "--rerank": rerank})
    watch, average = FailOn(fail_on), choose_ensemble(ensemble.value, weights)
    from encdec_cli.cli.input import Reader, named_lines, windows_of
    from encdec_cli.cli.output import Writer, write_all
    from encdec_cli.generation.lines import Options
    from encdec_cli.reranking.reranker import decode
    from encdec_cli.text.lines import LineReport
    from encdec_cli.training.machine import available_cores, decoding_workers

    bundles = load_bundles(model or [], device, plugin or [], precision.value)
    head = scoring.choose_head(bundles[0], alignments) if alignments else None
    chosen = choose_strategy(bundles[0], strategy, beam, n_best)
    processes = min(workers or decoding_workers(device), available_cores())
    options = Options(chosen, n_best, batch or 0, processes, exact, average, head, watch.asks_for("coverage"))
    reader = Reader(bundles[0].task, as_json, pairs=score, constraints=chosen.reads_constraints)
    windows = windows_of(reader, file, options.window, report := LineReport())
    with named_lines(file):
        if score:
            cut = scoring.write_scores(bundles, windows, as_json, options)
        else:
            writer = Writer(bundles[0], options, scores, as_json, watch)
            cut = write_all(decode(bundles, windows, options, rerank), writer)
    _tell(report, cut, min(bundle.longest_source for bundle in bundles), reader.ignored)
    watch.check()


def _check(
    workers: int | None, device: str, alignments: str | None, plugins: list[Path], named: dict[str, str | None]
) -> None:
    """Raise UsageError for flags that are wrong whatever the model, before torch is imported.

    named: `name,key=value,…` by its flag.
    """
    from encdec_cli.cli.scoring import check_head
    from encdec_cli.config import check_name
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import load_plugins, rerankers, strategies

    if workers and device != "cpu":
        raise UsageError(f"--workers {workers}: only a CPU is shared by processes; leave it out.")
    if alignments:
        check_head(alignments)
    load_plugins(plugins)
    for flag, registry in (("--strategy", strategies), ("--rerank", rerankers)):
        if text := named[flag]:
            check_name(text, registry, flag)


def _tell(report: LineReport, cut: int, most: int, ignored: int) -> None:
    from encdec_cli.cli import console

    for sentence in report.sentences():
        console.warn(sentence)
    if cut:
        lines = "1 line was" if cut == 1 else f"{cut:,} lines were"
        console.warn(f"{lines} longer than the {most:,} tokens that the model reads, and cut")
    if ignored:
        records = "a record" if ignored == 1 else f"{ignored:,} records"
        console.warn(f"the constraints of {records} were not read; --strategy constrained reads them")


def choose_strategy(bundle: Bundle, named: str | None, beam: int | None, n_best: int = 1) -> Strategy:
    """Return the strategy of --strategy, else the recipe's (with the keys of --strategy), with the beam of --beam.

    A beam that nobody named is as wide as --n-best.
    """
    from encdec_cli.config import given_keys, parse_component, with_key
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import strategies

    own, text = bundle.recipe.decoding, named or ""
    if beam is not None:
        text = with_key(text, "beam", beam)
    chosen: Strategy = parse_component(text, strategies, "--strategy", own) if text else own.config
    if n_best > chosen.beam and "beam" not in given_keys(text):
        chosen = parse_component(with_key(text, "beam", n_best), strategies, "--strategy", own)
    if n_best > chosen.beam:
        raise UsageError(f"--n-best {n_best}: the search keeps {chosen.beam} hypotheses a line; give --beam {n_best}.")
    return chosen
