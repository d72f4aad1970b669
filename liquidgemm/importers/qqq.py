"""QQQ (arXiv 2406.09904; HandH1998/QQQ), 4-bit weights for INT8 activations.

Per layer: ``B`` int32 ``[K / 16, 2 N]``, codes in tiles of 16 x 64 (see `_codes`); ``s_channel``
float32 ``[1, N]``, of 32 channels in the order 0, 1, 8, 9, 16, 17, 24, 25, 2, 3, ...; and
``s_group`` float16: ``[K / group, N]``, of 64 channels in the order 0, 8, ..., 56, 1, 9, ..., or
empty.

- with groups: ``W = s_channel * round(s_group * (code - 8))``, to the nearest even;
- per channel: ``W = 16 * s_channel * code`` with signed codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import WORDS, expect, expect_matrix, expect_scales, span_of, unpack_words
from .settings import LayerScheme, LayerSettings, Settings, harmless, no_override
from .source import SourceWeight

MARKS = frozenset({"B", "s_channel", "s_group"})

SYNONYMS = {
    "w_bit": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "checkpoint_format": "format",
}

HARMLESS = harmless(
    {
        "the columns are stored in their own order, no tensor has another": "desc_act",
        "seen by the tensors of the layer": "lm_head",
        "how the codes were found": "damp_percent damp_auto_increment static_groups "
        "true_sequential act_group_aware mse",
        "meant by its writer for what changes nothing": "meta",
    }
)

_TILE_CHANNELS = 64
# Nibble of each of the eight codes of a word.
_PLACES_BY_GROUP = (0, 4, 1, 5, 2, 6, 3, 7)
_PLACES_BY_CHANNEL = (1, 3, 5, 7, 0, 2, 4, 6)


def names(layer: LayerSettings) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset({"B", "s_channel"}), frozenset({"s_group", "bias"})


def scheme(settings: Settings) -> LayerScheme:
    settings.choice("bits", (4,), 4)
    settings.choice("format", ("qqq",))
    settings.choice("pack_dtype", ("int32", "torch.int32"))
    settings.choice("sym", (True,))
    span = settings.group_size()
    dynamic = settings.objects("dynamic")
    settings.harmless(HARMLESS)
    settings.close()

    def layer(name: str, module: str) -> LayerSettings:
        no_override(dynamic, name, module)
        return LayerSettings("qqq", group_size=span)

    return layer


def read(tensors: dict[str, Tensor], layer: LayerSettings) -> SourceWeight:
    words, s_channel = tensors["B"], tensors["s_channel"]
    s_group = tensors.get("s_group", torch.empty(0, dtype=torch.float16))
    expect_matrix("B", words)
    expect_matrix("s_channel", s_channel)
    n, k = s_channel.shape[1], 16 * words.shape[0]
    if n % _TILE_CHANNELS:
        raise ValueError(f"s_channel: expected a multiple of {_TILE_CHANNELS} channels, got {n}")
    expect("B", words, WORDS, [k // 16, 2 * n])
    expect_scales("s_channel", s_channel, [1, n], (torch.float32,))
    sigma, bias = _channels(s_channel), tensors.get("bias")
    if s_group.numel() == 0:
        span_of("s_group", k, 1, layer.group_size)
        codes = _codes(words, _PLACES_BY_CHANNEL) ^ 8  # two's complement to code + 8
        step = 16 * sigma.double().unsqueeze(1)
        return SourceWeight(codes, step, -8 * step, k, bias=bias)
    expect_matrix("s_group", s_group)
    groups = s_group.shape[0]
    span = span_of("s_group", k, groups, layer.group_size)
    expect_scales("s_group", s_group, [groups, n], (torch.float16,))
    step = s_group.view(groups, -1, 8, 8).transpose(2, 3).reshape(groups, n).t().double()
    codes = _codes(words, _PLACES_BY_GROUP)
    return SourceWeight(codes, step, -8 * step, span, sigma, bias)


def _codes(words: Tensor, places: tuple[int, ...]) -> Tensor:
    """int32 ``[K / 16, 2 N]`` to uint8 ``[N, K]``.

    A tile holds feature ``4m + r`` and channel ``16j + 8b + c`` in word ``[c, m, j]``; places[4b +
    r] is the nibble within it.
    """
    n, k = words.shape[1] // 2, 16 * words.shape[0]
    nibbles = unpack_words(words, dim=1).view(k // 16, n // _TILE_CHANNELS, 8, 4, 4, 8)
    tiles = nibbles[..., list(places)].unflatten(5, (2, 4))  # k, n, c, m, j, b, r
    return tiles.permute(1, 4, 5, 2, 0, 3, 6).reshape(n, k)


def _channels(parameters: Tensor) -> Tensor:
    """``[1, N]`` in the order 0, 1, 8, 9, 16, 17, 24, 25, 2, ... to ``[N]`` in order."""
    return parameters.view(-1, 4, 4, 2).transpose(1, 2).flatten()
