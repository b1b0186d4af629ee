"""Next-token scores without a full softmax: the normaliser in cache-sized blocks, the best tokens from chunk maxima.

A candidate's rank is settled by (score, lowest id first) packed into one integer, so equal scores never depend on
the batch, the device or the version of a sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encdec_cli import kernels

CHUNK = kernels.CHUNK
BLOCK = 1 << 18
"""Logits normalised at a time on a CPU: one MiB of float32 stays in the cache."""
IDS = (1 << 32) - 1
NEVER = torch.iinfo(torch.int64).min


def pack(values: Tensor, ids: Tensor) -> Tensor:
    """Return int64 keys that sort by value, then by lowest id. values: float32; ids: int64 below 2^32."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are the same value
    # The bits of a float sort like integers once those of negative numbers are turned round.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) + (IDS - ids)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values and ids that `pack` was given."""
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), IDS - (keys & IDS)


def chunk_maxima(logits: Tensor, out: Tensor) -> None:
    """Write the maximum of each CHUNK of tokens. logits: [rows, vocab]; out: [rows, chunks] float32."""
    rows, vocab = logits.shape
    whole = vocab // CHUNK
    if whole:
        out[:, :whole] = logits[:, : whole * CHUNK].view(rows, whole, CHUNK).amax(-1)
    if vocab % CHUNK:
        out[:, whole] = logits[:, whole * CHUNK :].amax(-1)


def normalise(logits: Tensor, banned: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Return log of the sum of exponentials [rows] and the chunk maxima [rows, chunks], both float32.

    In between, banned tokens become -inf.
    logits: [rows, vocab] of any float type; they are widened a block of rows at a time.
    """
    if kernels.usable(logits) and logits.is_contiguous():
        return kernels.scan(logits, banned)
    rows, vocab = logits.shape
    maxima = logits.new_empty((rows, -(-vocab // CHUNK)), dtype=torch.float32)
    normaliser = logits.new_empty(rows, dtype=torch.float32)
    block = max(1, BLOCK // vocab) if logits.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        wide = logits[part].float()
        chunk_maxima(wide, maxima[part])
        # The best token's probability is exp(highest) / sum; softmax is a third faster on a CPU than exp and sum.
        normaliser[part] = maxima[part].amax(-1) - wide.softmax(-1).amax(-1).log_()
    ban(logits, maxima, banned)
    return normaliser, maxima


def ban(logits: Tensor, maxima: Tensor, banned: Sequence[int]) -> None:
    """Make the logits [rows, vocab] of some tokens -inf, and mend the chunk maxima [rows, chunks]."""
    for token in banned:
        logits[:, token] = -torch.inf
    refresh(logits, maxima, banned)


def refresh(logits: Tensor, maxima: Tensor, tokens: Sequence[int]) -> None:
    """Compute the maxima [rows, chunks] of the chunks of these tokens anew."""
    for chunk in sorted({token // CHUNK for token in tokens}):
        maxima[:, chunk] = logits[:, chunk * CHUNK : (chunk + 1) * CHUNK].amax(-1)


@dataclass
class Candidates:
    """The best continuations of each sentence, best first. Every tensor is [sentences, k]."""

    totals: Tensor
    """Log-probability of the hypothesis with the new token; -inf where there is no such continuation."""
    parents: Tensor
    """Which row of its sentence the hypothesis continues, int64."""
    tokens: Tensor
    """The new token, int64."""


def rank(values: Tensor, penalties: Tensor, tokens: Tensor, k: int, vocab: int) -> Candidates:
    """Return the k best continuations by value less penalty, fewer if there are fewer; totals are the values alone.

    values, penalties, tokens: [sentences, beam, n], for n ways to go on of each row.
    Equal differences: lowest row first, then lowest token.
    """
    _, beam, n = values.shape
    ids = torch.arange(beam, device=values.device)[:, None] * vocab + tokens
    order = pack(values - penalties, ids).flatten(1).topk(min(k, beam * n)).indices
    return Candidates(values.flatten(1).gather(1, order), order // n, tokens.flatten(1).gather(1, order))


class Scores:
    """The scores of the next token for every row; nothing is computed that is not asked for.

    Log-probabilities are normalised over the whole vocabulary; banned tokens only leave the candidates.

    Args:
        logits: [rows, vocab], owned by this object from now on: bans are written into it.
        banned: tokens that are never candidates.
        normalised: whether the logits are log-probabilities already.
    """

    def __init__(self, logits: Tensor, banned: Sequence[int] = (), normalised: bool = False) -> None:
        self._logits = logits
        if normalised:
            self._normaliser = logits.new_zeros(logits.shape[0], dtype=torch.float32)
            self._maxima = logits.new_empty((logits.shape[0], -(-logits.shape[1] // CHUNK)), dtype=torch.float32)
            chunk_maxima(logits, self._maxima)
            ban(logits, self._maxima, banned)
        else:
            self._normaliser, self._maxima = normalise(logits, banned)

    @property
    def shape(self) -> torch.Size:
        """[rows, vocab]."""
        return self._logits.shape

    def forbid(self, token: int, rows: Tensor) -> None:
        """Take a token from the candidates of some rows. rows: [rows] bool."""
        self._logits[:, token].masked_fill_(rows, -torch.inf)
        refresh(self._logits, self._maxima, [token])

    def log_probs(self) -> Tensor:
        """Return a new [rows, vocab] float32; banned tokens are -inf."""
        return self._logits.float() - self._normaliser[:, None]

    def of(self, rows: Tensor, tokens: Tensor | int) -> Tensor:
        """Return the log-probability of one token in each of some rows, [n] float32. rows, tokens: [n]."""
        return self._logits[rows, tokens].float() - self._normaliser[rows]

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k best log-probabilities and their tokens, both [rows, k]: equal scores, lowest token first.

        k is cut to the size of the vocabulary.
        """
        best = self.best(k, self._normaliser.new_zeros(self.shape[0], 1))
        return best.totals, best.tokens

    def best(self, k: int, totals: Tensor) -> Candidates:
        """Return the k best continuations of each sentence, fewer if there are fewer.

        totals: [sentences, beam] float32, log-probabilities of the rows so far; -inf for a row to leave aside.
        Equal scores: lowest row first, then lowest token.
        """
        sentences, beam = totals.shape
        vocab, chunks = self.shape[1], self._maxima.shape[1]
        most = min(k, beam * vocab)
        dense = self._logits.is_contiguous()
        if most <= kernels.MOST_CANDIDATES and dense and kernels.usable(self._logits):
            return Candidates(*kernels.candidates(self._logits, self._normaliser, self._maxima, totals, most))
        # The k best candidates are all in the k chunks with the best maxima, so only those are looked into.
        ceilings = totals[..., None] + (self._maxima - self._normaliser[:, None]).view(sentences, beam, chunks)
        order = torch.arange(beam * chunks, device=totals.device)
        keys = pack(ceilings.view(sentences, -1), order).topk(min(k, beam * chunks), sorted=False).values
        chunk = IDS - (keys & IDS)
        parent = chunk // chunks
        first = torch.arange(sentences, device=totals.device)[:, None] * beam
        tokens = ((chunk % chunks) * CHUNK)[..., None] + torch.arange(CHUNK, device=totals.device)
        place = (first + parent)[..., None] * vocab + tokens.clamp(max=vocab - 1)
        logits = self._logits.view(-1)[place].float()
        values = totals.gather(1, parent)[..., None] + (
            logits - self._normaliser.view(sentences, beam).gather(1, parent)[..., None]
        )
        candidates = pack(values, parent[..., None] * vocab + tokens)
        if vocab % CHUNK:
            candidates.masked_fill_(tokens >= vocab, NEVER)
        best, ids = unpack(candidates.view(sentences, -1).topk(most).values)
        parents = ids // vocab
        return Candidates(best, parents, ids - parents * vocab)
