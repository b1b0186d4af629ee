"""`encdec chat`: talk with a dialogue model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from encdec_cli.cli.options import DeviceOption, ModelOption, PluginOption, StrategyOption

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.tasks.dialogue import Dialogue
    from encdec_cli.text.example import Example

_RESET = "/new"


def chat(
    model: ModelOption = None,
    strategy: StrategyOption = None,
    beam: Annotated[
        int | None, typer.Option("--beam", metavar="N", min=1, help="Hypotheses kept for each answer.")
    ] = None,
    device: DeviceOption = "cpu",
    plugin: PluginOption = None,
) -> None:
    """Talk with a dialogue model; it remembers the turns, and says so when old ones no longer fit.

    /new starts a new conversation, Ctrl-D ends. In a pipe each line is a turn and each answer a line, an empty
    one for an empty one.
    """
    from encdec_cli.cli import console
    from encdec_cli.cli.generate import choose_strategy
    from encdec_cli.cli.models import load_bundles
    from encdec_cli.errors import UsageError
    from encdec_cli.generation.lines import Options, first_text, generate
    from encdec_cli.tasks.dialogue import Dialogue

    bundle = load_bundles([model] if model else [], device, plugin or [])[0]
    task = bundle.task
    if not isinstance(task, Dialogue):
        made_for = bundle.recipe.task.name
        raise UsageError(f"chat needs a model of the task dialogue, not of {made_for}; give another with --model.")
    options = Options(choose_strategy(bundle, strategy, beam))
    asked: list[list[Example]] = []
    answers = generate([bundle], iter(asked.pop, []), options)  # one search, whose models are loaded once
    turns: list[str] = []
    told = False
    for said in _turns():
        if said == _RESET:
            turns, told = [], False
            continue
        if not said.strip():
            _answer("")
            continue
        turns.append(said)
        kept = _that_fit(bundle, task, turns)
        if len(turns) > kept and not told:
            told, lost = True, len(turns) - kept
            what = (
                "turn of this conversation no longer fits"
                if lost == 1
                else f"{lost} turns of this conversation no longer fit"
            )
            console.say(f"the first {what}; from here on the oldest ones are forgotten")
        asked.append([task.from_record({"turns": turns[-kept:]})])
        result = next(answers)
        if result.truncated:
            console.say("what you said is longer than the model can read; its end was left out")
        turns.append(first_text(result))
        _answer(turns[-1])


def _answer(text: str) -> None:
    from encdec_cli.cli import console

    if sys.stdout.isatty():
        text = console.printable(text)
    sys.stdout.buffer.write(text.encode() + b"\n")
    sys.stdout.buffer.flush()


def _turns() -> Iterator[str]:
    """Yield what the user says: with a prompt on a terminal, else the lines of the pipe."""
    from encdec_cli.text.lines import read_lines

    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from read_lines(None)
        return
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            said = input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")  # so that the shell's prompt does not follow ours
            raise
        if said.strip():
            yield said


def _that_fit(bundle: Bundle, task: Dialogue, turns: list[str]) -> int:
    """Return how many of the last turns the task keeps and the model can read."""
    most = bundle.longest_source
    keep = min(len(turns), task.turns)
    while keep > 1:
        example = task.from_record({"turns": turns[-keep:]})
        if len(bundle.source.encode(task.source(example))) <= most:
            break
        keep -= 1
    return keep
