"""What the Triton kernels share: rounding, rotation, and codes as numbers of a tensor core.

Where PTX is false, for Triton's interpreter, the same without inline PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The formats as constants of the kernels; those with codes and parameters come last.
FLOAT, FP8, INT8, INT4 = (tl.constexpr(i) for i in range(4))


@triton.jit
def rint(x):
    # Exact for |x| < 2^22: the sum is rounded to an integer, ties to even.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def bf16_not_below(x):
    """The least bfloat16 >= x, as float32; x >= 0 or NaN."""
    bits = (x.to(tl.int32, bitcast=True) + 0xFFFF) & -65536
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def rotate(x, R: tl.constexpr, D: tl.constexpr):
    """Rows float32 [R, D] times a Hadamard matrix of entries 1 and -1 (`format.rotate`)."""
    for stage in tl.static_range(8):  # D <= 256
        if D >> stage > 1:
            x = tl.reshape(x, [R * (1 << stage), 2, D >> (stage + 1)])
            a, b = tl.split(tl.permute(x, [0, 2, 1]))
            x = tl.permute(tl.join(a + b, a - b), [0, 2, 1])
    return tl.reshape(x, [R, D])


@triton.jit
def hadamard_matrix(W: tl.constexpr, dtype: tl.constexpr):
    """The symmetric matrix of `rotate`, [W, W], W <= 128: entry (i, j) is (-1)^popcount(i & j)."""
    both = tl.arange(0, W)[:, None] & tl.arange(0, W)[None, :]
    both ^= both >> 4
    parity = (0x6996 >> (both & 15)) & 1  # bit n of the constant: the parity of n
    return (1 - 2 * parity).to(tl.float32).to(dtype)


@triton.jit
def rotate_halves(low, high, R: tl.constexpr, W: tl.constexpr):
    """`rotate` of rows whose halves are low and high, float32 [R, W]."""
    return rotate(low + high, R, W), rotate(low - high, R, W)


@triton.jit
def dot_floats(a, b, acc, PTX: tl.constexpr):
    """acc + a @ b, of 16-bit floats; the interpreter does not know products of bfloat16."""
    if not PTX:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def nibbles(x, PTX: tl.constexpr):
    """Low and high nibbles, as int8, of uint8."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            """
            {
            and.b32 $0, $2, 0x0F0F0F0F;
            shr.u32 $1, $2, 4;
            and.b32 $1, $1, 0x0F0F0F0F;
            }
            """,
            "=r,=r,r",
            [x],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (x & 15).to(tl.int8)
        high = (x >> 4).to(tl.int8)
    return low, high


@triton.jit
def bytes_as_bf16(x, PTX: tl.constexpr):
    """The two int8 of each int16 as bfloat16: first byte, second byte.

    A bfloat16 in 128..255 has its integer part in its low 7 bits, and 0x4380 is 256: so the byte is
    (128 + its low bits) - (128, or 256 if it is negative), exactly.
    """
    if PTX:
        first, second = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 u, low, sign;
            lop3.b32 low, $2, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 sign, $2, 0x00800080, 0x43004300, 0xEA;
            sub.rn.bf16x2 $0, low, sign;
            shr.u32 u, $2, 8;
            lop3.b32 low, u, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 sign, u, 0x00800080, 0x43004300, 0xEA;
            sub.rn.bf16x2 $1, low, sign;
            }
            """,
            "=r,=r,r",
            [x],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        first = ((x << 8) >> 8).to(tl.float32).to(tl.bfloat16)
        second = (x >> 8).to(tl.float32).to(tl.bfloat16)
    return first, second


@triton.jit
def nibbles_as_bf16(x, PTX: tl.constexpr):
    """The four nibbles of each int16 as bfloat16, lowest first."""
    if PTX:
        n0, n1, n2, n3 = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 u, one;
            mov.b32 one, 0x43004300;
            lop3.b32 u, $4, 0x000F000F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $0, u, one;
            shr.u32 u, $4, 4;
            lop3.b32 u, u, 0x000F000F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $1, u, one;
            shr.u32 u, $4, 8;
            lop3.b32 u, u, 0x000F000F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $2, u, one;
            shr.u32 u, $4, 12;
            lop3.b32 u, u, 0x000F000F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $3, u, one;
            }
            """,
            "=r,=r,=r,=r,r",
            [x],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        n0 = (x & 15).to(tl.float32).to(tl.bfloat16)
        n1 = ((x >> 4) & 15).to(tl.float32).to(tl.bfloat16)
        n2 = ((x >> 8) & 15).to(tl.float32).to(tl.bfloat16)
        n3 = ((x >> 12) & 15).to(tl.float32).to(tl.bfloat16)
    return n0, n1, n2, n3
