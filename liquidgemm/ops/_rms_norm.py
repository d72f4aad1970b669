"""The op `rms_norm_quantize`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.liquidquant import MAX_IN_FEATURES
from . import _autograd, _registry
from ._checks import (
    FLOATS,
    check_rows,
    require,
    require_device,
    require_dtype,
    require_k,
    require_shape,
)
from ._tokens import QuantizedTokens

NORM_MODES = ("llama", "gemma")


def _rms_norm_quantize_fake(
    x, weight, eps, residual=None, mode="llama", offset=0.0, return_y=False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rows(x, *FLOATS)
    require_k("x", x.shape[-1], MAX_IN_FEATURES)
    require_dtype("weight", weight, *FLOATS)
    require_shape("weight", weight, [x.shape[-1]], " like the last dimension of x")
    require_device("weight", weight, "x", x.device)
    require(eps >= 0, "eps", "a number >= 0", eps)
    if residual is not None:
        require_dtype("residual", residual, x.dtype)
        require_shape("residual", residual, list(x.shape), " like x")
        require_device("residual", residual, "x", x.device)
    require(mode in NORM_MODES, "mode", " or ".join(NORM_MODES), mode)
    require(mode == "gemma" or offset == 0, "offset", "0 in mode llama", offset)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(x.shape if return_y else 0),
    )


_registry.define(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, Tensor? residual=None, "
    'str mode="llama", float offset=0.0, bool return_y=False) -> (Tensor, Tensor, Tensor, Tensor)',
    _rms_norm_quantize_fake,
    _autograd.not_differentiable("rms_norm_quantize"),
)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    mode: str = "llama",
    offset: float = 0.0,
    return_y: bool = False,
) -> tuple[QuantizedTokens, Tensor | None, Tensor | None]:
    """RMSNorm, with a residual added before it if there is one, and `quantize_activation`.

    With R for rounding to the dtype of x, and everything else in float32, each operation rounded
    separately::

        h = R(x + residual)                         # or x
        r = 1 / sqrt(mean(h^2) + eps)
        y = R(weight * R(h * r))                    # mode "llama"
        y = R((h * r) * (offset + weight))          # mode "gemma"

    and y quantized. These are the roundings of transformers' layers in eager mode: "llama" those of
    Llama, Mistral, Qwen2, Qwen3 and Phi-3, "gemma" with an offset of 1 those of Gemma to Gemma-3,
    with 0 those of OLMo-2. The sum of squares has an order that depends on K alone, so that the
    result depends neither on the number of tokens nor on the device.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``, K up to 132 104.
        weight: float32, bfloat16 or float16 ``[K]``. On a GPU it may be read before the kernel
            launched right before is complete, so that one must not write it.
        eps: a number >= 0, rounded to float32.
        residual: like x.
        mode: "llama" or "gemma".
        offset: added to the weight; in mode "llama" it is 0.
        return_y: whether y is wanted as well.

    Returns:
        The quantized y, h if there is a residual, else None, and y if it is wanted, else None; h
        and y are of the shape and dtype of x, contiguous.

    Raises:
        RuntimeError: an argument has another dtype, shape or device, or another value.
    """
    x8, scale, h, y = torch.ops.liquidgemm.rms_norm_quantize(
        x, weight, eps, residual, mode, offset, return_y
    )
    tokens = QuantizedTokens(x8, scale, x.dtype)
    return tokens, None if residual is None else h, y if return_y else None
