"""The op `grouped_gemm`."""

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
from . import _autograd, _registry
from ._checks import (
    FLOATS,
    dtype_names,
    require,
    require_device,
    require_dtype,
    require_k,
    require_shape,
)
from ._gemm import OUT_DTYPES

GATED = ("silu_mul", "gelu_tanh_mul", "swiglu_clamped")
ACTIVATIONS = ("none", *GATED)

INTERLEAVE = 8
"""Channels of the gate, and as many of the other half, that follow each other in a weight whose
product an activation ends."""


def check_matrix(argument: str, x: Tensor, *dtypes: torch.dtype) -> None:
    require_dtype(argument, x, *dtypes)
    got = list(x.shape)
    require(len(got) == 2 and got[1] >= 1, argument, "shape [rows, columns >= 1]", got)


def check_experts(
    k: int, like: Tensor, names: tuple[str, str, str], weight: Tensor, scale: Tensor, bias
) -> tuple[int, int]:
    """Checks the stacked weights of some experts for K = k columns; returns E and N."""
    weight_name, scale_name, bias_name = names
    require_k("x", k, MAX_IN_FEATURES)
    require_dtype(weight_name, weight, torch.uint8)
    require_dtype(scale_name, scale, torch.float32)
    shape = list(scale.shape)
    whole = len(shape) == 2 and shape[0] >= 1 and shape[1] >= 1
    require(whole, scale_name, "shape [E, N]", shape)
    experts, n = shape
    only = "4-bit weights in groups of 64, which experts alone are compiled for"
    # Compared, not looked up: a symbolic size has no hash.
    others = (
        (int8.BLOCK_BYTES, "INT8"),
        (BLOCK_BYTES_6, "6-bit"),
        (BLOCK_BYTES_G32, "group-of-32"),
    )
    block = weight.shape[-1] if weight.dim() > 0 else None
    other = next((name for size, name in others if block == size), None)
    require(other is None, weight_name, only, f"{other} weights of shape {list(weight.shape)}")
    packed = [experts, ceil_div(n, PANEL), ceil_div(k, GROUP), BLOCK_BYTES]
    why = f" for E = {experts} and N = {n} of {scale_name} and K = {k}"
    require_shape(weight_name, weight, packed, why)
    if bias is not None:
        require_dtype(bias_name, bias, *FLOATS)
        require_shape(bias_name, bias, [experts, n])
        require_device(bias_name, bias, "x", like.device)
    require_device(weight_name, weight, "x", like.device)
    require_device(scale_name, scale, "x", like.device)
    return experts, n


def check_activation(activation: str, n: int, scale_name: str, allowed=ACTIVATIONS) -> None:
    names = " or ".join(allowed)
    require(activation in allowed, "activation", names, repr(activation))
    if activation != "none":
        multiple = f"N a multiple of {2 * INTERLEAVE} with activation {activation}"
        require(n % (2 * INTERLEAVE) == 0, scale_name, multiple, f"N = {n}")


def _grouped_gemm_fake(
    x, x_scale, weight, weight_scale, offsets, bias=None, out_dtype=None, activation="none"
) -> Tensor:
    out_dtype = torch.bfloat16 if out_dtype is None else out_dtype
    check_matrix("x", x, torch.int8)
    rows, k = x.shape
    require_dtype("x_scale", x_scale, torch.float32)
    require_shape("x_scale", x_scale, [rows])
    require_device("x_scale", x_scale, "x", x.device)
    names = ("weight", "weight_scale", "bias")
    experts, n = check_experts(k, x, names, weight, weight_scale, bias)
    require_dtype("offsets", offsets, torch.int32)
    require_shape("offsets", offsets, [experts + 1], f" for E = {experts} of weight_scale")
    require_device("offsets", offsets, "x", x.device)
    check_activation(activation, n, "weight_scale")
    require(out_dtype in OUT_DTYPES, "out_dtype", dtype_names(*OUT_DTYPES), dtype_names(out_dtype))
    raw = out_dtype == torch.int32
    require(not (raw and bias is not None), "bias", "None with out_dtype int32", "a tensor")
    require(not raw or activation == "none", "activation", "none with out_dtype int32", activation)
    return x.new_empty((rows, n if activation == "none" else n // 2), dtype=out_dtype)


_registry.define(
    "grouped_gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor offsets, "
    'Tensor? bias=None, ScalarType? out_dtype=None, str activation="none") -> Tensor',
    _grouped_gemm_fake,
    _autograd.not_differentiable("grouped_gemm"),
)


def grouped_gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
) -> Tensor:
    """`gemm` of rows sorted by expert, each with the weight of its own expert.

    Rows ``offsets[e]`` to ``offsets[e + 1]`` of x are multiplied by expert e, to the same bits as
    by `gemm`. The offsets are data of the device: they are not read by the host, so that a CUDA
    graph may be replayed with others. They have to ascend from 0 to at most R. Whatever they hold,
    no memory outside x and the output is touched.

    An activation other than "none" ends the product: with g and u the two halves of its channels,
    rounded to out_dtype as `gemm` does, the output is ``act(g) * u``, with act(g) and the product
    each rounded to out_dtype. The rows of such a weight are interleaved before it is packed
    (`LiquidExperts` does so): rows 16j to 16j + 7 are channels 8j to 8j + 7 of the gate, rows
    16j + 8 to 16j + 15 those of the other half.

    - "silu_mul": ``g * sigmoid(g) * u``.
    - "gelu_tanh_mul": the tanh form of GELU of g, times u.
    - "swiglu_clamped": with g at most 7 and u from -7 to 7,
      ``g * sigmoid(1.702 * g) * (u + 1)``.

    Args:
        x: int8 ``[R, K]`` with values in -127..127, K up to 132 104.
        x_scale: float32 ``[R]``.
        weight: packed weights, uint8 ``[E, ceil(N / 64), ceil(K / 64), 2176]``.
        weight_scale: float32 ``[E, N]``.
        offsets: int32 ``[E + 1]``.
        bias: float32, bfloat16 or float16 ``[E, N]``, added before the activation.
        out_dtype: bfloat16 (default), float16 or float32; int32 returns the sums themselves,
            without scales (bias must be None and activation "none").
        activation: one of those above; N is a multiple of 16 with any but "none".

    Returns:
        ``[R, N]``, or ``[R, N / 2]`` with an activation, of out_dtype, contiguous. Rows from
        ``offsets[E]`` on are not written.

    Raises:
        RuntimeError: a wrong dtype, shape or device, an unknown activation, or on a CUDA tensor no
            usable kernel.
    """
    return torch.ops.liquidgemm.grouped_gemm(
        x, x_scale, weight, weight_scale, offsets, bias, out_dtype, activation
    )
