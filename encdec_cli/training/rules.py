"""Which rule each weight of a model follows."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from encdec_cli.models.model import Model
from encdec_cli.models.parts import parts_of
from encdec_cli.recipe import Train
from encdec_cli.text.vocabulary import BOS, EOS, PAD
from encdec_cli.training.adafactor import Adafactor
from encdec_cli.training.adam import Adam
from encdec_cli.training.loss import used_by
from encdec_cli.training.muon import Muon
from encdec_cli.training.optimizer import Optimizer, Rule


def make_optimizer(model: Model, train: Train, inner: Collection[str], dtype: torch.dtype) -> Optimizer:
    """Build the optimizer of a recipe for a model that still is fp32.

    Args:
        model: whose parameters are to learn.
        train: the recipe's section.
        inner: names of the matrices for Muon; see `hidden_matrices`.
        dtype: in which the model will compute.
    """
    rule: Rule = Adam(train.optimizer != "adam", train.betas, weight_decay=train.weight_decay)
    if train.optimizer == "adafactor":
        rule = Adafactor(train.weight_decay)
    muon = Muon(weight_decay=train.weight_decay, dtype=dtype)
    named = dict(model.named_parameters())
    return Optimizer(
        [
            (muon, [(name, p) for name, p in named.items() if name in inner]),
            (rule, [(name, p) for name, p in named.items() if name not in inner]),
        ],
        train.ema,
        {name: cut.piece(named[name].shape, part) for name, (cut, part) in parts_of(model).items()},
    )


def hidden_matrices(model: Model) -> set[str]:
    """Return the names of the matrices between layers: neither embeddings nor used by the output layer.

    What `project` uses is found by a pass over an empty example; no weight may be shared out yet.
    """
    device = next(model.parameters()).device
    source, target = torch.tensor([[EOS]], device=device), torch.tensor([[BOS]], device=device)
    with torch.no_grad():
        hidden = model(source, source != PAD, target)
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    others = {id(p) for p in (*tables, *used_by(model.project, hidden.flatten(0, 1), list(model.parameters()))[0])}
    return {name for name, p in model.named_parameters() if p.dim() == 2 and id(p) not in others}
