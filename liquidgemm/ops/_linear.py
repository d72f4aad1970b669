"""The op `linear` and its derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_vmap

from . import _autograd, _registry
from ._checks import FLOATS, check_product, check_rows
from ._dequantize import dequantize_packed

_ONLY_X_AND_BIAS = "liquidgemm.linear is differentiable with respect to x and bias alone"


def _linear_fake(x, weight, weight_scale, bias=None) -> Tensor:
    check_rows(x, *FLOATS)
    check_product(x, weight, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


# Derivatives. All take the rounding of x for the identity ("straight-through").


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
            packed, scale = ctx.saved_tensors
            grad_x = grad @ dequantize_packed(packed, scale, ctx.in_features, grad.dtype)
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
            packed, scale = ctx.saved_tensors
            tangent = x @ dequantize_packed(packed, scale, ctx.in_features, ctx.dtype).T
        if bias is not None:
            bias = bias.to(ctx.dtype).expand(ctx.shape)
            tangent = bias.clone() if tangent is None else tangent + bias
        return tangent


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


_linear = _registry.define(
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor",
    _linear_fake,
    _LinearRules,
)
register_vmap("liquidgemm::linear", _linear_vmap, lib=_registry.LIB)


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`quantize_activation` and `gemm` in one call; the output has the dtype of x.

    Differentiable with respect to x and bias, in reverse and forward mode and under torch.func's
    transforms. The derivative is that of the dequantized weight W, ``grad_y @ W`` and
    ``dx @ W.T``: rounding x is passed straight through.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``, K up to 132 104.
        weight: packed weight, uint8 ``[ceil(N / 64), ceil(K / 64), 2176]``, or 2304, 3200 or 4096,
            as in `gemm`. It tells its K only rounded up to a multiple of 64.
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
