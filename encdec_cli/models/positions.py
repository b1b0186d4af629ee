"""Where a token stands: sinusoidal, learned and rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encdec_cli.kernels.packing import Rows


class Table:
    """Rows of numbers computed from their position: made when they are needed, in the dtype they are needed in.

    Not a buffer on purpose: it is no weight, and a cast of the model to bf16 and back must not wear it down.
    """

    def __init__(self, angles: Tensor, dim: int) -> None:
        self.angles = angles
        self.dim = dim
        """Where sines and cosines are stacked: 1, or 2 for those of an angle side by side."""
        self.rows: Tensor | None = None

    def get(self, end: int, like: Tensor) -> Tensor:
        """Return the sines and cosines of the positions 0 to end - 1, [end, 2, angles] or [end, angles, 2].

        like: for type and device.
        """
        rows = self.rows
        if rows is None or len(rows) < end or rows.dtype != like.dtype or rows.device != like.device:
            # Tensors made under inference_mode could not serve a later training step.
            with torch.inference_mode(False), torch.no_grad():
                places = torch.arange(max(64, 2 * end), dtype=torch.float64)
                turns = places[:, None] * self.angles
                rows = torch.stack((turns.sin(), turns.cos()), self.dim).to(like.device, like.dtype)
            self.rows = rows
        return rows[:end]


def frequencies(count: int) -> Tensor:
    """Return the angles per position [count]: 1, and on down in equal ratios towards 1 / 10000."""
    return 10000.0 ** -(torch.arange(count, dtype=torch.float64, device="cpu") / count)


class Sinusoidal(nn.Module):
    """Sines and cosines added to the embeddings (Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762).

    There is no greatest length.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._table = Table(frequencies(dim // 2), 2)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Add to x [rows, len, dim] the positions from `start` on; even columns are sines, odd ones cosines."""
        end = start + x.shape[1]
        return x + self._table.get(end, x)[start:].flatten(1)


class Learned(nn.Embedding):
    """One learned vector for each of the first `max_positions` positions, added to the embeddings."""

    def __init__(self, max_positions: int, dim: int) -> None:
        super().__init__(max_positions, dim)
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Add to x [rows, len, dim] the positions from `start` on; raise ValueError beyond the last one."""
        end = start + x.shape[1]
        if end > len(self.weight):
            raise ValueError(
                f"a sequence of {end} tokens is longer than max_positions ({len(self.weight)}): shorten it, "
                "or train with more max_positions or with sinusoidal or rotary positions."
            )
        return x + self.weight[start:end]


class Rotary(nn.Module):
    """Queries and keys turned by their position (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Column i is paired with column i + head_dim / 2. There is no greatest length.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self._table = Table(frequencies(head_dim // 2), 1)

    def turns(self, start: int, end: int, like: Tensor) -> Tensor:
        """Return the sines and cosines of some positions, [end - start, 2, head_dim / 2], as `like` is stored."""
        return self._table.get(end, like)[start:]

    def forward(self, x: Tensor, start: int | Rows = 0) -> Tensor:
        """Turn x [rows, heads, len, head_dim], whose first position is `start`, or which is packed so."""
        if isinstance(start, Rows):
            turns = start.of_positions(self._table.get(start.longest, x))
        else:
            turns = self.turns(start, start + x.shape[2], x)
        sines, cosines = turns.unbind(1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
