"""The five ops of ``torch.ops.liquidgemm``: schemas, shape functions, autograd.

CUDA implementations come from ``_C_cuda.so``, those of the CPU from ``_C_host.so``, which calls
`_reference` if it is told to (`_cpu`). All give the same bits.

Every op takes inputs of any layout, stride and storage offset, checks them before it computes, and
raises a RuntimeError that names the argument, what was expected and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library, register_fake, register_vmap

from ..weights.liquidquant import (
    BLOCK_BYTES,
    GROUP,
    MAX_IN_FEATURES,
    PANEL,
    ceil_div,
    decode,
    padded,
)
from . import _autograd, _library

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32)

_SCHEMAS = (
    "quantize_activation(Tensor x) -> (Tensor, Tensor)",
    "pack_weight(Tensor qweight, Tensor qscale, Tensor qoffset) -> Tensor",
    "unpack_weight(Tensor packed, int n) -> (Tensor, Tensor, Tensor)",
    "gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor",
)

_lib = Library("liquidgemm", "DEF")
for _schema in _SCHEMAS:
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_cuda_library_problem = _library.load_libraries()


# Checks of the shape functions. The kernels check for themselves, in the same words.


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    # torch._check also takes the symbolic conditions that arise under torch.compile.
    torch._check(condition, lambda: f"{argument}: expected {expected}, got {got}")


def _dtype_names(*dtypes: torch.dtype) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _require_dtype(argument: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    expected = f"dtype {_dtype_names(*allowed)}"
    _require(tensor.dtype in allowed, argument, expected, _dtype_names(tensor.dtype))


def _require_shape(argument: str, tensor: Tensor, shape: list[int], why: str = "") -> None:
    got = list(tensor.shape)
    _require(len(got) == len(shape), argument, f"shape {shape}{why}", got)
    for actual, expected in zip(got, shape, strict=True):
        _require(actual == expected, argument, f"shape {shape}{why}", got)


def _require_device(argument: str, tensor: Tensor, like: str, device: torch.device) -> None:
    _require(tensor.device == device, argument, f"on {device} like {like}", f"on {tensor.device}")


def _require_k(argument: str, k: int, limit: int) -> None:
    expected = f"K <= {limit} so that int32 accumulation cannot overflow"
    _require(k <= limit, argument, expected, f"K = {k}")


def _check_rows(x: Tensor, *dtypes: torch.dtype) -> None:
    _require_dtype("x", x, *dtypes)
    got = f"shape {list(x.shape)}"
    _require(x.dim() >= 1, "x", "at least 1 dimension", got)
    _require(x.shape[-1] >= 1, "x", "at least 1 column", got)


def _check_product(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """What `gemm` and `linear` ask of everything but the dtype of x and the token scales."""
    k = x.shape[-1]
    _require_k("x", k, MAX_IN_FEATURES)
    _require_dtype("weight", weight, torch.uint8)
    _require_dtype("weight_scale", weight_scale, torch.float32)
    shape = list(weight_scale.shape)
    _require(weight_scale.dim() == 1 and shape[0] >= 1, "weight_scale", "shape [N]", shape)
    n = shape[0]
    why = f" for N = {n} of weight_scale and K = {k} of x"
    _require_shape("weight", weight, [ceil_div(n, PANEL), ceil_div(k, GROUP), BLOCK_BYTES], why)
    if bias is not None:
        _require_dtype("bias", bias, *FLOATS)
        _require_shape("bias", bias, [n])
        _require_device("bias", bias, "x", x.device)
    _require_device("weight", weight, "x", x.device)
    _require_device("weight_scale", weight_scale, "x", x.device)


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
    _check_rows(x, torch.int8)
    _require_dtype("x_scale", x_scale, torch.float32)
    _require_shape("x_scale", x_scale, list(x.shape[:-1]))
    _require_device("x_scale", x_scale, "x", x.device)
    _check_product(x, weight, weight_scale, bias)
    names = _dtype_names(*OUT_DTYPES)
    _require(out_dtype in OUT_DTYPES, "out_dtype", names, _dtype_names(out_dtype))
    raw = out_dtype == torch.int32
    _require(not (raw and bias is not None), "bias", "None with out_dtype int32", "a tensor")
    return out_dtype


def _check_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    _check_rows(x, *FLOATS)
    _check_product(x, weight, weight_scale, bias)


# Shape functions: what torch.compile, torch.export and meta tensors see.


def _quantize_activation_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_rows(x, *FLOATS)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _pack_weight_fake(qweight: Tensor, qscale: Tensor, qoffset: Tensor) -> Tensor:
    for name, tensor in (("qweight", qweight), ("qscale", qscale), ("qoffset", qoffset)):
        _require_dtype(name, tensor, torch.uint8)
        _require_device(name, tensor, "qweight", qweight.device)
    shape = list(qweight.shape)
    _require(qweight.dim() == 2 and shape[0] >= 1, "qweight", "shape [N, K / 2]", shape)
    n, k = shape[0], 2 * shape[1]
    multiple = f"[N, K / 2] with K a positive multiple of {GROUP}"
    _require(k > 0 and k % GROUP == 0, "qweight", multiple, f"shape {shape}")
    _require_k("qweight", k, padded(MAX_IN_FEATURES))
    _require_shape("qscale", qscale, [n, k // GROUP])
    _require_shape("qoffset", qoffset, [n, k // GROUP])
    return qweight.new_empty(ceil_div(n, PANEL), k // GROUP, BLOCK_BYTES)


def _unpack_weight_fake(packed: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    _require_dtype("packed", packed, torch.uint8)
    shape = list(packed.shape)
    whole = packed.dim() == 3 and shape[0] >= 1 and shape[1] >= 1 and shape[2] == BLOCK_BYTES
    expected = f"a packed weight [ceil(N / {PANEL}), K / {GROUP}, {BLOCK_BYTES}] from pack_weight"
    _require(whole, "packed", expected, f"shape {shape}")
    panels, groups = shape[:2]
    _require_k("packed", groups * GROUP, padded(MAX_IN_FEATURES))
    span = f"{(panels - 1) * PANEL + 1} to {panels * PANEL} rows for packed of shape {shape}"
    _require(n >= 1 and ceil_div(n, PANEL) == panels, "n", span, n)
    return (
        packed.new_empty(n, groups * GROUP // 2),
        packed.new_empty(n, groups),
        packed.new_empty(n, groups),
    )


def _gemm_fake(x, x_scale, weight, weight_scale, bias=None, out_dtype=None) -> Tensor:
    out_dtype = _check_gemm(x, x_scale, weight, weight_scale, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=out_dtype)


def _linear_fake(x, weight, weight_scale, bias=None) -> Tensor:
    _check_linear(x, weight, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


# Derivatives. All take the rounding of x for the identity ("straight-through").


def _dequantized(weight: Tensor, weight_scale: Tensor, k: int) -> Tensor:
    w8 = decode(*unpack_weight(weight, weight_scale.shape[0]))[:, :k]
    return w8.float() * weight_scale.unsqueeze(-1)


class _LinearRules(_autograd.Rules):
    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, x, weight, weight_scale, bias = inputs
        ctx.in_features = x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.dtype, ctx.shape = output.dtype, output.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, weight_scale)
        ctx.save_for_forward(weight, weight_scale)

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[3]:
            raise RuntimeError(_ONLY_X_AND_BIAS)
        if grad is not None and ctx.needs_input_grad[1]:
            w = _dequantized(*ctx.saved_tensors, ctx.in_features)
            grad_x = grad @ w.to(grad.dtype)
        if grad is not None and ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return None, grad_x, None, None, grad_bias

    @staticmethod
    def jvp(ctx, _, x, weight, weight_scale, bias):
        if weight_scale is not None:
            raise RuntimeError(_ONLY_X_AND_BIAS)
        tangent = None
        if x is not None:
            w = _dequantized(*ctx.saved_tensors, ctx.in_features)
            tangent = x @ w.to(ctx.dtype).T
        if bias is not None:
            bias = bias.to(ctx.dtype).expand(ctx.shape)
            tangent = bias.clone() if tangent is None else tangent + bias
        return tangent


_ONLY_X_AND_BIAS = "liquidgemm.linear is differentiable with respect to x and bias alone"


def _linear_vmap(info, in_dims, x, weight, weight_scale, bias=None):
    """One call for a batch of x, one for each sample where the weight has a batch of its own."""
    args, in_dims = (x, weight, weight_scale, bias), (*in_dims, None)[:4]
    if in_dims[1:] == (None, None, None):
        return linear(x.movedim(in_dims[0], 0), *args[1:]), 0
    samples = (
        (t if dim is None else t.select(dim, i) for t, dim in zip(args, in_dims, strict=True))
        for i in range(info.batch_size)
    )
    return torch.stack([linear(*sample) for sample in samples]), 0


# Registration.


def _without_cuda_library(op: str):
    def raise_readable(*args, **kwargs):
        raise RuntimeError(
            f"liquidgemm.{op}: the CUDA implementation is not loaded: {_cuda_library_problem}"
        )

    return raise_readable


for _op, _fake in (
    ("quantize_activation", _quantize_activation_fake),
    ("pack_weight", _pack_weight_fake),
    ("unpack_weight", _unpack_weight_fake),
    ("gemm", _gemm_fake),
    ("linear", _linear_fake),
):
    register_fake(f"liquidgemm::{_op}", _fake, lib=_lib)
    if _cuda_library_problem is not None:
        _lib.impl(_op, _without_cuda_library(_op), "CUDA")

_autograd.register("linear", _LinearRules, _lib)
for _op in ("quantize_activation", "gemm"):
    _autograd.register(_op, _autograd.not_differentiable(_op), _lib)
register_vmap("liquidgemm::linear", _linear_vmap, lib=_lib)


# Public functions.


_linear = torch.ops.liquidgemm.linear.default


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


def pack_weight(qweight: Tensor, qscale: Tensor, qoffset: Tensor) -> Tensor:
    """Bring a weight from the logical layout (`weights.liquidquant`) to the one the kernel reads.

    Args:
        qweight: uint8 ``[N, K / 2]``, two 4-bit values per byte, K a multiple of 64.
        qscale: uint8 ``[N, K / 64]``, the integer step s of each group.
        qoffset: uint8 ``[N, K / 64]``, the offset a of each group.

    Returns:
        uint8 ``[ceil(N / 64), K / 64, 2176]``, contiguous.

    Raises:
        RuntimeError: a wrong dtype, device or shape, K = 0 or too large for an exact INT32 sum,
            or a group in which some ``q * s + a`` exceeds 255.
    """
    return torch.ops.liquidgemm.pack_weight(qweight, qscale, qoffset)


def unpack_weight(packed: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact inverse of `pack_weight`.

    Args:
        packed: uint8 ``[ceil(n / 64), K / 64, 2176]``.
        n: number of rows N of the weight.

    Returns:
        ``qweight`` uint8 ``[n, K / 2]``, ``qscale`` and ``qoffset`` uint8 ``[n, K / 64]``.

    Raises:
        RuntimeError: a wrong dtype or shape, or an n that does not have this many panels.
    """
    return torch.ops.liquidgemm.unpack_weight(packed, n)


def gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``y[m, n] = float32(sum_k x[m, k] * w8[n, k]) * x_scale[m] * weight_scale[n] + bias[n]``.

    The sum is exact. The operations after it are float32, each rounded separately, in the order
    written, and the result is cast once: all outputs are bit-identical whatever the batch size,
    the kernel configuration or the device.

    Args:
        x: int8 ``[..., K]`` with values in -127..127, K up to 132 104.
        x_scale: float32 ``[...]``, one scale per row of x.
        weight: packed weight, uint8 ``[ceil(N / 64), ceil(K / 64), 2176]``. It tells its K only
            rounded up to a multiple of 64: an x with up to 63 columns less is taken, and columns
            of the weight past those of x are ignored. `LiquidLinear` checks K itself.
        weight_scale: float32 ``[N]``.
        bias: float32, bfloat16 or float16 ``[N]``.
        out_dtype: bfloat16 (default), float16 or float32; int32 returns the sum itself, without
            scales (bias must be None).

    Returns:
        ``[..., N]`` of out_dtype, contiguous.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or on a CUDA tensor no usable kernel.
    """
    return torch.ops.liquidgemm.gemm(x, x_scale, weight, weight_scale, bias, out_dtype)


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`quantize_activation` and `gemm` in one call; the output has the dtype of x.

    Differentiable with respect to x and bias, in reverse and forward mode and under torch.func's
    transforms. The derivative is that of the dequantized weight W, ``grad_y @ W`` and
    ``dx @ W.T``: rounding x is passed straight through.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``, K up to 132 104.
        weight: packed weight, uint8 ``[ceil(N / 64), ceil(K / 64), 2176]``. It tells its K only
            rounded up to a multiple of 64, as in `gemm`.
        weight_scale: float32 ``[N]``.
        bias: float32, bfloat16 or float16 ``[N]``.

    Returns:
        ``[..., N]`` of x.dtype, contiguous.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or on a CUDA tensor no usable kernel; and
            where a derivative with respect to weight_scale is asked for.
    """
    if torch.compiler.is_compiling() or _autograd.may_be_differentiated(
        x, weight, weight_scale, bias
    ):
        return _linear(x, weight, weight_scale, bias)
    # The dispatcher would ask the same in Python, which costs an eager call microseconds.
    with torch._C._AutoDispatchBelowAutograd():
        return _linear(x, weight, weight_scale, bias)
