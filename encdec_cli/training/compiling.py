"""`train.compile`: layers and loss as torch's compiler makes them, where that pays."""

from __future__ import annotations

import os
import shutil

import torch

from encdec_cli.errors import UsageError
from encdec_cli.models.model import Model
from encdec_cli.recipe import Recipe

MANY = 1000
"""Updates from which on `auto` compiles: it takes about half a minute, and saves a quarter of each update."""


def compiles(recipe: Recipe, model: Model, device: str) -> bool:
    """Return what `train.compile` comes to. Raises UsageError where it is true and cannot be done.

    `auto` depends on the recipe and the machine alone, so that a run that goes on does what it did before. On a CPU it
    does not pay: 3 + 3 layers of width 256 trained at 0.63 (bf16) and 0.84 (fp32) of the speed without it, since our
    dropout and our products are faster than those that the compiler makes. With shares of a model `auto` compiles
    nothing: whether it pays there has not been measured.
    """
    wanted, shared = recipe.train.compile, recipe.parallel.shard or recipe.parallel.tensor > 1
    if wanted == "auto":
        pays = torch.device(device).type == "cuda" and recipe.train.steps >= MANY
        return pays and model.can_compile and not shared and _has_compiler()
    if wanted and not model.can_compile:
        raise UsageError(f"train.compile: this model ({type(model).__name__}) cannot be compiled; set it to false.")
    if wanted and recipe.parallel.tensor > 1:
        raise UsageError("train.compile: parts of layers are summed outside the compiler; set it to false.")
    return bool(wanted)


def _has_compiler() -> bool:
    from torch.utils._triton import has_triton  # noqa: PLC0415 - it imports the compiler

    return bool(has_triton()) and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
