"""`encdec bench`: what this machine can do, how fast a recipe trains on it, what quality costs in speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from encdec_cli.cli.options import DeviceOption, OverridesArgument, PluginOption, RunOption

if TYPE_CHECKING:
    from encdec_cli.evaluation.metrics import Metric
    from encdec_cli.evaluation.tradeoff import Point


def bench(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="Measure how fast this trains and decodes.", show_default=False),
    ] = None,
    overrides: OverridesArgument = None,
    output: RunOption = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", metavar="PATH", help="Measure how fast this bundle or run decodes.")
    ] = None,
    beams: Annotated[str, typer.Option("--beams", metavar="N,N,…", help="Beam widths to try.")] = "1,2,5",
    batches: Annotated[
        str, typer.Option("--batches", metavar="N,N,…", help="Sentences decoded together; 0 is the usual number.")
    ] = "8,0",
    lines: Annotated[int, typer.Option("--lines", metavar="N", min=1, help="Test lines to decode each time.")] = 200,
    within: Annotated[
        float, typer.Option("--within", metavar="POINTS", min=0.0, help="What speed may cost; see below.")
    ] = 1.0,
    at_least: Annotated[
        float | None,
        typer.Option("--at-least", metavar="LINES", min=0.0, help="Recommend the best that decodes so many a second."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="SECONDS", min=0.0, help="How long to train for the measure.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every number.")] = False,
    device: DeviceOption = "cpu",
    plugin: PluginOption = None,
) -> None:
    """Measure this machine; with RECIPE how fast it trains and decodes, with --model what quality costs in speed.

    RECIPE trains for some seconds on its data, which it prepares if need be; nothing of that is kept. The model of its
    run as it is, if there is one, or --model decodes lines of its test split by every combination of beam, precision,
    batch and workers, and the fastest setting is recommended whose score is at most --within points below the best, or
    with --at-least the best that is fast enough.
    """
    from encdec_cli.cli import console
    from encdec_cli.errors import EncdecError
    from encdec_cli.training.machine import add_in_order, check_device, use_threads

    beam_widths, batch_sizes = _numbers("--beams", beams, 1), _numbers("--batches", batches, 0)
    check_device(device)
    add_in_order(device)
    use_threads(0)
    found: dict[str, Any] = {"machine": _machine(device)}
    if recipe is not None:
        found["training"] = _training(recipe, overrides or [], output, device, plugin or [], seconds)
    decoded = model or (_trained(recipe, output) if recipe else None)
    if decoded is not None:
        try:
            points, metric = _generation(decoded, device, plugin or [], (beam_widths, batch_sizes, lines))
            found["generation"] = _rated(points, metric, within, at_least)
        except EncdecError as error:
            if model is not None:
                raise
            console.say(f"the speed of generation is not measured: {error}")  # what was is printed all the same
    print(json.dumps(found, ensure_ascii=False) if as_json else "\n\n".join(_tables(found)))


def _numbers(flag: str, text: str, least: int) -> list[int]:
    from encdec_cli.errors import UsageError

    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise UsageError(f"{flag} {text}: expected numbers from {least} on, separated by commas, such as 1,5.")
    return numbers


def _machine(device: str) -> dict[str, Any]:
    import torch

    from encdec_cli.training.ceiling import matrix_ceiling, memory_bandwidth
    from encdec_cli.training.machine import available_cores

    on = torch.device(device)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if on.type == "cpu":
        types["int8"] = torch.int8
    ceilings = {f"{name}_gflops": round(matrix_ceiling(dtype, on) / 1e9, 1) for name, dtype in types.items()}
    bandwidth = round(memory_bandwidth(on) / 1e9, 1)
    return {"device": device, "cores": available_cores(), **ceilings, "memory_gb_per_second": bandwidth}


def _training(
    recipe: Path, overrides: Sequence[str], output: Path | None, device: str, plugins: Sequence[Path], seconds: float
) -> dict[str, Any]:
    import tempfile

    import torch

    from encdec_cli.allocator import keep_freed
    from encdec_cli.bundle.run import default_run, locked
    from encdec_cli.cli import console
    from encdec_cli.recipe import load
    from encdec_cli.training.beforehand import check
    from encdec_cli.training.budget import settle
    from encdec_cli.training.ceiling import matrix_ceiling
    from encdec_cli.training.data import prepared_data
    from encdec_cli.training.distributed import Ranks
    from encdec_cli.training.machine import use_threads
    from encdec_cli.training.precision import choose
    from encdec_cli.training.signals import watched
    from encdec_cli.training.trainer import Setting, Trainer
    from encdec_cli.training.trial import training_pace

    loaded = load(recipe, [*overrides, "parallel.tensor=1"], plugins=plugins)
    run = output or default_run(recipe)
    threads = use_threads(loaded.train.threads)
    keep_freed()
    with locked(run), watched() as stop, tempfile.TemporaryDirectory(prefix="encdec-bench-") as scratch:
        check(loaded, run, False, Ranks(), console.say)
        data, _ = prepared_data(loaded, run, console.say, device)
        trainer = Trainer(settle(Setting(loaded, data, Path(scratch), device, stop, console.say, loaded.loaded)))
        pace = training_pace(trainer, seconds)
    ceiling = matrix_ceiling(choose(trainer.precision, device).dtype, torch.device(device))
    return {
        "precision": trainer.precision,
        "threads": threads,
        "tokens_per_second": round(pace.tokens_per_second, 1),
        "gflops": round(pace.flops_per_second / 1e9, 1),
        "mfu": round(pace.flops_per_second / ceiling, 4),
    }


def _trained(recipe: Path, output: Path | None) -> Path | None:
    from encdec_cli.bundle.run import default_run
    from encdec_cli.cli import console

    run = output or default_run(recipe)
    if (run / "bundle").exists():
        return run
    console.say(f"{run}: no model yet; `encdec train` makes one, whose speed of generation can then be measured")
    return None


def _generation(
    model: Path, device: str, plugins: Sequence[Path], grid: tuple[list[int], list[int], int]
) -> tuple[list[Point], Metric]:
    from dataclasses import replace
    from itertools import islice

    from encdec_cli.cli.models import load_bundles
    from encdec_cli.config import parse_component
    from encdec_cli.errors import UsageError
    from encdec_cli.evaluation.tradeoff import measure
    from encdec_cli.generation.lines import Options
    from encdec_cli.registry import metrics
    from encdec_cli.training.machine import decoding_workers

    beams, batches, lines = grid
    points = []
    workers = dict.fromkeys((1, decoding_workers(device)))
    for precision in _precisions(device):
        (bundle,) = load_bundles([model], device, plugins, precision)
        metric: Metric = parse_component(bundle.recipe.train.metric, metrics, "train.metric")
        examples = list(islice(bundle.recipe.data.config.read("test"), lines))
        if metric.needs_model or not examples:
            raise UsageError(f"{model}: needs a test split (data.test) and a metric of outputs, not {metric.names[0]}.")
        for beam in beams:
            strategy = replace(bundle.recipe.decoding.config, beam=beam)
            for batch in batches:
                for count in workers:
                    options = Options(strategy, batch=batch, workers=count)
                    points.append(measure(bundle, precision, options, examples, metric))
    return points, metric


def _precisions(device: str) -> list[str]:
    import torch

    from encdec_cli.training.precision import fast_bf16

    found = ["fp32"] + (["bf16"] if fast_bf16(torch.device(device)) else [])
    return found + (["int8"] if device == "cpu" else [])


def _rated(points: Sequence[Point], metric: Metric, within: float, at_least: float | None) -> dict[str, Any]:
    from encdec_cli.evaluation.tradeoff import best_at_least, fastest_within, on_front

    higher = metric.higher_is_better
    if at_least is None:
        chosen, why = fastest_within(points, within, higher), f"within {within:g} of the best"
    elif found := best_at_least(points, at_least, higher):
        chosen, why = found, f"the best with {at_least:g} lines/s or more"
    else:
        chosen = max(points, key=lambda point: point.lines_per_second)
        why = f"the fastest, since none decodes {at_least:g} lines/s"
    return {
        "metric": metric.names[0],
        "settings": [asdict(point) | {"front": on_front(point, points, higher)} for point in points],
        "recommended": asdict(chosen),
        "why": why,
    }


def _tables(found: dict[str, Any]) -> list[str]:
    from encdec_cli.cli.chart import chart
    from encdec_cli.cli.console import table

    parts = [
        table([[key, f"{value:,}" if isinstance(value, float) else str(value)] for key, value in found[part].items()])
        for part in ("machine", "training")
        if part in found
    ]
    if "generation" in found:
        told = found["generation"]
        rows = [["precision", "beam", "batch", "workers", "lines/s", told["metric"], ""]]
        for one in told["settings"]:
            recommended = {key: one[key] for key in told["recommended"]} == told["recommended"]
            note = " ".join(filter(None, ["*" * one["front"], f"recommended: {told['why']}" if recommended else ""]))
            rows.append(
                [*(str(one[key]) for key in rows[0][:4]), f"{one['lines_per_second']:.1f}", f"{one['score']:.2f}", note]
            )
        parts += [table(rows) + "\n* no other setting is as fast and as good, and one of both more so"]
        front = sorted((one["lines_per_second"], one["score"]) for one in told["settings"] if one["front"])
        if len(front) > 1:
            parts.append("\n".join(chart(front, f"{told['metric']} by lines/s, of the settings marked *", height=6)))
    return parts
