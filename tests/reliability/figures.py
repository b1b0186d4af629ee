"""The order of examples, numbers that are not finite, memory that is not enough, and the stored curve."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from encdec_cli.bundle import checkpoint
from encdec_cli.data.sampler import Sampler
from encdec_cli.errors import NonFiniteError
from encdec_cli.training.distributed import Ranks
from tests.conftest import environment
from tests.reliability.bench import Bench
from tests.reliability.crashes import Result
from tests.test_memory import LIMITED
from tests.test_nonfinite import SMALL, equal, masters, poisoned
from tests.trainers import ignore, losses, trainer

GOLDEN = Path(__file__).parent / "golden.json"


def order(bench: Bench) -> Iterator[Result]:
    """T16: one order of examples, whatever the number of ranks, and resumed after every update."""
    random = np.random.default_rng(bench.seed)
    lengths = random.integers(1, 40, 3000), random.integers(1, 40, 3000)
    make = lambda: Sampler(*lengths, 512, "hash", 1)  # noqa: E731
    batches = make().batches(0) + make().batches(1)
    wanted = hashlib.sha256(np.concatenate(batches[:240]).tobytes()).hexdigest()
    once = np.sort(np.concatenate(make().batches(0))).tolist() == list(range(3000))
    yield "every example once an epoch", None if once else "not so"
    for world, resumed in bench.some(list(itertools.product((1, 2, 4), range(40)))):
        found: list[np.ndarray] = []
        updates = [make().updates(0, 4) for _ in range(world)]
        for step in range(60):
            if step == resumed:  # as a new process does: from the number of updates alone
                updates = [make().updates(step, 4) for _ in range(world)]
            parts = {}
            for rank, update in enumerate(map(next, updates)):
                parts |= {number: update[number] for number in Ranks(rank, world).share(range(4))}
            found += [parts[number] for number in range(4)]
        same = hashlib.sha256(np.concatenate(found).tobytes()).hexdigest() == wanted
        yield f"{world} ranks, resumed after {resumed} updates", None if same else "another order"


def non_finite(bench: Bench) -> Iterator[Result]:
    """T23: a loss or a gradient that is not finite, at ten updates: nothing of it reaches the weights."""
    words = (*SMALL, "train.save_every=1", "train.keep=99")
    clean = trainer(bench.recipe, bench.new(), *words)
    clean.run(ignore)
    kinds = [(math.nan, True), (math.nan, False), (math.inf, True), (math.inf, False), (-math.inf, False)]
    for step, (value, in_loss) in bench.some(list(itertools.product((1, 2, 3, 4, 6, 7, 9, 11, 13, 14), kinds))):
        made = poisoned(trainer(bench.recipe, bench.new(), *words), {step}, value, in_loss)
        wrong = "did not stop"
        try:
            made.run(ignore)
        except NonFiniteError as error:
            newest = max(checkpoint.steps(made.checkpoints), default=0)
            good = newest == step - 1 and (not newest or equal(masters(made, newest), masters(clean, newest)))
            wrong = "" if good and f"update {step}:" in str(error) else f"update {newest} is saved: {error}"
        yield f"{value} in the {'loss' if in_loss else 'gradient'} of update {step}", wrong or None


def memory(_: Bench) -> Iterator[Result]:
    """T24: a batch whose activations take more memory than the process may have."""
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    good = done.returncode == 0 and "computed in halves" in done.stdout and done.stdout.endswith("True\n")
    yield "300 MB for a batch of more than a gigabyte", None if good else done.stderr[-300:] + done.stdout[-300:]


def golden(bench: Bench) -> Iterator[Result]:
    """T25: the loss of each of the first updates is the stored one, to 1e-5."""
    wanted = json.loads(GOLDEN.read_text())
    seen = losses(bench.recipe, bench.new(), *GOLDEN_RUN)
    for step, (found, stored) in enumerate(zip(seen, wanted, strict=True), 1):
        yield f"update {step}", None if abs(found / stored - 1) < 1e-5 else f"{found}, stored {stored}"


# Without dropout: what it draws depends on whether padding is computed, and that on the processor.
GOLDEN_RUN = ("train.steps=20", "train.validate_every=0", "train.tokens=256", "model.dropout=0")
