"""The CPU path in plain torch: what every kernel has to equal to the bit.

``liquidgemm.set_cpu_kernel("reference")`` makes the ops of the CPU call those below. They get
arguments that have been checked. Every partial sum of a product in float64 is an exact integer, in
any order and on any processor, and every floating-point operation around it is a separately
rounded float32 operation in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.library import Library

from ..formats.liquidquant import PANEL, ceil_div
from ._pack import decoded

NAME = "reference"

# Size of what is worked on at a time, as float64: small enough to stay in a cache and to be
# allocated without fresh pages from the system, large enough for matmul.
_CHUNK_BYTES = 8 << 20


def _row_chunks(rows: int, bytes_per_row: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of about _CHUNK_BYTES that cover ``range(rows)``, each a multiple long."""
    step = max(1, _CHUNK_BYTES // (bytes_per_row * multiple)) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    x8 = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows, rows8, row_scale = x.reshape(-1, columns), x8.view(-1, columns), scale.view(-1)
    for chunk in _row_chunks(len(rows), 4 * columns):
        values = rows[chunk].float()
        amax = values.abs().amax(-1)  # NaN if any entry is NaN
        finite = amax.isfinite()
        step = torch.where(finite, amax / 127, torch.nan)
        q = (values / step.unsqueeze(-1)).round_().clamp_(-127, 127)
        usable = finite & (step > 0)
        rows8[chunk] = torch.where(usable.unsqueeze(-1), q, 0.0).to(torch.int8)
        row_scale[chunk] = step
    return x8, scale


def gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    k, n = x.shape[-1], weight_scale.shape[0]
    out = x.new_empty((*x.shape[:-1], n), dtype=out_dtype)
    rows, row_scale, out_rows = x.reshape(-1, k), x_scale.reshape(-1, 1), out.view(-1, n)
    for n_chunk in _row_chunks(n, 8 * k, PANEL):
        panels = weight[n_chunk.start // PANEL : ceil_div(n_chunk.stop, PANEL)]
        w = decoded(panels, n_chunk.stop - n_chunk.start)[:, :k].double()
        for m_chunk in _row_chunks(len(rows), 8 * k):
            acc = rows[m_chunk].double() @ w.T
            if out_dtype != torch.int32:
                acc = acc.float().mul_(row_scale[m_chunk]).mul_(weight_scale[n_chunk])
                if bias is not None:
                    acc.add_(bias[n_chunk].float())
            out_rows[m_chunk, n_chunk] = acc.to(out_dtype)
    return out


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    x8, x_scale = quantize_activation(x)
    return gemm(x8, x_scale, weight, weight_scale, bias, x.dtype)


_lib = Library("liquidgemm_reference", "DEF")


def define(function: Callable, schema: str) -> None:
    """Make a function of this kind an op, for the C++ side to call."""
    _lib.define(function.__name__ + schema)
    _lib.impl(function.__name__, function, "CPU")


define(quantize_activation, "(Tensor x) -> (Tensor, Tensor)")
define(
    gemm,
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
)
define(linear, "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor")
