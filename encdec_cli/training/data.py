"""The prepared data of a run: made if it is absent or stale, else opened and checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from encdec_cli import atomic
from encdec_cli.bundle.run import data_folder
from encdec_cli.corpora.synthetic import Synthetic
from encdec_cli.data.prepare import Prepared, is_current, prepare
from encdec_cli.errors import UsageError
from encdec_cli.recipe import DATA_SECTIONS, Recipe, fingerprint

if TYPE_CHECKING:
    from encdec_cli.models.model import Model
    from encdec_cli.training.distributed import Ranks


def prepared_data(recipe: Recipe, run: Path, say: Callable[[str], None], device: str = "cpu") -> tuple[Prepared, bool]:
    """Return the run's prepared data, and whether it had to be made now.

    Call it under the lock of the run. `say` is given sentences for the user; `device` is where models compute that
    write a part of the corpus. Raises UsageError, and leaves what is there, if the run has learned from other data.
    """
    folder = data_folder(run)
    atomic.recover(folder)
    corpus = recipe.data.config
    # The module of a plugin's class has the hash of its file in its name: other code, other data.
    code = f"{recipe.task.cls.__module__} {recipe.data.cls.__module__}"
    mark = f"{fingerprint(recipe, DATA_SECTIONS)} {corpus.fingerprint()} {code}"
    if is_current(folder, mark):
        return Prepared.open(folder), False
    if isinstance(corpus, Synthetic):
        # It needs torch, most corpora do not.
        from encdec_cli.training.synthesis import FOLDER, check_writers, languages, write_outputs  # noqa: PLC0415

        check_writers(recipe, run)
        write_outputs(corpus, run / FOLDER, device, say, languages(recipe))
    say(f"preparing data in {folder}")
    return prepare(recipe.task.config, corpus, recipe.text, mark, folder, say, partial(_accept, recipe, run)), True


def shared_data(recipe: Recipe, run: Path, say: Callable[[str], None], ranks: Ranks, device: str) -> Prepared:
    """Return the prepared data for one of several processes: the first makes or checks them, the others open them."""
    made: list[Prepared] = []

    def make() -> None:
        made.append(prepared_data(recipe, run, say, device)[0])

    ranks.first_does("the preparation of the data", make, silently=True)
    return made[0] if made else Prepared.open(data_folder(run))


def _accept(recipe: Recipe, run: Path, data_hash: str) -> None:
    if (run / "checkpoints").is_dir():
        from encdec_cli.training import resume  # noqa: PLC0415 - it needs torch, `preprocess` does not

        resume.check_data(recipe, data_hash, run)


def check_lengths(data: Prepared, model: Model) -> None:
    """Raise UsageError if an example to learn from or to validate with is too long for the model."""
    longest, most = data.longest("train", "valid"), model.max_positions
    if most is not None and longest > most:
        raise UsageError(
            f"model.max_positions: {most} positions, but the longest example has {longest} tokens; raise "
            "it, or lower text.max_source and text.max_target."
        )
