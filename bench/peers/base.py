"""What the driver asks of everything that it measures, and how results are checked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

POISON = -0x21524111  # of integer outputs: beyond any sum of 8-bit products at K below 34 000

# Elements of a float64 copy of a weight that the exact product works on at a time.
_CHUNK_ELEMENTS = 1 << 26


class Unsupported(Exception):
    """A peer cannot do what is asked; the message says why."""


class WrongResult(Exception):
    """A peer's result is not what its own quantized operands give."""


@dataclass(frozen=True)
class Way:
    """One way of calling a peer that is timed for itself.

    Attributes:
        op: "gemm" (the activations are quantized already), "linear" (they are bf16, and their
            quantization counts) or "both" (they are bf16 and stay so: comparable to either).
        variant: what tells it from other ways of the same op; the fastest one counts.
    """

    op: str
    variant: str = ""

    def serves(self, op: str) -> bool:
        return self.op in (op, "both")


class Peer(ABC):
    """A library's product ``x [M, K] @ weight [N, K].T``, in whatever number formats it has.

    One object serves one weight. All start from the same bf16 tensors and quantize them in their
    own way.
    """

    name: ClassVar[str]
    package: ClassVar[str] = "torch"  # the distribution that it comes with
    module: ClassVar[str] = "torch"  # the module that must be importable
    ways: ClassVar[tuple[Way, ...]]
    tolerance: ClassVar[float]  # of the relative error in the Frobenius norm; 0 means all bits
    min_tokens: ClassVar[int] = 1

    @classmethod
    def why_absent(cls) -> str | None:
        """Why it cannot be measured here, or None."""
        if importlib.util.find_spec(cls.module) is None:
            return f"{cls.package} is not installed"
        return None

    @classmethod
    def version(cls) -> str:
        try:
            return importlib.metadata.version(cls.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    @abstractmethod
    def __init__(self, weight: Tensor) -> None:
        """Quantizes the weight, bf16 ``[N, K]``; raises Unsupported if it cannot."""

    @abstractmethod
    def new_copy(self) -> Any:
        """A copy of the quantized weight in memory of its own, as `call` takes it."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of one copy that a call reads."""

    @abstractmethod
    def tokens(self, way: Way, x: Tensor) -> Any:
        """The activations, bf16 ``[M, K]``, as `call` takes them."""

    @abstractmethod
    def call(self, way: Way, tokens: Any, weight: Any) -> Tensor:
        """The product ``[M, N]``: what is timed."""

    @abstractmethod
    def expected(self, way: Way, tokens: Any, rows: Tensor) -> Tensor:
        """These rows of the product, from the same quantized operands by exact_product."""

    def describe(self, way: Way, m: int) -> str:
        """What ran, in a few words, for the record."""
        return way.variant


def exact_product(x: Tensor, w: Tensor) -> Tensor:
    """``x [R, K] @ w [N, K].T`` in float64: exact for 8-bit integers.

    Every operand has at most 16 bits, which float32 holds exactly; not all 8-bit types convert to
    float64 directly.
    """
    rows = max(1, _CHUNK_ELEMENTS // w.shape[1])
    x = x.float().double()
    return torch.cat([x @ part.float().double().T for part in w.split(rows)], dim=1)


def check_result(peer: Peer, way: Way, tokens: Any, out: Tensor, rows: Tensor) -> float:
    """The relative error of these rows in the Frobenius norm; 0 if every bit must be right and is.

    Raises:
        WrongResult: it is above the peer's tolerance or not a number, or a value outside these
            rows is still the poison.
    """
    left = int(out.isnan().sum()) if out.is_floating_point() else int((out == POISON).sum())
    if left:
        raise WrongResult(f"{left} of {out.numel()} values were not written, or are NaN")
    expected = peer.expected(way, tokens, rows)
    if peer.tolerance == 0:
        _require_equal(out[rows], expected, rows)
        return 0.0
    expected = expected.double()
    error = ((out[rows].double() - expected).norm() / expected.norm()).item()
    if not error <= peer.tolerance:
        raise WrongResult(f"relative error {error:.3g}, at most {peer.tolerance:g} expected")
    return error


def poison(out: Tensor) -> None:
    """Overwrites an output with what no product gives."""
    out.fill_(float("nan") if out.is_floating_point() else POISON)


def _require_equal(got: Tensor, expected: Tensor, rows: Tensor) -> None:
    if torch.equal(got, expected):
        return
    wrong = got != expected
    row, column = wrong.nonzero()[0].tolist()
    raise WrongResult(
        f"{int(wrong.sum())} of {wrong.numel()} values are wrong, first in row "
        f"{rows[row].item()}, column {column}: got {got[row, column].item()}, expected "
        f"{expected[row, column].item()}"
    )


def sample_rows(m: int, at_most: int, device: torch.device) -> Tensor:
    """Indices of at most that many rows, evenly spread, the first and the last among them."""
    return torch.linspace(0, m - 1, min(m, at_most), device=device).round().long()
