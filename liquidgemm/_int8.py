"""Exact products of INT8 matrices on the CPU."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .format import GROUP, padded


@functools.cache
def instructions_are_exact() -> bool:
    """Whether this process has an INT8 matrix product of torch that can be relied on.

    Without VNNI torch's product is either a plain loop, exact and several times slower than the
    product in float64, or oneDNN's, which adds products in pairs of 16 bits that saturate. The
    latter also shows if ONEDNN_MAX_CPU_ISA lowers the instruction set. It shows with operands at
    the ends of their range, which are tried once, by rows as one token and as many.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    k = 4 * GROUP
    for rows, columns in ((1, 64), (17, 192), (128, 64)):
        for x_value, w_value in ((127, -128), (-127, -128), (127, 127)):
            # On the CPU whatever the default device is.
            x = torch.full((rows, k), x_value, dtype=torch.int8, device="cpu")
            w = torch.full((columns, k), w_value, dtype=torch.int8, device="cpu")
            try:
                sums = torch._int_mm(x, w.T)
            except (AttributeError, RuntimeError):
                return False
            if not (sums == k * x_value * w_value).all():
                return False
    return True


def description() -> str:
    """How `product` multiplies here."""
    return "INT8 instructions" if instructions_are_exact() else "products in float64"


def product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ wᵀ``, exactly, as int32 or as integers in float64.

    Args:
        x: int8 ``[M, K]``, K small enough that no int32 sum overflows.
        w: int8 ``[N, ceil(K / 64) * 64]``, contiguous; columns past K are ignored.
    """
    k = x.shape[1]
    if instructions_are_exact():
        # Whole groups and contiguous: torch 2.13's product is wrong for K = 1.
        whole = x.contiguous() if k % GROUP == 0 else F.pad(x, (0, padded(k) - k))
        return torch._int_mm(whole, w.T)
    # float64 holds every partial sum exactly, in any order and on any processor.
    return x.double() @ w[:, :k].double().T
