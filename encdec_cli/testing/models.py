"""The laws of models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from encdec_cli.errors import UsageError
from encdec_cli.models.model import Croppable, Model
from encdec_cli.models.parts import parts_of
from encdec_cli.testing.parts import in_parts

SMALL = {
    **dict.fromkeys(("d_model", "hidden", "dim", "width", "embedding", "channels", "feed_forward"), 16),
    **dict.fromkeys(("layers", "encoder_layers", "decoder_layers", "heads"), 2),
}
"""Sizes that `check` gives to fields of these names in a model's Config; all others keep their defaults."""


class LawError(AssertionError):
    """A model or a strategy broke a law; the sentence names the law and says what it asks for."""


@dataclass
class Case:
    """A model and a random batch to try it on."""

    model: Model
    source: Tensor
    """[sentences, src_len], padded on the right with 0."""
    mask: Tensor
    """[sentences, src_len]; True where there is a token."""
    target: Tensor
    """[sentences, tgt_len], no padding."""
    vocab: tuple[int, int]
    """Tokens of the source's and of the target's vocabulary."""
    tolerance: float
    """Greatest difference of two hidden states, relative to the largest expected number."""
    seed: int

    def generator(self) -> torch.Generator:
        """Return a source of random numbers that is the same for every law."""
        return torch.Generator().manual_seed(self.seed)

    def hidden(self, sentences: Sequence[int], target: Tensor) -> Tensor:
        """Return the states [n, tgt_len, dim] of all positions at once, for source sentences[i] and target[i]."""
        return self.model(self.source[sentences], self.mask[sentences], target)  # type: ignore[no-any-return]

    def expect(self, found: Tensor, expected: Tensor, law: str) -> None:
        """Raise LawError with the sentence `law` unless both are equal up to the tolerance."""
        if found.shape != expected.shape:
            raise LawError(f"{law}: shape {list(expected.shape)} expected, {list(found.shape)} found.")
        if not bool(found.isfinite().all()):
            raise LawError(f"{law}: a number is not finite.")
        scale = max(1.0, float(expected.abs().max()))
        difference = float((found - expected).abs().max())
        if difference > self.tolerance * scale:
            raise LawError(f"{law}: the largest difference is {difference:.3g}.")


def check(
    model: type[Any] | Callable[[], Model],
    source_vocab: int = 17,
    target_vocab: int = 17,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> None:
    """Try every law on a model; raise LawError with the law's sentence if one does not hold.

    Args:
        model: a class with a nested `Config`, which is built with small sizes, or a function that returns a model.
        source_vocab: ids that the source may use, at most the model's own number.
        target_vocab: likewise for the target.
        seed: of the weights and of the sentences.
        tolerance: greatest difference, relative to the largest expected number.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = small(model, source_vocab, target_vocab) if isinstance(model, type) else model()
        case = make_case(built, (source_vocab, target_vocab), seed, tolerance)
        for law in LAWS:
            law(case)


def small(model: type[Any], source_vocab: int, target_vocab: int) -> Model:
    """Build a model with the sizes of SMALL, with random weights."""
    schema: Any = model.Config
    if not is_dataclass(schema):
        raise LawError(f"{model.__name__}.Config must be a dataclass: its fields are the keys of a recipe.")
    sizes = {field.name: SMALL[field.name] for field in fields(schema) if field.name in SMALL}
    built: Model = model(model.Config(**sizes), source_vocab, target_vocab)
    return built


def make_case(model: Model, vocab: tuple[int, int], seed: int, tolerance: float = 1e-4) -> Case:
    """Return four random sentences of different lengths, and put the model into evaluation mode."""
    model.eval()
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (4,), generator=random)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    source = torch.randint(1, vocab[0], mask.shape, generator=random) * mask
    target = torch.randint(1, vocab[1], (4, int(torch.randint(3, 8, (), generator=random))), generator=random)
    return Case(model, source, mask, target, vocab, tolerance, seed)


@torch.no_grad()
def any_split(case: Case) -> None:
    """All positions at once, step by step, and in pieces of any length give the same states."""
    expected = case.model(case.source, case.mask, case.target)
    length = case.target.shape[1]
    random = case.generator()
    cuts = [[1] * length, [length - 1, 1], [1, length - 1]]
    cuts.append([2, *torch.randint(1, 3, (length,), generator=random).tolist()])
    for pieces in cuts:
        state = case.model.start(case.model.encode(case.source, case.mask))
        parts = torch.split(case.target, _up_to(pieces, length), dim=1)
        found = torch.cat([case.model.decode(part, state) for part in parts], dim=1)
        case.expect(found, expected, f"decoding in pieces of {_up_to(pieces, length)} must equal decoding at once")


def _up_to(pieces: Sequence[int], length: int) -> list[int]:
    kept: list[int] = []
    for piece in pieces:
        kept.append(min(piece, length - sum(kept)))
    return [piece for piece in kept if piece > 0]


@torch.no_grad()
def padding(case: Case) -> None:
    """More padding, other ids under the mask, and other sentences in the batch change nothing."""
    expected = case.model(case.source, case.mask, case.target)
    wide = torch.nn.functional.pad(case.source, (0, 3))
    wide_mask = torch.nn.functional.pad(case.mask, (0, 3))
    case.expect(case.model(wide, wide_mask, case.target), expected, "more padding of the source must change nothing")
    junk = torch.randint(1, case.vocab[0], wide.shape, generator=case.generator())
    found = case.model(torch.where(wide_mask, wide, junk), wide_mask, case.target)
    case.expect(found, expected, "ids where the mask is False must change nothing")
    for row, count in enumerate(case.mask.sum(dim=1).tolist()):
        alone = case.model(case.source[row : row + 1, :count], case.mask[row : row + 1, :count], case.target[[row]])
        case.expect(alone[0], expected[row], "the other sentences of the batch must change nothing")


@torch.no_grad()
def no_future(case: Case) -> None:
    """A state does not depend on later target tokens."""
    expected = case.model(case.source, case.mask, case.target)
    for length in range(1, case.target.shape[1]):
        changed = case.target.clone()
        changed[:, length:] = torch.randint(0, case.vocab[1], changed[:, length:].shape, generator=case.generator())
        found = case.model(case.source, case.mask, changed)
        case.expect(found[:, :length], expected[:, :length], "later target tokens must not change earlier states")


@torch.no_grad()
def reordering(case: Case) -> None:
    """Rows of a beam, permuted, duplicated or dropped with their sentence, equal their prefixes read afresh."""
    for beam in (1, 3, 9):
        for keep in ([0, 1, 2, 3], [0, 2, 3], [3, 1], [2]):
            _reorder_once(case, beam, keep)


def _reorder_once(case: Case, beam: int, keep: list[int]) -> None:
    """Feed beams of different prefixes, keep the sentences `keep` with rows drawn anew, twice, and feed more."""
    random = case.generator()
    sentences = [row // beam for row in range(4 * beam)]
    prefix = torch.empty(4 * beam, 0, dtype=torch.int64)
    state = case.model.start(case.model.encode(case.source, case.mask), beam)
    for step, kept in enumerate((list(range(4)), keep, list(range(len(keep))))):
        drawn = [sentence * beam + torch.randint(0, beam, (beam,), generator=random) for sentence in kept]
        rows = torch.cat(drawn)
        if step > 0:
            state.reorder(rows)
            prefix, sentences = prefix[rows], [sentences[row] for row in rows.tolist()]
        for new in (2, 1, 1):
            tokens = torch.randint(1, case.vocab[1], (len(prefix), new), generator=random)
            prefix = torch.cat((prefix, tokens), dim=1)
            found = case.model.decode(tokens, state)
            expected = case.hidden(sentences, prefix)[:, -new:]
            name = "beams of one sentence" if step == 0 else f"State.reorder with beam {beam}, sentences {keep} kept,"
            case.expect(found, expected, f"{name} must equal reading every prefix afresh with its sentence")


@torch.no_grad()
def cropping(case: Case) -> None:
    """A state that can be cropped goes on as if it had never read what it forgot; others need not."""
    for beam in (1, 3):
        random = case.generator()
        sentences = [row // beam for row in range(4 * beam)]
        state = case.model.start(case.model.encode(case.source, case.mask), beam)
        if not isinstance(state, Croppable):
            return
        prefix = torch.empty(4 * beam, 0, dtype=torch.int64)
        for new, kept in ((3, 1), (1, 4), (2, 0), (4, 3), (1, 2)):
            for count, length in ((new, kept), (1, kept + 1)):
                tokens = torch.randint(1, case.vocab[1], (len(prefix), count), generator=random)
                prefix = torch.cat((prefix, tokens), dim=1)
                found = case.model.decode(tokens, state)
                expected = case.hidden(sentences, prefix)[:, -count:]
                case.expect(found, expected, f"State.crop with beam {beam} must equal reading what is left afresh")
                state.crop(length)
                prefix = prefix[:, :length]
            rows = torch.arange(4 * beam) // beam * beam + torch.randint(0, beam, (4 * beam,), generator=random)
            state.reorder(rows)
            prefix = prefix[rows]


@torch.no_grad()
def projecting(case: Case) -> None:
    """The output layer gives one number for each target token, and each row by itself."""
    hidden = case.model(case.source, case.mask, case.target).flatten(0, 1)
    whole = case.model.project(hidden)
    if whole.ndim != 2 or len(whole) != len(hidden) or whole.shape[1] < case.vocab[1]:
        raise LawError(f"project must return logits [{len(hidden)}, {case.vocab[1]}], not {list(whole.shape)}.")
    parts = torch.cat([case.model.project(part) for part in hidden.tensor_split(2)])
    case.expect(parts, whole, "project in chunks must equal project at once")


@torch.no_grad()
def attention(case: Case) -> None:
    """Where a model shows its attention: it sums to 1 over the source's tokens, and any split shows the same."""
    state = case.model.start(case.model.encode(case.source, case.mask))
    try:
        whole = list(case.model.attention(case.target, state))
    except UsageError:
        return
    state = case.model.start(case.model.encode(case.source, case.mask))
    steps = [list(case.model.attention(token, state)) for token in torch.split(case.target, 1, dim=1)]
    for weights, parts in zip(whole, zip(*steps, strict=True), strict=True):
        case.expect(weights.sum(-1), torch.ones(weights.shape[:-1]), "attention must sum to 1")
        masked = weights * ~case.mask[:, None, None]
        case.expect(masked, torch.zeros_like(masked), "attention must be 0 where the mask is False")
        case.expect(torch.cat(parts, dim=2), weights, "attention step by step must equal attention at once")


def gradients(case: Case) -> None:
    """A loss reaches every parameter with a finite gradient that is not all zero."""
    case.model.zero_grad()
    logits = case.model.project(case.model(case.source, case.mask, case.target).flatten(0, 1))
    torch.autograd.backward(torch.nn.functional.cross_entropy(logits.float(), case.target.flatten()))
    for name, parameter in case.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None or not bool(parameter.grad.any()):
            raise LawError(f"the loss must reach every parameter, but {name} gets no gradient.")
        if not bool(parameter.grad.isfinite().all()):
            raise LawError(f"gradients must be finite, but that of {name} is not.")
    case.model.zero_grad()


def dividing(case: Case) -> None:
    """Where a model's layers can be shared by processes: together these come to its states and its gradients."""

    def learned(model: Model) -> dict[str, Tensor]:
        hidden: Tensor = model(case.source, case.mask, case.target)
        torch.autograd.backward(hidden.square().sum())
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {"": hidden.detach(), **found}

    if not case.model.can_divide:
        return
    # The sums of two parts round otherwise than those of one, which norms enlarge.
    whole_model = copy.deepcopy(case.model).double()
    whole_model.zero_grad()
    try:
        parts = in_parts(whole_model, 2, learned)
    except UsageError:  # of such sizes
        return
    cuts = parts_of(parts[0][0])
    for name, expected in learned(whole_model).items():
        own = [found[name] for _, found in parts]
        what = f"the gradient of {name}" if name else "the states"
        for whole in [cuts[name][0].joined(own)] if name in cuts else own:
            case.expect(whole, expected, f"{what} must be those of one process where two share the layers")


LAWS: tuple[Callable[[Case], None], ...] = (
    any_split,
    padding,
    no_future,
    reordering,
    cropping,
    projecting,
    attention,
    gradients,
    dividing,
)
"""Every law of models, in the order in which `check` tries them."""
