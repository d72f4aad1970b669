"""Settings by what they mean: each changes the result, or is harmless, or is refused."""

import itertools
import json
import shutil

import foreign
import pytest
import torch
from foreign import K, N, write
from foreign_models import transformers
from foreign_settings import (
    BASES,
    CASES,
    CHANGED,
    EIGHTS,
    SAME,
    assert_refused,
    codes,
    ct,
    result,
    same,
    scales,
    weight,
    with_inputs,
    zeros,
)
from safetensors.torch import load_file

from liquidgemm import import_checkpoint, importers
from liquidgemm.importers.folder import SETTINGS_FILES


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
    """CHECKLIST 25."""
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


OLD = {
    "awq": {"zero_point": True, "q_group_size": -1, "w_bit": 4, "version": "GEMM"},
    "gptq": {"bits": 4, "group_size": -1, "damp_percent": 0.1, "desc_act": False, "sym": False},
}


@pytest.mark.parametrize(("name", "file"), itertools.product(OLD, SETTINGS_FILES))
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


@pytest.mark.parametrize("base", ["ct", "ct asymmetric", "awq", "gptq", "gptq symmetric"])
def test_settings_as_transformers_writes_them(tmp_path, base):
    """With all its defaults, and what it makes of its own objects."""
    tensors, settings = BASES[base]
    kind = {"ct": "CompressedTensors", "awq": "Awq", "gptq": "GPTQ"}[base.split()[0]]
    if kind == "CompressedTensors":
        pytest.importorskip("compressed_tensors")
    fields = {key: value for key, value in settings.items() if key != "quant_method"}
    config = getattr(transformers, f"{kind}Config")(**fields).to_dict()
    written = json.loads(json.dumps(config, default=str))
    assert len(written) > len(settings) + 2
    assert same(result(tmp_path, tensors, settings), result(tmp_path, tensors, written))


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
