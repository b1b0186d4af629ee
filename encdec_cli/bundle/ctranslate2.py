"""Our Transformer in the format of CTranslate2 (https://github.com/OpenNMT/CTranslate2), a fast engine in C++."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import numpy.typing as npt
import torch
from ctranslate2.specs import attention_spec, common_spec, transformer_spec
from torch import Tensor, nn

from encdec_cli.bundle.bundle import Bundle
from encdec_cli.bundle.ctranslate2_usage import beam_of, page, program
from encdec_cli.bundle.export import Agreement, Outputs, Probe, Search, Tolerance, batches, compare, run_model
from encdec_cli.errors import UsageError
from encdec_cli.models.layers import FeedForward, RMSNorm
from encdec_cli.models.positions import Learned
from encdec_cli.models.transformer import Transformer
from encdec_cli.registry import nearest
from encdec_cli.text.example import Example
from encdec_cli.text.vocabulary import BOS, EOS, PAD, SPECIAL, UNK, Vocabulary

TOLERANCES = {
    "none": Tolerance(1e-3, 0.99),
    "float32": Tolerance(1e-3, 0.99),
    "float16": Tolerance(0.05, 0.98),
    "bfloat16": Tolerance(0.5, 0.9),
    "int16": Tolerance(0.25, 0.95),
    "int8": Tolerance(1.5, 0.8),
    "int8_float32": Tolerance(1.5, 0.8),
    "int8_float16": Tolerance(1.5, 0.8),
    "int8_bfloat16": Tolerance(1.5, 0.8),
}
"""What `--quantize` takes, under CTranslate2's own names, and how far from the model each may be."""
MIN_POSITIONS = 2048
"""Rows of the table of sinusoidal positions at least; CTranslate2's own sinusoids are laid out in another way."""

_ACTIVATIONS = {
    "relu": common_spec.Activation.RELU,
    "gelu": common_spec.Activation.GELU,
    "swiglu": common_spec.Activation.SWISH,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "norm_order": ("pre", "post"),
    "norm": ("layer", "rms"),
    "activation": tuple(_ACTIVATIONS),
    "positions": ("sinusoidal", "learned", "rotary"),
    "tie": ("none", "decoder", "all"),
}
_ANY_VALUE = {"encoder_layers", "decoder_layers", "d_model", "heads", "feed_forward", "dropout", "attention_dropout"}
_ANY_VALUE |= {"activation_dropout", "max_positions", "scale_embeddings", "bias"}


@dataclass
class CTranslate2:
    """A folder that `ctranslate2.Translator` loads."""

    quantize: str = "none"
    """How weights are stored: `none` keeps float32; the others as CTranslate2 names them."""

    def __post_init__(self) -> None:
        if self.quantize not in TOLERANCES:
            known = list(TOLERANCES)
            raise UsageError(
                f"--quantize: no '{self.quantize}' among {', '.join(known)}{nearest(self.quantize, known)}."
            )

    def problems(self, bundle: Bundle) -> list[str]:
        """Return what CTranslate2 cannot express, each beginning with the recipe's key."""
        if type(bundle.model) is not Transformer:
            name = bundle.recipe.model.name
            return [f"model.name: '{name}' is a model of its own; CTranslate2 runs the built-in transformer alone."]
        found = []
        for field in fields(bundle.model.config):
            value = vars(bundle.model.config)[field.name]
            if field.name in _CHOICES and value not in _CHOICES[field.name]:
                known = ", ".join(_CHOICES[field.name])
                found.append(f"model.{field.name}: CTranslate2 has no '{value}'; it can be {known}.")
            elif field.name not in _CHOICES and field.name not in _ANY_VALUE and value != field.default:
                found.append(f"model.{field.name}: {value} cannot be expressed; only {field.default} can.")
        return found

    def write(self, bundle: Bundle, folder: Path) -> None:
        """Write model.bin, config.json and the vocabularies, and README.txt and translate.py that show their use."""
        model = _transformer(bundle)
        text = bundle.recipe.text
        spec = make_spec(model, max(MIN_POSITIONS, 4 * max(text.max_source, text.max_target)))
        spec.register_source_vocabulary(list(bundle.source.vocabulary.tokens))
        spec.register_target_vocabulary(list(bundle.target.vocabulary.tokens))
        spec.validate()
        spec.optimize(quantization=None if self.quantize == "none" else self.quantize)
        spec.save(str(folder))
        (folder / "README.txt").write_text(page(bundle), encoding="utf-8")
        (folder / "translate.py").write_text(program(bundle, _limit(bundle)), encoding="utf-8")

    def check(self, bundle: Bundle, folder: Path, sources: Sequence[Example]) -> Agreement:
        """Compare the model with what CTranslate2 makes of `folder` on a CPU, by scores and by outputs."""
        beam, penalty = beam_of(bundle)
        probe, ours = run_model(bundle, sources, Search(_limit(bundle), beam, penalty))
        # One thread: its pool and torch's would wait for each other's cores, which costs more than it brings.
        translator = ctranslate2.Translator(
            str(folder), device="cpu", compute_type=self._compute_type(), inter_threads=1, intra_threads=1
        )
        theirs = _run_translator(translator, probe, bundle.source.vocabulary, bundle.target.vocabulary)
        return compare(ours, theirs, TOLERANCES[self.quantize])

    def facts(self) -> dict[str, Any]:
        """Return the target's name and version, and the kind of weights."""
        return {"target": "ctranslate2", "ctranslate2": ctranslate2.__version__, "quantize": self.quantize}

    def _compute_type(self) -> str:
        # CTranslate2 falls back by itself, but with a warning; a CPU may lack what a GPU is meant to compute with.
        supported = ctranslate2.get_supported_compute_types("cpu")
        if self.quantize in supported:
            return self.quantize
        return "int8_float32" if self.quantize.startswith("int8") else "float32"


def _transformer(bundle: Bundle) -> Transformer:
    if not isinstance(bundle.model, Transformer):
        raise TypeError(f"expected a Transformer, found {type(bundle.model).__name__}; ask `problems` before")
    return bundle.model


def _limit(bundle: Bundle) -> int:
    """Return the most tokens of an output, without EOS, that the model has been trained for and can place."""
    config = _transformer(bundle).config
    longest = bundle.recipe.text.max_target
    if config.positions == "learned":
        longest = min(longest, config.max_positions)
    return max(1, longest - 1)


def make_spec(model: Transformer, positions: int) -> transformer_spec.TransformerSpec:
    """Return CTranslate2's description of a model, with its weights and without vocabularies.

    positions: rows of a table of sinusoidal positions; learned ones have the rows they have.
    """
    config = model.config
    options = {
        "pre_norm": config.norm_order == "pre",
        "activation": _ACTIVATIONS[config.activation],
        "ffn_glu": config.activation == "swiglu",
        "rms_norm": config.norm == "rms",
    }
    encoder = transformer_spec.TransformerEncoderSpec(config.encoder_layers, config.heads, **options)
    decoder = transformer_spec.TransformerDecoderSpec(
        config.decoder_layers, config.heads, **options, **_rotary_options(config)
    )
    _fill_encoder(encoder, model, positions)
    _fill_decoder(decoder, model, positions)
    spec = transformer_spec.TransformerSpec(encoder, decoder)
    spec.config.bos_token = spec.config.decoder_start_token = SPECIAL[BOS]
    spec.config.eos_token = SPECIAL[EOS]
    spec.config.unk_token = SPECIAL[UNK]
    spec.config.add_source_bos = False
    spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = _epsilon(model)
    return spec


def _rotary_options(config: Transformer.Config) -> dict[str, Any]:
    # 0 turns every column; ours pairs columns of the two halves.
    return {"rotary_dim": 0, "rotary_interleave": False} if config.positions == "rotary" else {}


def _epsilon(model: Transformer) -> float:
    epsilons = {norm.eps for norm in model.modules() if isinstance(norm, (nn.LayerNorm, RMSNorm))}
    if len(epsilons) != 1:
        raise ValueError(f"CTranslate2 has one epsilon for all norms, the model has {sorted(epsilons)}")
    return epsilons.pop()


def _fill_encoder(spec: Any, model: Transformer, positions: int) -> None:
    embedding = model.target_embedding if model.source_embedding is None else model.source_embedding
    spec.embeddings[0].weight = _array(embedding.weight)
    spec.scale_embeddings = model.config.scale_embeddings
    _fill_positions(spec, model.source_positions, positions, model.config.d_model)
    for layer_spec, layer in zip(spec.layer, model.encoder, strict=True):
        if model.config.positions == "rotary":
            # Not by the encoder's own arguments: CTranslate2 4.5 has none for it.
            layer_spec.self_attention = attention_spec.MultiHeadAttentionSpec(
                self_attention=True, rms_norm=model.config.norm == "rms", **_rotary_options(model.config)
            )
        _fill_self_attention(layer_spec.self_attention, layer)
        _fill_feed_forward(layer_spec.ffn, layer)
    if model.config.norm_order == "pre":
        _fill_norm(spec.layer_norm, model.encoder_norm)


def _fill_decoder(spec: Any, model: Transformer, positions: int) -> None:
    spec.embeddings.weight = _array(model.target_embedding.weight)
    spec.scale_embeddings = model.config.scale_embeddings
    _fill_positions(spec, model.target_positions, positions, model.config.d_model)
    for layer_spec, layer in zip(spec.layer, model.decoder, strict=True):
        _fill_self_attention(layer_spec.self_attention, layer)
        _fill_cross_attention(layer_spec.attention, layer)
        _fill_feed_forward(layer_spec.ffn, layer)
    if model.config.norm_order == "pre":
        _fill_norm(spec.layer_norm, model.decoder_norm)
    _fill_linear(spec.projection, model.target_embedding if model.output is None else model.output)


def _fill_positions(spec: Any, module: nn.Module | None, rows: int, dim: int) -> None:
    if isinstance(module, Learned):
        spec.position_encodings.encodings = _array(module.weight)
    elif module is not None:
        spec.position_encodings.encodings = _array(module(torch.zeros(1, rows, dim))[0])


def _fill_self_attention(spec: Any, layer: Any) -> None:
    _fill_norm(spec.layer_norm, layer.attention_residual.norm)
    _fill_linear(spec.linear[0], layer.attention.joined)
    _fill_linear(spec.linear[1], layer.attention.output)


def _fill_cross_attention(spec: Any, layer: Any) -> None:
    _fill_norm(spec.layer_norm, layer.cross_residual.norm)
    _fill_linear(spec.linear[0], layer.cross.query)
    _fill_linear(spec.linear[1], layer.cross.joined)
    _fill_linear(spec.linear[2], layer.cross.output)


def _fill_feed_forward(spec: Any, layer: Any) -> None:
    inner: FeedForward = layer.feed_forward
    _fill_norm(spec.layer_norm, layer.feed_forward_residual.norm)
    if inner.activation == "swiglu":
        # The first half passes the activation and gates the second.
        biases = (None, None) if inner.inner.bias is None else inner.inner.bias.chunk(2)
        specs = (spec.linear_0, spec.linear_0_noact)
        for half, weight, bias in zip(specs, inner.inner.weight.chunk(2), biases, strict=True):
            _set(half, weight, bias)
    else:
        _fill_linear(spec.linear_0, inner.inner)
    _fill_linear(spec.linear_1, inner.outer)


def _fill_norm(spec: Any, norm: nn.Module) -> None:
    weights = dict(norm.named_parameters())
    spec.gamma = _array(weights["weight"])
    if isinstance(norm, nn.LayerNorm):
        spec.beta = _array(weights["bias"]) if "bias" in weights else np.zeros_like(spec.gamma)


def _fill_linear(spec: Any, module: nn.Module) -> None:
    weights = dict(module.named_parameters())
    _set(spec, weights["weight"], weights.get("bias"))


def _set(spec: Any, weight: Tensor, bias: Tensor | None) -> None:
    spec.weight = _array(weight)
    if bias is not None:
        spec.bias = _array(bias)


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    # A copy, because CTranslate2 quantises in place.
    array: npt.NDArray[np.float32] = np.array(tensor.detach().float().cpu().numpy(), order="C", copy=True)
    return array


def _run_translator(translator: Any, probe: Probe, source: Vocabulary, target: Vocabulary) -> Outputs:
    sources = [[source.token(id) for id in ids] for ids in probe.sources]
    targets = [[target.token(id) for id in ids] for ids in probe.targets]
    outputs = Outputs([], [], [])
    for part in batches(sources):
        scored = translator.score_batch(sources[part], targets[part], max_input_length=0)
        outputs.scores += [list(result.log_probs) for result in scored]
        outputs.greedy += _translate(translator, sources[part], replace(probe.search, beam=1), target)
        outputs.beam += _translate(translator, sources[part], probe.search, target)
    return outputs


def _translate(translator: Any, sources: list[list[str]], search: Search, target: Vocabulary) -> list[list[int]]:
    results = translator.translate_batch(
        sources,
        beam_size=search.beam,
        length_penalty=search.length_penalty,
        max_input_length=0,
        max_decoding_length=search.limit,
        return_end_token=True,  # then EOS counts in the length that the penalty takes, as with us
        disable_unk=True,
        suppress_sequences=[[SPECIAL[PAD]], [SPECIAL[BOS]]],
    )
    return [[target.id(token) for token in result.hypotheses[0] if token != SPECIAL[EOS]] for result in results]
