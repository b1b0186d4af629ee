"""`encdec evaluate`: how good are these lines, or this model's?"""

from __future__ import annotations

import json
import os
import stat
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.evaluation.metrics import Metric
    from encdec_cli.evaluation.report import Outputs
    from encdec_cli.text.example import Example


class Test(str, Enum):
    """The paired tests."""

    randomization = "randomization"
    bootstrap = "bootstrap"


def evaluate(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Hypotheses, plain or .gz. [default: stdin; on a terminal the model writes them]", show_default=False
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="NAME,KEY=VALUE,… such as bleu,tokenize=zh; repeat for more.")
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option("--reference", "-r", help="References; repeat for more. [default: the recipe's test split]"),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="Another system's lines, for the paired test.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", help="What the model reads, if it writes the hypotheses.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Bundle or run. [default: $ENCDEC_MODEL, else the newest run]")
    ] = None,
    test: Annotated[Test, typer.Option("--test", help="The paired test against the baseline.")] = Test.randomization,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every number.")] = False,
    score_only: Annotated[bool, typer.Option("--score-only", help="The numbers alone, one a line.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 …")] = "cpu",
    plugin: Annotated[
        list[Path] | None, typer.Option("--plugin", help="A plugin file to load; repeat for more.")
    ] = None,
) -> None:
    """Score hypotheses against references, with 95 % bootstrap intervals and the signature of each number.

    Hypotheses come from FILE or a pipe; on a terminal (or with stdin from /dev/null) the model writes them. A
    baseline adds the paired significance test.
    """
    from encdec_cli.cli import console
    from encdec_cli.evaluation.report import evaluate as judge
    from encdec_cli.evaluation.significance import Resampling

    plugins = plugin or []
    lines = read_hypotheses(file)
    with_model = lines is None or not reference or any(_needs_model(name, plugins) for name in metric or [])
    bundle = _bundle(model, device, plugins) if with_model else None
    chosen = _metrics(metric or list(bundle.task.metrics if bundle else ["bleu"]))
    examples = _examples(bundle, source) if bundle and (lines is None or not reference or source) else []
    outputs = _outputs(lines, reference or [], baseline, examples)
    if bundle:
        _ask_model(bundle, outputs, examples, chosen)
    resamples = 0 if score_only and baseline is None else 1000
    report = judge(chosen, outputs, Resampling(test=test.value, resamples=resamples))
    for warning in report.warnings:
        console.warn(warning)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        for line in report.score_lines() if score_only else report.lines():
            typer.echo(line)


def read_hypotheses(file: Path | None) -> list[str] | None:
    """Return the lines of the file or of a pipe; None where a terminal or the null device asks the model.

    Raises DataError for an empty input: a broken pipeline must not score as something else.
    """
    from encdec_cli.errors import DataError
    from encdec_cli.text.lines import read_lines

    if file is None and _stdin_asks_model():
        return None
    lines = list(read_lines(file))
    if not lines:
        raise DataError(
            f"{file or 'stdin'}: no hypotheses; an empty pipe is taken for a broken one. To let the model write them, "
            "give it no input: add < /dev/null."
        )
    return lines


def _stdin_asks_model() -> bool:
    status = os.fstat(sys.stdin.fileno())
    return sys.stdin.isatty() or (stat.S_ISCHR(status.st_mode) and status.st_rdev == Path(os.devnull).stat().st_rdev)


def _needs_model(name: str, plugins: list[Path]) -> bool:
    from encdec_cli.registry import load_environment_plugins, load_plugin, metrics

    load_environment_plugins()
    for path in plugins:
        load_plugin(path)
    kind = name.partition(",")[0]
    return kind in metrics.names() and bool(metrics.get(kind).needs_model)


def _bundle(model: Path | None, device: str, plugins: list[Path]) -> Bundle:
    from encdec_cli.cli.models import load_bundles

    return load_bundles([model] if model else [], device, plugins)[0]


def _metrics(names: list[str]) -> list[Metric]:
    from encdec_cli.config import parse_component
    from encdec_cli.registry import metrics

    return [parse_component(name, metrics, "--metric") for name in names]


def _examples(bundle: Bundle, source: Path | None) -> list[Example]:
    from encdec_cli.errors import UsageError
    from encdec_cli.text.lines import read_lines

    if source is not None:
        return [bundle.task.read(line) for line in read_lines(source)]
    examples = list(bundle.recipe.data.config.read("test"))
    if not examples:
        raise UsageError(
            "the model's recipe names no test split (data.test); give --reference FILE, and --source FILE "
            "if the model shall write the hypotheses."
        )
    return examples


def _outputs(
    lines: list[str] | None, references: list[Path], baseline: Path | None, examples: list[Example]
) -> Outputs:
    from encdec_cli.errors import UsageError
    from encdec_cli.evaluation.report import Outputs
    from encdec_cli.text.lines import read_lines

    streams = [list(read_lines(path)) for path in references]
    if not streams:
        if any(example.target is None for example in examples):
            raise UsageError("--source without --reference: there is nothing to compare with; give --reference FILE.")
        streams = [[example.target or "" for example in examples]]
    return Outputs(
        references=streams, hypotheses=lines, baseline=list(read_lines(baseline)) if baseline is not None else None
    )


def _ask_model(bundle: Bundle, outputs: Outputs, examples: list[Example], chosen: list[Metric]) -> None:
    """Let the model write missing hypotheses, and score the references where a metric wants it."""
    from encdec_cli.evaluation.likelihood import likelihoods
    from encdec_cli.evaluation.metrics import check_lengths
    from encdec_cli.generation import WINDOW_BATCHES, Options, generate
    from encdec_cli.text.windows import full_windows

    if outputs.hypotheses is None and not all(metric.needs_model for metric in chosen):
        check_lengths("the source", [e.source for e in examples], "the reference", outputs.references[0])
        options = Options(bundle.recipe.decoding.config)
        windows = full_windows(examples, options.batch * WINDOW_BATCHES)
        outputs.hypotheses = [
            r.candidates[0].text if r.candidates else "" for r in generate([bundle], windows, options)
        ]
    if any(metric.needs_model for metric in chosen):
        examples = examples or _examples(bundle, None)
        check_lengths("the source", [e.source for e in examples], "the reference", outputs.references[0])
        outputs.likelihoods = likelihoods(bundle, examples, outputs.references[0])
