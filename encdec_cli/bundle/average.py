"""One model whose weights are the mean of several models' weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from encdec_cli.bundle.bundle import Bundle, model_keys
from encdec_cli.errors import BundleError


def average(paths: Sequence[Path], device: str = "cpu") -> Bundle:
    """Return a bundle with the mean weights, in fp32, of one or more bundles or runs; all else is that of the last.

    Its facts say what was averaged. Raises BundleError that names the first whose model, but for dropout, or whose
    vocabularies are not those of the first.
    """
    total: dict[str, Tensor] = {}
    parts: dict[str, Any] = {}
    for path in paths:
        bundle = Bundle.load(path, device)
        parts = parts or _parts(bundle)
        for part, value in _parts(bundle).items():
            if parts.get(part) != value:
                raise BundleError(
                    f"{path}: its {part} is not that of {paths[0]}; only models of one shape and of the same "
                    "vocabularies have a mean."
                )
        for name, weight in bundle.model.state_dict().items():
            total[name] = total[name] + weight.double() if name in total else weight.double()
    bundle.model.load_state_dict({name: (weight / len(paths)).float() for name, weight in total.items()})
    bundle.facts |= {"scores": {}, "averaged": [str(path) for path in paths]}
    return bundle


def _parts(bundle: Bundle) -> dict[str, Any]:
    """Return what models that are averaged must have in common, by name."""
    sides = (("source", bundle.source), ("target", bundle.target))
    return model_keys(bundle.recipe) | {f"{side} vocabulary": tokenizer.vocabulary.sha256 for side, tokenizer in sides}
