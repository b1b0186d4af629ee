"""The loss of every one of the first updates is what it was when it was written down."""

from __future__ import annotations

import json

import pytest

from tests.conftest import copy_task
from tests.reliability.figures import GOLDEN, GOLDEN_RUN
from tests.trainers import losses


def test_the_losses_are_the_stored_ones(tmp_path):
    """To 1e-4, since kernels of other processors round otherwise; `python -m tests.reliability T25` has 1e-5."""
    found = losses(copy_task(tmp_path / "corpus", train=2000), tmp_path / "run", *GOLDEN_RUN)
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)
