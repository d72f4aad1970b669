"""The op `gemm`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _autograd, _registry
from ._checks import (
    check_product,
    check_rows,
    dtype_names,
    require,
    require_device,
    require_dtype,
    require_shape,
)

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32)


def _check_gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """Checks all arguments and returns the dtype of the output."""
    out_dtype = torch.bfloat16 if out_dtype is None else out_dtype
    check_rows(x, torch.int8)
    require_dtype("x_scale", x_scale, torch.float32)
    require_shape("x_scale", x_scale, list(x.shape[:-1]))
    require_device("x_scale", x_scale, "x", x.device)
    check_product(x, weight, weight_scale, bias)
    names = dtype_names(*OUT_DTYPES)
    require(out_dtype in OUT_DTYPES, "out_dtype", names, dtype_names(out_dtype))
    raw = out_dtype == torch.int32
    require(not (raw and bias is not None), "bias", "None with out_dtype int32", "a tensor")
    return out_dtype


def _gemm_fake(
    x, x_scale, weight, weight_scale, bias=None, out_dtype=None, follows_producer=False
) -> Tensor:
    out_dtype = _check_gemm(x, x_scale, weight, weight_scale, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=out_dtype)


_registry.define(
    "gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
    "ScalarType? out_dtype=None, bool follows_producer=False) -> Tensor",
    _gemm_fake,
    _autograd.not_differentiable("gemm"),
)


def gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    follows_producer: bool = False,
) -> Tensor:
    """``y[m, n] = float32(sum_k x[m, k] * w8[n, k]) * x_scale[m] * weight_scale[n] + bias[n]``.

    The sum is exact. The operations after it are float32, each rounded separately, in the order
    written, and the result is cast once: all outputs are bit-identical whatever the batch size,
    the kernel configuration or the device.

    Args:
        x: int8 ``[..., K]`` with values in -127..127, K up to 132 104.
        x_scale: float32 ``[...]``, one scale per row of x.
        weight: packed weight, uint8 ``[ceil(N / 64), ceil(K / 64), 2176]`` from `pack_weight`, or
            2304 (groups of 32) or 3200 (6 bits), or 4096 from `pack_int8_weight`. It tells its K
            only rounded up to a multiple of 64: an x with up to 63 columns less is taken, and
            columns of the weight past those of x are ignored. `LiquidLinear` checks K itself.
        weight_scale: float32 ``[N]``.
        bias: float32, bfloat16 or float16 ``[N]``.
        out_dtype: bfloat16 (default), float16 or float32; int32 returns the sum itself, without
            scales (bias must be None).
        follows_producer: whether the kernel that writes x is launched right before, on the same
            stream: then another plan may be faster. The result is the same.

    Returns:
        ``[..., N]`` of out_dtype, contiguous.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or on a CUDA tensor no usable kernel.
    """
    return torch.ops.liquidgemm.gemm(
        x, x_scale, weight, weight_scale, bias, out_dtype, follows_producer
    )
