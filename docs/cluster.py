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
INSIDE = 450e9
"""Likewise to a GPU of the same machine: NVLink."""
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
    tensor: int = 1
    """GPUs, neighbours in one machine, that share each layer."""

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

    def own(self) -> float:
        """Return the weights of which a GPU has all: its part of the layers' matrices, and all that is not divided."""
        inner = 2 * self.width * self.inner + self.inner
        attention = 4 * self.width**2 + 3 * self.width
        divided = self.layers * (2 * inner + 3 * attention)
        return self.weights() - divided * (1 - 1 / self.tensor)

    def _outer(self) -> int:
        """Return the weights of a feed-forward and of two norms."""
        return 2 * self.width * self.inner + self.inner + self.width + 4 * self.width

    def state(self, gpus: int) -> float:
        """Return the bytes of weights, gradients and optimizer on a GPU.

        Whole: weights and gradients of a micro-batch in bf16; masters, two moments and summed gradients in fp32. In
        shares: the last three are divided, and the embeddings and one unit (and the next one's weights) are gathered.
        """
        if not self.shard:
            return (2 + 2 + 4 + 8 + 4) * self.own()
        root = self.vocabulary * self.width + 4 * self.width
        unit = self.unit() / self.tensor  # but for norms and some biases
        return (4 + 8 + 4) * self.own() / (gpus / self.tensor) + (2 + 2 + 4) * root + (2 + 2 + 2 + 4) * unit

    def activations(self) -> float:
        """Return the bytes kept for the backward pass: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198.

        Without their attention weights, which a fused kernel does not keep, and for any inner width. What stands
        between the divided maps is divided (section 4.2.1).
        """
        encoder = 10 * self.width + (8 * self.width + 4 * self.inner) / self.tensor
        decoder = encoder + 5 * self.width + 8 * self.width / self.tensor
        return self.tokens * self.layers * (encoder + decoder)

    def sent(self, gpus: int) -> float:
        """Return the bytes that a GPU sends an update to those that compute other micro-batches.

        Whole: fp32 gradients around a ring, there and back. In shares, for each micro-batch: bf16 weights gathered for
        the forward and for the backward pass, and fp32 gradients to those who keep them.
        """
        groups = gpus / self.tensor
        return (2 + 2 + 4 if self.shard else 2 * 4) * self.own() * (groups - 1) / groups

    def summed(self) -> float:
        """Return the bytes that a GPU sends an update to those that share its layers, around a ring, there and back.

        States [tokens, width] in bf16 are summed after the attentions and the feed-forward, and their gradients before
        them: four sums a layer of the encoder, and seven of the decoder, which also reads the encoder's.
        """
        return (4 + 7) * self.layers * 2 * self.tokens * self.width * 2 * (self.tensor - 1) / self.tensor

    def share_of_sending(self, gpus: int) -> float:
        """Return the time to send over the time to compute, if nothing overlaps: 6 operations a weight and token."""
        seconds = self.sent(gpus) / NETWORK + self.summed() / INSIDE
        return seconds / (6 * self.weights() * self.tokens / self.tensor / COMPUTING)

    def layout(self) -> str:
        """Return in words who has what."""
        return ("shares" if self.shard else "whole") + (f" of {self.tensor} parts" if self.tensor > 1 else "")


PLANS = (
    Plan("base, 6 + 6 × 512", 6, 512, 2048, 32_000, 25_000, False),
    Plan("big, 6 + 6 × 1,024", 6, 1024, 4096, 32_000, 25_000, False),
    Plan("3 B, 24 + 24 × 2,048", 24, 2048, 8192, 64_000, 8_000, True),
    Plan("3 B, 24 + 24 × 2,048", 24, 2048, 8192, 64_000, 20_000, True, 8),
    Plan("11 B, 24 + 24 × 4,096", 24, 4096, 16_384, 64_000, 4_000, True),
    Plan("11 B, 24 + 24 × 4,096", 24, 4096, 16_384, 64_000, 10_000, True, 8),
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
                *(plan.name, f"{plan.weights() / 1e6:,.0f} M", plan.layout(), f"{gpus:,}"),
                *(f"{plan.state(gpus) / 1e9:.1f}", f"{plan.activations() / 1e9:.1f}"),
                *(
                    f"{plan.tokens * gpus // plan.tensor:,}",
                    f"{(plan.sent(gpus) + plan.summed()) / 1e9:.2f}",
                    f"{plan.share_of_sending(gpus):.0%}",
                ),
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
