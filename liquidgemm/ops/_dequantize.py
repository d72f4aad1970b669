"""The op `dequantize_packed`: what products of floats by others are given, in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.liquidquant import MAX_IN_FEATURES
from . import _autograd, _registry
from ._checks import (
    FLOATS,
    check_blocks,
    dtype_names,
    require,
    require_device,
    require_dtype,
    require_k,
)
from ._pack import decoded


def _dequantize_fake(weight: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    require_dtype("weight", weight, torch.uint8)
    require_dtype("weight_scale", weight_scale, torch.float32)
    require_device("weight_scale", weight_scale, "weight", weight.device)
    shape = list(weight_scale.shape)
    require(weight_scale.dim() == 1 and shape[0] >= 1, "weight_scale", "shape [N]", shape)
    require(k >= 1, "k", "at least 1", k)
    require_k("k", k, MAX_IN_FEATURES)
    n = shape[0]
    why = f" for N = {n} of weight_scale and K = {k}"
    check_blocks(weight, n, k, why)
    require(dtype in FLOATS, "dtype", dtype_names(*FLOATS), dtype_names(dtype))
    return weight.new_empty((n, k), dtype=dtype)


def _dequantize_cpu(weight: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    _dequantize_fake(weight, weight_scale, k, dtype)
    w8 = decoded(weight, weight_scale.shape[0])[:, :k]
    return (w8.float() * weight_scale.unsqueeze(-1)).to(dtype)


_registry.define(
    "dequantize_packed(Tensor weight, Tensor weight_scale, int k, ScalarType dtype) -> Tensor",
    _dequantize_fake,
    _autograd.not_differentiable("dequantize_packed"),
)
_registry.LIB.impl("dequantize_packed", _dequantize_cpu, "CPU")


def dequantize_packed(
    weight: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``W[n, k] = cast(float32(w8[n, k]) * weight_scale[n])``, each operation rounded once.

    Args:
        weight: packed weight, uint8 ``[ceil(N / 64), ceil(K / 64), 2176]``, or 2304, 3200 or 4096,
            as in `gemm`.
        weight_scale: float32 ``[N]``.
        k: K.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[N, K]`` of that dtype, contiguous.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or on a CUDA tensor no usable kernel.
    """
    return torch.ops.liquidgemm.dequantize_packed(weight, weight_scale, k, dtype)
