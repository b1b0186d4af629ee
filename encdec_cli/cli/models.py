"""Which model a command uses, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encdec_cli.bundle.bundle import Bundle


def model_or_default(named: Path | None) -> Path:
    """Return the named model, or the default one, which is then said on stderr."""
    from encdec_cli.bundle.run import default_model
    from encdec_cli.cli import console

    if named is not None:
        return named
    path, why = default_model()
    console.say(f"model: {path} ({why})")
    return path


def load_bundles(named: Sequence[Path], device: str, plugins: Sequence[Path], precision: str = "fp32") -> list[Bundle]:
    """Load the named models, or the default one."""
    from encdec_cli.bundle.bundle import Bundle, changed_plugins
    from encdec_cli.cli import console
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
    dtype = choose(precision, device).dtype
    return [Bundle.load(path, device, dtype) for path in paths]
