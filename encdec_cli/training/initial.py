"""Weights to begin with that another run has learned."""

from __future__ import annotations

from pathlib import Path

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.bundle.tensors import load_weights
from encdec_cli.errors import BundleError
from encdec_cli.models.model import Model
from encdec_cli.text.tokenizer import Tokenizer


def take_weights(model: Model, bundle: Bundle, source: Tokenizer, target: Tokenizer) -> None:
    """Copy the weights of a bundle into a new model for these tokenizers.

    Raises BundleError that names the side whose vocabulary, or the first tensor whose shape, is another.
    """
    for side, ours, theirs in (("source", source, bundle.source), ("target", target, bundle.target)):
        if ours.vocabulary.sha256 != theirs.vocabulary.sha256:
            raise BundleError(
                f"--init-from: its {side} vocabulary is not that of this run's data, so its embeddings would stand for "
                "other tokens; it must come from a run with the same task, data and text sections."
            )
    load_weights(model, bundle.model.state_dict(), Path("--init-from"))
