"""transformers with quantized layers, through its own interfaces; how integrations register."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import foreign
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import IDS, float_model, liquid_layers, load, quantized, transformers
from torch import nn

import liquidgemm
from liquidgemm import (
    LiquidConfig,
    import_checkpoint,
    integrations,
    load_quantized,
    quantize_,
    save_quantized,
)


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Equal bits, of the state and of what comes out."""
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for key, tensor in wanted.items():
        reference.assert_same(state[key], tensor, key=key)
    with torch.no_grad():
        reference.assert_same(model(IDS).logits, expected(IDS).logits)


# Registration.


def test_importing_liquidgemm_imports_nothing_else():
    """Nor is it too late for the others: they are imported after it, and know it."""
    code = """
import sys, liquidgemm
assert not {"transformers", "peft", "torchao"} & sys.modules.keys()
import transformers.quantizers.auto as auto
assert auto.AUTO_QUANTIZER_MAPPING["liquidgemm"].__name__ == "LiquidGemmQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["liquidgemm"] is liquidgemm.LiquidGemmConfig
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Name of a library that is not imported yet, for which an integration is waiting."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "some_library.py").write_text("ready = True\n")
    monkeypatch.setattr(integrations, "_WAITING", {"some_library": "some_integration"})
    return "some_library"


def add_integration(monkeypatch, seen: list) -> None:
    """An integration that notes whether its library had run when it was imported."""
    imported = importlib.import_module

    def import_module(name):
        if name == "liquidgemm.integrations.some_integration":
            seen.append(sys.modules["some_library"].ready)
            return None
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize("first", ["the library", "liquidgemm"])
def test_order_of_imports(library, monkeypatch, first):
    seen = []
    add_integration(monkeypatch, seen)
    if first == "the library":
        __import__(library)
    integrations.register_integrations()
    assert len(seen) == (first == "the library")
    importlib.util.find_spec(library)  # to look is not to import
    __import__(library)
    assert seen == [True]
    assert integrations._WAITING == {}


def test_a_library_that_does_not_fit_stays_importable(library):
    integrations.register_integrations()
    with pytest.warns(
        UserWarning, match=r"not work with this version of some: ModuleNotFoundError"
    ):
        module = __import__(library)
    assert module.ready


# from_pretrained and save_pretrained.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_quantizing_on_load_is_quantize_(tmp_path, dtype, tied):
    folder = float_model(tmp_path, dtype, tie_word_embeddings=tied)
    model = quantized(folder, group_size=128)
    expected = load(folder)
    quantize_(expected, LiquidConfig(group_size=128), progress=False)
    assert len(liquid_layers(model)) == 14
    assert model.dtype == dtype
    assert not model.training
    assert model.liquid_config == LiquidConfig(group_size=128)
    assert_same(model, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_round_trip(tmp_path, dtype, tied):
    model = quantized(float_model(tmp_path / "float", dtype, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    assert liquid_layers(again) == liquid_layers(model)
    assert again.liquid_config == model.liquid_config
    assert_same(again, model)
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards(tmp_path):
    model = quantized(float_model(tmp_path / "float"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(load(tmp_path / "shards"), model)


@pytest.mark.parametrize("writer", ["save_quantized", "save_pretrained"])
@pytest.mark.parametrize("reader", ["load_quantized", "from_pretrained"])
@pytest.mark.parametrize(
    "config",
    [
        LiquidConfig(augment={"up_proj": 64, "*": 0}),
        # In the order of names the first of these patterns would be "*".
        LiquidConfig(bits={"up_proj": 6, "0.mlp.*": 8, "*": 4}),
    ],
)
def test_either_reads_what_the_other_writes(tmp_path, writer, reader, config):
    """Also for models that `quantize_` changed in place, and for residual columns."""
    model = load(float_model(tmp_path / "float"))
    quantize_(model, config, progress=False)
    assert model.model.layers[0].mlp.up_proj.columns is not None
    if writer == "save_quantized":
        save_quantized(model, tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
    other = (load_quantized if reader == "load_quantized" else load)(tmp_path / "saved")
    assert type(other) is type(model)
    assert not other.training
    assert other.liquid_config == model.liquid_config == config
    if config.bits:
        assert list(other.liquid_config.bits) == list(config.bits)
    else:
        assert list(other.liquid_config.augment) == list(config.augment)
    assert_same(other, model)
    other.save_pretrained(tmp_path / "again")  # what was read knows what it is
    assert_same(load(tmp_path / "again"), model)


def test_a_base_model_from_a_model_with_a_head_and_back(tmp_path):
    model = quantized(float_model(tmp_path / "float"))
    model.save_pretrained(tmp_path / "whole")
    base = load(tmp_path / "whole", transformers.AutoModel)
    assert len(liquid_layers(base)) == 14
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
        reference.assert_same(base(IDS).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        other = load(tmp_path / "base")
        reference.assert_same(other.model(IDS).last_hidden_state, expected)


def test_an_imported_checkpoint_loads(tmp_path):
    """A GPTQ folder of a whole model through `import_checkpoint` and from_pretrained."""
    folder = float_model(tmp_path / "float", torch.float16)
    state = load_file(folder / "model.safetensors")
    expected = {}
    for key in [key for key in state if key.endswith("proj.weight")]:
        weight = state.pop(key).float()
        step = (weight.abs().amax(1, keepdim=True) / 7.5).half()
        codes = (weight / step.float() + 8).round().clamp(0, 15).to(torch.uint8)
        zeros = torch.full_like(step, 8, dtype=torch.uint8)
        expected[key.removesuffix(".weight")] = step.float() * (codes.float() - 8)
        tensors = foreign.gptq(codes, step, zeros, codes.shape[1])
        state.update({key.removesuffix("weight") + k: t for k, t in tensors.items()})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    (folder / "config.json").write_text(json.dumps(config))
    report = import_checkpoint(folder, tmp_path / "out", progress=False)
    assert {layer.name for layer in report.layers} == expected.keys()
    model = load(tmp_path / "out")
    assert_same(load_quantized(tmp_path / "out"), model)
    for name, weight in expected.items():
        reference.assert_same(model.get_submodule(name).dequantize(), weight, key=name)
    assert model.dtype == torch.float16
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def drop(folder: Path, key: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[key]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


SCALE = "model.layers.0.mlp.up_proj.scale"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: drop(f, SCALE), f"{SCALE}: missing in "),
        (lambda f: edit(f, lambda c: c.update(format_version=4)), "newer liquidgemm"),
        (lambda f: edit(f, lambda c: c.update(config={"digits": 3})), r"got \['digits'\]"),
        (lambda f: edit(f, lambda c: c.pop("layers")), "expected the quantized layers"),
        (
            lambda f: edit(f, lambda c: c["layers"].update({"model.norm": 0})),
            "model.norm.qweight: missing",
        ),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    quantized(float_model(tmp_path / "float")).save_pretrained(tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 48}, "group_size: "),
        ({"digits": 3}, r"got \['digits'\]"),
        ({"config": LiquidConfig(), "method": "rtn"}, "config: expected it or its fields"),
        ({"layers": ["a"]}, r"layers: .*got \['a'\]"),
        ({"layers": {"a": 32}}, "layers: expected a multiple of 64"),
        ({"layers": {"a": 0}, "bits": 4}, r"layers: expected no fields .*\['bits'\]"),
        ({"format_version": True}, "format_version: .*True"),
        ({"config": 4}, "config: expected a LiquidConfig, got int"),
        ({"quant_method": "gptq"}, "quant_method: "),
    ],
)
def test_the_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        liquidgemm.LiquidGemmConfig(**fields)


def test_calibration_is_not_for_loading(tmp_path):
    with pytest.raises(ValueError, match=r"needs no calibration, .* call liquidgemm\.quantize_"):
        quantized(float_model(tmp_path), method="gptq")


def test_layers_of_a_checkpoint_quantize_no_float_model(tmp_path):
    with pytest.raises(ValueError, match="how to quantize a float model, got the layers of a"):
        quantized(float_model(tmp_path), layers={"lm_head": 0})


def test_casts_leave_the_scales_alone(tmp_path):
    model = quantized(float_model(tmp_path, torch.float32))
    layer = model.model.layers[0].mlp.up_proj
    before = layer.scale.clone()
    assert model.to(torch.bfloat16) is model
    reference.assert_same(layer.scale, before)
    other = load(tmp_path)
    quantize_(other, progress=False)
    assert other.half().model.layers[0].mlp.up_proj.scale.dtype == torch.float32


def test_the_quickstart(tmp_path, monkeypatch):
    """The code of its section on them, with a small model in place of the one it names."""
    for library in ("peft", "torchao"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    text = (Path(liquidgemm.__file__).parents[1] / "docs/quickstart.md").read_text()
    section = text.partition("## With transformers")[2].partition("\n## ")[0]
    blocks = [part.partition("```")[0] for part in section.split("```python\n")[1:]]
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks).replace("HuggingFaceTB/SmolLM2-135M", str(float_model(tmp_path / "a")))
    names = {}
    exec(code, names)
    assert len(liquid_layers(names["adapted"])) == 14
    assert len(liquid_layers(names["mlp"])) == 2


# generate.


@pytest.mark.parametrize("compiled", [False, True])
def test_generate_with_a_static_cache(tmp_path, compiled):
    model = quantized(float_model(tmp_path, torch.float32))
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(IDS, **options)
    if compiled:
        torch.compiler.reset()
        model.forward = torch.compile(model.forward, backend="aot_eager", dynamic=False)
    found = model.generate(IDS, cache_implementation="static", **options)
    assert torch.equal(found, expected)
