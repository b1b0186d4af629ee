"""Commands as processes of their own, without the seconds that importing torch takes: forked from a warm parent.

The parent imports everything and computes nothing. Each command gets its own streams, environment, folder,
signals and limits, and ends with its own exit code, as one that a shell has started.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import environment

TIMEOUT = 120
_WARM = (
    "encdec_cli.cli",
    "encdec_cli.training.trainer",
    "encdec_cli.models.transformer",
    "encdec_cli.corpora.files",
    "encdec_cli.decoding.beam",
    "encdec_cli.evaluation.overlap",
    "encdec_cli.tasks.dialogue",
    "encdec_cli.tasks.translation",
    "rich.progress",
)


@dataclass
class Command:
    """A command that runs, or has run."""

    folder: Path
    pid: int

    def code(self) -> int | None:
        """The exit code; minus the number of the signal that ended it; None while it runs."""
        path = self.folder / "code"
        return int(path.read_text()) if path.exists() else None

    def wait(self, timeout: float = TIMEOUT) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.code()) is None:
            assert time.monotonic() < deadline, f"still running: {self.stderr}"
            time.sleep(0.005)
        return code

    def send(self, number: int) -> None:
        if self.code() is None:
            os.kill(self.pid, number)

    def seconds(self, since: Path | None = None) -> float:
        """How long it ran, or how long it still ran after a file was written."""
        return (self.folder / "code").stat().st_mtime - (since or self.folder / "pid").stat().st_mtime

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_bytes().decode()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_bytes().decode()


class Forks:
    """Starts commands; `folder` is where their streams and exit codes go; `modules` are imported before, too."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self._folder = folder
        self._count = 0
        self._commands: list[Command] = []
        code = f"from tests.forked import serve; serve({list(modules)})"
        self._parent = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(),
            stdin=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )

    def start(
        self,
        *arguments: str | Path,
        stdin: str = "",
        cwd: Path | None = None,
        tty: str | None = None,
        tty_stdout: bool = False,
        file_limit: int | None = None,
        ignored: tuple[int, ...] = (),
        bound: bool = False,
        **changes: str,
    ) -> Command:
        """Start `encdec`. `tty` is a terminal for stdin and stderr, and stdout if asked; `file_limit` in bytes.

        Whoever is `bound` is held by the permissions of files, which do not bind root.
        """
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir(parents=True)
        (folder / "stdin").write_text(stdin)
        request = {
            "arguments": list(map(str, arguments)),
            "folder": str(folder),
            "cwd": str(cwd or folder),
            "environment": environment(**changes),
            "tty": tty,
            "tty_stdout": tty_stdout,
            "file_limit": file_limit,
            "ignored": list(map(int, ignored)),
            "bound": bound,
        }
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        deadline = time.monotonic() + TIMEOUT
        while not (folder / "pid").exists():
            assert time.monotonic() < deadline
            assert self._parent.poll() is None
            time.sleep(0.002)
        command = Command(folder, int((folder / "pid").read_text()))
        self._commands.append(command)
        return command

    def __call__(self, *arguments: str | Path, **options) -> Command:
        """Run `encdec` to its end."""
        command = self.start(*arguments, **options)
        command.wait()
        return command

    def close(self) -> None:
        for command in self._commands:
            command.send(signal.SIGKILL)
        self._parent.stdin.close()
        self._parent.wait(timeout=60)


def serve(modules: list[str]) -> None:
    """Fork a command for each request on stdin, until it is closed."""
    for name in (*_WARM, *modules):
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the keepers reap themselves
    with os.fdopen(os.dup(0)) as requests:  # not sys.stdin: the commands want theirs untouched
        for line in requests:
            if os.fork() == 0:
                _keep(json.loads(line))


def _keep(request: dict) -> None:
    """Wait for the command and write down how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder = Path(request["folder"])
    pid = os.fork()
    if pid == 0:
        _become(request)
    _write(folder / "pid", str(pid))
    _, status = os.waitpid(pid, 0)
    _write(folder / "code", str(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.rename(path)


def _become(request: dict) -> None:
    """Be the command that was asked for."""
    folder, tty = Path(request["folder"]), request["tty"]
    os.setsid()
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", write), (2, "stderr", write)):
        terminal = tty is not None and (number != 1 or request["tty_stdout"])
        os.dup2(os.open(tty if terminal else folder / name, os.O_RDWR if terminal else flags, 0o644), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for ignored in request["ignored"]:
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    if request["bound"]:
        version_3, itself, none = 0x20080522, 0, (ctypes.c_uint32 * 6)()
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version_3, itself), none)
    sys.argv = ["encdec", *request["arguments"]]
    from encdec_cli.cli import main

    code = 1
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)
