"""The ops `pack_weight` and `unpack_weight`, and those of INT8 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import int8, liquidquant6
from ..formats.liquidquant import (
    BLOCK_BYTES,
    BLOCK_BYTES_6,
    BLOCK_BYTES_G32,
    FINE_GROUP,
    GROUP,
    MAX_IN_FEATURES,
    PANEL,
    ceil_div,
    code_bits,
    decode,
    group_of,
    padded,
)
from . import _registry
from ._checks import require, require_device, require_dtype, require_k, require_shape


def _pack_weight_fake(qweight: Tensor, qscale: Tensor, qoffset: Tensor) -> Tensor:
    for name, tensor in (("qweight", qweight), ("qscale", qscale), ("qoffset", qoffset)):
        require_dtype(name, tensor, torch.uint8)
        require_device(name, tensor, "qweight", qweight.device)
    shape = list(qweight.shape)
    require(qweight.dim() == 2 and shape[0] >= 1, "qweight", "shape [N, K / 2]", shape)
    bits = code_bits(qweight, qscale)
    n, k = shape[0], shape[1] * 8 // bits
    multiple = f"[N, K / 2] with K a positive multiple of {GROUP}"
    require(k > 0 and k % GROUP == 0, "qweight", multiple, f"shape {shape}")
    require_k("qweight", k, padded(MAX_IN_FEATURES))
    group = group_of(qweight, qscale)
    require_shape("qscale", qscale, [n, k // group])
    require_shape("qoffset", qoffset, [n, k // group])
    block = BLOCK_BYTES_G32 if group == FINE_GROUP else BLOCK_BYTES if bits == 4 else BLOCK_BYTES_6
    return qweight.new_empty(ceil_div(n, PANEL), k // GROUP, block)


def _check_packed(packed: Tensor, n: int, block_bytes: int, packer: str) -> int:
    """Returns its groups along K."""
    require_dtype("packed", packed, torch.uint8)
    shape = list(packed.shape)
    whole = packed.dim() == 3 and shape[0] >= 1 and shape[1] >= 1 and shape[2] == block_bytes
    expected = f"a packed weight [ceil(N / {PANEL}), K / {GROUP}, {block_bytes}] from {packer}"
    require(whole, "packed", expected, f"shape {shape}")
    panels, groups = shape[:2]
    require_k("packed", groups * GROUP, padded(MAX_IN_FEATURES))
    span = f"{(panels - 1) * PANEL + 1} to {panels * PANEL} rows for packed of shape {shape}"
    require(n >= 1 and ceil_div(n, PANEL) == panels, "n", span, n)
    return groups


def _unpack_weight_fake(packed: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    block, bits, group = BLOCK_BYTES, 4, GROUP
    if packed.dim() > 0 and liquidquant6.is_packed(packed):
        block, bits = BLOCK_BYTES_6, 6
    elif packed.dim() > 0 and packed.shape[-1] == BLOCK_BYTES_G32:
        block, group = BLOCK_BYTES_G32, FINE_GROUP
    k = _check_packed(packed, n, block, "pack_weight") * GROUP
    return (
        packed.new_empty(n, k * bits // 8),
        packed.new_empty(n, k // group),
        packed.new_empty(n, k // group),
    )


def _pack_int8_weight_fake(qweight: Tensor) -> Tensor:
    require_dtype("qweight", qweight, torch.int8)
    shape = list(qweight.shape)
    whole = qweight.dim() == 2 and shape[0] >= 1 and shape[1] >= 1 and shape[1] % GROUP == 0
    require(whole, "qweight", f"[N, K] with K a positive multiple of {GROUP}", f"shape {shape}")
    require_k("qweight", shape[1], padded(MAX_IN_FEATURES))
    return qweight.new_empty(
        ceil_div(shape[0], PANEL), shape[1] // GROUP, int8.BLOCK_BYTES, dtype=torch.uint8
    )


def _unpack_int8_weight_fake(packed: Tensor, n: int) -> Tensor:
    groups = _check_packed(packed, n, int8.BLOCK_BYTES, "pack_int8_weight")
    return packed.new_empty(n, groups * GROUP, dtype=torch.int8)


_registry.define(
    "pack_weight(Tensor qweight, Tensor qscale, Tensor qoffset) -> Tensor", _pack_weight_fake
)
_registry.define(
    "unpack_weight(Tensor packed, int n) -> (Tensor, Tensor, Tensor)", _unpack_weight_fake
)
_registry.define("pack_int8_weight(Tensor qweight) -> Tensor", _pack_int8_weight_fake)
_registry.define("unpack_int8_weight(Tensor packed, int n) -> Tensor", _unpack_int8_weight_fake)


def pack_weight(qweight: Tensor, qscale: Tensor, qoffset: Tensor) -> Tensor:
    """Bring a weight from the logical layout (`formats.liquidquant`) to the one the kernel reads.

    Args:
        qweight: uint8 ``[N, K / 2]``, two 4-bit codes per byte, or ``[N, 3 K / 4]``, four 6-bit
            codes in three bytes. K is a multiple of 64.
        qscale: uint8 ``[N, K / 64]``, the integer step s of each group; or ``[N, K / 32]``, with
            4-bit codes.
        qoffset: uint8 of that shape, the offset a of each group.

    Returns:
        uint8 ``[ceil(N / 64), K / 64, 2176]``, of groups of 32 2304, of 6-bit codes 3200,
        contiguous. `gemm` and `linear` take all, experts those of 4 bits in groups of 64.

    Raises:
        RuntimeError: a wrong dtype, device or shape, K = 0 or too large for an exact INT32 sum,
            or a group in which some ``q * s + a`` exceeds 255.
    """
    return torch.ops.liquidgemm.pack_weight(qweight, qscale, qoffset)


def unpack_weight(packed: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact inverse of `pack_weight`.

    Args:
        packed: uint8 ``[ceil(n / 64), K / 64, 2176]``, or 2304 or 3200.
        n: number of rows N of the weight.

    Returns:
        ``qweight`` uint8 ``[n, K / 2]``, or ``[n, 3 K / 4]``; ``qscale`` and ``qoffset`` uint8
        ``[n, K / 64]``, or ``[n, K / 32]``.

    Raises:
        RuntimeError: a wrong dtype or shape, or an n that does not have this many panels.
    """
    return torch.ops.liquidgemm.unpack_weight(packed, n)


def pack_int8_weight(qweight: Tensor) -> Tensor:
    """Bring an INT8 weight to the layout that the kernel reads: 8 bits per weight, not decoded.

    Args:
        qweight: int8 ``[N, K]``, K a multiple of 64. The product is ``x8 @ qweight.T``.

    Returns:
        uint8 ``[ceil(N / 64), K / 64, 4096]``, contiguous. `gemm` and `linear` take it as they take
        a weight of `pack_weight`; experts do not.

    Raises:
        RuntimeError: a wrong dtype or shape, K = 0 or too large for an exact INT32 sum.
    """
    return torch.ops.liquidgemm.pack_int8_weight(qweight)


def unpack_int8_weight(packed: Tensor, n: int) -> Tensor:
    """Exact inverse of `pack_int8_weight`.

    Args:
        packed: uint8 ``[ceil(n / 64), K / 64, 4096]``.
        n: number of rows N of the weight.

    Returns:
        int8 ``[n, K]``.

    Raises:
        RuntimeError: a wrong dtype or shape, or an n that does not have this many panels.
    """
    return torch.ops.liquidgemm.unpack_int8_weight(packed, n)


def decoded(packed: Tensor, n: int) -> Tensor:
    """The int8 weight ``[n, K]`` that a packed weight of any format means."""
    if int8.is_packed(packed):
        return unpack_int8_weight(packed, n)
    return decode(*unpack_weight(packed, n))
