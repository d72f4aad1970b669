"""The producers of int8 activations in plain torch, to the bit; `_reference` says what for.

The order in which a norm sums is that of csrc/liquidgemm/common/norm.hpp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _reference, _reference_activation

_VECTOR, _LANES, _CHAINS = 8, 32, 32
_BLOCK = _VECTOR * _LANES * _CHAINS
_ROWS = 64  # that are worked on at a time


def _sum_of_halves(values: Tensor) -> Tensor:
    """Of the last dimension, a power of two: upper half added to lower until one is left."""
    while (half := values.shape[-1] // 2) > 0:
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)


def _sum_of_squares(values: Tensor) -> Tensor:
    """Of rows ``[rows, K]``."""
    padded = F.pad(values, (0, -values.shape[-1] % _BLOCK))
    squares = padded.square().view(len(values), -1, _CHAINS, _LANES, _VECTOR)
    groups = _sum_of_halves(_sum_of_halves(squares))
    chains = torch.zeros_like(groups[:, 0])
    for block in groups.unbind(1):
        chains = chains + block
    return _sum_of_halves(chains)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    mode: str,
    offset: float,
    return_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = x.shape[-1]
    h = x if residual is None else (x.float() + residual.float()).to(x.dtype).contiguous()
    normed = []
    weight = weight.float()
    if mode == "gemma":
        weight = weight + torch.tensor(offset, dtype=torch.float32)
    for rows in h.reshape(-1, k).split(_ROWS):
        values = rows.float()
        mean = _sum_of_squares(values) / k
        # In float64, since torch's root of float32 is not always the nearest one.
        root = (mean + torch.tensor(eps, dtype=torch.float32)).double().sqrt().float()
        factor = torch.ones_like(root) / root
        values = values * factor.unsqueeze(-1)
        if mode == "llama":
            values = values.to(x.dtype).float()
        normed.append((values * weight).to(x.dtype))
    y = torch.cat(normed).view(x.shape)
    empty = x.new_empty(0)
    return (
        *_reference.quantize_activation(y),
        empty if residual is None else h,
        y if return_y else empty.clone(),
    )


def glu_quantize(gate_up: Tensor, activation: str, return_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    y = _reference_activation.gated(activation, gate, up)
    return *_reference.quantize_activation(y), y if return_y else y.new_empty(0)


_reference.define(
    rms_norm_quantize,
    "(Tensor x, Tensor weight, float eps, Tensor? residual, str mode, float offset, "
    "bool return_y) -> (Tensor, Tensor, Tensor, Tensor)",
)
_reference.define(
    glu_quantize,
    "(Tensor gate_up, str activation, bool return_y) -> (Tensor, Tensor, Tensor)",
)
