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
    plugin: PluginOption = None,
) -> None:
    """Write a model whose weights are the mean of several models' weights, and print its folder.

    Each PATH is a bundle, or a run, whose best model counts. They are checkpoints of one run (runs/mt/bundles/step_*,
    where train.average says how many are kept) or runs that began with the same weights; those of runs with other seeds
    have no useful mean: give them to `encdec generate` as an ensemble. Recipe and tokenizers are those of the last.
    """
    from encdec_cli.bundle.average import average as mean
    from encdec_cli.bundle.bundle import find_bundle
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import load_plugins

    if len(models) < 2:
        raise UsageError(f"{models[0]}: the mean of one model is that model; name two or more.")
    if output.is_symlink() or (output.exists() and not (output / "bundle.json").is_file()):
        # A run's `bundle` is a link: what it names belongs to the run.
        raise UsageError(f"--output {output}: is a link or no bundle, so it is not replaced; choose another folder.")
    for path in models:
        find_bundle(path)  # before any is read
    plugins = load_plugins(plugin or [])
    bundle = mean(models)
    bundle.plugins = plugins
    bundle.save_weights(output, bundle.model.state_dict())
    typer.echo(str(output))
