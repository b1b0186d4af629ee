"""`encdec export`: a model for another program."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encdec_cli.cli.options import ModelOption, PluginOption

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.bundle.export import Agreement, Exporter
    from encdec_cli.text.example import Example

PROBE_LINES = 50
"""Held-out lines that are compared where --probe names none."""


def export(
    to: Annotated[
        str, typer.Option("--to", metavar="TARGET", help="The target, such as ctranslate2.", show_default=False)
    ],
    model: ModelOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder to write. [default: <name of the model>-<target>]"
        ),
    ] = None,
    quantize: Annotated[
        str,
        typer.Option(
            "--quantize", metavar="KIND", help="How weights are stored: none, int8, int16, float16, bfloat16 …"
        ),
    ] = "none",
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare the export with the model; where they differ exit 3, write nothing."),
    ] = False,
    probe: Annotated[
        Path | None,
        typer.Option(
            "--probe", metavar="FILE", help="Lines for --check. [default: held-out lines of the model's own corpus]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Write the model in another program's format, and print the folder.

    With --check, both are run on the same lines and the largest difference of log-probabilities and the share of
    equal outputs are printed too.
    """
    from encdec_cli.bundle.export import DisagreementError
    from encdec_cli.bundle.export import export as write
    from encdec_cli.cli import console
    from encdec_cli.cli.models import load_bundles, model_or_default
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import load_plugins

    if probe is not None and not check:
        raise UsageError("--probe FILE: only --check compares anything; add --check.")
    load_plugins(plugin or [])
    exporter = _exporter(to, quantize)
    model = model_or_default(model)
    bundle = load_bundles([model], "cpu", plugin or [], packed=False)[0]
    folder = output or Path(f"{_name(model)}-{to}")
    try:
        agreement = write(exporter, bundle, folder, _probe(bundle, probe) if check else None)
    except DisagreementError as error:
        _print(None, error.agreement, as_json)
        raise
    _print(folder, agreement, as_json)
    console.say(f"wrote {folder}")


def _exporter(name: str, quantize: str) -> Exporter:
    from encdec_cli.errors import UsageError
    from encdec_cli.registry import exporters

    try:
        target = exporters.get(name)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing == "encdec_cli":
            raise
        raise UsageError(
            f"--to {name}: needs the package {missing}, which is not installed; pip install 'encdec-cli[{name}]'."
        ) from error
    options = {} if quantize == "none" else {"quantize": quantize}
    if options.keys() - {field.name for field in fields(target)}:
        raise UsageError(f"--quantize {quantize}: the target {name} stores weights in one way alone; leave it out.")
    exporter: Exporter = target(**options)
    return exporter


def _name(model: Path) -> str:
    """Return the name of a run or bundle folder; a run's `bundle` has the name of the run."""
    path = Path.cwd() / model  # not resolved: what a link is called is the name that the user knows
    if ".." in path.parts:
        path = path.resolve()
    return path.parent.name if path.name == "bundle" and path.parent.name else path.name


def _probe(bundle: Bundle, file: Path | None) -> list[Example]:
    """Return the lines of the file, else the first held-out examples of the recipe's corpus."""
    from encdec_cli.errors import EncdecError, UsageError
    from encdec_cli.text.lines import read_lines

    if file is not None:
        return [bundle.task.read(line) for line in read_lines(file)]
    for split in ("test", "valid"):
        try:
            examples = list(itertools.islice(bundle.recipe.data.config.read(split), PROBE_LINES))
        except EncdecError as error:
            raise type(error)(
                f"--check: the model's corpus cannot be read; give lines with --probe FILE: {error}"
            ) from error
        if examples:
            return examples
    raise UsageError("--check: the model's corpus has no held-out lines; give some with --probe FILE.")


def _print(folder: Path | None, agreement: Agreement | None, as_json: bool) -> None:
    numbers = agreement.plain() if agreement else {}
    if as_json:
        typer.echo(json.dumps({"folder": None if folder is None else str(folder), **numbers}))
        return
    if folder is not None:
        typer.echo(str(folder))
    for key, value in numbers.items():
        typer.echo(f"{key} {_shown(value)}")


def _shown(value: float | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "nan"
    return f"{value:.6g}"
