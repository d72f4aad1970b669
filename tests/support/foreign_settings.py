"""One layer in each format with its settings, and what each setting is to do to its import."""

import json
import shutil

import foreign
import pytest
import torch
from foreign import K, random_grid, write
from foreign_models import compressed
from safetensors.torch import load_file

from liquidgemm import QuantizedWeight, import_checkpoint

SAME, CHANGED = "same", "changed"

codes, scales, zeros = random_grid(-1)
_, s128, z128 = random_grid(128)
EIGHTS = torch.full_like(zeros, 8)


def ct(layout="pack-quantized", **weights):
    return compressed(layout, **weights) | {"ignore": []}


def with_group(**fields):
    settings = ct()
    settings["config_groups"]["group_0"] |= fields
    return {"config_groups": settings["config_groups"]}


def with_weights(**fields):
    return {"config_groups": ct(**fields)["config_groups"]}


def with_inputs(**fields):
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    return with_group(input_activations={**dynamic, "dynamic": True, **fields})


def transform(location):
    apply = [{"targets": ["Linear"], "location": location, "inverse": False}]
    return {"transform_config": {"config_groups": {"R": {"type": "hadamard", "apply": apply}}}}


# The tensors and settings from which the cases below differ.
BASES = {
    "ct": (foreign.compressed_tensors(codes, scales), ct()),
    "ct asymmetric": (foreign.compressed_tensors(codes, scales, zeros), ct(symmetric=False)),
    "ct groups": (
        foreign.compressed_tensors(codes, s128),
        ct(strategy="group", group_size=128),
    ),
    "ct int": (
        {"weight": (codes.int() - 8).to(torch.int8), "weight_scale": scales},
        ct("int-quantized"),
    ),
    "awq": (
        foreign.awq(codes, scales, zeros),
        {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "gemm", "zero_point": True},
    ),
    "awq symmetric": (
        foreign.awq(codes, scales, EIGHTS),
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": -1,
            "version": "gemm",
            "zero_point": False,
        },
    ),
    "gptq": (
        foreign.gptq(codes, scales, zeros, K),
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False, "desc_act": False},
    ),
    "gptq symmetric": (
        foreign.gptq(codes, scales, EIGHTS, K),
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": False},
    ),
    "gptq groups": (
        {k: t for k, t in foreign.gptq(codes, s128, z128, 128).items() if k != "g_idx"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": False},
    ),
    "qoq": (
        foreign.qoq(codes, scales[:, 0], zeros=zeros),
        {"quant_method": "qoq", "wbits": 4, "group_size": -1},
    ),
    "qqq": (
        foreign.qqq(codes, scales[:, 0]),
        {"quant_method": "qqq", "wbits": 4, "group_size": -1},
    ),
}

CASES = {
    "ct": [
        ({"format": "int-quantized"}, r"a\.weight: missing|expected nothing but"),
        ({"format": "float-quantized"}, "format: expected .*got 'float-quantized'"),
        ({"format": "marlin-24"}, "format: .*got 'marlin-24'"),
        ({"format": "mixed-precision"}, r"group_0\.format: expected one of"),
        ({"format": "mixed-precision"} | with_group(format="pack-quantized"), SAME),
        (with_group(format="mxfp8-quantized"), r"group_0\.format: .*mxfp8"),
        (with_group(format="dense"), r"group_0\.format: "),
        (transform("input"), r"transform_config\.\S+location: .*'input': an online transform"),
        (transform("output"), "transform_config"),
        (transform("k_cache"), "transform_config"),
        (transform("q_attn"), "transform_config"),
        (transform("weight_input"), SAME),
        ({"transform_config": {"other": 1}}, r"transform_config\.other"),
        ({"transform_config": {}}, SAME),
        ({"transform_config": {"config_groups": {}}}, SAME),
        ({"sparsity_config": {}}, SAME),
        ({"sparsity_config": {"format": "dense"}}, SAME),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config\.format"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "kv_cache_scheme: "),
        ({"kv_cache_scheme": None}, SAME),
        ({"moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config: "),
        ({"ignore": ["a"]}, "ignore: expected a layer that is not quantized, as 'a'"),
        ({"ignore": ["re:.*a$"]}, "ignore: "),
        ({"ignore": ["re:.*b$", "lm_head"]}, SAME),
        ({"ignore": ["re:("]}, "expected a regular expression"),
        ({"ignore": 3}, "ignore: expected a list of names"),
        (with_group(targets=["b"]), "config_groups: expected a group that targets a"),
        (with_group(targets=["a"]), SAME),
        (with_group(targets=["re:a"]), SAME),
        (with_group(weights=None), r"config_groups: .*weights = null"),
        (with_group(output_activations={"num_bits": 8}), "output_activations: "),
        (with_group(other=1), r"config_groups\.group_0\.other: "),
        ({"config_groups": {"W4A16": ["Linear"]}}, r"config_groups\.W4A16: expected an object"),
        (with_inputs(), SAME),
        (with_inputs(dynamic=False), r"input_activations\.dynamic: expected True, got False"),
        (with_inputs(dynamic="local"), r"input_activations\.dynamic"),
        (with_inputs(other=1), r"input_activations\.other"),
        (with_weights(num_bits=8), "weight_packed: expected int32"),
        (with_weights(num_bits=3), r"num_bits: expected 4, 8, got 3"),
        (with_weights(type="float"), r"weights\.type: expected 'int'"),
        (with_weights(symmetric=False), "weight_zero_point: expected one"),
        (with_weights(strategy="tensor"), SAME),
        (with_weights(strategy="block", block_structure=[8, 8]), "strategy: .*'block'"),
        (with_weights(block_structure=[8, 8]), r"weights\.block_structure"),
        (with_weights(strategy="group"), "group_size: expected a number of columns"),
        (with_weights(group_size=128), "group_size: expected a number of columns"),
        (with_weights(group_size=-1), SAME),
        (with_weights(dynamic=True), r"weights\.dynamic"),
        (with_weights(actorder="weight"), SAME),
        (with_weights(observer="mse", scale_dtype="torch.float16", zp_dtype="torch.int8"), SAME),
        (with_weights(other=1), r"weights\.other"),
    ],
    "ct asymmetric": [
        (with_weights(symmetric=True), "weight_zero_point: expected zeros, as symmetric"),
        (with_weights(symmetric=None), "weight_zero_point: expected zeros"),  # true by default
    ],
    "ct groups": [
        (with_weights(strategy="group", group_size=64), "weight_scale: expected 4 groups"),
        (with_weights(strategy="group", group_size=128, actorder="group"), "weight_g_idx: "),
        (with_weights(strategy="channel"), "weight_scale: expected 1 groups"),
    ],
    "ct int": [
        ({"config_groups": None}, "config_groups: expected the settings of the layers"),
        ({"format": "naive-quantized"}, SAME),
        (with_weights(num_bits=8), CHANGED),  # the same weight, with residual columns
        (with_weights(symmetric=False), "weight_zero_point: expected one"),
    ],
    "awq": [
        ({"bits": 8}, "bits: expected 4, got 8"),
        ({"bits": 4.0}, "bits: expected 4"),
        ({"w_bit": 8}, "w_bit: expected one value, got 4 in .* and 8"),
        ({"version": "GEMM"}, SAME),
        ({"version": "gemv"}, "version: expected 'gemm', got 'gemv'"),
        ({"version": "gemv_fast"}, "version: .*gemv_fast"),
        ({"version": "marlin"}, "version: .*marlin"),
        ({"version": None, "format": "llm-awq"}, "version: .*llm-awq"),
        ({"backend": "llm-awq"}, "backend: "),
        ({"backend": "gemv"}, "backend: "),
        ({"backend": "exllama_v2"}, SAME),
        ({"group_size": 128}, "scales: expected 2 groups"),
        ({"group_size": 0}, "group_size: expected a positive number or -1"),
        ({"zero_point": False}, "qzeros: expected zeros of 8, as zero_point"),
        ({"zero_point": "x"}, "zero_point: "),
        ({"modules_to_not_convert": ["a"]}, "modules_to_not_convert: "),
        ({"modules_to_not_convert": ["visual"]}, SAME),
        ({"dynamic": {"a": {"bits": 8}}}, "dynamic: "),
        ({"pack_dtype": "int16"}, "pack_dtype: "),
    ],
    "awq symmetric": [({"zero_point": True}, SAME), ({"zero_point": None}, SAME)],
    "gptq": [
        ({"bits": 8}, "bits: expected 4, got 8"),
        ({"bits": 3}, "bits: expected 4, got 3"),
        ({"checkpoint_format": "gptq"}, SAME),
        ({"checkpoint_format": "gptq_v2"}, CHANGED),
        ({"format": "gptq_v2"}, CHANGED),
        ({"format": "gptq_v2", "checkpoint_format": "gptq"}, "format: expected 'gptq', got"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: .*marlin"),
        ({"is_marlin_format": True}, "is_marlin_format: "),
        ({"sym": True}, "qzeros: expected 8 everywhere, or 7"),
        ({"sym": None}, SAME),
        ({"group_size": 64}, "scales: expected 4 groups"),
        ({"desc_act": True}, SAME),  # one group, whatever its order
        ({"dynamic": {"a": {"bits": 8}}}, r"dynamic\.a\.bits: expected 4, got 8"),
        ({"dynamic": {"a": {"group_size": 64}}}, "scales: expected 4 groups"),
        ({"dynamic": {"+:a": {"sym": True}}}, "qzeros: expected 8 everywhere"),
        ({"dynamic": {"a": {"other": 1}}}, r"dynamic\.a\.other: "),
        ({"dynamic": {"-:a": {}}}, "dynamic: expected a layer that is not quantized"),
        ({"dynamic": {"-:b": {}, "b": {"sym": True}}}, SAME),
        ({"dynamic": {"a": {"damp_percent": 0.5}}}, SAME),
        ({"modules_in_block_to_quantize": [["a"], ["b"]]}, SAME),
        ({"modules_in_block_to_quantize": [["b"]]}, "modules_in_block_to_quantize: "),
        ({"lm_head": True}, SAME),
        ({"pack_dtype": "int64"}, "pack_dtype: "),
        ({"adapter": {"name": "lora"}}, "adapter: "),
        ({"rotation": "hadamard"}, "rotation: "),
        ({"data_type": "fp"}, "data_type: "),
        ({"act_bits": 8}, "act_bits: "),
    ],
    "gptq symmetric": [
        ({"sym": False}, SAME),
        ({"checkpoint_format": "gptq_v2"}, SAME),  # 8 is meant all the same
        ({"checkpoint_format": "gptq_v2", "sym": None}, "qzeros: .*say in the settings"),
        ({"checkpoint_format": "gptq_v2", "sym": False}, CHANGED),
    ],
    "gptq groups": [
        ({"desc_act": True}, "g_idx: expected the order of the columns"),
        ({"group_size": None}, SAME),
    ],
    "qoq": [
        ({"wbits": 8}, "bits: expected 4"),
        ({"group_size": 128}, "s1_szeros: expected 2 groups"),
    ],
    "qqq": [
        ({"wbits": 8}, "bits: expected 4"),
        ({"group_size": 128}, "s_group: expected 2 groups"),
        ({"sym": False}, "sym: expected True"),
        ({"format": "gptq"}, "format: expected 'qqq'"),
        ({"dynamic": {"a": {}}}, "dynamic: "),
    ],
}


def result(folder, tensors, settings, files=None):
    """The tensors of the import of one layer."""
    for name in ("source", "out"):
        shutil.rmtree(folder / name, ignore_errors=True)
    source = write(folder / "source", {"a": tensors}, settings)
    for name, content in (files or {}).items():
        (source / name).write_text(json.dumps(content))
    import_checkpoint(source, folder / "out", progress=False)
    return load_file(folder / "out/model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def assert_refused(folder, tensors, settings, message):
    with pytest.raises(ValueError, match=message):
        result(folder, tensors, settings)
    assert [path.name for path in folder.iterdir()] == ["source"]


def weight(state, k=K):
    parts = {key: state.get(f"a.{key}") for key in ("qweight", "qscale", "qoffset", "scale")}
    return foreign.values_of(
        QuantizedWeight(**parts, in_features=k, columns=state.get("a.columns"))
    )
