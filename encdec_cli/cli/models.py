"""Which models a command uses, how they are loaded and averaged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle
    from encdec_cli.decoding.ensemble import Ensemble


def model_or_default(named: Path | None) -> Path:
    """Return the named model, or the default one, which is then said on stderr."""
    from encdec_cli.bundle.run import default_model
    from encdec_cli.cli import console

    if named is not None:
        return named
    path, why = default_model()
    console.say(f"model: {path} ({why})")
    return path


def load_bundles(
    named: Sequence[Path], device: str, plugins: Sequence[Path], precision: str = "fp32", packed: bool = True
) -> list[Bundle]:
    """Load the named models, or the default one; `packed` for decoding alone."""
    from encdec_cli.allocator import keep_freed
    from encdec_cli.bundle.bundle import Bundle, changed_plugins
    from encdec_cli.cli import console
    from encdec_cli.models.packed import pack
    from encdec_cli.registry import load_plugins
    from encdec_cli.training.machine import check_device, use_threads
    from encdec_cli.training.precision import choose

    check_device(device)
    use_threads(0)
    loaded = dict.fromkeys(load_plugins(plugins))
    paths = list(named) or [model_or_default(None)]
    for path in paths:
        for sentence in changed_plugins(path, list(loaded)):
            console.warn(sentence)
    quantised = precision == "int8"
    if quantised:
        _check_int8(device)
    dtype = choose("auto" if quantised else precision, device).dtype
    bundles = [Bundle.load(path, device, dtype) for path in paths]
    if packed:
        keep_freed()
        _tell_of_no_compiler(device)
        for bundle in bundles:
            pack(bundle.model, quantised)
    return bundles


def _tell_of_no_compiler(device: str) -> None:
    """Say that decoding will be slow, unless an empty CC asks for it."""
    from encdec_cli.cli import console
    from encdec_cli.kernels import library

    if device == "cpu" and os.environ.get("CC", "cc").strip() and library() is None:
        console.say("note: no C compiler works here (cc, or what CC names), which makes decoding several times slower")


def _check_int8(device: str) -> None:
    from encdec_cli.errors import UsageError

    if device != "cpu":
        raise UsageError("--precision int8: 8-bit matrices are multiplied on a CPU alone; use bf16 or auto.")


def choose_ensemble(average: str, weights: str | None) -> Ensemble:
    """Return how several models are averaged. weights: as in `0.7,0.3`."""
    from encdec_cli.errors import UsageError

    try:
        numbers = tuple(float(word) for word in weights.split(",")) if weights is not None else ()
    except ValueError:
        expected = "expected a number for each --model, separated by commas, such as 0.7,0.3"
        raise UsageError(f"--weights {weights}: {expected}.") from None
    from encdec_cli.decoding.ensemble import Ensemble  # after what needs no torch

    try:
        return Ensemble(average, numbers)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"--{error}") from error
