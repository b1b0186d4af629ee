"""Weights to begin with that another run has learned, whatever its vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from encdec_cli.bundle.bundle import Bundle, build_model, model_keys
from encdec_cli.bundle.tensors import load_weights
from encdec_cli.errors import BundleError, UsageError
from encdec_cli.models.model import Model
from encdec_cli.recipe import Recipe
from encdec_cli.text.tokenizer import Tokenizer
from encdec_cli.text.vocabulary import UNK

_BYTE = "<0x"

Origin = Sequence[Sequence[int]]
"""For each token of a new vocabulary the tokens of an old one that it is made from; none if it is new."""


def check_fits(recipe: Recipe, bundle: Bundle) -> None:
    """Raise BundleError, before any data is read, if a recipe's model is not of the shape of the bundle's.

    Weights of the same sizes may mean something else, by another activation or number of heads, say.
    """
    ours, theirs = model_keys(recipe), model_keys(bundle.recipe)
    if ours["model.name"] != theirs["model.name"]:
        return  # a plugin may change what does not change the weights
    other = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    if "learned" not in (ours.get("model.positions"), theirs.get("model.positions")):
        other.discard("model.max_positions")
    if other:
        listed = ", ".join(f"{key} is {ours.get(key)!r}, was {theirs.get(key)!r}" for key in sorted(other))
        raise BundleError(
            f"--init-from: the model is another: {listed}; give the recipe the values that it was trained with."
        )


def take_weights(model: Model, recipe: Recipe, bundle: Bundle, source: Tokenizer, target: Tokenizer) -> list[str]:
    """Copy the weights of a bundle into a new model for these tokenizers; return sentences on tokens that differ.

    Where a vocabulary is another, a token's weights (its embedding, its row of the output layer) are those of the same
    token; a token that is new has the mean of the pieces that the bundle's tokenizer cuts it into (Gee et al. 2022,
    https://aclanthology.org/2022.emnlp-industry.41), or where there are no such pieces begins anew.

    Raises BundleError that names the first tensor whose shape is another.
    """
    weights = bundle.model.state_dict()
    sides = [("source", source, bundle.source), ("target", target, bundle.target)]
    changed = [side for side in sides if side[1].vocabulary.sha256 != side[2].vocabulary.sha256]
    if changed:
        own = model.state_dict()
        axes = vocabulary_axes(own, recipe, len(source.vocabulary), len(target.vocabulary))
        for name, ours, theirs in changed:
            origin = origins(ours, theirs)
            for tensor, axis in axes[name]:
                if tensor in weights:
                    weights[tensor] = mapped(weights[tensor], own[tensor], axis, origin)
    load_weights(model, weights, Path("--init-from"))
    if source is target:
        changed = [("shared", ours, theirs) for _, ours, theirs in changed[:1]]
    return [_told(name, origins(ours, theirs)) for name, ours, theirs in changed]


def vocabulary_axes(
    own: dict[str, Tensor], recipe: Recipe, source: int, target: int
) -> dict[str, list[tuple[str, int]]]:
    """Return which tensors of a model, along which axis, have an entry for each token, for either side.

    They are found by building the model for a vocabulary with one token more. Where a model has one vocabulary for
    both sides all tensors are the target's.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            sizes = {"source": (source + 1, target), "target": (source, target + 1)}
            shapes = {side: build_model(recipe, *size).state_dict() for side, size in sizes.items()}
        except UsageError:  # the sizes must be equal
            shapes = {"source": own, "target": build_model(recipe, source + 1, target + 1).state_dict()}
    return {
        side: [
            (name, axis)
            for name, tensor in own.items()
            for axis in range(tensor.dim())
            if tensor.shape[axis] != larger[name].shape[axis]
        ]
        for side, larger in shapes.items()
    }


def origins(ours: Tokenizer, theirs: Tokenizer) -> Origin:
    """Return from which old tokens each token of `ours` is made: the same one, or the pieces of its text."""
    known = {token: id for id, token in enumerate(theirs.vocabulary.tokens)}
    found: list[Sequence[int]] = []
    for id, token in enumerate(ours.vocabulary.tokens):
        if token in known:
            found.append([known[token]])
            continue
        pieces = [] if token.startswith(_BYTE) else theirs.encode(ours.decode([id]))
        # Bytes were seen in rare characters alone: they tell nothing of a new script.
        spelled = any(piece == UNK or theirs.vocabulary.token(piece).startswith(_BYTE) for piece in pieces)
        found.append([] if spelled else pieces)
    return found


def mapped(old: Tensor, fresh: Tensor, axis: int, origin: Origin) -> Tensor:
    """Return `old` for a new vocabulary along an axis: means of old entries, those of `fresh` for new tokens.

    Where the two differ in more than that axis `old` is returned as it is.
    """
    if old.dim() != fresh.dim() or old.select(axis, 0).shape != fresh.select(axis, 0).shape:
        return old
    entries = old.movedim(axis, 0)
    means = [
        entries[list(ids)].mean(0) if ids else new for ids, new in zip(origin, fresh.movedim(axis, 0), strict=True)
    ]
    return torch.stack(means).movedim(0, axis)


def _told(side: str, origin: Origin) -> str:
    counts = [sum(len(ids) == 1 for ids in origin), sum(len(ids) > 1 for ids in origin), sum(not ids for ids in origin)]
    return (
        f"--init-from: another {side} vocabulary: {counts[0]:,} of {len(origin):,} tokens taken over, {counts[1]:,} "
        f"made from their pieces, {counts[2]:,} new"
    )
