"""The plan for 8 to 1,024 GPUs in docs/distributed.md, by formula: `python docs/cluster.py` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from encdec_cli import atomic

PAGE = Path(__file__).parent / "distributed.md"
BEGIN, END = "<!-- Written by `python docs/cluster.py`; do not edit. -->\n", "<!-- The end of the plan. -->\n"
COUNTS = (8, 64, 256, 1024)
NETWORK = 50e9
"""Bytes a second that a GPU sends: a 400 Gb/s card each."""
COMPUTING = 0.4 * 989e12
"""Operations a second: 40 % of the peak of an H100 in bf16."""


@dataclass(frozen=True)
class Plan:
    """A Transformer with as many layers on both sides and one matrix of embeddings, in bf16 with AdamW."""

    name: str
    layers: int
    width: int
    inner: int
    vocabulary: int
    tokens: int
    """Of a micro-batch, on either side, padding included; each GPU computes one an update."""
    shard: bool

    def unit(self) -> int:
        """Return the weights of a layer of the decoder but for its map of the source: the largest unit of shares."""
        attention = 4 * self.width * (self.width + 1)
        return self._outer() + attention + 2 * self.width * (self.width + 1) + 2 * self.width

    def weights(self) -> int:
        """Return the number of weights."""
        attention = 4 * self.width * (self.width + 1)
        encoder = self._outer() + attention
        decoder = encoder + attention + 2 * self.width
        return self.layers * (encoder + decoder) + 4 * self.width + self.vocabulary * self.width

    def _outer(self) -> int:
        """Return the weights of a feed-forward and of two norms."""
        return 2 * self.width * self.inner + self.inner + self.width + 4 * self.width

    def state(self, gpus: int) -> float:
        """Return the bytes of weights, gradients and optimizer on a GPU.

        Whole: weights and gradients of a micro-batch in bf16; masters, two moments and summed gradients in fp32. In
        shares: the last three are divided, and the embeddings and one unit (and the next one's weights) are gathered.
        """
        if not self.shard:
            return (2 + 2 + 4 + 8 + 4) * self.weights()
        root = self.vocabulary * self.width + 4 * self.width
        return (4 + 8 + 4) * self.weights() / gpus + (2 + 2 + 4) * root + (2 + 2 + 2 + 4) * self.unit()

    def activations(self) -> float:
        """Return the bytes kept for the backward pass: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198.

        Without their attention weights, which a fused kernel does not keep, and for any inner width.
        """
        encoder = 18 * self.width + 4 * self.inner
        decoder = encoder + 13 * self.width
        return float(self.tokens * self.layers * (encoder + decoder))

    def sent(self, gpus: int) -> float:
        """Return the bytes that a GPU sends an update.

        Whole: fp32 gradients around a ring, there and back. In shares, for each micro-batch: bf16 weights gathered for
        the forward and for the backward pass, and fp32 gradients to those who keep them.
        """
        return (2 + 2 + 4 if self.shard else 2 * 4) * self.weights() * (gpus - 1) / gpus

    def share_of_sending(self, gpus: int) -> float:
        """Return the time to send over the time to compute, if nothing overlaps: 6 operations a weight and token."""
        return self.sent(gpus) / NETWORK / (6 * self.weights() * self.tokens / COMPUTING)


PLANS = (
    Plan("base, 6 + 6 × 512", 6, 512, 2048, 32_000, 25_000, False),
    Plan("big, 6 + 6 × 1,024", 6, 1024, 4096, 32_000, 25_000, False),
    Plan("3 B, 24 + 24 × 2,048", 24, 2048, 8192, 64_000, 8_000, True),
    Plan("11 B, 24 + 24 × 4,096", 24, 4096, 16_384, 64_000, 4_000, True),
)


def table() -> str:
    """Return the plan as Markdown."""
    lines = [
        "| model | weights | layout | GPUs | state GB | activations GB | tokens an update | sent GB | sending |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for plan in PLANS:
        for gpus in COUNTS:
            cells = (
                *(plan.name, f"{plan.weights() / 1e6:,.0f} M", "shares" if plan.shard else "whole", f"{gpus:,}"),
                *(f"{plan.state(gpus) / 1e9:.1f}", f"{plan.activations() / 1e9:.1f}", f"{plan.tokens * gpus:,}"),
                *(f"{plan.sent(gpus) / 1e9:.2f}", f"{plan.share_of_sending(gpus):.0%}"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return docs/distributed.md with the plan as it is computed now."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    atomic.write_file(PAGE, page().encode())
