"""Layers that are split by inputs over several GPUs, with the bits of one GPU.

What differs on several GPUs is that each has a scale of its own for its part of a token, and that
the parts are added in floats. Here the GPUs agree on the largest value of each token, quantize by
it, and add INT32 sums, which are exact; what follows is `gemm`'s own formula. Written in torch's
eager operations, each of which rounds once: a compiler that fuses them may not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import ops
from .layout import as_packed

Reduce = Callable[[Tensor], Tensor]


def row_maxima(x: Tensor) -> Tensor:
    """float32 ``[...]``: the largest magnitude of each row, infinite if one is not finite."""
    largest = x.abs().amax(-1).float()
    return torch.where(largest.isfinite(), largest, torch.inf)  # a NaN need not survive a maximum


def quantize(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The columns x of rows whose largest magnitude, there or elsewhere, is given.

    Args:
        x: ``[..., K]`` of a float dtype.
        largest: float32 ``[...]``, by `row_maxima` of all columns.

    Returns:
        int8 ``[..., K]`` and float32 ``[...]``, what `quantize_activation` gives for whole rows.
    """
    # A divisor on the CPU would be turned into a product by its reciprocal.
    step = largest / torch.full_like(largest, 127)
    step = torch.where(largest.isfinite(), step, torch.nan)
    q = (x.float() / step.unsqueeze(-1)).round_().clamp_(-127, 127)
    usable = (step > 0).unsqueeze(-1)
    return torch.where(usable, q, 0).to(torch.int8), step


def finish(
    total: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The output of `gemm` for its INT32 sums ``[..., N]``."""
    y = total.float().mul_(x_scale.unsqueeze(-1)).mul_(weight_scale)
    if bias is not None:
        y.add_(bias.float())
    return y.to(dtype)


def row_parallel(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    pad: tuple[int, int],
    largest: Reduce,
    total: Reduce,
) -> Tensor:
    """The output of the whole layer, on each GPU, from its columns.

    Args:
        x: ``[..., K]``, the features of this GPU.
        weight, gather, pad: of its `Packed`.
        weight_scale: float32 ``[N]``, the same on all GPUs.
        bias: ``[N]``, the same on all GPUs.
        largest, total: give the maximum and the sum of a tensor over all GPUs.

    Returns:
        ``[..., N]`` in the dtype of x, the bits of `linear` with the whole weight.
    """
    x8, x_scale = quantize(x, largest(row_maxima(x)))
    x8 = as_packed(x8, gather, pad)
    sums = ops.gemm(x8, x_scale, weight, weight_scale, out_dtype=torch.int32)
    return finish(total(sums), x_scale, weight_scale, bias, x.dtype)
