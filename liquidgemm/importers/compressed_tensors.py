"""compressed-tensors, integers of 4 or 8 bits and FP4 (vllm-project/compressed-tensors).

Per layer, ``pack-quantized``: ``weight_packed`` int32 ``[N, ceil(K * bits / 32)]``, codes + 8 (or
128), the first of a word's columns in its low bits; ``weight_scale`` float ``[N, G]``;
``weight_shape`` ``[2]``, which stacked experts may lack; if asymmetric, ``weight_zero_point``,
int32 ``[ceil(N * bits / 32), G]``, packed likewise along the rows, or int8 ``[N, G]`` as older
versions wrote it; ``weight_g_idx`` ``[K]`` if columns were put into groups out of order.
``int-quantized``: ``weight`` int8 ``[N, K]`` instead of the first, no shape, and zero points int8
``[N, G]``.
``W = scale * (code - zero)``. ``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``:
``weight_packed`` uint8 ``[N, K / 2]``, `fp4`; ``weight_scale`` uint8 or E4M3 for groups of 32 or
16; NVFP4 has ``weight_global_scale`` float32 ``[1]``, by which its scales are divided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.liquidquant import ceil_div
from . import fp4
from .bits import WORDS, expect, expect_matrix, expect_scales, in_order, span_of, unpack_words
from .settings import LayerScheme, LayerSettings, Settings, harmless, matched, not_quantized
from .source import AnyWeight, SourceWeight
from .wide import ByteWeight

MARKS = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"})

SYNONYMS: dict[str, str] = {}

HARMLESS = harmless(
    {
        "described": "version global_compression_ratio",
        "seen by the tensors of a layer": "quantization_status",
        "how a loader computes": "run_compressed dequantize use_optimized_inference",
    }
)
# Of the arguments for weights and activations. Scales and zeros lie there with their dtypes.
_HARMLESS_ARGUMENTS = harmless(
    {"how the scales were found": "observer observer_kwargs scale_dtype zp_dtype"}
)

# naive-quantized stores integers as int-quantized does.
_INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")
_FP4 = {f"{kind}-pack-quantized": kind for kind in fp4.SPANS}
_LAYOUTS = (*_INTEGERS, *_FP4)
_OFFLINE = ("weight_input", "weight_output")


def names(layer: LayerSettings) -> tuple[frozenset[str], frozenset[str]]:
    optional = frozenset({"weight_zero_point", "weight_g_idx", "bias"})
    if layer.layout == "pack-quantized":
        return frozenset({"weight_packed", "weight_scale"}), optional | {"weight_shape"}
    if layer.layout == "mxfp4":
        return frozenset({"weight_packed", "weight_scale"}), frozenset({"bias"})
    if layer.layout == "nvfp4":  # the last one is of activations, which get scales as they come
        required = frozenset({"weight_packed", "weight_scale", "weight_global_scale"})
        return required, frozenset({"bias", "input_global_scale"})
    return frozenset({"weight", "weight_scale"}), optional


def scheme(settings: Settings) -> LayerScheme:
    layout = settings.choice("format", (*_LAYOUTS, "mixed-precision"))
    _check_transforms(settings)
    if sparsity := settings.take("sparsity_config"):
        Settings(sparsity, "sparsity_config.").choice("format", ("dense",), "missing")
    ignored = settings.names("ignore")
    groups = {}
    for name, group in settings.objects("config_groups").items():
        targets = group.names("targets")
        groups[name] = targets, _group(group, layout)
    settings.harmless(HARMLESS)
    settings.close()  # kv_cache_scheme, moe_sparsity_config: not understood
    if not groups and layout != "pack-quantized":
        raise ValueError(
            f"config_groups: expected the settings of the layers, got none for format {layout!r}"
        )

    def layer(name: str, module: str) -> LayerSettings:
        for entry in ignored:
            if entry == "Linear" or matched(entry, (name, module)):
                raise not_quantized("ignore", entry, name)
        if not groups:
            return LayerSettings("pack-quantized")
        found = _of_layer(groups, (name, module))
        if isinstance(found, str):
            raise not_quantized("config_groups", found, name)
        return found

    return layer


def _of_layer(
    groups: dict[str, tuple[list[str], LayerSettings | str]], layer: tuple[str, str]
) -> LayerSettings | str:
    """Of the groups that target the layer, the library's choice: one that names it, then one by
    a regular expression, in the order of the alphabet, then one for its class."""
    by_target = {t: parsed for targets, parsed in groups.values() for t in targets}
    for target in sorted(by_target, key=lambda t: (t.startswith("re:"), t)):
        if matched(target, layer):
            return by_target[target]
    if "Linear" in by_target:
        return by_target["Linear"]
    raise ValueError(
        f"config_groups: expected a group that targets {layer[0]}, whose tensors are quantized, "
        f"got targets {', '.join(sorted(by_target))}"
    )


def _group(group: Settings, layout: str | None) -> LayerSettings | str:
    """The settings of a group's layers, or why they are not quantized."""
    own = group.choice("format", (*_LAYOUTS, "dense"))
    arguments, inputs = group.take("weights"), group.take("input_activations")
    group.close()  # output_activations would change the results
    note = ""
    if inputs is not None:
        note = _inputs(Settings(inputs, f"{group.path}input_activations."))
    if arguments is None:
        return f"{group.path}weights = null"
    layout = own or layout
    if layout in (None, "mixed-precision", "dense"):
        raise ValueError(f"{group.path}format: expected one of {_LAYOUTS}, got {own!r}")
    weights = Settings(arguments, f"{group.path}weights.")
    if layout in _FP4:
        return _fp4(weights, _FP4[layout], note)
    bits = weights.choice("num_bits", (4, 8), 8)
    weights.choice("type", ("int",), "int")
    weights.choice("dynamic", (False,))
    symmetric = weights.choice("symmetric", (True, False), True)
    span = weights.group_size()
    strategy = weights.choice("strategy", ("channel", "group", "tensor"))
    if strategy is None:
        strategy = "tensor" if span is None else "channel" if span == -1 else "group"
    if (strategy == "group") != (span not in (None, -1)):
        raise ValueError(
            f"{weights.path}group_size: expected a number of columns for strategy 'group' alone, "
            f"got {span!r} for {strategy!r}"
        )
    # With "group" the columns are out of order, which weight_g_idx has to tell.
    order = weights.choice("actorder", (False, "weight", "static", "group", "dynamic", True))
    weights.harmless(_HARMLESS_ARGUMENTS)
    weights.close()
    layout = "pack-quantized" if layout == "pack-quantized" else "int-quantized"
    ordered = order not in ("group", "dynamic", True)
    span = span if strategy == "group" else -1
    return LayerSettings(layout, bits, span, symmetric, ordered, note)


def _fp4(weights: Settings, kind: str, note: str) -> LayerSettings:
    span = fp4.SPANS[kind]
    weights.choice("num_bits", (4,), 8)
    weights.choice("type", ("float",), "int")
    weights.choice("dynamic", (False,))
    weights.choice("symmetric", (True,), True)
    weights.choice("strategy", ("group",) if kind == "mxfp4" else ("tensor_group",))
    weights.choice("group_size", (span,))
    weights.choice("actorder", (False, "weight", "static"))
    weights.harmless(_HARMLESS_ARGUMENTS)
    weights.close()
    return LayerSettings(kind, 4, span, True, True, note)


def _inputs(inputs: Settings) -> str:
    """What there is to say of how the source quantizes activations: here they are quantized to 8
    bits as the model runs, each token by its own scale. Scales measured before have no place."""
    # "local": as it comes but for one factor, by which FP4 uses the range of its scales.
    of_floats = inputs.take("type", "int") == "float"
    inputs.choice("dynamic", (True, "local") if of_floats else (True,), False)
    kind = {
        "num_bits": inputs.take("num_bits", 8),
        "type": inputs.take("type", "int"),
        "symmetric": inputs.take("symmetric", True),
        "strategy": inputs.take("strategy", "tensor"),
    }
    span = inputs.group_size()
    inputs.harmless(_HARMLESS_ARGUMENTS)
    inputs.close()
    if kind == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}:
        return ""
    said = ", ".join(f"{key} = {value}" for key, value in {**kind, "group_size": span}.items())
    return (
        f"{inputs.path.removesuffix('.')}: not carried over ({said}): activations are quantized to "
        "8 bits, each token by its own scale"
    )


def _check_transforms(settings: Settings) -> None:
    """Those of weights are in the weights already; any other would have to run with the model."""
    transforms = Settings(settings.take("transform_config", {}), "transform_config.")
    for group in transforms.objects("config_groups").values():
        apply = group.take("apply", [])
        for entry in apply if isinstance(apply, list) else [apply]:
            where = Settings(entry, f"{group.path}apply.")
            location = where.take("location")
            if location not in _OFFLINE:
                raise ValueError(
                    f"{where.path}location: expected a transform of the weights, which are stored "
                    f"transformed, got {location!r}: an online transform ({group.take('type')}), "
                    "without which the model computes something else, has no place in the format"
                )
    transforms.close()


def read(tensors: dict[str, Tensor], layer: LayerSettings) -> AnyWeight:
    if layer.layout in fp4.SPANS:
        return _read_fp4(tensors, layer.layout)
    codes, scale = _codes(tensors, layer), tensors["weight_scale"]
    n, k = codes.shape
    if scale.numel() == 1 and layer.group_size in (None, -1):  # strategy tensor
        scale = scale.reshape(1, 1).expand(n, 1)
    expect_matrix("weight_scale", scale)
    groups = scale.shape[1]
    expect_scales("weight_scale", scale, [n, groups])
    span = span_of("weight_scale", k, groups, layer.group_size)
    group_of_column = tensors.get("weight_g_idx")
    in_order("weight_g_idx", group_of_column, k, span)
    if layer.ordered is False and groups > 1 and group_of_column is None:
        raise ValueError("weight_g_idx: expected the order of columns as actorder says, got none")
    zero, bias = _zeros(tensors, layer, [n, groups]), tensors.get("bias")
    if layer.bits == 8:
        if groups > 1:
            raise ValueError(
                "num_bits: expected 4 for weights in groups, got 8: weights of 8 bits fit the "
                "format with one scale per row"
            )
        return ByteWeight(codes, zero[:, 0], scale[:, 0].float(), bias)
    step = scale.double()
    return SourceWeight(
        (codes + 8).to(torch.uint8), step, -(zero + 8).double() * step, span, bias=bias
    )


def _read_fp4(tensors: dict[str, Tensor], kind: str) -> AnyWeight:
    names, bias = ("weight_packed", "weight_scale"), tensors.get("bias")
    packed, scale = (tensors[name] for name in names)
    if kind == "mxfp4":
        return fp4.mxfp4(names, packed, scale, bias)
    divisor = tensors["weight_global_scale"]
    expect_scales("weight_global_scale", divisor, [1])
    return fp4.nvfp4(names, packed, scale, 1 / divisor.float(), bias)


def _codes(tensors: dict[str, Tensor], layer: LayerSettings) -> Tensor:
    """Signed codes, int16 ``[N, K]``."""
    half = 2 ** (layer.bits - 1)
    if layer.layout == "int-quantized":
        codes = tensors["weight"]
        expect_matrix("weight", codes)
        expect("weight", codes, (torch.int8,), list(codes.shape))
        low, high = (int(extremum) for extremum in codes.aminmax())
        if low < -half or high >= half:
            raise ValueError(
                f"weight: expected codes of {layer.bits} bits, {-half} to {half - 1}, got {low} to "
                f"{high}"
            )
        return codes.short()
    packed = tensors["weight_packed"]
    expect_matrix("weight_packed", packed)
    per_word = 32 // layer.bits
    if (shape_of_weight := tensors.get("weight_shape")) is None:
        # Some writers of stacked experts leave it out. Whole groups are whole words.
        n, k = packed.shape[0], packed.shape[1] * per_word
        if layer.group_size in (None, -1) or k % layer.group_size:
            raise ValueError("weight_shape: expected one but for whole groups of columns, got none")
    else:
        expect("weight_shape", shape_of_weight, (torch.int64, torch.int32), [2])
        n, k = (int(size) for size in shape_of_weight)
    if n < 1 or k < 1:
        raise ValueError(f"weight_shape: expected a matrix, got {n} x {k}")
    shape = [n, ceil_div(k, per_word)]
    if list(packed.shape) == [n, ceil_div(k, 4)] != shape:
        raise ValueError("weight_packed: expected 4 bits per weight, got 8")
    expect("weight_packed", packed, WORDS, shape)
    return unpack_words(packed, dim=1, bits=layer.bits)[:, :k].short() - half


def _zeros(tensors: dict[str, Tensor], layer: LayerSettings, shape: list[int]) -> Tensor:
    """Signed zeros, int16 ``[N, G]``."""
    zero = tensors.get("weight_zero_point")
    if zero is None:
        if layer.symmetric is False:
            raise ValueError("weight_zero_point: expected one, as symmetric = false says, got none")
        return torch.zeros(shape, dtype=torch.int16)
    n, groups = shape
    half = 2 ** (layer.bits - 1)
    if layer.layout == "pack-quantized" and zero.dtype == torch.int32:
        expect("weight_zero_point", zero, WORDS, [ceil_div(n * layer.bits, 32), groups])
        zero = unpack_words(zero, dim=0, bits=layer.bits)[:n].short() - half
    else:
        if zero.numel() == n * groups == n:
            zero = zero.reshape(shape)
        elif zero.numel() == 1:
            zero = zero.reshape(1, 1).expand(shape)
        expect("weight_zero_point", zero, (torch.int8,), shape)
        zero = zero.short()
    low, high = (int(extremum) for extremum in zero.aminmax())
    if low < -half or high >= half:
        raise ValueError(f"weight_zero_point: expected {-half} to {half - 1}, got {low} to {high}")
    if layer.symmetric and (low, high) != (0, 0):
        raise ValueError(
            f"weight_zero_point: expected zeros, as symmetric = true means, got {low} to {high}"
        )
    return zero
