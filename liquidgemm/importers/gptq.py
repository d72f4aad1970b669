"""GPTQ, 4 bits, as AutoGPTQ and GPTQModel store it.

Per layer: ``qweight`` int32 ``[K / 8, N]``, eight input features per word, the first in the low
nibble; ``qzeros`` int32 ``[G, N / 8]``, eight output channels per word; ``scales`` float
``[G, N]``; ``g_idx`` int32 ``[K]``, the group of each input feature.
``W = scale * (code - zero)``. ``qzeros`` holds the zero itself in version 2
(``checkpoint_format: gptq_v2``) and the zero minus 1 modulo 16 in version 1.
"""

from __future__ import annotations

from torch import Tensor

from ..format import ceil_div
from .bits import FLOATS, WORDS, expect, expect_matrix, in_order, unpack_words
from .source import SourceWeight

REQUIRED = frozenset({"qweight", "qzeros", "scales"})
OPTIONAL = frozenset({"g_idx", "bias"})


def read(tensors: dict[str, Tensor], settings: dict) -> SourceWeight:
    if (bits := settings.get("bits", 4)) != 4:
        raise ValueError(f"bits: expected 4, got {bits!r}")
    version = settings.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format: expected 'gptq' or 'gptq_v2', got {version!r}")
    span = settings.get("group_size", -1)
    if not isinstance(span, int) or (span < 1 and span != -1):
        raise ValueError(f"group_size: expected a positive number or -1, got {span!r}")
    words, zeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    expect_matrix("qweight", words)
    k, n = 8 * words.shape[0], words.shape[1]
    span = k if span == -1 else min(span, k)
    groups = ceil_div(k, span)
    expect("qweight", words, WORDS, [k // 8, n])
    expect("qzeros", zeros, WORDS, [groups, ceil_div(n, 8)])
    expect("scales", scales, FLOATS, [groups, n])
    in_order("g_idx", tensors.get("g_idx"), k, span)
    zero = unpack_words(zeros, dim=1)[:, :n]
    if version == "gptq":
        # A zero of 0 is written as 15: no group has a zero of 16.
        zero = (zero + 1) & 0xF
    step = scales.double().t()
    codes = unpack_words(words, dim=0).t().contiguous()
    return SourceWeight(codes, step, -zero.double().t() * step, span, bias=tensors.get("bias"))
