"""How keys and values are stored: formats, layouts, and their exact arithmetic.

A row is the key or the value of one token and one head, D numbers. ``y`` is the row x itself,
``rotate(x - center)`` for the keys of int8 and int4, and ``rotate(x)`` for the values of int4. With
float32 operations, each rounded to nearest even, IEEE division, and ``up(x)`` the least bfloat16
that is not below x:

int8    scale = up(max|y| / 127)
        code = clamp(rint(y / scale), -127, 127)                 y ~ scale * code
int4    low = min(y, 0), high = max(y, 0), of the row
        scale = up((high - low) / 15), zero = rint(-low / scale)
        code = clamp(rint(y / scale) + zero, 0, 15)              y ~ scale * (code - zero)

``rotate`` is the product with the Hadamard matrix of entries 1 and -1, by log2(D) rounds of sums
and differences: of the halves of the row, then of the halves of each half, and so on. It spreads
what a few channels have most of, as keys do, over all; ``x = rotate(rotate(x)) / D``. The center,
float32 ``[H, D]`` for each sequence or for all, is optional and may be anything: it moves all
scores of a query by the same amount, which the softmax does not see. The mean of some keys takes
away what all have in common, such as a bias.

A row of zeros has scale 0; one with a NaN or an infinity has scale NaN and codes 0. bfloat16,
float16 and fp8 (e4m3, saturating, without a scale) are stored as they are.

Layout, for P pages of T tokens (T a multiple of 16) of H heads:

             k                        v                          k_params, v_params
    float    [P, H, T, D]             [P, H, T, D]               none
    fp8      float8 [P, H, T, D]      float8 [P, H, T/2, D, 2]   none
    int8     int8 [P, H, T, D]        int8 [P, H, T/4, D, 4]     bfloat16 [P, H, T]: scale
    int4     uint8 [P, H, T, D/2]     uint8 [P, H, T/4, D/2, 4]  int32 [P, H, T]: bits of the scale
                                                                 as float32, | zero

Values of 8 bits or less are stored for 2 or 4 tokens together, byte by byte: so one load gives a
tensor core several tokens of one element. A byte of int4 holds element i in its low and i + D / 2
in its high nibble. A contiguous cache has one page for each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_DIMS = (64, 128, 256)
PAGE_MULTIPLE = 16  # tokens: no half block of the kernels is in two pages


@dataclass(frozen=True)
class Format:
    """A way to store keys and values.

    Attributes:
        name: as users say it.
        codes: dtype of ``k`` and ``v``.
        params: dtype of ``k_params`` and ``v_params``; None without.
        packed: elements per byte of codes that are smaller than a byte, else 1.
        together: tokens whose values are stored byte by byte.
        rotates_k, rotates_v: whether what is coded are rotated keys and values.
    """

    name: str
    codes: torch.dtype
    params: torch.dtype | None = None
    packed: int = 1
    together: int = 1
    rotates_k: bool = False
    rotates_v: bool = False

    def rotates(self, values: bool) -> bool:
        return self.rotates_v if values else self.rotates_k

    def bytes_per_token(self, head_dim: int) -> float:
        """Of one head, key and value together."""
        codes = head_dim * self.codes.itemsize // self.packed
        return 2 * (codes + (0 if self.params is None else self.params.itemsize))


FORMATS = {
    one.name: one
    for one in (
        Format("bfloat16", torch.bfloat16),
        Format("float16", torch.float16),
        Format("fp8", torch.float8_e4m3fn, together=2),
        Format("int8", torch.int8, torch.bfloat16, together=4, rotates_k=True),
        Format(
            "int4", torch.uint8, torch.int32, packed=2, together=4, rotates_k=True, rotates_v=True
        ),
    )
}
BY_CODES = {one.codes: one for one in FORMATS.values()}


def capacity_of(k: Tensor, block_table: Tensor | None) -> int:
    """Tokens that a sequence of a cache may have."""
    return k.shape[2] * (1 if block_table is None else block_table.shape[1])


def rotate(x: Tensor) -> Tensor:
    """Rows of float32 ``[..., D]`` times the Hadamard matrix of D, a power of 2."""
    shape, half = x.shape, x.shape[-1] // 2
    while half:
        pairs = x.reshape(-1, 2, half)
        a, b = pairs[:, 0], pairs[:, 1]
        x = torch.stack((a + b, a - b), 1)
        half //= 2
    return x.reshape(shape)


def bf16_not_below(x: Tensor) -> Tensor:
    """The least bfloat16 >= x, as float32; x >= 0 or NaN."""
    bits = (x.contiguous().view(torch.int32) + 0xFFFF) & -65536
    return torch.where(x.isnan(), x, bits.view(torch.float32))


def quantize(x: Tensor, fmt: Format, values: bool) -> tuple[Tensor, Tensor | None]:
    """Keys or values ``[..., D]`` as codes ``[..., D]``, one element each, and their parameters."""
    if fmt.params is None:
        if fmt.name == "fp8":
            limit = torch.finfo(fmt.codes).max
            x = x.float().clamp(-limit, limit)
        return x.to(fmt.codes), None
    x = x.float()
    bad = ~x.isfinite().all(-1)
    if fmt.rotates(values):
        x = rotate(x)
    if fmt.name == "int8":
        scale = bf16_not_below(x.abs().amax(-1) / 127)
        least, most, offset = -127, 127, torch.zeros_like(scale)
    else:
        low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
        scale = bf16_not_below((high - low) / 15)
        least, most, offset = 0, 15, (-low / scale).round()
    scale = torch.where(bad, torch.nan, scale)
    usable = scale > 0  # not zero, not NaN
    offset = torch.where(usable, offset, 0)
    codes = (x / scale.unsqueeze(-1)).round() + offset.unsqueeze(-1)
    codes = torch.where(usable.unsqueeze(-1), codes.clamp(least, most), 0).to(fmt.codes)
    if fmt.name == "int8":
        return codes, scale.to(fmt.params)
    return codes, (scale.contiguous().view(torch.int32) & -65536) | offset.to(torch.int32)


def dequantize(codes: Tensor, params: Tensor | None, fmt: Format, values: bool) -> Tensor:
    """float32 ``[..., D]`` of what `quantize` gives."""
    x = codes.float()
    if params is not None and fmt.name == "int8":
        x = x * params.float().unsqueeze(-1)
    elif params is not None and fmt.name == "int4":
        scale = (params & -65536).view(torch.float32)
        x = (x - (params & 15).unsqueeze(-1)) * scale.unsqueeze(-1)
    return rotate(x) / x.shape[-1] if fmt.rotates(values) else x


def shapes(fmt: Format, pages: int, heads: int, tokens: int, head_dim: int) -> tuple:
    """Shapes of k, v and each of the parameters (None without)."""
    width = head_dim // fmt.packed
    k = (pages, heads, tokens, width)
    v = k if fmt.together == 1 else (pages, heads, tokens // fmt.together, width, fmt.together)
    return k, v, None if fmt.params is None else k[:3]


def head_dim_of(k: Tensor) -> int:
    return k.shape[-1] * BY_CODES[k.dtype].packed


def unpack_rows(cache: Tensor, fmt: Format, values: bool) -> Tensor:
    """Codes ``[P, H, T, D]``, one element each, of ``k`` or (with values) ``v``."""
    if values and fmt.together > 1:
        cache = cache.transpose(-1, -2).flatten(2, 3)
    if fmt.packed == 2:
        cache = torch.cat((cache & 15, cache >> 4), -1)
    return cache


def pack_codes(codes: Tensor, fmt: Format) -> Tensor:
    """What is stored of codes ``[..., D]`` of one element each: bytes ``[..., D / packed]``."""
    if fmt.packed == 2:
        low, high = codes.chunk(2, -1)
        return low | (high << 4)
    return codes
