"""The one line reader: rows end at the newline alone, oddities are counted, errors name the place."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encdec_cli.errors import DataError
from encdec_cli.text import lines
from encdec_cli.text.lines import LineReport, decode_line, read_lines, read_parallel, split_lines, suspicious_row


def read(content: bytes) -> tuple[list[str], LineReport]:
    report = LineReport()
    return list(split_lines(io.BytesIO(content), "x", report)), report


horrors = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from(
            [b"\n", b"\r\n", b"\r", b"\x00", b"\xef\xbb\xbf", "\u2028\u2029\x85\x0b\x0c".encode(), b"\xff"]
        ),
    )
).map(b"".join)


@given(horrors)
def test_rows_are_newlines_plus_an_unfinished_last_row(content: bytes) -> None:
    rows, report = read(content)
    expected = content.count(b"\n") + (not content.endswith(b"\n") and content != b"")
    assert len(rows) == report.lines == expected
    assert not any("\n" in row or "\0" in row for row in rows)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0")), min_size=1))
def test_text_comes_back_as_it_was_written(rows: list[str]) -> None:
    kept, report = read("".join(f"{row}|\n" for row in rows).encode())
    assert [f"{row}|" for row in rows] == [("\ufeff" if report.bom and i == 0 else "") + x for i, x in enumerate(kept)]


@pytest.mark.parametrize(
    ("content", "rows", "counted"),
    [
        (b"a\r\nb\r\n", ["a", "b"], {"carriage_returns_stripped": 2}),
        (b"a\r\r\n", ["a\r"], {"carriage_returns_stripped": 1, "lone_cr": 1}),
        (b"a\rb\n", ["a\rb"], {"lone_cr": 1}),
        (b"a\xc3\x28b\n", ["a\ufffd(b"], {"invalid_utf8": 1}),
        (b"\xc3\x00\xa9\n", ["\ufffd\ufffd"], {"invalid_utf8": 1, "nul": 1}),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"], {"bom": 1}),
        (b"a\x00\x00b\n", ["ab"], {"nul": 1}),
        ("a\u2028b\u2029c\x85d\x0be\x0cf\n".encode(), ["a\u2028b\u2029c\x85d\x0be\x0cf"], {"line_separators": 1}),
        (b"a\n\n \n", ["a", "", " "], {"blank": 2}),
        (b"a\nb", ["a", "b"], {"no_final_newline": 1}),
        (b"", [], {}),
    ],
)
def test_table_of_oddities(content: bytes, rows: list[str], counted: dict[str, int]) -> None:
    found, report = read(content)
    assert found == rows
    counts = {key: value for key, value in vars(report).items() if isinstance(value, int) and value and key != "lines"}
    assert counts == counted


def test_sentences_name_the_first_place() -> None:
    _, report = read(b"ok\nb\xff\n\xff\n")
    assert report.sentences() == ["2 lines (first x:2) held invalid UTF-8: the bytes were replaced by U+FFFD."]
    assert read(b"plain\n")[1].sentences() == []


def test_a_bom_is_stripped_from_the_first_line_alone() -> None:
    assert decode_line(b"\xef\xbb\xbfa\n", 1, "x") == "a"
    assert decode_line(b"\xef\xbb\xbfa\n", 2, "x") == "\ufeffa"


@pytest.mark.parametrize("name", ["x.gz", "x.txt"])
def test_gzip_is_known_by_suffix_or_magic(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress("a\nü\u2028b\n".encode()))
    assert list(read_lines(path)) == ["a", "ü\u2028b"]


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    packed = gzip.compress(os.urandom(5000).hex().encode())
    contents = {
        "cut.gz": packed[:-200],
        "flipped.gz": packed[:300] + b"\0\0\0\0" + packed[304:],
        "plain.gz": b"hello\n",
    }
    for name, content in {**contents, "empty.gz": b""}.items():
        (folder / name).write_bytes(content)
    says = {"cut.gz": "gzip", "flipped.gz": "gzip", "plain.gz": "gzip", "empty.gz": "empty", "none": "no such file"}
    return {name: (folder / name, word) for name, word in says.items()} | {"folder": (folder, "folder")}


@pytest.mark.parametrize("case", ["cut.gz", "flipped.gz", "plain.gz", "empty.gz", "none", "folder"])
def test_what_cannot_be_read_is_a_data_error_naming_the_file(tmp_path: Path, case: str) -> None:
    path, word = broken_files(tmp_path)[case]
    with pytest.raises(DataError, match=word) as caught:
        list(read_lines(path))
    assert str(path) in str(caught.value)


def test_a_line_over_the_limit_is_refused_and_one_at_the_limit_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    path = tmp_path / "x"
    path.write_bytes(b"0123456789\n0123456789")
    assert list(read_lines(path)) == ["0123456789"] * 2
    path.write_bytes(b"short\n0123456789a\n")
    with pytest.raises(DataError, match=f"{path}:2: "):
        list(read_lines(path))


def test_a_gzip_bomb_is_refused_without_being_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    member = gzip.compress(bytes(1 << 24).replace(b"\0", b"a"))
    path.write_bytes(member * 100)  # 1.6 GB in one line
    code = f"""
import sys
from pathlib import Path
from encdec_cli.errors import DataError
from encdec_cli.text.lines import read_lines
try:
    list(read_lines(Path({str(path)!r})))
except DataError as error:
    print(error)
# Not getrusage: its maximum is inherited from the parent.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "16 MiB" in out[0]
    assert int(out[1]) < 300_000


def test_stdin_yields_each_line_when_it_arrives() -> None:
    code = """
from encdec_cli.text.lines import read_lines
for line in read_lines(None):
    print("got", line, flush=True)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for word in (b"one", b"two", b"three"):
            process.stdin.write(word + b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"got " + word + b"\n"  # before the next line is written
        process.stdin.close()
        assert process.wait() == 0


def test_stdin_may_be_gzip_and_a_dash_is_stdin() -> None:
    code = "from pathlib import Path; from encdec_cli.text.lines import *; print(list(read_lines(Path('-'))))"
    done = subprocess.run([sys.executable, "-c", code], input=gzip.compress(b"a\nb"), capture_output=True, check=True)
    assert done.stdout == b"['a', 'b']\n"


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def test_parallel_files_give_rows(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a", ["1", "2"]), write_rows(tmp_path / "b", ["x", "y"])
    assert list(read_parallel([a, b])) == [("1", "x"), ("2", "y")]


def test_unequal_files_name_both_counts_and_where_they_part(tmp_path: Path) -> None:
    rng = random.Random(7)
    source = ["w" * rng.randrange(5, 120) for _ in range(400)]
    target = [row + "s" * rng.randrange(6) for row in source]
    del target[251]
    a, b = write_rows(tmp_path / "a.en", source), write_rows(tmp_path / "a.de", target)
    with pytest.raises(DataError) as caught:
        list(read_parallel([a, b]))
    said = str(caught.value)
    assert f"{a} has 400 lines" in said
    assert f"{b} has 399" in said
    assert "row 252" in said


@given(st.integers(0, 199), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_the_break_is_found_wherever_it_is(row: int, lost: int, seed: int, swap: bool) -> None:
    rng = random.Random(seed)
    first = [rng.randrange(5, 200) for _ in range(205)]
    second = first[:row] + first[row + lost :]
    found = suspicious_row(second, first) if swap else suspicious_row(first, second)
    # Beside the break a row may happen to fit as well on the other side.
    assert abs(found - row) <= lost + 1


def test_a_file_cut_short_is_said_to_be_cut_short(tmp_path: Path) -> None:
    rows = [("ab " * (i % 17 + 1)).strip() for i in range(60)]
    a, b = write_rows(tmp_path / "a", rows), write_rows(tmp_path / "b", rows[:50])
    with pytest.raises(DataError, match="cut short"):
        list(read_parallel([a, b]))
