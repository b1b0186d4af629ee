"""Which parameters of a model learn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from encdec_cli.errors import UsageError
from encdec_cli.registry import nearest


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters whose names match `train.freeze` learn nothing.

    Raises UsageError for a pattern that matches none, and if nothing is left to learn.
    """
    named = dict(model.named_parameters())
    for name in matching(patterns, named, "train.freeze", "parameter"):
        named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise UsageError(f"train.freeze: {', '.join(patterns)} leave no parameter that learns; freeze fewer.")


def matching(patterns: Sequence[str], names: Iterable[str], key: str, kind: str) -> list[str]:
    """Return the names that match any pattern, as a shell matches file names: `*` stands for dots too.

    Raises UsageError that names the key, and a pattern near to one that matches none.
    """
    known = list(names)
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in known if fnmatchcase(name, pattern)}
        if not matched:
            words = [name.split(".") for name in known]
            groups = sorted({".".join([*word[:n], "*"]) for word in words for n in range(1, len(word))})
            first = ", ".join(dict.fromkeys(name.partition(".")[0] + "*" for name in known))
            near = nearest(pattern, [*known, *groups])
            raise UsageError(f"{key}: '{pattern}' matches no {kind} of this model{near}; there are {first}.")
        found |= matched
    return [name for name in known if name in found]
