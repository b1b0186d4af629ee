"""The C functions as other processors get them: their tests again, compiled without some of this one's instructions."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from encdec_cli import kernels
from tests.conftest import environment

pytestmark = pytest.mark.skipif(
    not kernels.wide() or platform.machine() != "x86_64", reason="no C compiler, or neither AVX-512 nor AVX2"
)
FILES = ("kernels", "linear", "packed", "training_attention", "training_kernels")
ELSEWHERE = "not command and not compiled and not freed and not decodes_the_same"
"""Tests of what does not depend on instructions, or that take long."""


@pytest.mark.parametrize(
    ("compiler", "most_skipped"),
    [
        ("cc -mno-avx512f", 0),
        ("cc -mno-avx512f -mno-avxvnni", 0),
        ("cc -mno-avx512vnni -mno-avx512bf16 -mno-amx-tile", 0),
        ("cc -mno-amx-tile", 0),
        ("cc -mno-avx", 100),
    ],
    ids=["AVX2 with VNNI", "AVX2", "AVX-512 alone", "AVX-512", "none"],
)
def test_they_are_right_with_fewer_instructions(compiler, most_skipped):
    folder = Path(__file__).parent
    paths = [str(folder / f"test_{name}.py") for name in FILES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-k",
        ELSEWHERE,
        *paths,
    ]
    done = subprocess.run(
        command,
        check=False,
        cwd=folder.parent,
        env=environment(CC=compiler),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    skipped = int(summary.split(" skipped")[0].split()[-1]) if " skipped" in summary else 0
    assert skipped <= most_skipped, summary
    assert int(summary.split(" passed")[0].split()[-1]) >= 50, summary
