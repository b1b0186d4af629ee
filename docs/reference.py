"""Writes docs/commands, docs/recipe.md and docs/exit-codes.md from the code itself: `python docs/reference.py`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import typer

from encdec_cli import atomic, recipe
from encdec_cli.cli import application
from encdec_cli.config.schema import descriptions
from encdec_cli.errors import ExitCode

_NOTE = "<!-- Written by `python docs/reference.py`; do not edit. -->\n\n"


def pages() -> dict[str, str]:
    """Return the text of every generated page by its path below docs/."""
    group: Any = typer.main.get_command(application())
    result = {f"commands/{name}.md": _command(name, command) for name, command in group.commands.items()}
    intro = "# Every key of a recipe\n\nWith its default. `encdec train --explain` writes the same.\n\n"
    result["recipe.md"] = f"{_NOTE}{intro}```yaml\n{recipe.explain()}```\n"
    result["exit-codes.md"] = _exit_codes()
    return result


def _command(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    words = " ".join([f"encdec {name} [OPTIONS]", *map(_argument, arguments)])
    parts = [f"# encdec {name}", "\n\n".join(_paragraphs(command.help or "")), f"```\n{words}\n```"]
    rows = [(f"`{_argument(parameter)}`", parameter) for parameter in arguments]
    parts += [_table("argument", rows)] if rows else []
    rows = [(_option(parameter), parameter) for parameter in options]
    parts += [_table("option", rows)] if rows else []
    return _NOTE + "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.replace("\b", "").split("\n\n")]


def _argument(parameter: Any) -> str:
    name = str(parameter.metavar)
    name = name if parameter.required else f"[{name}]"
    return f"{name}..." if parameter.nargs == -1 else name


def _option(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    return f"{names} `{parameter.metavar}`" if parameter.metavar else names


def _table(kind: str, rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {kind} | meaning | default |", "|---|---|---|"]
    for name, parameter in rows:
        meaning = " ".join((parameter.help or "").split())
        if "[default: " in meaning:
            meaning, _, default = meaning.rstrip("]").partition("[default: ")
        else:
            default = _default(parameter)
        cells = (name, meaning.strip(), default)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _default(parameter: Any) -> str:
    value = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    if parameter.required:
        return "required"
    return f"`{value}`" if isinstance(value, (str, int, float, Path)) and not isinstance(value, bool) else ""


def _exit_codes() -> str:
    meanings = descriptions(ExitCode)
    lines = ["# Exit codes", "", "| code | meaning |", "|---|---|", "| 0 | All went well. |"]
    lines += [f"| {code.value} | {meanings[code.name]} |" for code in ExitCode if code]
    lines += ["", "Whoever's reader goes away (`| head`) ends by SIGPIPE, without a word: a shell tells it as 141."]
    return _NOTE + "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, text in pages().items():
        atomic.write_file(Path(__file__).parent / name, text.encode())
