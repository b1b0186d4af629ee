"""The commands, and what becomes of their errors: one sentence on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from encdec_cli import __version__
from encdec_cli.cli import console
from encdec_cli.cli.average import average
from encdec_cli.cli.bench import bench
from encdec_cli.cli.chat import chat
from encdec_cli.cli.compare import compare
from encdec_cli.cli.distill import distill
from encdec_cli.cli.evaluate import evaluate
from encdec_cli.cli.export import export
from encdec_cli.cli.generate import generate
from encdec_cli.cli.listing import list_components
from encdec_cli.cli.preprocess import preprocess
from encdec_cli.cli.train import train
from encdec_cli.cli.watch import watch
from encdec_cli.errors import EncdecError, ExitCode

COMMANDS: dict[str, Callable[..., None]] = {
    "preprocess": preprocess,
    "train": train,
    "distill": distill,
    "watch": watch,
    "compare": compare,
    "generate": generate,
    "evaluate": evaluate,
    "average": average,
    "export": export,
    "chat": chat,
    "bench": bench,
    "list": list_components,
}
"""Every command by its name, in the order of the help. Their modules import light things alone."""
SUMMARIES = {
    "preprocess": "Read a recipe's corpus and write what training reads.",
    "train": "Train a model from a recipe, or go on where it was stopped.",
    "distill": "Train a small model on what a large one writes, and compare them.",
    "watch": "Show how a run stands, from another terminal.",
    "compare": "Lay the recipes and the curves of runs side by side.",
    "generate": "Translate, summarise or answer: lines in, lines out.",
    "evaluate": "Score outputs against references, with intervals and tests.",
    "average": "Write a model that is the mean of several.",
    "export": "Write a model in another program's format.",
    "chat": "Talk with a dialogue model.",
    "bench": "Measure the machine, a recipe's training, and quality against speed.",
    "list": "List every component, from where it is, and what is broken.",
}
"""What each command does, in a line that fits beside its name."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
# `typer` does not export the class of Click's errors, and newer versions bring a Click of their own.
_CommandLineError: type[Any] = typer.BadParameter.__mro__[2]


def application() -> typer.Typer:
    """Return the Typer application."""
    app = typer.Typer(
        name="encdec",
        add_completion=False,
        pretty_exceptions_enable=False,
        # Plain help: no boxes in a pipe, and rich is not imported for it.
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        epilog="Exit codes: 0 good, 1 a failure of ours, 2 wrong command or recipe, 3 a check did not hold, "
        "4 bad data, 5 bad checkpoint or bundle, 6 disk, memory, download, lock or a lost process, "
        "7 training became non-finite, 130 and 143 interrupted.",
    )
    app.callback(invoke_without_command=True)(_encdec)
    for name, command in COMMANDS.items():
        app.command(name, short_help=SUMMARIES.get(name))(command)
    return app


def _encdec(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Write the version and exit.")] = False,
    debug: Annotated[  # taken out of the arguments by `main`, since it may stand anywhere; here for the help
        bool, typer.Option("--debug", help="Show the traceback of an error; also ENCDEC_DEBUG=1.")
    ] = False,
) -> None:
    """Train, decode, judge and export encoder-decoder models.

    Each command is a filter: data on stdin and stdout, words for people on stderr.
    """
    if version:
        print(f"encdec {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(ExitCode.USAGE)


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    arguments, debug = _take_debug(sys.argv[1:])
    if sys.stdout is None:  # closed: nobody wants the results, and no file may take its place
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end
    code = run(arguments, debug)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _end_as_broken_pipe()
    except OSError as error:
        _discard_stdout()
        code = code or _report(error, debug)
    if any(thread.daemon for thread in threading.enumerate()):
        # One still waits for stdin, or learns pieces. Python would end it by force as its last act, and with C++
        # libraries in the process that now and then aborts.
        if sys.stderr is not None:
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of the arguments, wherever it stands before a `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = [word for word in arguments[:end] if word != "--debug"]
    debug = len(rest) < end or os.environ.get("ENCDEC_DEBUG", "") not in ("", "0")
    return [*rest, *arguments[end:]], debug


def run(arguments: Sequence[str], debug: bool = False) -> int:
    """Run one command line and return its exit code; every error becomes a sentence on stderr."""
    command = typer.main.get_command(application())
    try:
        code = command.main(args=list(arguments), prog_name="encdec", standalone_mode=False)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # Typer's own answer to it
            return _report(error.__context__, debug)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        return _report(error, debug)
    return int(code) if isinstance(code, int) else 0


def _report(error: BaseException, debug: bool) -> int:
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return ExitCode.INTERRUPTED
    if isinstance(error, BrokenPipeError) and _stdout_is_broken():
        _end_as_broken_pipe()
    if debug and not isinstance(error, _CommandLineError):
        import traceback

        console.say("".join(traceback.format_exception(error)).rstrip())
    sentence, code = _sentence(error)
    console.fail(sentence)
    return code


def _sentence(error: BaseException) -> tuple[str, int]:
    if isinstance(error, EncdecError):
        return str(error), error.code
    if isinstance(error, _CommandLineError):
        return _usage(error), ExitCode.USAGE
    # torch.OutOfMemoryError by its name, and its CPU allocator by its words: torch may not be imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return "out of memory; use a smaller batch or model, or a larger machine.", ExitCode.RESOURCES
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = error.filename or "the output"
        return f"{where}: {error.strerror}; make room and run the command again.", ExitCode.RESOURCES
    kind = f"{type(error).__name__}: {error}".rstrip(": .").replace("\n", " ")
    return f"a failure of ours ({kind}); run again with --debug and report what it shows.", ExitCode.FAILURE


def _usage(error: Any) -> str:
    sentence = str(error.format_message()).rstrip(".").replace("\n", " ").replace(": Value error, ", ": ")
    path = error.ctx.command_path if error.ctx else "encdec"
    # A question already stands at the end where Click knows a similar name.
    stop = " " if sentence.endswith("?") else "; "
    return f"{sentence}{stop}see '{path} --help'."


def _stdout_is_broken() -> bool:
    """Tell whether the reader of stdout is gone; another pipe that broke, to a worker, is a failure."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return True


def _discard_stdout() -> None:
    """Send what is left in stdout's buffer nowhere, so that the interpreter does not stumble over it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _end_as_broken_pipe() -> NoReturn:
    """End as every filter does whose reader went away: by SIGPIPE, without a word."""
    _discard_stdout()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(128 + signal.SIGPIPE)
