"""The op `quantize_activation`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _autograd, _registry
from ._checks import FLOATS, check_rows


def _quantize_activation_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(x, *FLOATS)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


_registry.define(
    "quantize_activation(Tensor x) -> (Tensor, Tensor)",
    _quantize_activation_fake,
    _autograd.not_differentiable("quantize_activation"),
)


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each token (row) to INT8 with its own scale.

    ``x_scale = max|x| / 127`` and ``x8 = clamp(round(x / x_scale), -127, 127)`` in float32, with
    IEEE division, denormals kept and ties rounded to even. A row with a NaN or an infinity gets
    ``x_scale = NaN`` and ``x8 = 0``, so that exactly its own outputs become NaN. A row whose
    scale is zero gets ``x8 = 0``.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``.

    Returns:
        ``x8`` int8 ``[..., K]`` (contiguous) and ``x_scale`` float32 ``[...]``.

    Raises:
        RuntimeError: x has another dtype, no dimension or no columns.
    """
    return torch.ops.liquidgemm.quantize_activation(x)
