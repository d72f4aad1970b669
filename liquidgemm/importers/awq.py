"""AutoAWQ, version ``gemm``, 4 bits (casper-hansen/AutoAWQ).

Per layer: ``qweight`` int32 ``[K, N / 8]`` and ``qzeros`` int32 ``[K / group, N / 8]``, of eight
output channels in the order 0, 2, 4, 6, 1, 3, 5, 7 from the low nibble up; ``scales`` float
``[K / group, N]``. ``W = scale * (code - zero)``.
"""

from __future__ import annotations

from torch import Tensor

from .bits import FLOATS, WORDS, expect, expect_matrix, unpack_words
from .source import SourceWeight

REQUIRED = frozenset({"qweight", "qzeros", "scales"})
OPTIONAL = frozenset({"bias"})

_CHANNEL_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def read(tensors: dict[str, Tensor], settings: dict) -> SourceWeight:
    if (bits := settings.get("bits", settings.get("w_bit", 4))) != 4:
        raise ValueError(f"bits: expected 4, got {bits!r}")
    if (version := str(settings.get("version", "gemm")).lower()) != "gemm":
        raise ValueError(f"version: expected 'gemm', got {version!r}, which is packed otherwise")
    words, zeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    expect_matrix("qweight", words)
    expect_matrix("scales", scales)
    k, n, groups = words.shape[0], 8 * words.shape[1], scales.shape[0]
    expect("qweight", words, WORDS, [k, n // 8])
    expect("qzeros", zeros, WORDS, [groups, n // 8])
    expect("scales", scales, FLOATS, [groups, n])
    if k % groups:
        raise ValueError(f"scales: expected groups that divide {k} rows of qweight, got {groups}")
    step = scales.double().t()
    zero = _channels(zeros).double().t()
    codes = _channels(words).t().contiguous()
    return SourceWeight(codes, step, -zero * step, k // groups, bias=tensors.get("bias"))


def _channels(words: Tensor) -> Tensor:
    """int32 ``[rows, N / 8]`` to uint8 ``[rows, N]`` with the channels in order."""
    nibbles = unpack_words(words, dim=1).unflatten(1, (-1, 8))
    nibble_of_channel = sorted(range(8), key=_CHANNEL_OF_NIBBLE.__getitem__)
    return nibbles[..., nibble_of_channel].flatten(1)
