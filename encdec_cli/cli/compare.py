"""`encdec compare`: the recipes and the curves of runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from encdec_cli.cli.watch import duration, metric, record

if TYPE_CHECKING:
    from encdec_cli.training.history import History


class By(str, Enum):
    """What curves are laid side by side by."""

    updates = "updates"
    tokens = "tokens"
    time = "time"


_POINTS = 12
"""Training losses at most that stand for a run without validations."""
_FIELD = {By.updates: "step", By.tokens: "tokens", By.time: "seconds"}


def compare(
    # Hidden, since the help would show its Python type.
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, such as runs/mt.", hidden=True)],
    by: Annotated[
        By, typer.Option("--by", metavar="|".join(By), help="What the scores of a row have in common.")
    ] = By.updates,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object with every number.")] = False,
) -> None:
    """Lay runs such as runs/mt side by side: where their recipes differ, their scores at the same point, their ends.

    A point is an update, a number of target tokens, or a time of training; each run shows its last validation up to
    there, or where it has none its training loss. Runs that still learn can be compared as well.
    """
    import json

    from encdec_cli.cli.console import table
    from encdec_cli.errors import UsageError
    from encdec_cli.training.history import read

    histories = [read(run) for run in runs]
    for history in histories:
        if not history.facts:
            raise UsageError(f"{history.run}: has not begun to train, so there is nothing to compare; leave it out.")
    differences = _differences(histories)
    if as_json:
        print(json.dumps({"differences": differences, "runs": list(map(record, histories))}, ensure_ascii=False))
        return
    names = _names(runs)
    rows = [[key, *map(_cell, values)] for key, values in differences.items()]
    print(table([["KEY", *names], *rows]) if rows else "no difference between the recipes")
    print(f"\n{table(_curves(histories, names, by))}\n\n{table(_ends(histories, names))}")


def _names(runs: Sequence[Path]) -> list[str]:
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else list(map(str, runs))


def _differences(histories: Sequence[History]) -> dict[str, list[Any]]:
    """Return the keys whose values are not the same in all runs, facts such as `threads` after those of the recipe."""
    facts = [{key: value for key, value in history.facts.items() if key != "recipe"} for history in histories]
    flat = [history.recipe | each for history, each in zip(histories, facts, strict=True)]
    keys = dict.fromkeys(key for each in flat for key in each)
    values = {key: [each.get(key) for each in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _cell(value: Any) -> str:
    import json

    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _curves(histories: Sequence[History], names: Sequence[str], by: By) -> list[list[str]]:
    """Return a row for each point at which any run was judged; a run is blank outside its own."""
    field = _FIELD[by]
    metrics, curves = zip(*map(_curve, histories), strict=True)
    head = [by.value.upper(), *(f"{name} {score}" for name, score in zip(names, metrics, strict=True))]
    rows = [head]
    for point in sorted({line[field] for curve in curves for line in curve}):
        row = [duration(point) if by is By.time else f"{point:,}"]
        for curve, score in zip(curves, metrics, strict=True):
            past = [line for line in curve if line[field] <= point]
            ended = not past or point > curve[-1][field]
            row.append("" if ended or past[-1].get(score) is None else f"{past[-1][score]:.4g}")
        rows.append(row)
    return rows


def _curve(history: History) -> tuple[str, list[dict[str, Any]]]:
    """Return what a run is judged by, and when: its validations, or without any some of its training losses."""
    if validations := history.events("valid"):
        return metric(history), validations
    lines = history.events("train")[::-1]
    return "loss", lines[:: max(1, -(-len(lines) // _POINTS))][::-1]


def _ends(histories: Sequence[History], names: Sequence[str]) -> list[list[str]]:
    rows = [["RUN", "STATE", "UPDATE", "TOKENS", "TIME", "LOSS", "BEST"]]
    for history, name in zip(histories, names, strict=True):
        last = history.lines[-1] if history.lines else {"tokens": 0, "seconds": 0.0}
        losses = [line["loss"] for line in history.events("train") if line.get("loss") is not None]
        rows.append(
            [
                *(name, history.state, f"{history.step:,}", f"{last['tokens']:,}", duration(last["seconds"])),
                f"{losses[-1]:.4g}" if losses else "",
                _best(history),
            ]
        )
    return rows


def _best(history: History) -> str:
    progress = history.saved.progress if history.saved else {}
    return f"{metric(history)} {progress['best']:.4g} ({progress['model']})" if progress.get("best") is not None else ""
