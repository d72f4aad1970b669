"""The op `glu_quantize`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.liquidquant import MAX_IN_FEATURES
from . import _autograd, _registry
from ._checks import FLOATS, require, require_dtype, require_k
from ._grouped import GATED
from ._tokens import QuantizedTokens


def _glu_quantize_fake(
    gate_up, activation="silu_mul", return_y=False
) -> tuple[Tensor, Tensor, Tensor]:
    require_dtype("gate_up", gate_up, *FLOATS)
    got = f"shape {list(gate_up.shape)}"
    require(gate_up.dim() >= 1, "gate_up", "at least 1 dimension", got)
    columns = gate_up.shape[-1]
    require(columns >= 2, "gate_up", "at least 2 columns", got)
    require(columns % 2 == 0, "gate_up", "an even number of columns, gates first", got)
    require_k("gate_up", columns // 2, MAX_IN_FEATURES)
    require(activation in GATED, "activation", " or ".join(GATED), activation)
    shape = (*gate_up.shape[:-1], columns // 2)
    return (
        gate_up.new_empty(shape, dtype=torch.int8),
        gate_up.new_empty(shape[:-1], dtype=torch.float32),
        gate_up.new_empty(shape if return_y else 0),
    )


_registry.define(
    'glu_quantize(Tensor gate_up, str activation="silu_mul", bool return_y=False) '
    "-> (Tensor, Tensor, Tensor)",
    _glu_quantize_fake,
    _autograd.not_differentiable("glu_quantize"),
)


def glu_quantize(
    gate_up: Tensor, activation: str = "silu_mul", *, return_y: bool = False
) -> tuple[QuantizedTokens, Tensor | None]:
    """The activation of a gated MLP, and `quantize_activation`.

    With R for rounding to the dtype of gate_up, y is

    - "silu_mul": ``R(R(gate * sigmoid(gate)) * up)``;
    - "gelu_tanh_mul": ``R(R(gelu(gate)) * up)``, gelu in its approximation by tanh;
    - "swiglu_clamped": ``R(R(g * sigmoid(1.702 * g)) * R(u + 1))`` with ``g = min(gate, 7)`` and
      ``u = min(max(up, -7), 7)``,

    where the activation is computed in float32 by separately rounded operations, none of them
    approximate: to about 2 ulp of float32, and to the same bits on every device.

    Args:
        gate_up: float32, bfloat16 or float16 ``[..., 2 K]``, K up to 132 104: the gates of all
            channels, then the other factors.
        activation: which.
        return_y: whether y is wanted as well.

    Returns:
        The quantized y, and y itself if it is wanted, else None: ``[..., K]``, of the dtype of
        gate_up.

    Raises:
        RuntimeError: gate_up has another dtype, or no even number of columns; or an activation
            that is none of those.
    """
    x8, scale, y = torch.ops.liquidgemm.glu_quantize(gate_up, activation, return_y)
    return QuantizedTokens(x8, scale, gate_up.dtype), y if return_y else None
