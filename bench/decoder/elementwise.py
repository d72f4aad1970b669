"""What is between the products, in plain torch, for Inductor to fuse; the same for all formats.

Sums are float32. Where a format quantizes activations, its quantizer is part of the function before
it, so that Inductor can fuse the two: what a compiled model of that format would run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
FP8_MAX = 448.0  # of e4m3
# A static scale for whole tensors, as checkpoints have it: random weights give activations of order
# 1, of which 16 is never exceeded.
FP8_STATIC = 16 / FP8_MAX
_GREEDY_PARTS = 256


def add_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """RMSNorm of the sum, and the sum."""
    h = x if residual is None else x + residual
    wide = h.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return normed.to(h.dtype) * weight, h


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def fp8_tensor(x: Tensor) -> Tensor:
    """With the static scale."""
    return (x.float() / FP8_STATIC).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def fp8_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """With a scale per row, ``[M, 1]``."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(1e-12)
    return (wide / scale).to(torch.float8_e4m3fn), scale


def add_norm_fp8_tensor(x, weight, residual):
    normed, h = add_norm(x, weight, residual)
    return fp8_tensor(normed), h


def add_norm_fp8_row(x, weight, residual):
    normed, h = add_norm(x, weight, residual)
    return fp8_row(normed), h


def silu_mul_fp8_tensor(gate_up):
    return fp8_tensor(silu_mul(gate_up))


def silu_mul_fp8_row(gate_up):
    return fp8_row(silu_mul(gate_up))


def linear_of_one(x: Tensor, weight: Tensor) -> Tensor:
    """A product of one row: a reduction, at a higher share of the memory's rate than cuBLAS's."""
    return F.linear(x, weight)


def linear_of_one_fp8(x8: Tensor, scale: Tensor, weight8: Tensor, weight_scale: Tensor) -> Tensor:
    """x8 ``[1, K]``, weight8 ``[N, K]``; scales of the tensors, or of row and channels."""
    sums = (x8.float() * weight8.float()).sum(-1)
    return (sums * scale.flatten() * weight_scale.flatten()).to(torch.bfloat16).unsqueeze(0)


# A product of one row becomes a reduction only where Inductor tries more tilings.
_REDUCTION = {"coordinate_descent_tuning": True}
_ONE_KERNEL = {"combo_kernels": True}  # of q, k and v
_OPTIONS = {
    "linear_of_one": _REDUCTION,
    "linear_of_one_fp8": _REDUCTION,
    "rope": _ONE_KERNEL,
    "rope_into": _ONE_KERNEL,
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: x ``[..., D]``, cos and sin broadcast to ``[..., D / 2]``."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, heads: int, kv_heads: int):
    """q ``[M, heads, D]``, k and v ``[M, kv_heads, D]`` of one token per row at one position."""
    parts = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
    cos, sin = cos[position], sin[position]
    return rotate(parts[0], cos, sin), rotate(parts[1], cos, sin), parts[2]


def rope_into(qkv, cos, sin, position, heads, kv_heads, keys, values) -> Tensor:
    """q as `rope`; k and v go to their place in a cache ``[M, kv_heads, T, D]``."""
    q, k, v = rope(qkv, cos, sin, position, heads, kv_heads)
    keys[:, :, position] = k.unsqueeze(2)
    values[:, :, position] = v.unsqueeze(2)
    return q


def rope_sequence(qkv: Tensor, cos: Tensor, sin: Tensor, batch: int, heads: int, kv_heads: int):
    """q, k and v ``[batch, heads, T, D]`` of whole sequences, ``[batch * T, N]``."""
    whole = qkv.unflatten(0, (batch, -1)).unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = whole.split([heads, kv_heads, kv_heads], 1)
    cos, sin = cos[: q.shape[2]], sin[: q.shape[2]]
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, the first of equals; in two steps, since one reduction
    for each row would leave a GPU idle where there are few."""
    parts = logits.unflatten(-1, (math.gcd(logits.shape[-1], _GREEDY_PARTS), -1))
    most, place = parts.max(-1)
    part = most.argmax(-1, keepdim=True)
    return (part * parts.shape[-1] + place.gather(-1, part)).squeeze(-1)


class Elementwise:
    """The functions above, compiled for each shape that they meet, or as they are on a CPU."""

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled
        self._functions: dict[str, Callable] = {}

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._functions:
            function = globals()[name]
            if self._compiled:
                function = torch.compile(
                    function, dynamic=False, fullgraph=True, options=_OPTIONS.get(name)
                )
            self._functions[name] = function
        return self._functions[name]
