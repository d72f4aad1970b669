"""KV caches of the decoder, each with its attention over one new token per sequence."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .elementwise import Elementwise
from .sizes import Sizes

try:
    from liquidgemm.kv import KVCache
    from liquidgemm.kv.format import FORMATS
except ImportError:
    KVCache = FORMATS = None

_FILLED_AT_ONCE = 128  # tokens of each sequence


class Cache:
    """Keys and values in bf16, full of random numbers; attention by torch's SDPA.

    A step writes its token at `position`, the last place, and attends to all of them.

    Attributes:
        repeatable: whether attention gives the same bits each time. torch's own choice does not: it
            is cuDNN's kernel for decoding, some elements of which differ from call to call.
    """

    name: ClassVar[str] = "bf16"
    repeatable: ClassVar[bool] = False

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

    def repeating(self) -> AbstractContextManager:
        """In this context attention gives the same bits each time."""
        # Without set_priority: with it around its first call, torch stays with flash afterwards.
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # the second on a CPU
        return nullcontext() if self.repeatable else sdpa_kernel(backends)

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


class Quantized(Cache):
    """Ours: written and attended to by the ops of `liquidgemm.kv`.

    The fp8 one is as many bytes as INT8, and what an FP8 model would have.
    """

    name = "int8"
    repeatable = True
    format: ClassVar[str] = "int8"

    @classmethod
    def why_absent(cls, device):
        return None if KVCache is not None else "liquidgemm has no kv"

    @classmethod
    def bytes_per_token(cls, sizes):
        each = FORMATS[cls.format].bytes_per_token(sizes.head_dim)
        return sizes.layers * sizes.kv_heads * each

    def _layer(self, device: torch.device) -> KVCache:
        sizes, context = self.sizes, self.length - 1
        layer = KVCache.allocate(
            self.format, self.batch, sizes.kv_heads, self.length, sizes.head_dim, device
        )
        self.lengths = torch.full((self.batch,), self.length, dtype=torch.int32, device=device)
        for start in range(0, context, _FILLED_AT_ONCE):
            count = min(_FILLED_AT_ONCE, context - start)
            shape = (self.batch, count, sizes.kv_heads, sizes.head_dim)
            k, v = (
                torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(
                    generator=self.generator
                )
                for _ in range(2)
            )
            layer.write_(k, v, torch.full_like(self.lengths, start + count))
        return layer

    def write(self, layer, qkv):
        sizes = self.sizes
        q, k, v = self.elementwise.rope(
            qkv, self.cos, self.sin, self.position, sizes.heads, sizes.kv_heads
        )
        self.layers[layer].write_(k.unsqueeze(1), v.unsqueeze(1), self.lengths)
        return q

    def attend(self, layer, q):
        return self.layers[layer].attention(q.unsqueeze(1), self.lengths).flatten(1)


class QuantizedInt4(Quantized):
    name = format = "int4"


class QuantizedFp8(Quantized):
    name = format = "fp8"


class OurBf16(Quantized):
    """bf16 by the attention of the quantized ones."""

    name = "bf16-ours"
    format = "bfloat16"


CACHES: dict[str, type[Cache]] = {
    one.name: one for one in (Cache, OurBf16, QuantizedFp8, Quantized, QuantizedInt4)
}
