"""Processes that share every layer: together they compute, learn, save and go on as one does."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encdec_cli.bundle import checkpoint
from encdec_cli.bundle.tensors import container, read_pieces
from encdec_cli.errors import BundleError, UsageError
from encdec_cli.models.dropout import drawing
from encdec_cli.models.parts import Cut, Part, Piece, parts_of
from encdec_cli.models.transformer import Transformer
from encdec_cli.testing import LawError, check
from encdec_cli.testing.parts import in_parts
from tests.conftest import log_lines
from tests.test_beforehand import told
from tests.test_distributed import NO_FAULT, faulty, lose, trained

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
SMALL = (
    *("train.precision=fp32", "train.steps=6", "train.save_every=3", "train.validate_every=6", "train.log_every=1"),
    *(
        "train.accumulate=2",
        "train.ema=0.9",
        "model.heads=4",
        "model.attention_dropout=0.1",
        "model.activation_dropout=0.1",
    ),
)
SHARED = "parallel.tensor=2"
ROWS = ("parallel.shard=true",)


IMPORTS = ["encdec_cli.training.tensor_parallel"]
"""What commands are to have imported, ready to share layers: it takes seconds."""


def learned(model: Transformer) -> dict[str, Tensor]:
    """The states of two sentences, and the gradient of a loss by every parameter."""
    source, target = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 0]]), torch.tensor([[2, 5, 6], [2, 9, 4]])
    with drawing(3):
        hidden = model(source, source > 0, target)
        model.project(hidden.flatten(0, 1)).log_softmax(-1)[:, 3].sum().backward()
    return {"hidden": hidden.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"activation": "swiglu", "norm": "rms", "positions": "rotary", "bias": False, "norm_order": "post"},
        {"activation": "gelu", "tie": "none", "positions": "learned"},
    ],
)
@pytest.mark.parametrize("places", [2, 4])
def test_the_parts_of_a_transformer_compute_what_the_whole_does_dropout_included(places, kind, checkpointing):
    torch.manual_seed(1)
    dropout = {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.2}
    whole = Transformer(Transformer.Config(2, 2, 32, 4, 64, **dropout, **kind), 20, 20)
    whole.checkpointing = checkpointing
    expected = learned(copy.deepcopy(whole))
    found = in_parts(whole, places, learned)
    parts = parts_of(found[0][0])
    assert len(parts) == (22 if kind.get("bias") is False else 34)  # 22 maps; of 12 of them the bias too
    for name, value in expected.items():
        own = [one[name] for _, one in found]
        if name in parts:
            own = [parts[name][0].joined(own)]
        assert all(torch.equal(one, own[0]) for one in own)
        torch.testing.assert_close(own[0], value, **ROUNDING)


def test_a_model_that_is_divided_wrongly_breaks_a_law():
    class Wrong(Transformer):
        def divide(self, part: Part) -> None:
            self.decoder_norm.bias.data += part.place

    with pytest.raises(LawError, match="the states must be those of one process where two share the layers"):
        check(Wrong)


LAYOUTS = st.tuples(st.sampled_from([None, Cut(0), Cut(0, 3), Cut(1)]), st.integers(1, 3), st.integers(1, 3))
"""How a matrix is cut, in how many parts, and in how many shares of rows each of them."""


def pieces(layout) -> list[Piece]:
    """What each process has of a matrix of 18 rows and 6 columns."""
    cut, places, shares = layout
    found = []
    for place in range(places if cut else 1):
        part = Part(place, places, id)
        piece = cut.piece(cut.of(torch.empty(18, 6), part).shape, part) if cut else Piece.whole((18, 6))
        most = -(-piece.size[0] // shares)
        found += [piece.narrow(0, most * share, most * (share + 1)) for share in range(shares)]
    return found


@settings(max_examples=60, deadline=None)
@given(LAYOUTS, LAYOUTS)
def test_pieces_are_found_in_however_many_files_by_however_many_readers(writers, readers):
    whole, scalar = torch.arange(108.0).view(18, 6), torch.tensor(7)
    rows, columns = (torch.arange(size) for size in whole.shape)

    def taken(piece: Piece) -> Tensor:
        by_row, by_column = (
            torch.cat([index[begin:end] for begin, end in spans] or [index[:0]])
            for index, spans in zip((rows, columns), piece.spans, strict=True)
        )
        return whole[by_row][:, by_column]

    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, piece in enumerate(pieces(writers)):
            paths.append(Path(folder) / f"{number}.safetensors")
            once = {"step": scalar, "same": whole} if number == 0 else {}
            container({"w": taken(piece), **once}, {"w": piece}).write(paths[-1])
        for piece in pieces(readers):
            found = read_pieces(paths, {"w": piece})
            assert torch.equal(found["w"], taken(piece))
            assert torch.equal(found["same"], whole)
            assert found["step"] == 7
        assert torch.equal(read_pieces(paths)["w"], whole)
        if len(paths) > 1 and paths[-1].stat().st_size > paths[0].stat().st_size // 2 and len(pieces(writers)) > 1:
            last = pieces(writers)[-1]
            if 0 not in last.size:
                with pytest.raises(BundleError, match="'w' do not make a whole"):
                    read_pieces(paths[:-1])


def state(run: Path) -> dict[str, Tensor]:
    """The newest checkpoint, put together."""
    return checkpoint.read(run / "checkpoints", max(checkpoint.steps(run / "checkpoints"))).tensors


@pytest.fixture(scope="module")
def one(forks, corpus, tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    trained(forks, 1, corpus, *SMALL, "--output", run)
    return run


@pytest.fixture(scope="module")
def two(forks, corpus, tmp_path_factory):
    """The run of two that share every layer."""
    run = tmp_path_factory.mktemp("two") / "run"
    told = trained(forks, 2, corpus, *SMALL, SHARED, "--output", run)
    assert told[1].stderr == ""
    return run


def assert_close(run: Path, other: Path) -> None:
    """Assert that two runs have come to the same state, but for rounding."""
    ours, theirs = state(run), state(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Attention does not change with a bias of the keys: its gradient is rounding alone, which Adam makes large.
        if not name.endswith("joined.bias"):
            torch.testing.assert_close(value, theirs[name], **ROUNDING)
    bundle = safetensors.torch.load_file(run / "bundle" / "model.safetensors")
    assert all(torch.equal(w, ours[f"ema.{name}"]) for name, w in bundle.items())


def assert_alike(run: Path, other: Path) -> None:
    """Assert that two runs have come to the same state, but for rounding, and think the same of their models."""
    assert_close(run, other)
    for line, expected in zip(log_lines(run), log_lines(other), strict=True):
        assert (line["event"], line.get("order")) == (expected["event"], expected.get("order"))
        for key in ("loss", "norm", "exact", "tokens", "flops"):
            assert line.get(key, 0) == pytest.approx(expected.get(key, 0), rel=1e-5)


def test_processes_that_share_layers_learn_what_one_learns(one, two):
    assert_alike(two, one)
    first, second = map(safetensors.torch.load_file, sorted(max((two / "checkpoints").iterdir()).glob("state*")))
    for name, whole in state(two).items():  # nobody wrote what another has
        cut = any(word in name for word in ("joined", "query", "inner", "output.weight", "outer.weight"))
        assert (name in second) == cut
        assert first[name].numel() == whole.numel() / (2 if cut else 1)


@pytest.mark.parametrize(
    ("options", "files"), [(["train.checkpointing=true"], 2), pytest.param(ROWS, 4, marks=pytest.mark.slow)]
)
def test_groups_of_them_share_an_update_and_the_rows_of_their_parts(forks, one, corpus, tmp_path, options, files):
    run = tmp_path / "run"
    trained(forks, 4, corpus, *SMALL, SHARED, *options, "--output", run)
    assert_close(run, one)
    found = list(max((run / "checkpoints").iterdir()).glob("state*"))
    assert len(found) == files
    sizes = [sum(map(Tensor.numel, safetensors.torch.load_file(path).values())) for path in found]
    assert sum(sizes) == sum(map(Tensor.numel, state(run).values()))  # each number once


FOUR = ("parallel.tensor=4",)
READERS = [
    [(4, (SHARED, *ROWS), 2), (1, (), 6)],
    pytest.param([(1, (), 1), (2, (SHARED,), 2), (4, (SHARED, *ROWS), 3), (4, FOUR, 6)], marks=pytest.mark.slow),
    pytest.param([(4, FOUR, 2), (4, (SHARED,), 3), (2, ROWS, 4), (2, (SHARED,), 6)], marks=pytest.mark.slow),
]
"""How many processes go on with a run, what they share, and to which update."""


@pytest.mark.parametrize("readers", READERS)
def test_a_checkpoint_is_read_by_any_number_of_them(forks, one, corpus, tmp_path, readers):
    before = None
    for world, keys, steps in readers:
        options = (*SMALL, *keys, f"train.steps={steps}", "--output", tmp_path / "run")
        said = trained(forks, world, corpus, *options)[0].stderr
        tensor = int(keys[0][-1]) if "parallel.tensor" in "".join(keys) else 1
        if before not in (None, tensor):
            note = f"parallel.tensor was {before}, is now {tensor}; the weights will not be bit-identical"
            assert note in said
        before = tensor
    assert_close(tmp_path / "run", one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [["teacher.model={one}"], ["risk={metric: chrf, weight: 0.5}", "train.tokens=64", "--init-from", "{one}"]]
)
def test_a_teacher_and_minimum_risk_serve_them_too(forks, one, corpus, tmp_path, keys):
    options = (corpus, *SMALL, *(key.replace("{one}", str(one)) for key in keys), "--output")
    trained(forks, 1, *options, tmp_path / "alone")
    trained(forks, 2, *options, tmp_path / "two", SHARED)
    assert_close(tmp_path / "two", tmp_path / "alone")
    trained(forks, 4, *options, tmp_path / "four", SHARED, *ROWS)
    assert_close(tmp_path / "four", tmp_path / "alone")


def test_one_of_them_killed_is_named_and_the_run_goes_on_to_the_bit(forks, two, corpus, tmp_path):
    options = (faulty(corpus, tmp_path), *SMALL, SHARED, "parallel.timeout=2", "--output", tmp_path / "run")
    lose(forks, options, "1:update:9:kill")  # in the fifth update: each computes both micro-batches
    trained(forks, 2, *options, FAULT=NO_FAULT)
    ours, theirs = state(tmp_path / "run"), state(two)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


WHOLE = """
from encdec_cli.models.transformer import Transformer
from encdec_cli.registry import models


@models.register("whole")
class Whole(Transformer):
    can_divide = False
"""


@pytest.mark.parametrize(
    ("keys", "world", "message"),
    [
        (["parallel.tensor=2"], 1, r"parallel.tensor: 1 process\(es\) cannot form groups of 2; start a multiple of 2"),
        (["parallel.tensor=2"], 3, r"parallel.tensor: 3 process\(es\) cannot form groups of 2"),
        (["parallel.tensor=4"], 4, "parallel.tensor: 4 processes cannot share 2 heads equally"),
        (["parallel.tensor=2", "model.feed_forward=63"], 2, "cannot share 63 columns of feed_forward equally"),
        (["parallel.tensor=2"], 4, "train.accumulate: 2 groups of 2 processes cannot share an update in 1 part"),
        (["parallel.tensor=2", "train.accumulate=3"], 4, "it must be a multiple of 2"),
        (["parallel.tensor=2", "train.optimizer=muon"], 2, "parallel.tensor: train.optimizer=muon cannot"),
        (
            ["parallel.tensor=2", "guide.weight=0.1", "lora.rank=2"],
            2,
            "parallel.tensor: lora.rank, guide.weight cannot",
        ),
        (["parallel.tensor=2", "train.compile=true"], 2, "train.compile: parts of layers are summed"),
        (
            ["parallel.tensor=2", "plugins=[whole.py]", "model={name: whole}"],
            2,
            r"this model \(Whole\) does not say how its layers are shared",
        ),
    ],
)
def test_what_cannot_be_shared_is_told_before_any_data_is_read(tmp_path, keys, world, message):
    (tmp_path / "whole.py").write_text(WHOLE)
    with pytest.raises(UsageError, match=message):
        told(tmp_path, *keys, world=world, starts=True)
