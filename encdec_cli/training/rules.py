"""Which rule each weight of a model follows."""

from __future__ import annotations

import torch
from torch import nn

from encdec_cli.recipe import Train
from encdec_cli.training.adam import Adam
from encdec_cli.training.muon import Muon
from encdec_cli.training.optimizer import Optimizer


def make_optimizer(model: nn.Module, train: Train, vocabularies: tuple[int, int], dtype: torch.dtype) -> Optimizer:
    """Build the optimizer of a recipe for a model that still is fp32.

    Args:
        model: whose parameters are to learn.
        train: the recipe's section.
        vocabularies: the sizes of both, by which matrices with a row for each token are told from others.
        dtype: in which the model will compute.
    """
    first, second = train.betas
    adam = Adam(train.optimizer != "adam", (first, second), weight_decay=train.weight_decay)
    named = dict(model.named_parameters())
    inner = hidden_matrices(model, vocabularies) if train.optimizer == "muon" else set()
    muon = Muon(weight_decay=train.weight_decay, dtype=dtype)
    return Optimizer(
        [
            (muon, [(name, p) for name, p in named.items() if name in inner]),
            (adam, [(name, p) for name, p in named.items() if name not in inner]),
        ]
    )


def hidden_matrices(model: nn.Module, vocabularies: tuple[int, int]) -> set[str]:
    """Return the names of the matrices between layers: neither embeddings nor the output layer."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and id(parameter) not in tables and parameter.shape[0] not in vocabularies
    }
