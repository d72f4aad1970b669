"""AutoAWQ, version ``gemm``, 4 bits (casper-hansen/AutoAWQ).

Per layer: ``qweight`` int32 ``[K, N / 8]`` and ``qzeros`` int32 ``[K / group, N / 8]``, of eight
output channels in the order 0, 2, 4, 6, 1, 3, 5, 7 from the low nibble up; ``scales`` float
``[K / group, N]``. ``W = scale * (code - zero)``; without qzeros, which ``zero_point: false``
allows, the zero is 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import FLOATS, WORDS, expect, expect_matrix, expect_scales, span_of, unpack_words
from .settings import (
    LayerScheme,
    LayerSettings,
    Settings,
    harmless,
    no_override,
    not_quantized,
    part_of,
)
from .source import SourceWeight

MARKS = frozenset({"qweight", "qzeros", "scales"})

# Kernels for this arrangement of the tensors; others are for others.
_BACKENDS = (
    *("auto", "autoawq", "auto_trainable", "machete", "marlin", "exllama_v1", "exllama_v2"),
    *("gemm", "gemm_triton", "torch_awq", "torch_fused_awq"),
)

_CHANNEL_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)

SYNONYMS = {
    "w_bit": "bits",
    "q_group_size": "group_size",
    "format": "version",
    "checkpoint_format": "version",
}

HARMLESS = harmless(
    {
        "how a loader computes": "do_fuse fuse_max_seq_len modules_to_fuse fuse_mapping "
        "exllama_config max_input_length use_cuda_fp16 model_seqlen cache_block_outputs",
        "how the codes were found": "dataset tokenizer batch_size pad_token_id damp_percent "
        "true_sequential act_group_aware block_name_to_quantize module_name_preceding_first_block "
        "duo_scaling apply_clip n_parallel_calib_samples max_calib_samples max_calib_seq_len",
        "meant by its writer for what changes nothing": "meta",
        "another format's, inherited; qzeros has the zeros, no tensor an order": "sym desc_act",
        "seen by the tensors of the layer": "lm_head",
    }
)


def names(layer: LayerSettings) -> tuple[frozenset[str], frozenset[str]]:
    required = frozenset({"qweight", "scales"})
    return (required if layer.symmetric else required | {"qzeros"}), frozenset({"qzeros", "bias"})


def scheme(settings: Settings) -> LayerScheme:
    bits = settings.choice("bits", (4,), 4)
    settings.choice("version", ("gemm",), "gemm")
    settings.choice("backend", _BACKENDS)
    settings.choice("pack_dtype", ("int32", "torch.int32"))
    zero_point = settings.flag("zero_point")
    span = settings.group_size()
    kept = settings.names("modules_to_not_convert")
    dynamic = settings.objects("dynamic")
    settings.harmless(HARMLESS)
    settings.close()
    symmetric = None if zero_point is None else not zero_point

    def layer(name: str, module: str) -> LayerSettings:
        for part in kept:
            if part_of(part, name) or part_of(part, module):
                raise not_quantized("modules_to_not_convert", part, name)
        no_override(dynamic, name, module)
        return LayerSettings("gemm", bits, span, symmetric)

    return layer


def read(tensors: dict[str, Tensor], layer: LayerSettings) -> SourceWeight:
    words, zeros, scales = tensors["qweight"], tensors.get("qzeros"), tensors["scales"]
    expect_matrix("qweight", words)
    expect_matrix("scales", scales)
    k, n, groups = words.shape[0], 8 * words.shape[1], scales.shape[0]
    expect("qweight", words, WORDS, [k, n // 8])
    expect_scales("scales", scales, [groups, n], FLOATS)
    span = span_of("scales", k, groups, layer.group_size)
    step = scales.double().t()
    if zeros is None:
        zero = torch.full_like(step, 8)
    else:
        expect("qzeros", zeros, WORDS, [groups, n // 8])
        zero = _channels(zeros).double().t()
    if layer.symmetric and not (zero == 8).all():
        raise ValueError(
            "qzeros: expected zeros of 8, as zero_point = false means, or no such tensor, got "
            f"{zero[zero != 8][0]:.0f}"
        )
    codes = _channels(words).t().contiguous()
    return SourceWeight(codes, step, -zero * step, span, bias=tensors.get("bias"))


def _channels(words: Tensor) -> Tensor:
    """int32 ``[rows, N / 8]`` to uint8 ``[rows, N]`` with the channels in order."""
    nibbles = unpack_words(words, dim=1).unflatten(1, (-1, 8))
    nibble_of_channel = sorted(range(8), key=_CHANNEL_OF_NIBBLE.__getitem__)
    return nibbles[..., nibble_of_channel].flatten(1)
