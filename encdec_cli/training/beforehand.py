"""What can be told of a run before any data is read: what its recipe asks for in vain."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from encdec_cli.errors import UsageError
from encdec_cli.recipe import Recipe
from encdec_cli.training.distributed import Ranks


def check(recipe: Recipe, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Raise UsageError for what the model cannot do, what is not installed, and updates that cannot be shared.

    `say` is given sentences for the user.
    """
    kind = recipe.model.cls
    if recipe.train.checkpointing and not kind.can_checkpoint:
        raise UsageError(
            f"train.checkpointing: this model ({kind.__name__}) cannot compute its layers again; set it to false."
        )
    parts, world = recipe.train.accumulate, ranks.world
    if parts < world or (parts % world and recipe.parallel.shard):
        raise UsageError(
            f"train.accumulate: {world} processes cannot share an update in {parts} part(s); it must be a multiple "
            f"of {world}, with a smaller train.tokens if the update is to stay as large as it was."
        )
    if recipe.train.tensorboard and find_spec("tensorboard") is None:
        raise UsageError("train.tensorboard: needs pip install 'encdec-cli[tensorboard]'; or set it to false.")
    if parts % world:
        say(f"note: {parts} micro-batches an update, {world} processes: some wait for the others")
