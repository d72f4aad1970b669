"""MXFP4 of experts, as gpt-oss is stored.

Per stack of experts: ``blocks`` uint8 ``[E, N, K / 32, 16]``, two codes to a byte, `fp4`;
``scales`` uint8 ``[E, N, K / 32]``, the exponents of 32 columns; ``bias`` float ``[E, N]``. All
else is in floats.
"""

from __future__ import annotations

import re

from torch import Tensor

from . import fp4
from .bits import expect
from .settings import LayerScheme, LayerSettings, Settings, harmless, not_quantized
from .source import AnyWeight

MARKS = frozenset({"blocks", "scales"})

SYNONYMS: dict[str, str] = {}

HARMLESS = harmless({"how a loader computes": "dequantize"})

_BYTES = fp4.SPANS["mxfp4"] // 2  # of a block


def names(layer: LayerSettings) -> tuple[frozenset[str], frozenset[str]]:
    return MARKS, frozenset({"bias"})


def scheme(settings: Settings) -> LayerScheme:
    kept = settings.names("modules_to_not_convert")
    settings.harmless(HARMLESS)
    settings.close()

    def layer(name: str, module: str) -> LayerSettings:
        for entry in kept:  # "model.layers.*.self_attn": a star stands for anything
            expression = ".*".join(map(re.escape, entry.split("*")))
            if any(re.search(rf"(^|\.){expression}(\.|$)", one) for one in (name, module)):
                raise not_quantized("modules_to_not_convert", entry, name)
        return LayerSettings("mxfp4", 4, fp4.SPANS["mxfp4"], True, True)

    return layer


def read(tensors: dict[str, Tensor], layer: LayerSettings) -> AnyWeight:
    blocks, scales = tensors["blocks"], tensors["scales"]
    if blocks.dim() != 3:
        raise ValueError(
            f"blocks: expected shape [N, K / 32, {_BYTES}] of each expert, got {list(blocks.shape)}"
        )
    expect("blocks", blocks, (blocks.dtype,), [*blocks.shape[:2], _BYTES])
    return fp4.mxfp4(("blocks", "scales"), blocks.flatten(1), scales, tensors.get("bias"))
