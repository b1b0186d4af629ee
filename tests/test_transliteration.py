"""A real pretrained model of CTranslate2's own tests: our searches write its expected tokens with its expected scores.

ENCDEC_BENCHMARKS names a folder that holds models/aren-transliteration: model.bin and the two vocabularies as they lie
in https://github.com/OpenNMT/CTranslate2, tests/data/models/v2, and expected.jsonl, what CTranslate2 4.8 makes of 67
words: greedily and with a beam of 4.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from encdec_cli.decoding.beam import Beam
from encdec_cli.decoding.force import as_targets, score_targets
from encdec_cli.decoding.hypothesis import Hypothesis
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.models.transformer import Transformer
from encdec_cli.text.vocabulary import SPECIAL
from tests.scripted import bounds, pad

FOLDER = Path(os.environ.get("ENCDEC_BENCHMARKS", "")) / "models" / "aren-transliteration"
pytestmark = pytest.mark.skipif(
    not os.environ.get("ENCDEC_BENCHMARKS") or not FOLDER.is_dir(),
    reason="set ENCDEC_BENCHMARKS to a folder that holds models/aren-transliteration",
)
LAYERS, DIM, LONGEST = 6, 32, 64
THEIRS = {
    "attention.joined": "self_attention/linear_0",
    "attention.output": "self_attention/linear_1",
    "attention_residual.norm": "self_attention/layer_norm",
    "cross.query": "attention/linear_0",
    "cross.joined": "attention/linear_1",
    "cross.output": "attention/linear_2",
    "cross_residual.norm": "attention/layer_norm",
    "feed_forward.inner": "ffn/linear_0",
    "feed_forward.outer": "ffn/linear_1",
    "feed_forward_residual.norm": "ffn/layer_norm",
}


class Biased(Transformer):
    """Our Transformer with a bias on the logits, which theirs has."""

    bias: Tensor

    def project(self, hidden: Tensor) -> Tensor:
        return super().project(hidden) + self.bias


def read_variables(path: Path) -> dict[str, Tensor]:
    """The tensors of a model in CTranslate2's binary format, version 2, all float32."""
    data, at, found = path.read_bytes(), 0, {}

    def take(kind: str) -> int:
        nonlocal at
        at += struct.calcsize(f"<{kind}")
        return struct.unpack_from(f"<{kind}", data, at - struct.calcsize(f"<{kind}"))[0]

    def text() -> str:
        nonlocal at
        length = take("H")  # with a NUL at the end
        at += length
        return data[at - length : at - 1].decode()

    assert (take("I"), text(), take("I")) == (2, "TransformerBase", 2)
    for _ in range(take("I")):
        name, shape = text(), [take("I") for _ in range(take("B"))]
        assert take("B") == 4  # bytes of an item
        count = take("I")
        found[name] = torch.from_numpy(np.frombuffer(data, "<f4", count, at).reshape(shape).copy())
        at += 4 * count
    assert at == len(data)
    return found


def their_name(name: str) -> str:
    """What CTranslate2 calls a parameter of ours."""
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(.+)", module)
    if layer:
        path = f"{layer[1]}/layer_{layer[2]}/{THEIRS[layer[3]]}"
    else:
        side, _, what = module.partition("_")
        path = f"{side}/layer_norm" if what == "norm" else "decoder/projection"
    norm = {"weight": "gamma", "bias": "beta"}
    return f"{path}/{norm[kind] if path.endswith('layer_norm') else kind}"


def in_our_order(rows: Tensor) -> Tensor:
    """Rows of theirs, <blank> <s> </s> … and last <unk>, as <pad> <unk> <s> </s> …"""
    return torch.cat((rows[:1], rows[-1:], rows[1:-1]))


def positions() -> Tensor:
    """CTranslate2's table: sines, then cosines; the first position is 1."""
    rates = 10_000 ** -torch.linspace(0, 1, DIM // 2, dtype=torch.float64)
    angles = torch.arange(1, LONGEST + 1)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1).float()


@pytest.fixture(scope="module")
def model() -> Transformer:
    theirs = read_variables(FOLDER / "model.bin")
    config = Transformer.Config(
        encoder_layers=LAYERS, decoder_layers=LAYERS, d_model=DIM, heads=8, feed_forward=128, dropout=0.0,
        positions="learned", max_positions=LONGEST, tie="none",
    )  # fmt: skip
    sizes = [len(vocabulary(side)) for side in ("source", "target")]
    ours = Biased(config, *sizes).eval()
    ours.bias = in_our_order(theirs.pop("decoder/projection/bias"))
    state = {}
    for name in ours.state_dict():
        if "positions" in name:
            state[name] = positions()
        elif "embedding" in name:
            side = "encoder" if name.startswith("source") else "decoder"
            state[name] = in_our_order(theirs.pop(f"{side}/embeddings/weight"))
        else:
            state[name] = theirs.pop(their_name(name))
            if name.startswith("output"):
                state[name] = in_our_order(state[name])
    assert not theirs, "every tensor of theirs has a place"
    ours.load_state_dict(state)
    return ours


def vocabulary(side: str) -> list[str]:
    """Their tokens by our ids."""
    blank, bos, eos, *rest = (FOLDER / f"{side}_vocabulary.txt").read_text().rstrip("\n").split("\n")
    assert (blank, bos, eos) == ("<blank>", "<s>", "</s>")
    return [*SPECIAL, *rest]


@pytest.fixture(scope="module")
def expected() -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "expected.jsonl").read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def sources(expected) -> tuple[Tensor, Tensor]:
    ids = {token: number for number, token in enumerate(vocabulary("source"))}
    return pad([[ids[token] for token in entry["src"]] for entry in expected])


def search(model: Transformer, sources: tuple[Tensor, Tensor], strategy: Beam) -> list[list[Hypothesis]]:
    stepper = Stepper([model], *sources, strategy.rows)
    return strategy(stepper, bounds(len(sources[0]), LONGEST - 1), [])


def texts(found: list[Hypothesis]) -> list[list[str]]:
    names = vocabulary("target")
    return [[names[token] for token in one.tokens] for one in found]


def test_greedy_tokens_and_the_score_of_each(model, sources, expected):
    found = search(model, sources, Beam(beam=1, length_penalty=0.0))
    assert len(expected) == 67
    for (one,), entry in zip(found, expected, strict=True):
        assert texts([one]) == [entry["greedy"][0]["tokens"]]
        assert one.token_scores == pytest.approx(entry["greedy_logprobs"], abs=1e-5)
        # What CTranslate2 says while it searches is up to 9e-4 beside what it says when it scores the same tokens.
        assert one.score == pytest.approx(entry["greedy"][0]["score"], abs=1e-3)


def test_a_beam_of_four_and_all_its_scores(model, sources, expected):
    found = search(model, sources, Beam(beam=4, length_penalty=1.0))
    for some, entry in zip(found, expected, strict=True):
        assert texts(some) == [one["tokens"] for one in entry["beam4"]]
        assert [one.score for one in some] == pytest.approx([one["score"] for one in entry["beam4"]], abs=3e-4)


def test_teacher_forcing_gives_the_scores_too(model, sources, expected):
    found = search(model, sources, Beam(beam=1, length_penalty=0.0))
    scores = score_targets([model], *sources, as_targets(found, 1, torch.device("cpu")))
    for row, entry in zip(scores.tolist(), expected, strict=True):
        assert row[: len(entry["greedy_logprobs"])] == pytest.approx(entry["greedy_logprobs"], abs=1e-5)
