"""`encdec preprocess`: the data part of training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from encdec_cli.cli.options import OverridesArgument, PluginOption, RunOption


def preprocess(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)],
    overrides: OverridesArgument = None,
    output: RunOption = None,
    plugin: PluginOption = None,
) -> None:
    """Read the corpus, train the tokenizer and write the shards that `encdec train` uses.

    KEY=VALUE changes a key of the recipe, such as data.target=fr. `train` does all this by itself; do it apart to look
    at the data first, or where no accelerator is idle.
    """
    from encdec_cli.bundle.run import data_folder, default_run, locked
    from encdec_cli.cli import console
    from encdec_cli.recipe import DATA_SECTIONS, load
    from encdec_cli.training.data import prepared_data
    from encdec_cli.training.signals import watched

    run = output or default_run(recipe)
    loaded = load(recipe, overrides or [], plugins=plugin or [], sections=DATA_SECTIONS)
    with locked(run), watched():
        prepared, made = prepared_data(loaded, run, console.say)
    if not made:
        console.say(f"nothing to do: {data_folder(run)} is current ({prepared.count('train'):,} training pairs)")
