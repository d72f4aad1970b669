"""What the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT, FP8 = (tl.constexpr(i) for i in range(2))  # the formats as constants of the kernels


@triton.jit
def dot_floats(a, b, acc, PTX: tl.constexpr):
    """acc + a @ b, of 16-bit floats; the interpreter does not know products of bfloat16."""
    if not PTX:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)
