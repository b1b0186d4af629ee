"""Shards: what goes in comes out, in any library; what is damaged is named and never a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli import atomic
from encdec_cli.data.shard import Side
from encdec_cli.data.store import Store, write_shards
from encdec_cli.errors import BundleError

SIDES = (Side(100, "a" * 64), Side(70_000, "b" * 64))
PAIRS = [([5, 6, 7], [69_999]), ([], [4, 5]), ([99], []), ([8] * 10, list(range(20)))]
SHARD = "train-00000.safetensors"


def same(store: Store, pairs: list[tuple[list[int], list[int]]]) -> None:
    assert len(store) == len(pairs)
    assert store.source_lengths.tolist() == [len(source) for source, _ in pairs]
    assert store.target_lengths.tolist() == [len(target) for _, target in pairs]
    for number, (source, target) in enumerate(pairs):
        assert [side.tokens.tolist() for side in store.gather([number])] == [source, target]


@pytest.mark.parametrize("shard_size", [1, 3, 4, 100])
def test_round_trip_over_any_number_of_shards(tmp_path, shard_size):
    write_shards(tmp_path, "train", iter(PAIRS), SIDES, shard_size)
    assert len(list(tmp_path.iterdir())) == -(-len(PAIRS) // shard_size)
    store = Store.open(tmp_path, "train")
    same(store, PAIRS)
    assert store.sides == SIDES
    assert [side.tokens.dtype for side in store.gather([0])] == [np.uint16, np.uint32]


lists = st.lists(st.integers(0, 99), max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(lists, lists), min_size=1, max_size=12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_gather_is_one_after_the_other(tmp_path_factory, pairs, shard_size, chance):
    folder = tmp_path_factory.mktemp("store")
    write_shards(folder, "valid", pairs, SIDES, shard_size)
    store = Store.open(folder, "valid")
    same(store, pairs)
    wanted = [chance.randrange(len(pairs)) for _ in range(chance.randrange(8))]
    source, target = store.gather(wanted)
    assert source.tokens.tolist() == [token for number in wanted for token in pairs[number][0]]
    assert source.lengths.tolist() == [len(pairs[number][0]) for number in wanted]
    assert target.tokens.tolist() == [token for number in wanted for token in pairs[number][1]]
    assert target.lengths.tolist() == [len(pairs[number][1]) for number in wanted]


def test_the_public_library_reads_our_shards(tmp_path):
    write_shards(tmp_path, "train", PAIRS, SIDES)
    tensors = safetensors.numpy.load_file(tmp_path / SHARD)
    assert tensors["source.offsets"].tolist() == [0, 3, 3, 4, 14]
    assert tensors["source.tokens"].tolist() == [5, 6, 7, 99, *[8] * 10]
    assert tensors["target.tokens"].tolist() == [69_999, 4, 5, *range(20)]


def test_an_absent_split_is_empty(tmp_path):
    write_shards(tmp_path, "train", [], SIDES)
    assert list(tmp_path.iterdir()) == []
    store = Store.open(tmp_path, "train")
    assert len(store) == 0
    source, target = store.gather([])
    assert source.tokens.size == target.lengths.size == 0


@pytest.mark.parametrize("index", [-1, 4])
def test_no_example_beyond_the_ends(tmp_path, index):
    write_shards(tmp_path, "train", PAIRS, SIDES, 3)
    store = Store.open(tmp_path, "train")
    with pytest.raises(IndexError):
        store.gather([0, index])


def test_the_content_hash_depends_on_content_and_order_alone(tmp_path):
    def content_hash(name: str, pairs: list[tuple[list[int], list[int]]], sides=SIDES, shard_size=100) -> str:
        (tmp_path / name).mkdir()
        return write_shards(tmp_path / name, "train", pairs, sides, shard_size)

    first = content_hash("a", PAIRS)
    assert content_hash("b", PAIRS, shard_size=2) == first
    assert content_hash("c", PAIRS, sides=(Side(70_000, ""), SIDES[1])) == first
    others = [PAIRS[::-1], PAIRS[:3], [([5, 6], [7]), ([], [])], [([5], [7]), ([6], [])], [([5, 6, 7], []), ([], [])]]
    hashes = {content_hash(f"d{number}", pairs) for number, pairs in enumerate(others)}
    assert len(hashes | {first}) == 6


def test_equal_data_gives_equal_bytes(tmp_path):
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.test_store import PAIRS, SIDES, write_shards
write_shards(Path({str(tmp_path)!r}), sys.argv[1], PAIRS, SIDES)
"""
    contents = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", code, "train"], check=True, env=environment, cwd=Path(__file__).parent.parent
        )
        contents.append((tmp_path / SHARD).read_bytes())
    assert contents[0] == contents[1]


def test_tokens_are_mapped_not_loaded(tmp_path):
    """A shard of 400 MB, most of it a hole in the file, opens in a process that may not have that much memory."""
    count, length = 1000, 100_000
    offsets = np.arange(count + 1, dtype=np.int64) * length
    header = {
        "__metadata__": {
            "format": "1", "split": "train", "count": str(count),
            "source.vocabulary": "9", "source.vocabulary.sha256": "", "target.vocabulary": "9",
            "target.vocabulary.sha256": "",
        }
    }  # fmt: skip
    begin = 0
    for name in ("source.offsets", "target.offsets", "source.tokens", "target.tokens"):
        dtype, size, items = ("I64", 8, count + 1) if name.endswith("offsets") else ("U16", 2, count * length)
        header[name] = {"dtype": dtype, "shape": [items], "data_offsets": [begin, begin + items * size]}
        begin += items * size
    text = json.dumps(header).encode()
    with (tmp_path / SHARD).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + offsets.tobytes() * 2)
        file.truncate(8 + len(text) + begin)
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import resource
from pathlib import Path
from encdec_cli.data.store import Store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = Store.open(Path({str(tmp_path)!r}), "train")
assert store.gather([500])[0].tokens.sum() == 0 and store.source_lengths.sum() == {count * length}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 20_000  # KiB


def parts(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(path: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def changed(change):
    def damage(path: Path) -> None:
        header, data = parts(path)
        result = change(header)
        put(path, header if result is None else result, data)

    return damage


def item(name: str, key: str, value: object):
    return changed(lambda header: header[name].__setitem__(key, value))


def offsets(name: str, values: list[int]):
    def damage(path: Path) -> None:
        header, data = parts(path)
        begin, end = header[f"{name}.offsets"]["data_offsets"]
        new = np.array(values, dtype="<i8").tobytes()
        assert len(new) == end - begin
        put(path, header, data[:begin] + new + data[end:])

    return damage


DAMAGES = {
    "empty": lambda p: os.truncate(p, 0),
    "seven bytes": lambda p: os.truncate(p, 7),
    "half a header": lambda p: os.truncate(p, 100),
    "one byte less": lambda p: os.truncate(p, p.stat().st_size - 1),
    "one byte more": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "header of 2^64-1": lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]),
    "header longer than allowed": lambda p: put(p, b" " * (17 << 20), b""),
    "header not JSON": lambda p: put(p, b"pickle", b""),
    "header deep": lambda p: put(p, b"[" * 100_000, b""),
    "header a list": lambda p: put(p, b"[]", b""),
    "header not UTF-8": lambda p: put(p, b'{"\xff": 1}', b""),
    "a key twice": changed(lambda h: json.dumps(h)[:-1].encode() + b', "source.tokens": 3}'),
    "a tensor more": changed(lambda h: h.__setitem__("../../etc/x", h["source.tokens"])),
    "a tensor less": changed(lambda h: h.__delitem__("source.tokens")),
    "no metadata": changed(lambda h: h.__delitem__("__metadata__")),
    "metadata a number": changed(lambda h: h.__setitem__("__metadata__", 3)),
    "another format": changed(lambda h: h["__metadata__"].__setitem__("format", "9")),
    "another split": changed(lambda h: h["__metadata__"].__setitem__("split", "test")),
    "another count": changed(lambda h: h["__metadata__"].__setitem__("count", "5")),
    "vocabulary not a number": changed(lambda h: h["__metadata__"].__setitem__("source.vocabulary", "x")),
    "entry a number": changed(lambda h: h.__setitem__("source.tokens", 3)),
    "dtype unknown": item("source.tokens", "dtype", "O"),
    "dtype a list": item("source.tokens", "dtype", ["U16"]),
    "dtype too wide": item("source.tokens", "dtype", "U32"),
    "offsets as floats": item("source.offsets", "dtype", "F64"),
    "shape of two": item("source.tokens", "shape", [7, 2]),
    "shape negative": item("source.tokens", "shape", [-14]),
    "shape true": item("source.tokens", "shape", [True]),
    "shape enormous": item("source.tokens", "shape", [10**30]),
    "place negative": item("source.tokens", "data_offsets", [-28, 0]),
    "place beyond the end": item("source.tokens", "data_offsets", [10**6, 10**6 + 28]),
    "overlap": item("source.tokens", "data_offsets", [0, 28]),
    "offsets from one": offsets("source", [1, 3, 3, 4, 14]),
    "offsets fall": offsets("source", [0, 4, 3, 4, 14]),
    "offsets overflow": offsets("source", [0, 2**63 - 1, -(2**63), 4, 14]),
    "offsets end early": offsets("target", [0, 1, 3, 3, 22]),
    "offsets end late": offsets("target", [0, 1, 3, 3, 10**9]),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_shard_is_named(tmp_path, damage):
    write_shards(tmp_path, "train", PAIRS, SIDES)
    damage(tmp_path / SHARD)
    with pytest.raises(BundleError, match=SHARD):
        Store.open(tmp_path, "train")


def test_a_missing_or_foreign_shard_is_named(tmp_path):
    write_shards(tmp_path, "train", PAIRS, SIDES, 1)
    (tmp_path / "train-00001.safetensors").rename(tmp_path / "kept")
    with pytest.raises(BundleError, match="shard 1 of 'train' is missing"):
        Store.open(tmp_path, "train")
    (tmp_path / "other").mkdir()
    write_shards(tmp_path / "other", "train", PAIRS, (Side(100, "c" * 64), SIDES[1]), 1)
    (tmp_path / "other" / "train-00001.safetensors").rename(tmp_path / "train-00001.safetensors")
    with pytest.raises(BundleError, match=r"train-00001\.safetensors: made with another vocabulary"):
        Store.open(tmp_path, "train")


def test_every_flipped_bit_is_found_by_the_manifest(tmp_path):
    with atomic.new_folder(tmp_path / "data") as folder:
        write_shards(folder, "train", PAIRS, SIDES)
    path = tmp_path / "data" / SHARD
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 23):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(BundleError, match=SHARD):
            atomic.verify(tmp_path / "data")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 10**6))
def test_whatever_the_bytes_opening_ends_in_a_store_or_a_sentence(tmp_path_factory, changes, cut):
    folder = tmp_path_factory.mktemp("fuzz")
    write_shards(folder, "train", PAIRS, SIDES)
    content = bytearray((folder / SHARD).read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    (folder / SHARD).write_bytes(content[: cut % len(content)] if cut % 3 == 0 else content)
    opened, message = None, SHARD
    try:
        opened = Store.open(folder, "train")
    except BundleError as error:
        message = str(error)
    assert SHARD in message
    if opened is not None:
        opened.gather(np.arange(len(opened)))
