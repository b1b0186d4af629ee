"""`encdec distill`: a small model from what a large one writes, and what that gains and costs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encdec_cli.cli.options import (
    DeviceOption,
    MetricOption,
    OverridesArgument,
    PluginOption,
    RerankOption,
    RunOption,
    StrategyOption,
)

if TYPE_CHECKING:
    from encdec_cli.evaluation.metrics import Metric
    from encdec_cli.evaluation.report import Score
    from encdec_cli.recipe import Recipe
    from encdec_cli.text.example import Example


class Level(str, Enum):
    """What a student learns of its teacher."""

    sequence = "sequence"
    token = "token"  # noqa: S105 - no password


def distill(
    teacher: Annotated[
        Path, typer.Argument(metavar="TEACHER", help="Bundle or run of the large model.", show_default=False)
    ],
    student: Annotated[
        Path, typer.Option("--student", metavar="RECIPE", help="The small model's recipe.", show_default=False)
    ],
    overrides: OverridesArgument = None,
    level: Annotated[
        Level,
        typer.Option("--level", metavar="|".join(Level), help="Learn what it writes, or its chances of each token."),
    ] = Level.sequence,
    model: Annotated[
        list[Path] | None,
        typer.Option("--model", "-m", metavar="PATH", help="A further teacher; repeat: they are an ensemble."),
    ] = None,
    output: RunOption = None,
    strategy: StrategyOption = None,
    rerank: RerankOption = None,
    metric: MetricOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="The rows of the table as a JSON array.")] = False,
    device: DeviceOption = "cpu",
    plugin: PluginOption = None,
) -> None:
    """Train a small model on what a large one writes for its training sources, and tell what was gained and lost.

    The teacher decodes the sources of the student's recipe, what looks wrong is left out, the student learns the rest
    (sequence-level knowledge distillation), and teacher and student are measured on the test split: sentences a
    second, and each metric with its 95 % interval. With --level token nothing is decoded: the student, which must have
    the teacher's vocabularies, learns the teacher's distribution beside the real targets. Started again, it goes on
    where it was interrupted. KEY=VALUE changes a key of the student's recipe, such as teacher.weight.
    """
    from encdec_cli.bundle.run import default_run
    from encdec_cli.cli.evaluate import chosen_metrics
    from encdec_cli.cli.train import train_run
    from encdec_cli.errors import UsageError
    from encdec_cli.recipe import load

    recipe = load(student, overrides or [], plugins=plugin or [])
    metrics, examples = chosen_metrics(metric or recipe.task.config.metrics), _held_out(recipe)
    if any(one.needs_model for one in metrics):
        raise UsageError(
            "--metric perplexity: outputs are compared; a metric of probabilities needs `encdec evaluate`."
        )
    teachers = [teacher, *(model or [])]
    run = output or default_run(student)
    if level is Level.sequence:
        recipe = _with_outputs(recipe, teachers, strategy, rerank)
    else:
        recipe = _with_teacher(recipe, teachers, decodes=strategy or rerank)
    for path in map(Path.resolve, teachers):
        if run.resolve() in (path, *path.parents[:2]):  # a model of a run lies two folders below it
            raise UsageError(f"--output {run}: is the run of a teacher, {path}; choose another folder.")
    train_run(recipe, run, device)
    _print(_rows(teacher, run, examples, device, metrics), as_json)


def _with_outputs(recipe: Recipe, teachers: list[Path], strategy: str | None, rerank: str | None) -> Recipe:
    """Return the recipe with the teachers' outputs as its targets."""
    from encdec_cli.config import Component
    from encdec_cli.corpora.distilled import Distilled

    data = Distilled(corpus=recipe.data, models=teachers, strategy=strategy or "", rerank=rerank or "")
    return replace(recipe, data=Component("distilled", data, Distilled))


def _with_teacher(recipe: Recipe, teachers: list[Path], decodes: str | None) -> Recipe:
    """Return the recipe with a teacher of its tokens."""
    from encdec_cli.errors import UsageError

    if len(teachers) > 1 or decodes:
        raise UsageError("--level token: one teacher, which decodes nothing: no --model, --strategy or --rerank.")
    return replace(recipe, teacher=replace(recipe.teacher, model=teachers[0]))


def _held_out(recipe: Recipe) -> list[Example]:
    """Return the test split, else the validation split."""
    from encdec_cli.cli import console
    from encdec_cli.errors import UsageError

    examples = list(recipe.data.config.read("test"))
    if not examples:
        examples = list(recipe.data.config.read("valid"))
        console.warn("the recipe names no test split (data.test): the table tells of the validation split")
    if not examples:
        raise UsageError("data: neither a test nor a valid split; there is nothing to compare the models on.")
    return examples


@dataclass
class _Row:
    """A model as it was measured."""

    model: str
    parameters: int
    precision: str
    sentences_per_second: float
    speed_up: float
    """Sentences a second, divided by the teacher's."""
    scores: list[Score]
    """With the teacher's outputs as the baseline, but for the teacher's own."""


def _rows(teacher: Path, student: Path, examples: list[Example], device: str, metrics: list[Metric]) -> list[_Row]:
    """Measure the teacher, the student, and the student in few bits, in turn; all are compared with the first."""
    from encdec_cli.cli.models import load_bundles
    from encdec_cli.evaluation.report import Outputs, evaluate
    from encdec_cli.evaluation.significance import Resampling
    from encdec_cli.evaluation.tradeoff import timed
    from encdec_cli.generation.lines import Options

    small = "int8" if device == "cpu" else "bf16"
    models = [(teacher, "fp32"), (student, "fp32"), (student, small)]
    rows: list[_Row] = []
    references = [[example.target or "" for example in examples]]
    baseline: list[str] | None = None
    sizes: dict[Path, int] = {}
    for path, precision in models:
        bundle = load_bundles([path], device, [], precision)[0]
        if path not in sizes:  # packed weights are parameters no more
            whole = load_bundles([path], device, [], packed=False)[0].model
            sizes[path] = sum(parameter.numel() for parameter in whole.parameters())
        lines, rate = timed(bundle, Options(bundle.recipe.decoding.config), examples)
        outputs = Outputs(references=references, hypotheses=lines, baseline=baseline)
        scores = evaluate(metrics, outputs, Resampling()).scores
        first = rows[0].sentences_per_second if rows else rate
        rows.append(_Row(str(path), sizes[path], precision, rate, rate / first, scores))
        baseline = baseline or lines
    return rows


def _table(rows: list[_Row]) -> list[list[str]]:
    """Return the cells of the rows below those of the head."""
    head = ["model", "parameters", "precision", "sentences/s", "speed-up"]
    head += [cell for score in rows[0].scores for cell in (score.name, "difference")]
    table = [head]
    for row in rows:
        cells = [row.model, f"{row.parameters:,}", row.precision, f"{row.sentences_per_second:.1f}"]
        cells.append(f"{row.speed_up:.2f}")
        for score in row.scores:
            cells += [score.brief(), score.difference()]
        table.append(cells)
    return table


def _print(rows: list[_Row], as_json: bool) -> None:
    from encdec_cli.cli import console

    if as_json:
        print(json.dumps([asdict(row) for row in rows], ensure_ascii=False))
        return
    print(console.table(_table(rows)))
    for score in rows[0].scores:
        print(f"{score.name}: {score.signature}")
