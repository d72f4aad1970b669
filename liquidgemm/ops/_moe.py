"""The ops of a layer of experts: `moe`, and the parts that it is put together from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _registry
from ._checks import FLOATS, require, require_device, require_dtype, require_shape
from ._dequantize import dequantize_packed
from ._grouped import GATED, INTERLEAVE, check_activation, check_experts, check_matrix

_MOST_SLOTS = 2**31 - 1


def _check_ids(topk_ids: Tensor) -> None:
    require_dtype("topk_ids", topk_ids, torch.int32, torch.int64)
    shape = list(topk_ids.shape)
    whole = len(shape) == 2 and shape[1] >= 1
    require(whole, "topk_ids", "shape [tokens, top_k >= 1]", shape)
    slots = shape[0] * shape[1]
    require(slots <= _MOST_SLOTS, "topk_ids", f"at most {_MOST_SLOTS} entries", slots)


def _moe_schedule_fake(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_ids(topk_ids)
    require(num_experts >= 1, "num_experts", "at least 1", num_experts)
    slots = topk_ids.shape[0] * topk_ids.shape[1]

    def empty(size: int) -> Tensor:
        return topk_ids.new_empty(size, dtype=torch.int32)

    return empty(num_experts + 1), empty(slots), empty(slots)


_registry.define(
    "moe_schedule(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)",
    _moe_schedule_fake,
)


def moe_schedule(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the slots of a routing by expert.

    Slot ``t * top_k + j`` is the j-th choice of token t. The sort is stable: the rows of an expert
    are in the order of tokens. Ids outside 0 to num_experts - 1 are dropped: those of experts that
    are elsewhere, as in expert parallelism.

    Args:
        topk_ids: int32 or int64 ``[tokens, top_k]``, the experts of each token.
        num_experts: E.

    Returns:
        ``offsets`` int32 ``[E + 1]``: rows ``offsets[e]`` to ``offsets[e + 1]`` are expert e's.
        ``row_of_slot`` int32 ``[tokens * top_k]``: -1 for a slot that was dropped.
        ``slot_of_row`` int32 ``[tokens * top_k]``: -1 from ``offsets[E]`` on.

    Raises:
        RuntimeError: a wrong dtype or shape, or num_experts below 1.
    """
    return torch.ops.liquidgemm.moe_schedule(topk_ids, num_experts)


def _quantize_activation_rows_fake(
    x: Tensor, slot_of_row: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    check_matrix("x", x, *FLOATS)
    require_dtype("slot_of_row", slot_of_row, torch.int32)
    got = list(slot_of_row.shape)
    require(slot_of_row.dim() == 1, "slot_of_row", "shape [R]", got)
    require_device("slot_of_row", slot_of_row, "x", x.device)
    require(top_k >= 1, "top_k", "at least 1", top_k)
    rows = slot_of_row.shape[0]
    return (
        x.new_empty((rows, x.shape[1]), dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
    )


_registry.define(
    "quantize_activation_rows(Tensor x, Tensor slot_of_row, int top_k) -> (Tensor, Tensor)",
    _quantize_activation_rows_fake,
    _autograd.not_differentiable("quantize_activation_rows"),
)


def quantize_activation_rows(x: Tensor, slot_of_row: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`quantize_activation` of the rows that a schedule asks for, in its order.

    Row r of the output is token ``slot_of_row[r] // top_k`` of x. A row whose slot is negative, or
    of a token that x does not have, is not written.

    Args:
        x: float32, bfloat16 or float16 ``[tokens, K]``.
        slot_of_row: int32 ``[R]``, from `moe_schedule`.
        top_k: slots per token.

    Returns:
        ``x8`` int8 ``[R, K]`` and ``x_scale`` float32 ``[R]``.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or top_k below 1.
    """
    return torch.ops.liquidgemm.quantize_activation_rows(x, slot_of_row, top_k)


def _moe_combine_fake(
    y: Tensor, row_of_slot: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    check_matrix("y", y, *FLOATS)
    require_dtype("topk_weights", topk_weights, *FLOATS)
    got = list(topk_weights.shape)
    require(len(got) == 2 and got[1] >= 1, "topk_weights", "shape [tokens, top_k >= 1]", got)
    require_device("topk_weights", topk_weights, "y", y.device)
    tokens, top_k = got
    require_dtype("row_of_slot", row_of_slot, torch.int32)
    why = " for the shape of topk_weights"
    require_shape("row_of_slot", row_of_slot, [tokens * top_k], why)
    require_device("row_of_slot", row_of_slot, "y", y.device)
    shape = [tokens, y.shape[1]]
    if residual is not None:
        require_dtype("residual", residual, y.dtype)
        require_shape("residual", residual, shape)
        require_device("residual", residual, "y", y.device)
    return y.new_empty(shape)


_registry.define(
    "moe_combine(Tensor y, Tensor row_of_slot, Tensor topk_weights, Tensor? residual=None) "
    "-> Tensor",
    _moe_combine_fake,
    _autograd.not_differentiable("moe_combine"),
)


def moe_combine(
    y: Tensor, row_of_slot: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    """The weighted sum of each token's slots, in the order of the slots.

    ``out[t] = cast(residual[t] + sum_j topk_weights[t, j] * y[row_of_slot[t * top_k + j]])``: from
    the residual, or 0, on, products and sums in float32, each rounded separately, j ascending. A
    slot whose row is negative, or none of y's, is left out.

    Args:
        y: float32, bfloat16 or float16 ``[R, H]``.
        row_of_slot: int32 ``[tokens * top_k]``, from `moe_schedule`.
        topk_weights: float32, bfloat16 or float16 ``[tokens, top_k]``.
        residual: of y's dtype ``[tokens, H]``.

    Returns:
        ``[tokens, H]`` of y's dtype.

    Raises:
        RuntimeError: a wrong dtype, shape or device.
    """
    return torch.ops.liquidgemm.moe_combine(y, row_of_slot, topk_weights, residual)


def _moe_fake(
    x,
    topk_ids,
    topk_weights,
    w1,
    w1_scale,
    w2,
    w2_scale,
    b1=None,
    b2=None,
    activation="silu_mul",
    total_experts=0,
) -> Tensor:
    check_matrix("x", x, *FLOATS)
    tokens, hidden = x.shape
    _check_ids(topk_ids)
    require(topk_ids.shape[0] == tokens, "topk_ids", f"{tokens} tokens", list(topk_ids.shape))
    require_device("topk_ids", topk_ids, "x", x.device)
    require_dtype("topk_weights", topk_weights, *FLOATS)
    require_shape("topk_weights", topk_weights, list(topk_ids.shape))
    require_device("topk_weights", topk_weights, "x", x.device)
    experts, n = check_experts(hidden, x, ("w1", "w1_scale", "b1"), w1, w1_scale, b1)
    check_activation(activation, n, "w1_scale", GATED)
    why = f" for E = {experts} of w1_scale and H = {hidden} of x"
    require_shape("w2_scale", w2_scale, [experts, hidden], why)
    check_experts(n // 2, x, ("w2", "w2_scale", "b2"), w2, w2_scale, b2)
    require(
        total_experts == 0 or total_experts >= experts,
        "total_experts",
        f"0 or at least the {experts} experts of w1",
        total_experts,
    )
    return x.new_empty((tokens, hidden))


# Derivatives take the rounding of activations for the identity ("straight-through").

_ONLY_X_AND_WEIGHTS = "liquidgemm.moe is differentiable with respect to x and topk_weights alone"


def float_gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """What `grouped_gemm` ends with, in torch's functions, which have derivatives."""
    if activation == "silu_mul":
        return F.silu(gate) * up
    if activation == "gelu_tanh_mul":
        return F.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class _MoeRules(_autograd.Rules):
    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.activation, _ = inputs[1:]
        ctx.there = [tensor is not None for tensor in tensors]
        ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))

    @staticmethod
    def backward(ctx, grad: Tensor):
        if any(ctx.needs_input_grad[4:]):
            raise RuntimeError(_ONLY_X_AND_WEIGHTS)
        saved = iter(ctx.saved_tensors)
        tensors: list = [next(saved) if there else None for there in ctx.there]
        grad_x, grad_weights = _moe_backward(ctx.activation, grad, *tensors)
        return None, grad_x, None, grad_weights, *(None,) * 8

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError("liquidgemm.moe: there is no derivative in forward mode")


def _moe_backward(
    activation, grad, x, topk_ids, topk_weights, w1, w1_scale, w2, w2_scale, b1, b2
) -> tuple[Tensor, Tensor]:
    """Expert by expert, so that the float weights of one are there at a time."""
    # One row per slot and a sum in order: index_add_ would add in any order.
    by_slot = grad.new_zeros((*topk_ids.shape, x.shape[1]))
    grad_weights = torch.zeros_like(topk_weights)
    for e in range(len(w1_scale)):
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        of_first = dequantize_packed(w1[e], w1_scale[e], x.shape[1], grad.dtype)
        of_second = dequantize_packed(w2[e], w2_scale[e], w1_scale.shape[1] // 2, grad.dtype)
        with torch.enable_grad():
            rows = x[token].detach().to(grad.dtype).requires_grad_()
            first = F.linear(rows, of_first, None if b1 is None else b1[e].to(grad.dtype))
            gate, up = first.unflatten(1, (-1, 2, INTERLEAVE)).unbind(2)
            h = float_gated(activation, gate, up).flatten(1)
            y = F.linear(h, of_second, None if b2 is None else b2[e].to(grad.dtype))
        weights = topk_weights[token, slot].unsqueeze(1).to(grad.dtype)
        (by_slot[token, slot],) = torch.autograd.grad(y, rows, grad[token] * weights)
        grad_weights[token, slot] = (y.detach() * grad[token]).sum(1).to(grad_weights.dtype)
    return by_slot.sum(1), grad_weights


_moe = _registry.define(
    "moe(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor w1, Tensor w1_scale, Tensor w2, "
    'Tensor w2_scale, Tensor? b1=None, Tensor? b2=None, str activation="silu_mul", '
    "int total_experts=0) -> Tensor",
    _moe_fake,
    _MoeRules,
)


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "silu_mul",
    total_experts: int = 0,
) -> Tensor:
    """A layer of gated experts, from tokens and their routing to the sum over their experts.

    To the bit what these give one after the other: `moe_schedule`, `quantize_activation_rows`,
    `grouped_gemm` with the activation, `quantize_activation`, `grouped_gemm` and `moe_combine`,
    every intermediate of the dtype of x. The output of a token depends on that token, its choices
    and their experts alone.

    Differentiable in reverse mode with respect to x and topk_weights, as with the dequantized
    weights and without rounding of activations.

    Args:
        x: float32, bfloat16 or float16 ``[tokens, H]``.
        topk_ids: int32 or int64 ``[tokens, top_k]``; ids outside 0 to E - 1 add nothing.
        topk_weights: float32, bfloat16 or float16 ``[tokens, top_k]``.
        w1: packed, interleaved weights of gate and up (see `grouped_gemm`), uint8
            ``[E, ceil(2 I / 64), ceil(H / 64), 2176]``, I a multiple of 8.
        w1_scale: float32 ``[E, 2 I]``, interleaved as well.
        w2: packed weights, uint8 ``[E, ceil(H / 64), ceil(I / 64), 2176]``.
        w2_scale: float32 ``[E, H]``.
        b1: float32, bfloat16 or float16 ``[E, 2 I]``, interleaved as well.
        b2: float32, bfloat16 or float16 ``[E, H]``.
        activation: "silu_mul", "gelu_tanh_mul" or "swiglu_clamped".
        total_experts: of the whole layer, where these are one GPU's share of them: then kernels for
            as many rows as that share expects are chosen. 0: these are all. It changes no bit.

    Returns:
        ``[tokens, H]`` of x.dtype, contiguous.

    Raises:
        RuntimeError: a wrong dtype, shape or device, an unknown activation, or on a CUDA tensor no
            usable kernel; and where another derivative is asked for.
    """
    return _moe(
        x, topk_ids, topk_weights, w1, w1_scale, w2, w2_scale, b1, b2, activation, total_experts
    )
