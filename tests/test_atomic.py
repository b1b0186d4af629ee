"""Files are old or new, never between; what is damaged is named; folders of others are left alone."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from encdec_cli import atomic
from encdec_cli.errors import BundleError, EncdecError, ResourceError


def commit(path: Path, **files: str) -> None:
    with atomic.new_folder(path) as folder:
        for name, content in files.items():
            (folder / name).write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_file_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.txt"
    atomic.write_file(path, b"one")
    atomic.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["a.txt"]


def test_write_file_keeps_the_old_file_if_flushing_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    atomic.write_file(path, b"one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk full"):
        atomic.write_file(path, b"two")
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["a.txt"]


def test_write_file_where_a_file_stands_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="a file stands where a folder is needed"):
        atomic.write_file(tmp_path / "file" / "a.txt", b"one")


def test_json_is_the_same_bytes_for_the_same_value(tmp_path):
    assert atomic.json_bytes({"b": 1, "a": "ü"}) == atomic.json_bytes({"a": "ü", "b": 1})
    atomic.write_file(tmp_path / "a.json", atomic.json_bytes({"b": [1, 2]}))
    assert atomic.read_json(tmp_path / "a.json") == {"b": [1, 2]}


def test_new_folder_commits_what_verify_accepts(tmp_path):
    commit(tmp_path / "x", a="one", b="two")
    assert names(tmp_path) == ["x"]
    first = atomic.verify(tmp_path / "x")
    commit(tmp_path / "x", a="one", b="two")
    assert atomic.verify(tmp_path / "x") == first
    commit(tmp_path / "x", a="other")
    assert atomic.verify(tmp_path / "x") != first
    assert names(tmp_path / "x") == [atomic.MANIFEST, "a"]
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "no space")])
def test_a_failing_block_leaves_the_old_folder(tmp_path, error):
    commit(tmp_path / "x", a="one")
    before = atomic.verify(tmp_path / "x")
    with pytest.raises(ResourceError if isinstance(error, OSError) else type(error)):
        fail_inside(tmp_path / "x", error)
    assert atomic.verify(tmp_path / "x") == before
    assert names(tmp_path) == ["x"]


def fail_inside(path: Path, error: BaseException) -> None:
    with atomic.new_folder(path) as folder:
        (folder / "a").write_text("two")
        raise error


def test_an_input_that_cannot_be_read_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), atomic.new_folder(tmp_path / "x"):
        (tmp_path / "input.txt").read_text()
    assert names(tmp_path) == []


@pytest.mark.parametrize("which", [1, 2])
def test_a_failing_rename_brings_the_old_folder_back(tmp_path, monkeypatch, which):
    commit(tmp_path / "x", a="one")
    before = atomic.verify(tmp_path / "x")
    calls = []
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.is_dir():
            calls.append(self)
            if len(calls) == which:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ResourceError):
        commit(tmp_path / "x", a="two")
    assert atomic.verify(tmp_path / "x") == before
    assert names(tmp_path) == ["x"]


def test_a_folder_of_others_is_never_replaced_nor_worked_for(tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    (tmp_path / "documents.old").mkdir()
    with pytest.raises(ResourceError, match="will not replace it"), atomic.new_folder(tmp_path / "documents"):
        pytest.fail("the work must not begin")
    commit(tmp_path / "model", a="one")
    (tmp_path / "model.old").mkdir()
    commit(tmp_path / "model", a="two")
    atomic.recover(tmp_path / "model")
    assert names(tmp_path) == ["documents", "documents.old", "model", "model.old"]
    assert (tmp_path / "documents" / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_and_a_link_to_a_folder_may_be_filled(tmp_path):
    (tmp_path / "big" / "disk").mkdir(parents=True)
    (tmp_path / "x").symlink_to(tmp_path / "big" / "disk")
    for text in ("one", "two"):
        commit(tmp_path / "x", a=text)
        assert (tmp_path / "big" / "disk" / "a").read_text() == text
    assert (tmp_path / "x").is_symlink()
    assert names(tmp_path / "big") == ["disk"]


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ResourceError, match="a file stands"):
        commit(tmp_path / "x", a="one")
    assert (tmp_path / "x").read_text() == "mine"


def test_what_a_dead_process_of_our_number_left_is_no_obstacle(tmp_path):
    (tmp_path / f"x.tmp-{os.getpid()}").mkdir()
    (tmp_path / f"x.tmp-{os.getpid()}" / "junk").write_text("")
    commit(tmp_path / "x", a="one")
    assert names(tmp_path / "x") == [atomic.MANIFEST, "a"]


@pytest.mark.parametrize("name", ["x", "x [1]", "x*"])
def test_recover_brings_back_and_clears(tmp_path, name):
    path = tmp_path / name
    commit(path, a="one")
    path.rename(tmp_path / f"{name}.tmp-replaced")
    (tmp_path / f"{name}.tmp-77").mkdir()
    (tmp_path / f"{name}.tmp-78").write_text("")
    (tmp_path / f"{name}.tmp-notes").write_text("the user's own")
    atomic.recover(path)
    atomic.verify(path)
    assert names(tmp_path) == sorted([name, f"{name}.tmp-notes"])
    atomic.recover(path)
    atomic.recover(tmp_path / "absent")
    atomic.verify(path)


def test_remove_folder_and_what_its_death_leaves(tmp_path):
    commit(tmp_path / "x", a="one")
    atomic.remove_folder(tmp_path / "x")
    atomic.remove_folder(tmp_path / "x")
    assert names(tmp_path) == []


CHILD = """
import sys
from pathlib import Path
from encdec_cli import atomic
path = Path(sys.argv[1])
turn = 0
while True:
    turn += 1
    atomic.recover(path)
    with atomic.new_folder(path) as folder:
        for name in "abc":
            (folder / name).write_bytes(str(turn).encode() * 5000)
    if turn == 1:
        print("ready", flush=True)
"""


def test_killed_at_any_moment_the_folder_is_whole(tmp_path):
    path, chance = tmp_path / "x", random.Random(1)
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(chance.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        atomic.recover(path)
        atomic.verify(path)
        assert len({(path / name).read_bytes() for name in "abc"}) == 1
        assert names(tmp_path) == ["x"]


def test_a_file_size_limit_is_a_sentence_and_leaves_nothing(tmp_path):
    commit(tmp_path / "x", a="one")
    code = f"""
from pathlib import Path
from encdec_cli import atomic
from encdec_cli.errors import ResourceError
path = Path({str(tmp_path / "x")!r})
def fill():
    with atomic.new_folder(path) as folder:
        (folder / "a").write_bytes(bytes(200_000))
for write in (fill, lambda: atomic.write_file(path.with_name("y"), bytes(200_000))):
    try:
        write()
    except ResourceError as error:
        print(error)
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, check=True)
    assert done.stdout.count("disk full") == 2
    assert done.stderr == ""
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x" / "a").read_text() == "one"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="no permission to write"):
        commit(tmp_path / "x", a="one")
    with pytest.raises(ResourceError, match="no permission to write"):
        atomic.write_file(tmp_path / "y", b"")


def damage_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / atomic.MANIFEST).read_text())
    manifest["files"].update(changes)
    (folder / atomic.MANIFEST).write_text(json.dumps(manifest))


ENTRY = {"bytes": 0, "sha256": ""}
DAMAGES = {
    "truncated": lambda f: os.truncate(f / "a", 2),
    "longer": lambda f: (f / "a").write_text("one!"),
    "flipped": lambda f: (f / "a").write_text("onf"),
    "gone": lambda f: (f / "a").unlink(),
    "a folder": lambda f: ((f / "a").unlink(), (f / "a").mkdir()),
    "a link": lambda f: ((f / "a").rename(f / "c"), (f / "a").symlink_to("c")),
    "a loop": lambda f: ((f / "a").unlink(), (f / "a").symlink_to("a")),
    "no manifest": lambda f: (f / atomic.MANIFEST).unlink(),
    "manifest a pipe": lambda f: ((f / atomic.MANIFEST).unlink(), os.mkfifo(f / atomic.MANIFEST)),
    "manifest a folder": lambda f: ((f / atomic.MANIFEST).unlink(), (f / atomic.MANIFEST).mkdir()),
    "manifest cut": lambda f: os.truncate(f / atomic.MANIFEST, 20),
    "manifest a list": lambda f: (f / atomic.MANIFEST).write_text("[]"),
    "manifest deep": lambda f: (f / atomic.MANIFEST).write_text("[" * 100_000),
    "manifest bytes": lambda f: (f / atomic.MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "name out": lambda f: damage_manifest(f, **{"../a": ENTRY}),
    "name absolute": lambda f: damage_manifest(f, **{"/etc/passwd": ENTRY}),
    "name empty": lambda f: damage_manifest(f, **{"": ENTRY}),
    "name with NUL": lambda f: damage_manifest(f, **{"a\0b": ENTRY}),
    "name too long": lambda f: damage_manifest(f, **{"a" * 300: ENTRY}),
    "name surrogate": lambda f: damage_manifest(f, **{"\ud800": ENTRY}),
    "entry a number": lambda f: damage_manifest(f, a=3),
    "entry without hash": lambda f: damage_manifest(f, a={"bytes": 3}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_verify_names_what_is_damaged(tmp_path, damage):
    commit(tmp_path / "x", a="one", b="two")
    damage(tmp_path / "x")
    with pytest.raises(BundleError, match=str(tmp_path / "x")):
        atomic.verify(tmp_path / "x")


def test_every_flipped_bit_is_found(tmp_path):
    commit(tmp_path / "x", a="one two three")
    path = tmp_path / "x" / "a"
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(BundleError, match="SHA-256"):
            atomic.verify(tmp_path / "x")


def test_a_huge_json_file_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("")
    os.truncate(path, 65 << 20)
    with pytest.raises(EncdecError, match="larger than"):
        atomic.read_json(path)


def test_what_a_killed_process_left_goes_with_the_next_one_but_not_what_another_writes(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / f"x.tmp-{child.pid}").mkdir()
    with atomic.new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path) == ["x", f"x.tmp-{child.pid}"]
    child.communicate()
    with atomic.new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("2")
    assert names(tmp_path) == ["x"]
    # It died after it had moved the old folder away: the old one comes back if the next one fails too.
    (tmp_path / "x").rename(tmp_path / "x.tmp-replaced")
    with pytest.raises(KeyError), atomic.new_folder(tmp_path / "x"):
        raise KeyError
    assert (tmp_path / "x" / "a").read_text() == "2"
