"""Checks of the ops' shape functions. The kernels check for themselves, in the same words."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import int8
from ..formats.liquidquant import (
    BLOCK_BYTES,
    BLOCK_BYTES_6,
    BLOCK_BYTES_G32,
    GROUP,
    MAX_IN_FEATURES,
    PANEL,
    ceil_div,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    # torch._check also takes the symbolic conditions that arise under torch.compile.
    torch._check(condition, lambda: f"{argument}: expected {expected}, got {got}")


def dtype_names(*dtypes: torch.dtype) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def require_dtype(argument: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    expected = f"dtype {dtype_names(*allowed)}"
    require(tensor.dtype in allowed, argument, expected, dtype_names(tensor.dtype))


def require_shape(argument: str, tensor: Tensor, shape: list[int], why: str = "") -> None:
    got = list(tensor.shape)
    require(len(got) == len(shape), argument, f"shape {shape}{why}", got)
    for actual, expected in zip(got, shape, strict=True):
        require(actual == expected, argument, f"shape {shape}{why}", got)


def require_device(argument: str, tensor: Tensor, like: str, device: torch.device) -> None:
    require(tensor.device == device, argument, f"on {device} like {like}", f"on {tensor.device}")


def require_k(argument: str, k: int, limit: int) -> None:
    expected = f"K <= {limit} so that int32 accumulation cannot overflow"
    require(k <= limit, argument, expected, f"K = {k}")


def check_rows(x: Tensor, *dtypes: torch.dtype) -> None:
    require_dtype("x", x, *dtypes)
    got = f"shape {list(x.shape)}"
    require(x.dim() >= 1, "x", "at least 1 dimension", got)
    require(x.shape[-1] >= 1, "x", "at least 1 column", got)


def check_blocks(weight: Tensor, n: int, k: int, why: str) -> None:
    """Checks the shape of a packed weight. What is of no format is taken for LiquidQuant."""
    of_format = (int8.BLOCK_BYTES, BLOCK_BYTES_6, BLOCK_BYTES_G32)
    known = weight.dim() > 0 and weight.shape[-1] in of_format
    block = weight.shape[-1] if known else BLOCK_BYTES
    require_shape("weight", weight, [ceil_div(n, PANEL), ceil_div(k, GROUP), block], why)


def check_product(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """What `gemm` and `linear` ask of everything but the dtype of x and the token scales."""
    k = x.shape[-1]
    require_k("x", k, MAX_IN_FEATURES)
    require_dtype("weight", weight, torch.uint8)
    require_dtype("weight_scale", weight_scale, torch.float32)
    shape = list(weight_scale.shape)
    require(weight_scale.dim() == 1 and shape[0] >= 1, "weight_scale", "shape [N]", shape)
    n = shape[0]
    why = f" for N = {n} of weight_scale and K = {k} of x"
    check_blocks(weight, n, k, why)
    if bias is not None:
        require_dtype("bias", bias, *FLOATS)
        require_shape("bias", bias, [n])
        require_device("bias", bias, "x", x.device)
    require_device("weight", weight, "x", x.device)
    require_device("weight_scale", weight_scale, "x", x.device)
