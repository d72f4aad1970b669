"""The CPU path of experts in plain torch: what every kernel has to equal to the bit.

As `_reference`: the ops of the CPU call these if they are told to, with checked arguments.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from . import _reference
from ._reference_activation import gated

_INTERLEAVE = 8


def moe_schedule(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = topk_ids.flatten().long()
    inside = (ids >= 0) & (ids < num_experts)
    counts = torch.bincount(ids[inside], minlength=num_experts)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    slots = torch.where(inside, ids, num_experts).argsort(stable=True)[: int(inside.sum())].int()
    slot_of_row = torch.full(ids.shape, -1, dtype=torch.int32)
    slot_of_row[: len(slots)] = slots
    row_of_slot = torch.full_like(slot_of_row, -1)
    row_of_slot[slots.long()] = torch.arange(len(slots), dtype=torch.int32)
    return offsets, row_of_slot, slot_of_row


def quantize_activation_rows(x: Tensor, slot_of_row: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    x8 = x.new_empty((len(slot_of_row), x.shape[1]), dtype=torch.int8)
    scale = x.new_empty(len(slot_of_row), dtype=torch.float32)
    token = slot_of_row.long().div(top_k, rounding_mode="floor")
    rows = ((slot_of_row >= 0) & (token < len(x))).nonzero().squeeze(1)
    x8[rows], scale[rows] = _reference.quantize_activation(x[token[rows]])
    return x8, scale


def grouped_gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str,
) -> Tensor:
    n = weight_scale.shape[1]
    out = x.new_empty((len(x), n if activation == "none" else n // 2), dtype=out_dtype)
    ends = offsets.clamp(0, len(x)).tolist()
    for e, (start, stop) in enumerate(pairwise(ends)):
        if stop <= start:
            continue
        rows = slice(start, stop)
        of_expert = None if bias is None else bias[e]
        y = _reference.gemm(
            x[rows], x_scale[rows], weight[e], weight_scale[e], of_expert, out_dtype
        )
        if activation != "none":
            gate, up = y.unflatten(1, (-1, 2, _INTERLEAVE)).unbind(2)
            y = gated(activation, gate, up).flatten(1)
        out[rows] = y
    return out


def moe_combine(
    y: Tensor, row_of_slot: Tensor, topk_weights: Tensor, residual: Tensor | None
) -> Tensor:
    tokens, top_k = topk_weights.shape
    rows = row_of_slot.view(tokens, top_k).long()
    total = y.new_zeros((tokens, y.shape[1]), dtype=torch.float32)
    if residual is not None:
        total += residual.float()
    for j in range(top_k):
        there = ((rows[:, j] >= 0) & (rows[:, j] < len(y))).nonzero().squeeze(1)
        values = y[rows[there, j]].float()
        total[there] += topk_weights[there, j].float().unsqueeze(1) * values
    return total.to(y.dtype)


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
    total_experts: int,
) -> Tensor:
    offsets, row_of_slot, slot_of_row = moe_schedule(topk_ids, len(w1_scale))
    x8, x_scale = quantize_activation_rows(x, slot_of_row, topk_ids.shape[1])
    h = grouped_gemm(x8, x_scale, w1, w1_scale, offsets, b1, x.dtype, activation)
    rows = int(offsets[-1])
    h8, h_scale = _reference.quantize_activation(h[:rows])
    y = grouped_gemm(h8, h_scale, w2, w2_scale, offsets, b2, x.dtype, "none")
    return moe_combine(y, row_of_slot, topk_weights, None)


_reference.define(moe_schedule, "(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)")
_reference.define(
    quantize_activation_rows, "(Tensor x, Tensor slot_of_row, int top_k) -> (Tensor, Tensor)"
)
_reference.define(
    grouped_gemm,
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor offsets, "
    "Tensor? bias, ScalarType out_dtype, str activation) -> Tensor",
)
_reference.define(
    moe_combine, "(Tensor y, Tensor row_of_slot, Tensor topk_weights, Tensor? residual) -> Tensor"
)
_reference.define(
    moe,
    "(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor w1, Tensor w1_scale, Tensor w2, "
    "Tensor w2_scale, Tensor? b1, Tensor? b2, str activation, int total_experts) -> Tensor",
)
