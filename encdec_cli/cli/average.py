"""`encdec average`: one model from several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from encdec_cli.cli.options import PluginOption


def average(
    models: Annotated[
        # Hidden, since the help would show its Python type; the text below tells of it.
        list[Path],
        typer.Argument(metavar="PATH", help="Bundles, or runs, whose best models count.", hidden=True),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the new bundle.", show_default=False)
    ],
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=2, help="Of the models that a run has kept, the newest N.")
    ] = None,
    best: Annotated[
        int | None, typer.Option("--best", metavar="N", min=2, help="Of the models that a run has kept, the N best.")
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """Write a model whose weights are the mean of several models' weights, and print its folder.

    Each PATH is a bundle, or a run, whose best model counts. They are models of one run (train.average says how many
    are kept; --last and --best choose of them) or runs that began with the same weights; those of runs with other
    seeds have no useful mean: give them to `encdec generate` as an ensemble. Recipe and tokenizers are those of the
    last.
    """
    from encdec_cli.bundle.average import average as mean
    from encdec_cli.bundle.bundle import find_bundle
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import load_plugins

    plugins = load_plugins(plugin or [])
    if last or best:
        models = _of_run(models, last, best)
    if len(models) < 2:
        raise UsageError(f"{models[0]}: the mean of one model is that model; name two or more.")
    if output.is_symlink() or (output.exists() and not (output / "bundle.json").is_file()):
        # A run's `bundle` is a link: what it names belongs to the run.
        raise UsageError(f"--output {output}: is a link or no bundle, so it is not replaced; choose another folder.")
    if output.resolve().parent.name == "bundles":
        raise UsageError(f"--output {output}: is among the models of a run, which keeps them; choose another folder.")
    for path in models:
        find_bundle(path)  # before any is read
    bundle = mean(models)
    bundle.plugins = plugins
    bundle.save_weights(output, bundle.model.state_dict())
    typer.echo(str(output))


def _of_run(runs: list[Path], last: int | None, best: int | None) -> list[Path]:
    """Return models that a run has kept, oldest first: the newest, or the best by its train.metric."""
    from encdec_cli.bundle import checkpoint
    from encdec_cli.bundle.bundle import find_bundle
    from encdec_cli.errors import UsageError

    if len(runs) > 1 or (last and best):
        raise UsageError("--last and --best: give one of them, and one run.")
    run, count = runs[0], last or best or 0
    find_bundle(run)
    folder = run / "bundles"
    kept = [folder / checkpoint.step_name(step) for step in checkpoint.steps(folder)]
    if best and kept:
        kept = _by_score(run, kept)
    if len(kept) < count:
        raise UsageError(
            f"{run}: has {len(kept)} such models, not {count}; one of each validation is kept, as many as "
            "train.average says."
        )
    return sorted(kept[-count:])


def _by_score(run: Path, kept: list[Path]) -> list[Path]:
    """Return the models of a run whose score is a number, the best one last."""
    from encdec_cli.bundle.bundle import Bundle, read_facts
    from encdec_cli.config import parse_component
    from encdec_cli.registry import metrics

    metric = parse_component(Bundle.load(run).recipe.train.metric, metrics, "train.metric")
    scores = {model: read_facts(model)["scores"].get(metric.names[0]) for model in kept}
    judged = [model for model in kept if scores[model] is not None]
    sign = 1 if metric.higher_is_better else -1
    return sorted(judged, key=lambda model: (sign * scores[model], model))
