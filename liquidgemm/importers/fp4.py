"""Weights of E2M1 codes with a scale for 32 columns (MXFP4) or 16 (NVFP4).

A byte holds two codes, the first column's in its low bits; bit 3 of a code is its sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import expect, expect_matrix, expect_scales
from .wide import FineWeight

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS, _E8M0_NAN = 127, 255

SPANS = {"mxfp4": 32, "nvfp4": 16}
"""Columns that share a scale."""


def codes_of(packed: Tensor) -> Tensor:
    """uint8 ``[..., K / 2]`` to the values of the codes, float32 ``[..., K]``."""
    table = torch.tensor((*_E2M1, *(-value for value in _E2M1)))
    return table[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()]


def powers_of(name: str, scale: Tensor) -> Tensor:
    """The powers of two, float32, whose exponents a uint8 tensor holds (E8M0).

    Raises:
        ValueError: one of them stands for NaN.
    """
    if (scale == _E8M0_NAN).any():
        raise ValueError(f"{name}: expected exponents up to 254, got 255, which means NaN")
    return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - _E8M0_BIAS)


def mxfp4(names: tuple[str, str], packed: Tensor, scale: Tensor, bias: Tensor | None) -> FineWeight:
    """``W = code * 2 ** (scale - 127)``: packed uint8 ``[N, K / 2]``, scale uint8 ``[N, K / 32]``.

    Args:
        names: of the two tensors, for messages.
    """
    n, groups = _sizes(names, packed, scale, SPANS["mxfp4"])
    expect(names[1], scale, (torch.uint8,), [n, groups])
    return _weight(packed, powers_of(names[1], scale), bias)


def nvfp4(
    names: tuple[str, str], packed: Tensor, scale: Tensor, unit: Tensor, bias: Tensor | None
) -> FineWeight:
    """``W = code * (scale * unit)``: packed uint8 ``[N, K / 2]``, scale E4M3 ``[N, K / 16]``.

    Args:
        names: of the first two tensors, for messages.
        unit: float32, of one element: the scale of the whole weight.
    """
    n, groups = _sizes(names, packed, scale, SPANS["nvfp4"])
    expect_scales(names[1], scale.float(), [n, groups], (torch.float32,))
    expect(names[1], scale, (torch.float8_e4m3fn,), [n, groups])
    return _weight(packed, scale.float() * unit.reshape(()), bias)


def _sizes(names: tuple[str, str], packed: Tensor, scale: Tensor, span: int) -> tuple[int, int]:
    """N and the number of groups."""
    expect_matrix(names[0], packed)
    n, half = packed.shape
    expect(names[0], packed, (torch.uint8,), [n, half])
    if 2 * half % span:
        raise ValueError(f"{names[0]}: expected whole groups of {span}, got {2 * half} columns")
    return n, 2 * half // span


def _weight(packed: Tensor, scale: Tensor, bias: Tensor | None) -> FineWeight:
    span = 2 * packed.shape[1] // scale.shape[1]
    values = codes_of(packed).unflatten(1, (-1, span)).mul_(scale.unsqueeze(2)).flatten(1)
    return FineWeight(values, span, bias)
