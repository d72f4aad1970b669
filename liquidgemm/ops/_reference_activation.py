"""The activations of `csrc/liquidgemm/common/activation.hpp` in plain torch, to the bit.

Separately rounded float32 operations in the same order; what they are is said there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_hex = float.fromhex
_SHIFT = _hex("0x1.8p23") - 1  # with the offset -1 that one_plus_exp takes
_LOG2_E = _hex("0x1.715476p0")
_LN2_HIGH, _LN2_LOW = 355 / 512, _hex("-0x1.bd0106p-13")
_TAIL = (
    "0x1.6a504cp-10",
    "0x1.123976p-7",
    "0x1.5558acp-5",
    "0x1.555492p-3",
    "0x1.fffffcp-2",
)
_MINUS_TWO_ROOT = _hex("-0x1.988454p0")
_LIMIT, _ALPHA = 7.0, 1.702


def _one_plus_exp(x: Tensor) -> Tensor:
    x = torch.where(x > -32, x, -32.0)
    x = torch.where(x < 89, x, 89.0)
    shifted = x * _LOG2_E + _SHIFT
    minus_n = _SHIFT - shifted
    r = (minus_n * _LN2_HIGH + x) + minus_n * _LN2_LOW
    tail = torch.full_like(r, _hex(_TAIL[0]))
    for coefficient in _TAIL[1:]:
        tail = tail * r + _hex(coefficient)
    of_rest = (r * r * tail + r) + 1
    half = (of_rest.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    return half * 2 + 1


def silu(x: Tensor) -> Tensor:
    return x / _one_plus_exp(-x)


def gelu_tanh(x: Tensor) -> Tensor:
    cubic = x * x * x * 0.044715
    return x / _one_plus_exp((x + cubic) * _MINUS_TWO_ROOT)


def _swiglu_gate(x: Tensor) -> Tensor:
    x = torch.where(x > _LIMIT, _LIMIT, x)
    return x / _one_plus_exp(x * -_ALPHA)


def _swiglu_up(x: Tensor) -> Tensor:
    x = torch.where(x > _LIMIT, _LIMIT, x)
    return torch.where(x < -_LIMIT, -_LIMIT, x) + 1


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """Of two tensors of one dtype, in which the result and its factors are."""
    act, factor = {
        "silu_mul": (silu, None),
        "gelu_tanh_mul": (gelu_tanh, None),
        "swiglu_clamped": (_swiglu_gate, _swiglu_up),
    }[activation]
    dtype = gate.dtype
    if factor is not None:
        up = factor(up.float()).to(dtype)
    return (act(gate.float()).to(dtype).float() * up.float()).to(dtype)
