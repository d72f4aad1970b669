"""Settings by what they mean: each changes the result, or is harmless, or is refused."""

import itertools
import json
import shutil

import foreign
import pytest
import torch
from foreign import K, N, random_grid, write
from foreign_models import compressed
from safetensors.torch import load_file

from liquidgemm import QuantizedWeight, import_checkpoint, importers

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
        (with_group(format="nvfp4-pack-quantized"), r"group_0\.format: .*nvfp4"),
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


@pytest.mark.parametrize(
    ("base", "number"), [(base, i) for base, cases in CASES.items() for i in range(len(cases))]
)
def test_a_setting_that_changes(tmp_path, base, number):
    tensors, settings = BASES[base]
    changes, expected = CASES[base][number]
    before = result(tmp_path, tensors, settings)
    if expected not in (SAME, CHANGED):
        assert_refused(tmp_path, tensors, {**settings, **changes}, expected)
        return
    after = result(tmp_path, tensors, {**settings, **changes})
    assert same(before, after) == (expected == SAME)


@pytest.mark.parametrize("base", BASES)
def test_an_unknown_setting_is_refused_unless_it_is_empty(tmp_path, base):
    tensors, settings = BASES[base]
    before = result(tmp_path, tensors, settings)
    for value in (1, 0, 0.5, True, "x", [1], {"x": 1}):
        assert_refused(tmp_path, tensors, {**settings, "never_seen": value}, "never_seen: ")
    for value in (None, False, "", [], {}):
        assert same(before, result(tmp_path, tensors, {**settings, "never_seen": value}))


@pytest.mark.parametrize("base", BASES)
def test_harmless_settings_change_nothing(tmp_path, base):
    tensors, settings = BASES[base]
    before = result(tmp_path, tensors, settings)
    module = importers.FORMATS[settings["quant_method"]]
    # lm_head and the like matter to layers of that name.
    for key in module.HARMLESS - {"lm_head"} - settings.keys():
        assert same(before, result(tmp_path, tensors, {**settings, key: "anything"})), key


@pytest.mark.parametrize("version", [1, 2])
def test_the_zero_of_a_symmetric_layer_is_8_in_either_version(tmp_path, version):
    tensors = foreign.gptq(codes, scales, EIGHTS, K, version)
    meant = foreign.weight_of(codes, scales, 8)
    for name in ("gptq", "gptq_v2", None):
        settings = {"quant_method": "gptq", "bits": 4, "sym": True, "checkpoint_format": name}
        state = result(tmp_path, tensors, settings)
        assert torch.equal(weight(state), meant)


def weight(state, k=K):
    parts = {key: state.get(f"a.{key}") for key in ("qweight", "qscale", "qoffset", "scale")}
    return foreign.values_of(
        QuantizedWeight(**parts, in_features=k, columns=state.get("a.columns"))
    )


@pytest.mark.parametrize(("base", "sign"), itertools.product(BASES, [1, -1]))
def test_scales_of_either_sign(tmp_path, base, sign):
    """A negative scale turns the weight around, in each format the same."""
    tensors, settings = BASES[base]
    state = {key: tensor.clone() for key, tensor in tensors.items()}
    expected = weight(result(tmp_path, state, settings))
    for key in state:
        if "scale" in key or key == "s_channel":
            state[key][..., 1::2] *= sign
            if base.startswith("ct"):
                state[key] = tensors[key].clone()
                state[key][1::2] *= sign
        if key == "s1_szeros":  # the product of a scale and a zero
            state[key][1::2] *= sign
    got = weight(result(tmp_path, state, settings))
    rows = (got * expected).sum(1).sign()
    assert (rows == -1).any() == (sign == -1)
    assert torch.equal(rows.unsqueeze(1) * got, expected) or "groups" in base
    assert (rows.unsqueeze(1) * got - expected).norm() < 0.06 * expected.norm()


OLD = {
    "awq": {"zero_point": True, "q_group_size": -1, "w_bit": 4, "version": "GEMM"},
    "gptq": {"bits": 4, "group_size": -1, "damp_percent": 0.1, "desc_act": False, "sym": False},
}


@pytest.mark.parametrize(("name", "file"), itertools.product(OLD, importers.SETTINGS_FILES))
def test_settings_in_a_file_of_their_own(tmp_path, name, file):
    tensors, settings = BASES[name]
    before = result(tmp_path, tensors, settings)
    assert same(before, result(tmp_path, tensors, None, {file: OLD[name]}))
    assert same(before, result(tmp_path, tensors, settings, {file: OLD[name]}))
    assert not (tmp_path / "out" / file).exists()
    with pytest.raises(ValueError, match="bits: expected"):
        result(tmp_path, tensors, None, {file: {**OLD[name], "bits": 3}})
    with pytest.raises(
        ValueError, match=rf"group_size: expected one value, got -1 in .* in {file}"
    ):
        result(tmp_path, tensors, settings, {file: {**OLD[name], "group_size": 64, "w_bit": 4}})


def test_settings_within_those_of_the_text_model(tmp_path):
    tensors, settings = BASES["ct"]
    before = result(tmp_path, tensors, settings)
    config = tmp_path / "source/config.json"
    config.write_text(json.dumps({"text_config": {"quantization_config": settings}}))
    shutil.rmtree(tmp_path / "out")
    import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert same(before, load_file(tmp_path / "out/model.safetensors"))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["text_config"] == {}
    assert written["quantization_config"]["quant_method"] == "liquidgemm"


def test_tensors_without_any_settings_are_refused(tmp_path):
    tensors, _ = BASES["awq"]
    assert_refused(tmp_path, tensors, None, "quant_method: .*tell AutoAWQ from GPTQ")


def test_a_head_that_is_said_to_be_float(tmp_path):
    tensors, settings = BASES["gptq"]
    source = write(tmp_path / "source", {"lm_head": tensors}, {**settings, "lm_head": False})
    with pytest.raises(ValueError, match="lm_head: expected a layer that is not quantized"):
        import_checkpoint(source, tmp_path / "out", progress=False)


def test_groups_of_layers_have_settings_of_their_own(tmp_path):
    """4 and 8 bits in one checkpoint: a name goes before an expression, that before a class."""
    bytes_ = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    layers = {
        "a": {"weight": bytes_, "weight_scale": scales},
        "b": {"weight": bytes_ >> 4, "weight_scale": scales},
        "c": foreign.compressed_tensors(codes, scales, zeros),
    }
    settings = ct("mixed-precision")
    arguments = settings["config_groups"].pop("group_0")["weights"]
    for name, targets, layout, more in (
        ("x", ["Linear"], "int-quantized", {}),
        ("y", ["re:[ac]"], "pack-quantized", {"symmetric": False}),
        ("z", ["a"], "int-quantized", {"num_bits": 8}),
    ):
        group = {"targets": targets, "format": layout, "weights": {**arguments, **more}}
        settings["config_groups"][name] = group
    source = write(tmp_path / "source", layers, settings)
    report = import_checkpoint(source, tmp_path / "out", progress=False)
    assert [layer.error for layer in report.layers] == [0, 0, 0]
    state = load_file(tmp_path / "out/model.safetensors")
    expected = {
        "a": scales.double() * bytes_,
        "b": scales.double() * (bytes_ >> 4),
        "c": foreign.weight_of(codes, scales, zeros),
    }
    for name, meant in expected.items():
        parts = {key.removeprefix(f"{name}."): t for key, t in state.items() if key[0] == name}
        assert torch.equal(weight({f"a.{key}": t for key, t in parts.items()}), meant)


def test_what_is_not_carried_over_is_in_the_report(tmp_path):
    tensors, settings = BASES["ct"]
    write(tmp_path / "source", {"a": tensors}, {**settings, **with_inputs(type="float")})
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    (note,) = report.notes
    assert "input_activations: not carried over (num_bits = 8, type = float" in note
    assert note in str(report)


def test_scales_are_checked_by_the_name_of_their_tensor(tmp_path):
    for tensors, settings in BASES.values():
        for key in (key for key in tensors if "scale" in key or key == "s_channel"):
            for value in (torch.nan, torch.inf, 0.0):
                bad = tensors[key].clone().fill_(value)
                source = write(tmp_path / "source", {"a": {**tensors, key: bad}}, settings)
                with pytest.raises(ValueError, match=rf"a: {key}: expected (finite|scales)"):
                    import_checkpoint(source, tmp_path / "out", progress=False)


def eight_bits(k, zero, low=-128, high=127, **weights):
    """Every row has both ends of the range."""
    values = torch.randint(low, high + 1, (N, k), generator=torch.Generator().manual_seed(0))
    values[:, 0], values[:, 1] = low, high
    tensors = {
        "weight": values.to(torch.int8),
        "weight_scale": scales,
        "weight_zero_point": torch.full((N, 1), zero, dtype=torch.int8),
    }
    settings = ct("int-quantized", num_bits=8, symmetric=False, **weights)
    return tensors, settings, scales.double() * (values - zero)


@pytest.mark.parametrize("zero", [-127, -113, -112, -17, -1, 0, 1, 100, 127])
def test_eight_bits_with_zeros_of_any_size(tmp_path, zero):
    tensors, settings, meant = eight_bits(K, zero)
    assert torch.equal(weight(result(tmp_path, tensors, settings)), meant)


def test_eight_bits_of_columns_that_fill_no_group(tmp_path):
    """Where the values fit INT8; else what fills the last group could not be zero."""
    for zero, low, high in ((0, -128, 127), (-10, -128, 117), (10, -118, 127)):
        tensors, settings, meant = eight_bits(100, zero, low, high)
        assert torch.equal(weight(result(tmp_path, tensors, settings), 100), meant)
    tensors, settings, _ = eight_bits(100, 10)
    assert_refused(tmp_path, tensors, settings, "zero points: .* no multiple of 64 columns")


def test_eight_bits_that_do_not_fit_are_refused(tmp_path):
    tensors, settings, _ = eight_bits(K, -128)
    assert_refused(tmp_path, tensors, settings, "a: zero points: expected .* got 0 to 255")
    tensors, settings, _ = eight_bits(K, 0, strategy="group", group_size=128)
    tensors["weight_scale"] = s128
    tensors["weight_zero_point"] = tensors["weight_zero_point"].expand(N, 2).contiguous()
    assert_refused(tmp_path, tensors, settings, "num_bits: expected 4 for weights in groups, got 8")
