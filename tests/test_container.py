"""Files of the safetensors format: the library's own bytes, without its copies."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli.bundle import tensors
from encdec_cli.errors import BundleError
from encdec_cli.training import memory

SHAPES = [(), (0,), (3,), (2, 0), (2, 3), (1, 2, 3)]
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


KINDS = sorted(tensors._DTYPES, key=str)
OF_ONE_WIDTH = (torch.uint8, torch.bfloat16, torch.float32, torch.int64)
"""Of types that are equally wide the library has an order of its own."""


@settings(deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(KINDS), st.sampled_from(SHAPES))))
def test_the_library_reads_what_is_written(tmp_path_factory, wanted):
    made = {name: torch.randn(shape).mul(9).abs().to(dtype) for name, (dtype, shape) in wanted.items()}
    path = tmp_path_factory.mktemp("made") / "file"
    file = tensors.container(made)
    file.write(path)
    read = safetensors.torch.load_file(path)
    assert read.keys() == made.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in made.items())
    assert path.stat().st_size == file.size
    if all(value.dtype in OF_ONE_WIDTH for value in made.values()):
        assert path.read_bytes() == safetensors.torch.save(made)


def test_what_the_format_has_no_name_for_is_told():
    with pytest.raises(BundleError, match=r"'odd' is of torch.complex64"):
        tensors.container({"odd": torch.zeros(1, dtype=torch.complex64)})


def test_what_is_not_contiguous_is_written_in_order(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors.container({"t": whole.T, "row": whole[1]}).write(tmp_path / "file")
    assert torch.equal(tensors.read_tensors(tmp_path / "file")["t"], whole.T)
    assert torch.equal(tensors.read_tensors(tmp_path / "file")["row"], whole[1])


def test_nothing_is_copied(tmp_path):
    state = {str(number): torch.ones(4 << 20) for number in range(4)}  # 64 MiB
    before = memory.reset_peak()
    if not before:
        pytest.skip("this system does not tell the peak of a process")
    tensors.container(state).write(tmp_path / "file")
    assert memory.peak_resident() - before < 8 << 20
