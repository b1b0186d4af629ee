"""The plain side of the benchmark is the same model and the same search as ours, written independently."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .plain import BOS, EOS, beam_search
from .speed import equal_outputs, generation_variants, our_model, plain_model, synthetic
from .training_engines import micro_batches

VOCAB = 60


def test_the_plain_model_with_our_weights_gives_our_logits() -> None:
    ours, plain = our_model(VOCAB).eval(), plain_model(VOCAB).eval()
    torch.manual_seed(2)
    source, target = torch.randint(4, VOCAB, (3, 9)), torch.randint(4, VOCAB, (3, 7))
    source[0, 6:] = 0
    with torch.no_grad():
        expected = ours.project(ours(source, source != 0, target))
        torch.testing.assert_close(plain(source, target), expected, rtol=1e-4, atol=1e-4)


def test_all_searches_write_the_same_outputs() -> None:
    variants, outputs = generation_variants(synthetic(12, VOCAB), sentences=12, batch=5, beam=3)
    for variant in variants:
        if variant.name != "ours, auto":
            assert variant.run() == 12
    assert outputs["ours, fp32"] == outputs["textbook cache, fp32"] == outputs["no cache, fp32"]
    assert "ours, fp32 12" in equal_outputs(outputs)


class Table:
    """A decoder whose next token depends on the last one only."""

    def __init__(self, seed: int) -> None:
        self.logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)) * 2

    def step(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens[:, -1]]

    def reorder(self, rows: Tensor) -> None:
        pass


def exhaustive(table: Table, maximum: int) -> list[int]:
    """The ended output over the words 4 and 5 with the highest log-probability / length, EOS counted."""
    log_probs = table.logits.log_softmax(dim=1)

    def score(words: tuple[int, ...]) -> float:
        path = (BOS, *words, EOS)
        return sum(float(log_probs[a, b]) for a, b in itertools.pairwise(path)) / (len(path) - 1)

    return list(max((w for n in range(maximum + 1) for w in itertools.product((4, 5), repeat=n)), key=score))


def test_the_plain_search_with_a_huge_beam_is_exhaustive() -> None:
    lengths = set()
    for seed in range(20):
        table = Table(seed)
        (found,) = beam_search(table, 1, 16, [3])
        assert found == exhaustive(table, 3)
        lengths.add(len(found))
    assert lengths == {0, 1, 2, 3}


def run(module: str, options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{module}", *options.split()],
        cwd=Path(__file__).parent.parent.parent,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_command_prints_a_table_of_searches() -> None:
    found = run("speed", "--vocabulary 60 --sentences 4 --batch 4 --beam 2 --repetitions 1")
    assert "\nbeam 2\n" in found
    assert "textbook cache, fp32" in found


@pytest.mark.slow
def test_every_tool_trains_on_the_same_tokens() -> None:
    found = run("training", "--vocabulary 60 --pairs 24 --tokens 200 --repetitions 1 --cores 1")
    tokens = sum(len(target) + 1 for target in synthetic(24, 60).targets)
    assert f"24 pairs, {tokens} target tokens" in found
    rows = [line.split("  ")[0] for line in found.splitlines()[2:]]
    assert rows[:3] == ["encdec, bf16", "encdec, fp32", "nn.Transformer, shuffled batches, fp32"]


def test_an_epoch_of_each_loop_is_all_pairs_once() -> None:
    pairs, seen = synthetic(30, VOCAB), []
    for batch in micro_batches(pairs, 100, 1):
        seen += [tuple(row[row != 0].tolist()) for row in batch.known_target]
    assert sorted(seen) == sorted((BOS, *target.tolist(), EOS) for target in pairs.targets)
