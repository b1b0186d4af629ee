"""`encdec watch`: how a run stands, from another terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from encdec_cli.training.history import History

_EVERY = 2.0
"""Seconds between two looks."""


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, such as runs/mt.")],
    once: Annotated[
        bool, typer.Option("--once", help="Print how it stands and leave, as when stdout is no terminal.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object with every number, and the alarms, and leave.")
    ] = False,
) -> None:
    """Show how a run stands: state, loss, speed, time left, cost, scores, last checkpoint, and what is alarming.

    Reads the run's folder alone and never writes there, so it may look at a run of another user or machine. On a
    terminal it looks again every two seconds until the run ends; whether one on another machine still runs it cannot
    know, so it looks until that one has finished.
    """
    import json
    import shutil
    import sys
    import time

    from encdec_cli.training.history import read

    if as_json:
        history = read(run)
        print(json.dumps({**record(history), "alarms": history.alarms(time.time())}, ensure_ascii=False))
        return
    live = sys.stdout.isatty() and not once
    while True:
        history = read(run)
        text = "\n".join(_page(history, time.time(), min(100, shutil.get_terminal_size().columns)))
        text = text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding)
        print(f"\x1b[H\x1b[2J{text}" if live else text, flush=True)
        if not live or history.state not in ("running", "elsewhere"):
            return
        time.sleep(_EVERY)


def _page(history: History, now: float, width: int) -> list[str]:
    from encdec_cli.cli.chart import chart
    from encdec_cli.cli.console import printable

    lines = [_headline(history), *_learning(history), *_cost(history), *_scores(history)]
    if history.saved:
        age = duration(now - history.saved.time)
        lines.append(f"checkpoint: update {history.saved.progress['step']:,}, {age} ago")
    lines += [f"alarm: {alarm}" for alarm in history.alarms(now)]
    lines += history.notes()[-3:]
    losses = [(line["step"], line["loss"]) for line in history.events("train") if line.get("loss") is not None]
    lines += chart(losses, "loss by update", width)
    name = metric(history)
    scores = [(line["step"], line[name]) for line in history.events("valid") if line.get(name) is not None]
    lines += chart(scores, f"{name} by update", width, 4) if len(scores) > 1 else []
    return list(map(printable, lines))


def _headline(history: History) -> str:
    steps = history.recipe.get("train.steps")
    share = f" of {steps:,} ({history.step / steps:.0%})" if isinstance(steps, int) and steps else ""
    who = f"; {history.holder}" if history.state in ("running", "elsewhere") else ""
    return f"{history.run}: {history.state}, update {history.step:,}{share}{who}"


def _learning(history: History) -> list[str]:
    lines = history.events("train")
    if not lines:
        every = history.recipe.get("train.log_every")
        return ["no update in the log yet" + (f"; the first line comes with update {every}" if every else "")]
    last, speed, steps = lines[-1], history.speed(), history.recipe.get("train.steps")
    words = [f"{name} {last[name]:.4g}" for name in ("loss", "rate", "norm") if last.get(name) is not None]
    words += [f"epoch {last['epoch']}"] if "epoch" in last else []
    words.append(f"{last['tokens']:,} tokens in {duration(last['seconds'])}")
    if history.state == "running" and speed:
        words.append(f"{last['clock'].get('tokens_per_second') or 0:,.0f} tokens/s")
        words += [f"{duration((steps - history.step) / speed)} left"] if isinstance(steps, int) else []
    return ["  ".join(words)]


_COSTS = {
    "padding": "{:.1%} padding",
    "mfu": "{:.0%} of the machine's ceiling",
    "kwh": "{:.3g} kWh",
    "kwh_estimated": "about {:.3g} kWh",
    "price": "price {:.2f}",
    "co2_grams": "{:.3g} g CO2",
}


def _cost(history: History) -> list[str]:
    lines = history.events("train")
    if not lines:
        return []
    last, clock = lines[-1], lines[-1]["clock"]
    found = {**last, **clock, **clock.get("spent", {})}
    told = [words.format(found[key]) for key, words in _COSTS.items() if found.get(key) is not None]
    return [f"cost: {', '.join(told)}"] if told else []


def _scores(history: History) -> list[str]:
    lines = history.events("valid")
    if not lines:
        return []
    own = {key: value for key, value in lines[-1].items() if key not in NO_SCORES}
    listed = ", ".join(f"{name} {value:.4g}" for name, value in own.items() if value is not None)
    best = history.saved.progress["best"] if history.saved else None
    return [
        f"validation at update {lines[-1]['step']:,}: {listed}" + (f"; best {best:.4g}" if best is not None else "")
    ]


def record(history: History) -> dict[str, Any]:
    """Return what `--json` tells of a run."""
    progress = history.saved.progress if history.saved else {}
    return {
        "run": str(history.run),
        "state": history.state,
        "update": history.step,
        "checkpoint": progress.get("step"),
        "best": progress.get("best"),
        "model": progress.get("model") or None,
        "recipe": history.recipe,
        "notes": history.notes(),
        "train": [
            {key: line.get(key) for key in ("step", "tokens", "seconds", "loss")} for line in history.events("train")
        ],
        "valid": [
            {key: value for key, value in line.items() if key not in ("event", "clock")}
            for line in history.events("valid")
        ],
    }


NO_SCORES = ("event", "step", "clock", "tokens", "seconds")
"""What a line of a validation has beside its scores."""


def metric(history: History) -> str:
    """Return the name of the score by which models are compared: the first after the loss, if there is one."""
    names = [key for line in history.events("valid")[:1] for key in line if key not in NO_SCORES]
    return names[min(1, len(names) - 1)] if names else "loss"


def duration(seconds: float) -> str:
    """Return seconds as words: `42 s`, `12 min`, `3 h 05 min`, `2 d 04 h`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    if whole < 172800:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02} h"
