"""On a GPU: the same numbers, the same bytes, the same outputs. Skipped where there is none."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest
import torch

from encdec_cli.models.dropout import dropout, dropout_of_part
from encdec_cli.models.parts import Part
from encdec_cli.training.largest import need
from encdec_cli.training.machine import add_in_order
from tests.conftest import copy_task, encdec, start
from tests.trainers import ignore, losses, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA")

BIGGER = ("model.d_model=256", "model.feed_forward=1024", "model.heads=4", "train.tokens=8192", "text.vocabulary=40")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_the_losses_are_those_of_a_cpu(optimizer, tmp_path):
    options = ("model.dropout=0.0", "train.steps=20", "train.validate_every=0", f"train.optimizer={optimizer}")
    copies = copy_task(tmp_path / "corpus")
    cpu, gpu = (losses(copies, tmp_path / device, *options, device=device) for device in ("cpu", "cuda"))
    assert gpu == pytest.approx(cpu, rel=2e-3)


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
def test_compiled_layers_give_the_same_losses(positions, tmp_path):
    options = ("model.dropout=0.0", "train.steps=20", "train.validate_every=0", f"model.positions={positions}")
    copies = copy_task(tmp_path / "corpus")
    plain = losses(copies, tmp_path / "plain", *options, device="cuda")
    compiled = losses(copies, tmp_path / "compiled", *options, "train.compile=true", device="cuda")
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_parts_of_a_layer_draw_apart_and_then_on_together():
    x, draws = torch.ones(1000, device="cuda"), []
    for place in range(2):
        torch.manual_seed(1)
        draws.append((dropout_of_part(x, 0.5, Part(place, 2, id), 0), dropout(x, 0.5)))
    assert not torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])


def weights(run: Path) -> str:
    return hashlib.sha256((run / "bundle" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("compile_", ["false", "true"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(precision, compile_, tmp_path):
    recipe = copy_task(tmp_path / "corpus")
    options = ("--device", "cuda", "train.steps=60", f"train.precision={precision}", f"train.compile={compile_}")
    options = (*options, "model.attention_dropout=0.1")
    whole = encdec("train", recipe, "--output", tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    process = start("train", recipe, "--output", tmp_path / "cut", *options)
    while not list((tmp_path / "cut").glob("checkpoints/*/MANIFEST.json")) and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = encdec("train", recipe, "--output", tmp_path / "cut", *options)
    assert again.returncode == 0, again.stderr
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        ("--beam", "1"),
        ("--beam", "5", "--n-best", "3"),
        ("--strategy", "sampling,seed=3"),
        ("--strategy", "diverse"),
        ("--strategy", "contrastive"),
        ("--strategy", "constrained"),
        ("--beam", "4", "--rerank", "mbr", "--n-best", "2"),
    ],
)
def test_a_gpu_writes_what_a_cpu_writes(options, copy_run):
    lines = "".join(f"{' '.join(str(n * k % 10) for k in range(1 + n % 6))}\n" for n in range(60))
    done = [encdec("generate", "--model", copy_run, *options, "--device", d, stdin=lines) for d in ("cpu", "cuda")]
    assert all(each.returncode == 0 for each in done), done[1].stderr
    cpu, gpu = (each.stdout.split("\n") for each in done)
    assert sum(a != b for a, b in zip(cpu, gpu, strict=True)) <= len(cpu) // 50


def test_scores_and_evaluation_run_on_a_gpu(copy_run):
    scored = encdec("generate", "--model", copy_run, "--score", "--device", "cuda", stdin="1 2 3\t1 2 3\n")
    assert scored.returncode == 0, scored.stderr
    judged = encdec("evaluate", "--model", copy_run, "--metric", "exact", "--device", "cuda", "--score-only")
    assert judged.returncode == 0, judged.stderr
    assert float(judged.stdout) > 90


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_memory_is_as_predicted(checkpointing, tmp_path):
    recipe = copy_task(tmp_path / "corpus", train=6000)
    options = (*BIGGER, "train.steps=4", "train.validate_every=0", f"train.checkpointing={checkpointing}")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    made = trainer(recipe, tmp_path / "run", *options, device="cuda")
    predicted = need(made).total
    torch.cuda.reset_peak_memory_stats()
    made.run(ignore)
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


def test_what_does_not_fit_is_computed_in_halves(tmp_path):
    recipe, said = copy_task(tmp_path / "corpus", train=6000), []
    options = (*BIGGER, "model.d_model=512", "train.steps=2", "train.validate_every=0", "train.tokens=16384")
    made = trainer(recipe, tmp_path / "run", *options, device="cuda", say=said.append)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (200 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        made.run(ignore)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("computed in halves" in sentence for sentence in said), said


def test_sums_are_added_in_one_order():
    add_in_order("cuda")
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
