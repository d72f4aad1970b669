"""bitsandbytes, 4 bits: NF4 and FP4 (bitsandbytes-foundation/bitsandbytes).

Per layer: ``weight`` uint8 ``[N * K / 2, 1]``, the codes of the flattened matrix, the first of two
in the high bits; ``weight.quant_map`` float32 ``[16]``, their values; ``weight.absmax``, the scale
of each block of the flattened matrix, whose last one may be shorter: float32, or with double
quantization uint8, which means ``nested_quant_map[absmax] * nested_absmax + nested_offset`` with
float32 ``weight.nested_quant_map [256]`` and ``weight.nested_absmax`` for blocks of scales.
``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``) is JSON in bytes: sizes and the offset.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._files import parse_json
from ..formats.liquidquant import ceil_div
from .bits import expect, expect_scales
from .settings import LayerScheme, LayerSettings, Settings, harmless, not_quantized, part_of
from .wide import FineWeight

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_NESTED = ("nested_absmax", "nested_quant_map")

MARKS = frozenset({f"{_STATE}{kind}" for kind in _KINDS} | {"weight.absmax", "SCB"})

SYNONYMS = {
    "_load_in_4bit": "load_in_4bit",
    "_load_in_8bit": "load_in_8bit",
}

HARMLESS = harmless(
    {
        "how a loader computes": "bnb_4bit_compute_dtype llm_int8_enable_fp32_cpu_offload",
        "of 8-bit weights": "llm_int8_threshold llm_int8_has_fp16_weight",
        "how codes are stored, which their tensor says": "bnb_4bit_quant_storage",
        "seen by the tensors of a layer": "bnb_4bit_use_double_quant",
    }
)


def names(layer: LayerSettings) -> tuple[frozenset[str], frozenset[str]]:
    required = {"weight", "weight.absmax", "weight.quant_map", f"{_STATE}{layer.layout}"}
    return frozenset(required), frozenset({f"weight.{key}" for key in _NESTED} | {"bias"})


def scheme(settings: Settings) -> LayerScheme:
    settings.choice("load_in_8bit", (False,))
    settings.choice("load_in_4bit", (True,))
    kind = settings.choice("bnb_4bit_quant_type", _KINDS, "fp4")
    kept = settings.names("llm_int8_skip_modules")
    settings.harmless(HARMLESS)
    settings.close()

    def layer(name: str, module: str) -> LayerSettings:
        for part in kept:
            if part_of(part, name) or part_of(part, module):
                raise not_quantized("llm_int8_skip_modules", part, name)
        return LayerSettings(kind)

    return layer


def read(tensors: dict[str, Tensor], layer: LayerSettings) -> FineWeight:
    state = _state(tensors, layer.layout)
    n, k = state["shape"]
    packed = tensors["weight"]
    if packed.dtype in (torch.bfloat16, torch.float16, torch.float32):  # bnb_4bit_quant_storage
        packed = packed.contiguous().view(torch.uint8).reshape(-1, 1)
    expect("weight", packed, (torch.uint8,), [ceil_div(n * k, 2), 1])
    table = tensors["weight.quant_map"]
    expect_scales("weight.quant_map", table, [16], (torch.float32,))
    span = state["blocksize"]
    scale = _scales(tensors, state, ceil_div(n * k, span))
    codes = torch.cat((packed >> 4, packed & 15), 1).flatten()[: n * k]
    values = table[codes.int()]
    for part, one in zip(values.split(span * 4096), scale.split(4096), strict=True):
        part.mul_(one.repeat_interleave(span)[: len(part)])
    return FineWeight(values.view(n, k), span, tensors.get("bias"))


def _state(tensors: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """The content of quant_state, checked."""
    key = f"{_STATE}{kind}"
    stored = tensors[key]
    expect(key, stored, (torch.uint8,), [stored.numel()])
    try:
        state = parse_json(bytes(stored.tolist()).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{key}: damaged ({error})") from None
    content = Settings(state, f"{key}.")
    content.choice("quant_type", (kind,))
    shape = content.take("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and size > 0 for size in shape)
    ):
        raise ValueError(f"{key}.shape: expected the shape of a matrix, got {shape!r}")
    nested = "weight.nested_absmax" in tensors
    sizes = ("blocksize", "nested_blocksize") if nested else ("blocksize",)
    for name in sizes:
        if type(size := content.take(name)) is not int or size < 1:
            raise ValueError(f"{key}.{name}: expected a positive number, got {size!r}")
    offset = content.take("nested_offset")
    if nested and (type(offset) is not float or not math.isfinite(offset)):
        raise ValueError(f"{key}.nested_offset: expected a finite number, got {offset!r}")
    content.choice("nested_dtype", ("float32",))
    content.harmless(("dtype", "nested_blocksize"))  # dtype: that of the weight before
    content.close()
    return state


def _scales(tensors: dict[str, Tensor], state: dict[str, Any], blocks: int) -> Tensor:
    """The scale of each block, float32."""
    scale = tensors["weight.absmax"]
    has = [f"weight.{key}" in tensors for key in _NESTED]
    if not any(has):
        expect_scales("weight.absmax", scale, [blocks], (torch.float32,))
        return scale
    if not all(has):
        raise ValueError(
            f"weight.{_NESTED[has.index(False)]}: missing beside weight.{_NESTED[has.index(True)]}"
        )
    span = state["nested_blocksize"]
    unit, table = (tensors[f"weight.{key}"] for key in _NESTED)
    expect("weight.absmax", scale, (torch.uint8,), [blocks])
    expect_scales("weight.nested_absmax", unit, [ceil_div(blocks, span)], (torch.float32,))
    expect_scales("weight.nested_quant_map", table, [256], (torch.float32,))
    unit = unit.repeat_interleave(span)[:blocks]
    return table[scale.int()] * unit + state["nested_offset"]
