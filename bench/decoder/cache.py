"""KV caches of the decoder, each with its attention over one new token per sequence."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .elementwise import Elementwise
from .sizes import Sizes


class Cache:
    """Keys and values in bf16, full of random numbers; attention by torch's SDPA.

    A step writes its token at `position`, the last place, and attends to all of them.
    """

    name: ClassVar[str] = "bf16"

    def __init__(
        self, sizes: Sizes, batch: int, context: int, elementwise: Elementwise, device: torch.device
    ) -> None:
        self.sizes, self.batch, self.elementwise = sizes, batch, elementwise
        self.length = context + 1
        self.position = torch.full((1,), context, dtype=torch.int64, device=device)
        self.generator = torch.Generator(device).manual_seed(1)
        self.layers = [self._layer(device) for _ in range(sizes.layers)]
        self.cos, self.sin = rotations(sizes.head_dim, self.length, device)

    @classmethod
    def why_absent(cls, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None."""
        return None

    @classmethod
    def bytes_per_token(cls, sizes: Sizes) -> float:
        """Of one sequence, in all layers."""
        return 2 * sizes.kv_values

    def _random(self, device: torch.device) -> Tensor:
        sizes = self.sizes
        shape = (self.batch, sizes.kv_heads, self.length, sizes.head_dim)
        whole = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return whole.normal_(generator=self.generator)

    def _layer(self, device: torch.device) -> tuple:
        return self._random(device), self._random(device)

    def write(self, layer: int, qkv: Tensor) -> Tensor:
        """Writes keys and values of the new tokens, ``qkv [B, N]``; q ``[B, heads, D]``."""
        return self.elementwise.rope_into(
            qkv,
            self.cos,
            self.sin,
            self.position,
            self.sizes.heads,
            self.sizes.kv_heads,
            *self.layers[layer],
        )

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """``[B, heads * D]``."""
        keys, values = self.layers[layer]
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2), keys, values, enable_gqa=self.sizes.heads != self.sizes.kv_heads
        )
        return out.reshape(self.batch, -1)


def rotations(head_dim: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, head_dim / 2]`` of the rotary embedding."""
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(length, device=device).unsqueeze(1) * frequency
    return angle.cos(), angle.sin()


CACHES: dict[str, type[Cache]] = {one.name: one for one in (Cache,)}
