"""QoQ, the W4A8 format of QServe (arXiv 2405.04532; mit-han-lab/qserve).

Per layer: ``qweight`` int8 ``[N, K / 2]``, codes in blocks of 32 channels and 32 features (see
`_codes`); ``s1_scales`` float16 ``[N]``; and

- progressive groups: ``s2_scales`` and ``s2_zeros`` int8 ``[K / group, N]``, 32 channels in the
  order 0, 8, 16, 24, 1, 9, ...: ``W = s1 * int8(s2 * code + zero)``, a byte that wraps around;
- per channel: ``s1_szeros`` float16 ``[N]``: ``W = s1 * code - szero``, or where szero is but the
  product of s1 and an integer, rounded to float16, ``W = s1 * (code - zero)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import expect, expect_matrix, expect_scales, span_of
from .settings import LayerScheme, LayerSettings, Settings
from .source import SourceWeight

MARKS = frozenset({"qweight", "s1_scales"})

SYNONYMS = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}

HARMLESS: frozenset[str] = frozenset()

_BLOCK = 32


def names(layer: LayerSettings) -> tuple[frozenset[str], frozenset[str]]:
    return MARKS, frozenset({"s2_scales", "s2_zeros", "s1_szeros", "bias"})


def scheme(settings: Settings) -> LayerScheme:
    settings.choice("bits", (4,), 4)
    span = settings.group_size()
    settings.harmless(HARMLESS)
    settings.close()
    return lambda name, module: LayerSettings("qoq", group_size=span)


def read(tensors: dict[str, Tensor], layer: LayerSettings) -> SourceWeight:
    words, s1 = tensors["qweight"], tensors["s1_scales"]
    expect_matrix("qweight", words)
    n, k = words.shape[0], 2 * words.shape[1]
    if n % _BLOCK or k % _BLOCK:
        raise ValueError(f"qweight: expected blocks of {_BLOCK} x {_BLOCK}, got {n} x {k}")
    expect("qweight", words, (torch.int8,), [n, k // 2])
    expect_scales("s1_scales", s1, [n], (torch.float16, torch.float32))
    codes, sigma, bias = _codes(words), s1.float(), tensors.get("bias")
    if "s1_szeros" in tensors:
        if both := sorted({"s2_scales", "s2_zeros"} & tensors.keys()):
            raise ValueError(f"{both[0]}: expected no groups beside s1_szeros, got both")
        span_of("s1_szeros", k, 1, layer.group_size)
        szeros = tensors["s1_szeros"]
        expect("s1_szeros", szeros, (torch.float16, torch.float32), [n])
        step, szero = s1.double().unsqueeze(1), szeros.double().unsqueeze(1)
        zero = (szero / torch.where(step != 0, step, 1)).round()
        recovered = (zero * step).to(szeros.dtype) == szeros.unsqueeze(1)
        offset = torch.where(recovered, -zero * step, -szero)
        return SourceWeight(codes, step, offset, k, bias=bias)
    if missing := sorted({"s2_scales", "s2_zeros"} - tensors.keys()):
        raise ValueError(f"{missing[0]}: expected beside s1_scales, or s1_szeros, got neither")
    s2, zeros = tensors["s2_scales"], tensors["s2_zeros"]
    expect_matrix("s2_scales", s2)
    groups = s2.shape[0]
    expect_scales("s2_scales", s2, [groups, n], (torch.int8,))
    expect("s2_zeros", zeros, (torch.int8,), [groups, n])
    step, offset = _channels(s2).double(), _channels(zeros).double()
    span = span_of("s2_scales", k, groups, layer.group_size)
    if k % span:
        raise ValueError(f"s2_scales: expected groups that divide {k} columns, got {groups}")
    # The product of step and zero was cut to a byte: the multiple of 256 is put back that brings
    # the smallest code in use within INT8.
    least, largest = codes.unflatten(1, (groups, -1)).aminmax(dim=2)
    bottom = step * least + offset
    offset += (bottom + 128).remainder(256) - 128 - bottom
    if (step * largest + offset).max() > 127:
        raise ValueError("s2_scales, s2_zeros: expected weights within INT8, got some that wrap")
    return SourceWeight(codes, step, offset, span, sigma, bias)


def _codes(words: Tensor) -> Tensor:
    """int8 ``[N, K / 2]`` to uint8 ``[N, K]``.

    A block of 32 x 32 holds channel ``16a + 8b + c`` and feature ``16d + 4e + f`` at
    ``[c, e, d, b, f]``, a = 0 in the low nibble and a = 1 in the high one.
    """
    n, k = words.shape[0], 2 * words.shape[1]
    words = words.view(torch.uint8).view(n // _BLOCK, k // _BLOCK, 8, 4, 2, 2, 4)
    nibbles = torch.stack((words & 0xF, words >> 4))  # a, row, column, c, e, d, b, f
    return nibbles.permute(1, 0, 6, 3, 2, 5, 4, 7).reshape(n, k)


def _channels(parameters: Tensor) -> Tensor:
    """``[K / group, N]`` in the order 0, 8, 16, 24, 1, ... to ``[N, K / group]`` in order."""
    groups, n = parameters.shape
    return parameters.view(groups, n // _BLOCK, 8, 4).transpose(2, 3).reshape(groups, n).t()
