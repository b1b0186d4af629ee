"""`encdec evaluate`: how good are these lines, or this model's?"""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encdec_cli.cli.generate import Precision, PrecisionOption
from encdec_cli.cli.options import DeviceOption, MetricOption, ModelOption, PluginOption, RerankOption

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.evaluation.metrics import Metric
    from encdec_cli.evaluation.report import Outputs, Report
    from encdec_cli.evaluation.significance import Resampling
    from encdec_cli.text.example import Example


_PATIENCE = 5.0
"""Seconds without input after which a user is told that input is awaited."""


class Test(str, Enum):
    """The paired tests."""

    randomization = "randomization"
    bootstrap = "bootstrap"


TestOption = Annotated[
    Test, typer.Option("--test", metavar="|".join(Test), help="The paired test against the baseline.")
]


def evaluate(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="Hypotheses, plain or .gz. [default: stdin; on a terminal the model writes them]",
            show_default=False,
        ),
    ] = None,
    metric: MetricOption = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(
            "--reference", "-r", metavar="FILE", help="References; repeat for more. [default: the recipe's test split]"
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="Another system's lines, for the paired test.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", metavar="FILE", help="What the model reads, if it writes the hypotheses.")
    ] = None,
    model: ModelOption = None,
    rerank: RerankOption = None,
    precision: PrecisionOption = Precision.fp32,
    test: TestOption = Test.randomization,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every number.")] = False,
    score_only: Annotated[bool, typer.Option("--score-only", help="The numbers alone, one a line.")] = False,
    device: DeviceOption = "cpu",
    plugin: PluginOption = None,
) -> None:
    """Score hypotheses against references, with 95 % bootstrap intervals and the signature of each number.

    Hypotheses come from FILE or a pipe; on a terminal (or with stdin from /dev/null) the model writes them. A
    baseline adds the paired significance test. With another --precision than fp32 the model in fp32 is the baseline:
    the numbers tell what is lost.
    """
    from encdec_cli.cli.models import model_or_default
    from encdec_cli.evaluation.report import evaluate as judge
    from encdec_cli.registry import load_plugins

    _check_format(as_json, score_only)
    load_plugins(plugins := plugin or [])
    chosen = chosen_metrics(metric or ())
    _check_stdin(file, [*(reference or []), baseline, source])
    lines = read_hypotheses(file)
    _check_unwritten(lines, rerank, precision.value)
    bundle = None
    if lines is None or not reference or any(each.needs_model for each in chosen):
        bundle = _bundle(model := model_or_default(model), device, plugins, precision.value)
    else:
        _tell_unused(model, source)
    chosen = chosen or chosen_metrics(_usual_metrics(bundle))
    outputs = _outputs(lines, reference or [], baseline, bundle, source)
    if bundle:
        _ask_model(bundle, outputs, source, chosen, rerank)
        if precision.value != "fp32":
            _add_unrounded(outputs, model, device, plugins, (source, chosen, rerank))
    _print(judge(chosen, outputs, _resampling(test, score_only, baseline)), as_json, score_only)


def _check_format(as_json: bool, score_only: bool) -> None:
    from encdec_cli.errors import UsageError

    if as_json and score_only:
        raise UsageError("--json and --score-only: give one of them; the JSON object holds every score.")


def _check_stdin(file: Path | None, others: Sequence[Path | None]) -> None:
    """Refuse stdin for two texts: the second would find it empty."""
    from encdec_cli.errors import UsageError

    first = str(file) == "-" or (file is None and not _stdin_asks_model())
    if first + [str(other) for other in others].count("-") > 1:
        raise UsageError("-: stdin can be read once; give hypotheses, references or a source as a file instead.")


def _resampling(test: Test, score_only: bool, baseline: Path | None) -> Resampling:
    from encdec_cli.errors import UsageError
    from encdec_cli.evaluation.significance import Resampling

    usual = Resampling()
    seed = os.environ.get("SACREBLEU_SEED") or str(usual.seed)
    if not seed.isdecimal():
        raise UsageError(f"SACREBLEU_SEED: expected a whole number from 0 on, found '{seed}'; it seeds all draws.")
    resamples = 0 if score_only and baseline is None else usual.resamples
    return Resampling(test=test.value, resamples=resamples, seed=int(seed))


def _print(report: Report, as_json: bool, score_only: bool) -> None:
    from encdec_cli.cli import console

    for warning in report.warnings:
        console.warn(warning)
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print("\n".join(report.score_lines() if score_only else report.lines()))


def read_hypotheses(file: Path | None) -> list[str] | None:
    """Return the lines of the file or of a pipe; None where a terminal or the null device asks the model.

    Raises DataError for an empty input: a broken pipeline must not score as something else.
    """
    from encdec_cli.errors import DataError

    if file is None and _stdin_asks_model():
        return None
    if file is None or str(file) == "-":
        _tell_if_waiting()
    lines = _read(file)
    if not lines:
        raise DataError(
            f"{file or 'stdin'}: no hypotheses; an empty pipe is taken for a broken one. To let the model write them, "
            "give it no input: add < /dev/null."
        )
    return lines


def _read(path: Path | None) -> list[str]:
    """Return the lines of a file, and warn of what was odd in them."""
    from encdec_cli.cli import console
    from encdec_cli.text.lines import LineReport, read_lines

    report = LineReport()
    lines = list(read_lines(path, report))
    for sentence in report.sentences():
        console.warn(sentence)
    return lines


def _stdin_asks_model() -> bool:
    if sys.stdin is None:  # closed: the reader says so
        return False
    status = os.fstat(sys.stdin.fileno())
    return sys.stdin.isatty() or (stat.S_ISCHR(status.st_mode) and status.st_rdev == Path(os.devnull).stat().st_rdev)


def _tell_if_waiting() -> None:
    """Say for what the command waits where stdin stays silent, as a pipe does that nobody writes to."""
    from encdec_cli.cli import console

    if sys.stdin is not None and not select.select([sys.stdin.fileno()], [], [], _PATIENCE)[0]:
        console.say("still waiting for hypotheses on stdin; give FILE, or < /dev/null to let the model write them")


def _check_unwritten(lines: list[str] | None, rerank: str | None, precision: str) -> None:
    from encdec_cli.errors import UsageError

    if lines is not None and rerank is not None:
        raise UsageError(f"--rerank {rerank}: the hypotheses are given; it orders what a model writes.")
    if lines is not None and precision != "fp32":
        raise UsageError(f"--precision {precision}: the hypotheses are given; it tells of what a model writes.")


def _tell_unused(model: Path | None, source: Path | None) -> None:
    from encdec_cli.cli import console

    unused = [flag for flag, value in (("--model", model), ("--source", source)) if value]
    if unused:
        told = "hypotheses and references are given, and no metric asks a model"
        console.warn(f"{' and '.join(unused)} not used: {told}")


def _bundle(model: Path, device: str, plugins: Sequence[Path], precision: str = "fp32") -> Bundle:
    from encdec_cli.cli.models import load_bundles

    return load_bundles([model], device, plugins, precision)[0]


def chosen_metrics(names: Sequence[str]) -> list[Metric]:
    """Return the metrics of --metric. Raises UsageError for an unknown one, and for what one of them lacks."""
    from encdec_cli.config import parse_component
    from encdec_cli.evaluation.metrics import try_out
    from encdec_cli.registry import metrics

    chosen = [parse_component(name, metrics, "--metric") for name in names]
    for metric in chosen:
        try_out(metric)
    return chosen


def _usual_metrics(bundle: Bundle | None) -> list[str]:
    return list(bundle.task.metrics) if bundle else ["bleu"]


def _examples(bundle: Bundle, source: Path | None) -> list[Example]:
    from encdec_cli.errors import DataError, UsageError

    if source is not None:
        return [bundle.task.read(line) for line in _read(source)]
    try:
        examples = list(bundle.recipe.data.config.read("test"))
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise DataError(
            f"{str(error).rstrip('.')}; the model's recipe names its test split (data.test) from the folder in which "
            "it was trained: go there, or give --source and --reference."
        ) from error
    if not examples:
        raise UsageError(
            "the model's recipe names no test split (data.test); give --reference FILE, and --source FILE "
            "if the model shall write the hypotheses."
        )
    return examples


def _outputs(
    lines: list[str] | None, references: list[Path], baseline: Path | None, bundle: Bundle | None, source: Path | None
) -> Outputs:
    from encdec_cli.errors import UsageError
    from encdec_cli.evaluation.report import Outputs

    streams = [_read(path) for path in references]
    if bundle is not None and not streams:
        if source is not None:
            raise UsageError("--source without --reference: there is nothing to compare with; give --reference FILE.")
        streams = [[example.target or "" for example in _examples(bundle, None)]]
    others = _read(baseline) if baseline is not None else None
    _check_lengths(lines, others, streams, references)
    return Outputs(references=streams, hypotheses=lines, baseline=others)


def _check_lengths(
    lines: list[str] | None, others: list[str] | None, streams: list[list[str]], names: list[Path]
) -> None:
    from encdec_cli.evaluation.metrics import check_lengths

    first = str(names[0]) if names else "the recipe's test split"
    for name, stream in zip(map(str, names[1:]), streams[1:], strict=True):
        check_lengths(first, streams[0], name, stream)
    for name, given in (("the output", lines), ("the baseline", others)):
        if given is not None:
            check_lengths(name, given, first, streams[0])


def _ask_model(bundle: Bundle, outputs: Outputs, source: Path | None, chosen: list[Metric], rerank: str | None) -> None:
    """Let the model write missing hypotheses, and score the references where a metric wants it."""
    from encdec_cli.evaluation.likelihood import likelihoods
    from encdec_cli.evaluation.metrics import check_lengths

    to_write = outputs.hypotheses is None and not all(metric.needs_model for metric in chosen)
    to_score = any(metric.needs_model for metric in chosen)
    if not (to_write or to_score):
        return
    examples = _examples(bundle, source)
    check_lengths("the source", [e.source for e in examples], "the reference", outputs.references[0])
    if to_write:
        outputs.hypotheses = _write_hypotheses(bundle, examples, rerank)
    if to_score:
        outputs.likelihoods = likelihoods(bundle, examples, outputs.references[0])


def _add_unrounded(
    outputs: Outputs,
    model: Path | None,
    device: str,
    plugins: Sequence[Path],
    asked: tuple[Path | None, list[Metric], str | None],
) -> None:
    """Let the model in fp32 be the baseline, unless there is one; `asked` is what `_ask_model` takes."""
    from encdec_cli.cli import console
    from encdec_cli.evaluation.report import Outputs

    if model is not None and outputs.baseline is None:
        console.say("baseline: the same model in fp32")
        exact = Outputs(references=outputs.references)
        _ask_model(_bundle(model, device, plugins), exact, *asked)
        outputs.baseline, outputs.baseline_likelihoods = exact.hypotheses, exact.likelihoods


def _write_hypotheses(bundle: Bundle, examples: list[Example], rerank: str | None) -> list[str]:
    """Return what the model writes for each example, after the reranker if one is named."""
    from encdec_cli.generation.lines import Options, first_text
    from encdec_cli.reranking.reranker import decode
    from encdec_cli.text.windows import full_windows
    from encdec_cli.training.machine import decoding_workers

    options = Options(bundle.recipe.decoding.config, workers=decoding_workers(bundle.device.type))
    windows = full_windows(examples, options.window)
    return [first_text(result) for result in decode([bundle], windows, options, rerank)]
