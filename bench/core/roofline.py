"""The cost model of the LiquidGEMM paper (arXiv 2509.01229, section 3): what a W4A8 product must
take at least, by the bytes of its weight, by its dequantization and by its multiplications."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from liquidgemm.formats.liquidquant import BLOCK_BYTES, GROUP, PANEL, ceil_div

from . import machine, programs
from .results import Run

LARGEST_TILE = 256  # tokens that one dequantization of a weight can serve: the N of a WGMMA


@dataclass(frozen=True)
class Ceilings:
    """What a GPU sustains, measured.

    Attributes:
        source: where it was measured.
        bytes_per_us: memory bandwidth that a copy-only kernel reaches on a large weight (1e6 =
            1 TB/s).
        ops_per_us: INT8 WGMMA with dequantized operand A from registers, sustained for seconds at
            the power limit; a multiplication and an addition count as two (1e6 = 1 TOPS).
        decoded_bytes_per_us: packed bytes that all SMs dequantize with nothing else to do; None
            where it was not measured.
    """

    source: str
    bytes_per_us: float
    ops_per_us: float
    decoded_bytes_per_us: float | None = None

    def __str__(self) -> str:
        text = f"{self.bytes_per_us / 1e6:.3g} TB/s, {self.ops_per_us / 1e6:.0f} TOPS"
        if self.decoded_bytes_per_us is None:
            return text
        return f"{text}, dequantization {self.decoded_bytes_per_us / 1e6:.3g} TB/s"


H100_SMS = 132
H100 = Ceilings("an H100 SXM (700 W)", bytes_per_us=3.11e6, ops_per_us=1750e6)


def from_microbenchmarks(record: programs.Record) -> Ceilings | None:
    """The ceilings that the C++ microbenchmarks measured, or None if they did not."""

    def pick(table: str, column: str, **where) -> list[float]:
        rows = record.tables.get(table, [])
        found = [row[column] for row in rows if all(row[key] == v for key, v in where.items())]
        return [value for value in found if value is not None]

    stream = pick("stream_floor", "pdl_TBps")
    mma = pick("mma_rate", "sustained_tops", operand="s8")
    decoded = pick("dequant_cost", "weights_TBps", scheme="s8")
    if not stream or not mma:
        return None
    return Ceilings(
        source=f"this {record.machine['gpu']} (microbenchmarks, commit {record.commit})",
        bytes_per_us=max(stream) * 1e6,
        ops_per_us=max(mma) * 1e6,
        decoded_bytes_per_us=max(decoded) * 1e6 if decoded else None,
    )


def ceilings_of(run: Run, microbenchmarks: Path | None = None) -> Ceilings:
    """Those of the GPU of a run, as far as they were measured.

    Where there are no microbenchmarks, the bandwidth is that of the run's own stream floor, and the
    throughput that of an H100's SMs, as many as the GPU has; `source` says so.

    Raises:
        results.BadResults: the file of microbenchmarks cannot be read.
    """
    if microbenchmarks is not None and microbenchmarks.exists():
        measured = from_microbenchmarks(programs.load(microbenchmarks))
        if measured is not None:
            return measured
    gpu = run.machine["gpu"]
    if machine.gpu_slug(gpu) == "h100-sxm" or not run.floors:
        return H100
    bandwidth = max(floor["bytes"] / floor["pdl_us"] for floor in run.floors)
    return Ceilings(
        f"this {gpu} (bandwidth: stream floor of this run) and {H100.source} (throughput per SM)",
        bytes_per_us=bandwidth,
        ops_per_us=H100.ops_per_us * run.machine["sms"] / H100_SMS,
    )


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
    dequantization_us: float
    mma_us: float

    @property
    def us(self) -> float:
        """All three at the same time, as the library's pipeline does it."""
        return max(self.memory_us, self.dequantization_us, self.mma_us)

    @property
    def in_turn_us(self) -> float:
        """Dequantization and multiplication one after the other, loads at the same time."""
        return max(self.memory_us, self.dequantization_us + self.mma_us)

    @property
    def binds(self) -> str:
        """Which of the three it is."""
        if self.us == self.memory_us:
            return "memory"
        return "mma" if self.us == self.mma_us else "dequantization"


def roofline(m: float, n: int, k: int, ceilings: Ceilings = H100) -> Roofline:
    """``packed bytes / bandwidth``, ``passes * packed bytes / decoding rate``, and ``2 M N K /
    throughput``, where a pass serves 256 tokens."""
    loaded = packed_bytes(n, k)
    passes = max(1.0, m / LARGEST_TILE)
    decoding = ceilings.decoded_bytes_per_us
    return Roofline(
        memory_us=loaded / ceilings.bytes_per_us,
        dequantization_us=passes * loaded / decoding if decoding else 0.0,
        mma_us=operations(m, n, k) / ceilings.ops_per_us,
    )


def roof_ops_per_us(m: float, ceilings: Ceilings = H100) -> float:
    """The roof at m tokens: the same for every weight that needs no padding."""
    return operations(m, PANEL, GROUP) / roofline(m, PANEL, GROUP, ceilings).us


def crossover_tokens(ceilings: Ceilings = H100) -> float:
    """Batch size from which on multiplications bind and not memory: 149 on an H100."""
    return ceilings.ops_per_us * BLOCK_BYTES / (2 * PANEL * GROUP * ceilings.bytes_per_us)
