"""Our Transformer as a Hugging Face model, so that `generate` can be run on the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.models.transformer import Transformer
from encdec_cli.text.vocabulary import BOS, EOS, PAD

POSITIONS = 1024
"""Rows of the table of sinusoidal positions."""


def to_huggingface(bundle: Bundle) -> Any:
    """Return a Pegasus (pre-norm) or Marian (post-norm) model of `transformers` with a bundle's weights.

    Raises SystemExit that says what cannot be expressed.
    """
    from transformers import (
        MarianConfig,
        MarianMTModel,
        PegasusConfig,
        PegasusForConditionalGeneration,
    )

    ours = bundle.model
    if not isinstance(ours, Transformer):
        raise SystemExit("only the built-in transformer has a Hugging Face model of its kind")
    config = ours.config
    for key, known in (("positions", "sinusoidal"), ("norm", "layer"), ("tie", "all"), ("bias", True)):
        if vars(config)[key] != known:
            raise SystemExit(f"model.{key}: {vars(config)[key]} has no Hugging Face model here, only {known}")
    kinds: dict[str, tuple[Any, Any]] = {
        "pre": (PegasusConfig, PegasusForConditionalGeneration),
        "post": (MarianConfig, MarianMTModel),
    }
    make_config, make_model = kinds[config.norm_order]
    sizes = (config.encoder_layers, config.d_model, config.heads, config.feed_forward)
    changes = {
        "decoder_layers": config.decoder_layers,
        "activation_function": config.activation,
        "scale_embedding": config.scale_embeddings,
    }
    theirs = make_model(make_config(**arguments(len(bundle.target.vocabulary), *sizes) | changes))
    expected = theirs.state_dict()
    weights = huggingface_weights(ours)
    missing = [name for name in expected if name not in weights and name != "final_logits_bias"]
    if missing:
        raise SystemExit(f"no weights for {', '.join(missing)}")
    theirs.load_state_dict({name: weights[name] for name in expected if name in weights}, strict=False)
    theirs.tie_weights()
    return theirs.eval()


def arguments(vocabulary: int, layers: int, dim: int, heads: int, inner: int) -> dict[str, Any]:
    """Return what a configuration of Pegasus or Marian wants to be told of a model of these sizes."""
    return {
        "vocab_size": vocabulary,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "d_model": dim,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": inner,
        "decoder_ffn_dim": inner,
        "activation_function": "relu",
        "max_position_embeddings": POSITIONS,
        "scale_embedding": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "decoder_start_token_id": BOS,
        "forced_eos_token_id": None,
    }


def huggingface_weights(ours: Transformer) -> dict[str, Tensor]:
    """Return our weights under the names of Pegasus and Marian."""
    state = ours.state_dict()
    embedding = state["target_embedding.weight"]
    weights = {"model.shared.weight": embedding, "lm_head.weight": embedding}
    positions = ours.target_positions
    for stack in ("encoder", "decoder"):
        weights[f"model.{stack}.embed_tokens.weight"] = embedding
        if positions is not None:
            zeros = torch.zeros(1, POSITIONS, ours.config.d_model)
            weights[f"model.{stack}.embed_positions.weight"] = positions(zeros)[0]
        for kind in ("weight", "bias"):
            if f"{stack}_norm.{kind}" in state:
                weights[f"model.{stack}.layer_norm.{kind}"] = state[f"{stack}_norm.{kind}"]
    plain = {
        "attention.output": "self_attn.out_proj",
        "attention_residual.norm": "self_attn_layer_norm",
        "cross.query": "encoder_attn.q_proj",
        "cross.output": "encoder_attn.out_proj",
        "cross_residual.norm": "encoder_attn_layer_norm",
        "feed_forward.inner": "fc1",
        "feed_forward.outer": "fc2",
        "feed_forward_residual.norm": "final_layer_norm",
    }
    joined = {"attention.joined": ("self_attn", "qkv"), "cross.joined": ("encoder_attn", "kv")}
    for name, tensor in state.items():
        stack, number, *inside = name.split(".")
        if stack not in ("encoder", "decoder"):
            continue
        part, kind = ".".join(inside[:-1]), inside[-1]
        layer = f"model.{stack}.layers.{number}"
        if part in plain:
            weights[f"{layer}.{plain[part]}.{kind}"] = tensor
        else:
            module, letters = joined[part]
            for letter, piece in zip(letters, tensor.chunk(len(letters)), strict=True):
                weights[f"{layer}.{module}.{letter}_proj.{kind}"] = piece
    return weights
