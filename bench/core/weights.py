"""Weights to time kernels on."""

from __future__ import annotations

import torch

import liquidgemm

FORMATS = {"liquidquant": 4, "liquidquant_g32": 4, "liquidquant6": 6, "int8": 8}
"""Bits of a weight, by what the library calls its format."""

COLD_BYTES = 160e6  # more than three times the L2 cache


def random_weights(n: int, k: int, format: str = "liquidquant") -> list[torch.Tensor]:
    """Copies of one packed weight, enough to find the L2 cache cold."""
    blocks = -(-k // 64)
    if format == "int8":
        w8 = torch.randint(-128, 128, (n, blocks * 64), dtype=torch.int8, device="cuda")
        return copies_of(liquidgemm.pack_int8_weight(w8))
    bits = FORMATS[format]
    qweight = torch.randint(0, 256, (n, blocks * 8 * bits), dtype=torch.uint8, device="cuda")
    most = 255 // (2**bits - 1)
    groups = 2 * blocks if format == "liquidquant_g32" else blocks
    qscale = torch.randint(1, most + 1, (n, groups), dtype=torch.uint8, device="cuda")
    packed = liquidgemm.pack_weight(qweight, qscale, torch.zeros_like(qscale))
    return copies_of(packed)


def copies_of(packed: torch.Tensor) -> list[torch.Tensor]:
    copies = max(2, int(COLD_BYTES / packed.numel()) + 1)
    return [packed, *(packed.clone() for _ in range(copies - 1))]
