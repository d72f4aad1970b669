"""GPTQ, 4 bits, as AutoGPTQ and GPTQModel store it.

Per layer: ``qweight`` int32 ``[K / 8, N]``, eight input features per word, the first in the low
nibble; ``qzeros`` int32 ``[G, N / 8]``, eight output channels per word; ``scales`` float
``[G, N]``; ``g_idx`` int32 ``[K]``, the group of each input feature.
``W = scale * (code - zero)``. ``qzeros`` holds the zero itself in version 2
(``checkpoint_format: gptq_v2``) and the zero minus 1 modulo 16 in version 1. Writers have confused
the versions; where ``sym`` is true the zero is 8, which tells them apart.
"""

from __future__ import annotations

from torch import Tensor

from ..formats.liquidquant import ceil_div
from .bits import WORDS, expect, expect_matrix, expect_scales, in_order, span_of, unpack_words
from .settings import LayerScheme, LayerSettings, Settings, harmless, not_quantized, part_of, starts
from .source import SourceWeight

MARKS = frozenset({"qweight", "qzeros", "scales"})

SYNONYMS = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}

_VERSIONS = ("gptq", "gptq_v2")

HARMLESS = harmless(
    {
        "how a loader computes": "use_cuda_fp16 use_exllama disable_exllama use_exllama_v2 "
        "exllama_config max_input_length model_seqlen cache_block_outputs backend",
        "how the codes were found": "damp_percent damp_auto_increment static_groups "
        "true_sequential act_group_aware mse dataset tokenizer batch_size pad_token_id "
        "block_name_to_quantize module_name_preceding_first_block fail_safe fallback hessian gptaq "
        "v2 v2_alpha mock_quantization moe",
        "the same, of AutoRound": "nsamples seqlen iters lr minmax_lr gradient_accumulate_steps "
        "enable_minmax_tuning enable_quanted_input enable_norm_bias_tuning low_gpu_mem_usage "
        "low_cpu_mem_usage amp scale_dtype to_quant_block_names train_bs not_use_best_mse "
        "dynamic_max_gap",
        "where the writer ran": "device pack_impl offload_to_disk offload_to_disk_path "
        "auto_forward_data_parallel vram_strategy gc_mode wait_for_submodule_finalizers",
        "names": "model_name_or_path model_file_base_name provider autoround_version",
        "meant by its writer for what changes nothing": "meta",
    }
)


def names(layer: LayerSettings) -> tuple[frozenset[str], frozenset[str]]:
    return MARKS, frozenset({"g_idx", "bias"})


def scheme(settings: Settings) -> LayerScheme:
    whole = _one(settings)
    settings.choice("is_marlin_format", (False,))
    settings.choice("pack_dtype", ("int32", "torch.int32"))
    settings.choice("data_type", ("int",))
    settings.choice("act_bits", (16, 32))
    head = settings.flag("lm_head")
    parts = settings.names("modules_in_block_to_quantize")
    dynamic = settings.objects("dynamic")
    overrides = {}
    for pattern, entry in dynamic.items():
        overrides[pattern] = None if pattern.startswith("-") else _one(entry, whole)
        entry.harmless(HARMLESS)
        entry.close()
    settings.harmless(HARMLESS)
    settings.close()

    def layer(name: str, module: str) -> LayerSettings:
        is_head = name.rpartition(".")[2] == "lm_head"
        if is_head and head is False:
            raise not_quantized("lm_head", "false", name)
        if parts and not is_head and not any(part_of(part, name) for part in parts):
            raise not_quantized("modules_in_block_to_quantize", ", ".join(parts), name)
        for pattern, override in overrides.items():
            expression = pattern.removeprefix("-:").removeprefix("+:")
            if starts(expression, (name, module)):
                if override is None:
                    raise not_quantized("dynamic", pattern, name)
                return override
        return whole

    return layer


def _one(settings: Settings, base: LayerSettings | None = None) -> LayerSettings:
    """The settings of a layer, or those that are other than base's."""
    base = base or LayerSettings("gptq")
    settings.choice("bits", (4,), 4)
    # GPTQModel calls it format, others checkpoint_format; it writes both.
    layout = settings.choice("checkpoint_format", _VERSIONS)
    also = settings.choice("format", _VERSIONS)
    if layout and also and layout != also:
        raise ValueError(f"{settings.path}format: expected {layout!r}, got {also!r}")
    span, symmetric = settings.group_size(), settings.flag("sym")
    reordered = settings.flag("desc_act")
    return LayerSettings(
        layout or also or base.layout,
        4,
        base.group_size if span is None else span,
        base.symmetric if symmetric is None else symmetric,
        base.ordered if reordered is None else not reordered,
    )


def read(tensors: dict[str, Tensor], layer: LayerSettings) -> SourceWeight:
    words, zeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    expect_matrix("qweight", words)
    expect_matrix("scales", scales)
    k, n, groups = 8 * words.shape[0], words.shape[1], scales.shape[0]
    span = span_of("scales", k, groups, layer.group_size)
    expect("qweight", words, WORDS, [k // 8, n])
    expect("qzeros", zeros, WORDS, [groups, ceil_div(n, 8)])
    expect_scales("scales", scales, [groups, n])
    in_order("g_idx", tensors.get("g_idx"), k, span)
    if layer.ordered is False and groups > 1 and "g_idx" not in tensors:
        raise ValueError("g_idx: expected the order of the columns, as desc_act says, got none")
    zero = _zeros(unpack_words(zeros, dim=1)[:, :n], layer)
    step = scales.double().t()
    codes = unpack_words(words, dim=0).t().contiguous()
    return SourceWeight(codes, step, -zero.double().t() * step, span, bias=tensors.get("bias"))


def _zeros(stored: Tensor, layer: LayerSettings) -> Tensor:
    """The zeros ``[G, N]`` that are meant by those stored."""
    first = int(stored[0, 0])
    uniform = bool((stored == first).all())
    if layer.symmetric:
        if not uniform or first not in (7, 8):
            got = first if uniform else f"{int(stored.min())} to {int(stored.max())}"
            raise ValueError(
                "qzeros: expected 8 everywhere, or 7 as version 1 stores a zero of 8, since sym is "
                f"true, got {got}"
            )
        return stored.new_full(stored.shape, 8)
    # Of a symmetric layer, in the version that was not declared: no asymmetric one is like that.
    other = {"gptq": 8, "gptq_v2": 7}[layer.layout]
    if layer.symmetric is None and uniform and first == other:
        raise ValueError(
            f"qzeros: expected zeros as {layer.layout!r} stores them, got {first} everywhere, "
            "which is a zero of 8 in the other version: say in the settings whether sym is true "
            "(then they are read as 8) or false"
        )
    # A zero of 0 is written as 15 in version 1: no group has a zero of 16.
    return (stored + 1) & 0xF if layer.layout == "gptq" else stored
