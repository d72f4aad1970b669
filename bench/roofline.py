"""What a W4A8 product must take at least, from the bytes of its weight and its multiplications."""

from __future__ import annotations

from dataclasses import dataclass

from liquidgemm.format import BLOCK_BYTES, GROUP, PANEL, ceil_div


@dataclass(frozen=True)
class Ceilings:
    """What a GPU sustains, measured.

    Attributes:
        gpu: where it was measured.
        bytes_per_us: memory bandwidth that a copy-only kernel reaches on 1 GiB (1e6 = 1 TB/s).
        ops_per_us: INT8 WGMMA with operand A from registers, sustained for seconds at the power
            limit; a multiplication and an addition count as two (1e6 = 1 TOPS).
    """

    gpu: str
    bytes_per_us: float
    ops_per_us: float


H100 = Ceilings("H100 SXM (700 W)", bytes_per_us=3.11e6, ops_per_us=1750e6)


def packed_bytes(n: int, k: int) -> int:
    """Bytes of the packed weight ``[n, k]``: 4.25 bits per weight, padded to blocks of 64 x 64."""
    return ceil_div(n, PANEL) * ceil_div(k, GROUP) * BLOCK_BYTES


def operations(m: float, n: int, k: int) -> float:
    return 2 * m * n * k


@dataclass(frozen=True)
class Roofline:
    """Lower bounds in µs of one product on a weight that is not in the L2 cache.

    Activations and output do not count: they are small where memory binds, and come from the L2
    cache or stay there.
    """

    memory_us: float
    mma_us: float

    @property
    def us(self) -> float:
        return max(self.memory_us, self.mma_us)

    @property
    def binds(self) -> str:
        return "memory" if self.memory_us >= self.mma_us else "mma"


def roofline(m: float, n: int, k: int, ceilings: Ceilings = H100) -> Roofline:
    """``max(packed bytes / bandwidth, 2 M N K / throughput)``."""
    return Roofline(
        memory_us=packed_bytes(n, k) / ceilings.bytes_per_us,
        mma_us=operations(m, n, k) / ceilings.ops_per_us,
    )


def roof_ops_per_us(m: float, ceilings: Ceilings = H100) -> float:
    """The roof at m tokens: the same for every weight that needs no padding.

    Each block of 64 x 64 weights is 2176 bytes and ``2 * 64 * 64 * m`` operations.
    """
    operations_per_byte = 2 * PANEL * GROUP * m / BLOCK_BYTES
    return min(ceilings.ops_per_us, operations_per_byte * ceilings.bytes_per_us)


def crossover_tokens(ceilings: Ceilings = H100) -> float:
    """Batch size from which on multiplications bind and not memory: 149 on an H100."""
    return ceilings.ops_per_us * BLOCK_BYTES / (2 * PANEL * GROUP * ceilings.bytes_per_us)
