"""Layers of experts that are measured, their routings, and the floor of their two products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liquidgemm.formats.liquidquant import BLOCK_BYTES

COMPUTE_TOPS = 1750.0  # INT8, sustained at the limit of power
# What a kernel that only copies weights reaches, in bytes per µs, by the folder of results.
STREAM_BYTES_PER_US = {"h100-sxm": 3.11e6, "h200": 4.05e6}


@dataclass(frozen=True)
class Layer:
    """One rank's share of a layer.

    Attributes:
        inner: I of the rank: the first product has 2 I channels, the second one K = I.
        experts: of all ranks; `ranks` share them evenly. Tokens count over all ranks.
        activation: between the products.
    """

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    ranks: int = 1
    activation: str = "silu_mul"

    @property
    def local_experts(self) -> int:
        return self.experts // self.ranks

    @property
    def products(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """N and K of both."""
        return (2 * self.inner, self.hidden), (self.hidden, self.inner)

    def expert_bytes(self) -> int:
        """Packed, both products."""
        return sum(-(-n // 64) * -(-k // 64) * BLOCK_BYTES for n, k in self.products)


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("mixtral-8x7b", 4096, 14336, 8, 2),
        Layer("qwen3-30b-a3b", 2048, 768, 128, 8),
        Layer("dsv3-ep8", 7168, 2048, 256, 8, ranks=8),
        Layer("gpt-oss-20b", 2880, 2880, 32, 4, activation="swiglu_clamped"),
        Layer("glm-4.5-air", 4096, 1408, 128, 8),
        Layer("qwen3-235b-tp4", 4096, 384, 128, 8),
        # Not measured by default.
        Layer("mixtral-8x22b", 6144, 16384, 8, 2),
        Layer("qwen3-next-80b", 2048, 512, 512, 10),
        Layer("qwen3.5-35b-a3b", 2048, 512, 256, 8),
        Layer("dsv4-flash-ep8", 4096, 2048, 256, 6, ranks=8),
        Layer("gpt-oss-120b", 2880, 2880, 128, 4, activation="swiglu_clamped"),
        Layer("glm-4.5-tp4", 5120, 384, 160, 8),
        Layer("kimi-k2-ep8", 7168, 2048, 384, 8, ranks=8),
        Layer("llama-4-scout", 5120, 8192, 16, 1),
        Layer("minimax-m2", 3072, 1536, 256, 8),
    )
}
MEASURED = tuple(LAYERS)[:6]
ROUTINGS = ("uniform", "skewed")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Routing:
    """Attributes:
    ids: int32 [tokens, top_k]; local_experts and more: of another rank.
    offsets: int32 [local_experts + 1].
    counts: rows per local expert.
    """

    ids: Tensor
    offsets: Tensor
    counts: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def active(self) -> int:
        return sum(count > 0 for count in self.counts)


def route(layer: Layer, tokens: int, kind: str, seed: int, device: str = "cuda") -> Routing:
    """Distinct experts of each token: all equally likely, or with weights exp(normal)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(layer.experts)
    if kind == "skewed":
        logits = torch.randn(layer.experts, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(tokens, layer.experts, generator=generator)
    ids = (logits - (-uniform.log()).log()).topk(layer.top_k).indices
    if layer.ranks > 1 and not (ids < layer.local_experts).any():
        ids[0, 0] = seed % layer.local_experts  # a rank without rows has nothing to measure
    local = ids[ids < layer.local_experts]
    counts = torch.bincount(local, minlength=layer.local_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Routing(ids.int().to(device), offsets.int().to(device), tuple(counts.tolist()))


def floor_us(layer: Layer, routing: Routing, bytes_per_us: float) -> float:
    """Both products: the bytes of active experts or the multiplications, whichever takes longer."""
    total = 0.0
    for n, k in layer.products:
        weights = routing.active * -(-n // 64) * -(-k // 64) * BLOCK_BYTES
        total += max(weights / bytes_per_us, 2e-6 * routing.rows * n * k / COMPUTE_TOPS)
    return total
