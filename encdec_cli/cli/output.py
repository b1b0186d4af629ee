"""Results go to stdout, a line at a time, through here."""

from __future__ import annotations

import sys


def write_line(line: str) -> None:
    """Write a line at once, whoever waits for it; halves of surrogate pairs become U+FFFD."""
    from encdec_cli.text.options import without_surrogates

    sys.stdout.buffer.write(without_surrogates(line).encode() + b"\n")
    sys.stdout.buffer.flush()
