"""The errors a user may see: one sentence each, and one exit code per kind."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command; documented in `encdec --help` and in docs/exit-codes.md."""

    OK = 0
    FAILURE = 1
    """A failure of ours: please report it."""
    USAGE = 2
    """Wrong command line or recipe."""
    CHECK = 3
    """A check that was asked for did not hold."""
    DATA = 4
    """Bad input data."""
    BUNDLE = 5
    """Bad checkpoint or bundle."""
    RESOURCES = 6
    """Disk, memory, permissions, a failed download, a lock held by another run, or a lost process of this one."""
    NON_FINITE = 7
    """Training met a loss or a gradient that is not finite."""
    INTERRUPTED = 130
    """Ctrl-C (SIGINT)."""
    TERMINATED = 143
    """SIGTERM, or SIGHUP."""


class EncdecError(Exception):
    """An error with a sentence for the user: what is wrong, what was expected, what to do."""

    code = ExitCode.FAILURE


class UsageError(EncdecError):
    """The command line or the recipe is wrong."""

    code = ExitCode.USAGE


class CheckError(EncdecError):
    """A check that the user asked for did not hold."""

    code = ExitCode.CHECK


class DataError(EncdecError):
    """The input data is wrong; the sentence names file and line."""

    code = ExitCode.DATA


class LineError(DataError):
    """One line of the input is wrong."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"line {line}: {what}")
        self.line = line
        """Counted from 1."""
        self.what = what


class BundleError(EncdecError):
    """A checkpoint, a bundle or a prepared data folder is damaged or does not fit."""

    code = ExitCode.BUNDLE


class ResourceError(EncdecError):
    """The machine lacks something: disk space, permission, memory, or a lock is taken."""

    code = ExitCode.RESOURCES


class NonFiniteError(EncdecError):
    """A loss or a gradient is not finite; the weights have not been touched by it."""

    code = ExitCode.NON_FINITE


class StoppedError(EncdecError):
    """A signal asked the command to stop, and what it had done is saved."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code
