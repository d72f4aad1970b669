"""Checkpoints as the library compressed-tensors writes them, and what it reads from others."""

import json

import foreign
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make

from liquidgemm import QuantizedWeight, dequantize_weight, import_checkpoint, load_quantized

pytest.importorskip("compressed_tensors")
from compressed_tensors import quantization as Q
from compressed_tensors.compressors import BaseCompressor, ModelCompressor

LAYOUTS = ("pack-quantized", "int-quantized")


def compressed_model(weights: "Q.QuantizationArgs", folder, layout) -> dict[str, torch.Tensor]:
    """Writes a model; returns the weights that the library reads from it again."""
    model = make(
        hidden_size=128, intermediate_size=384, num_attention_heads=8, tie_word_embeddings=False
    )
    inputs = Q.QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    scheme = Q.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    Q.apply_quantization_config(
        model,
        Q.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=layout),
    )
    group, half = weights.group_size, 2 ** (weights.num_bits - 1)
    for name, linear in model.named_modules():
        if type(linear) is not torch.nn.Linear or name == "lm_head":
            continue
        w = linear.weight.detach()
        w = w.view(len(w), -1, group or w.shape[1])
        low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
        if weights.symmetric:
            linear.weight_scale.data = torch.maximum(-low, high) / (half - 0.5)
        else:
            linear.weight_scale.data = (high - low) / (2 * half - 1)
            zero = (-half - low / linear.weight_scale).round().clamp(-half, half - 1)
            linear.weight_zero_point.data = zero.to(linear.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model, layout)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("proj.weight")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 64), (4, 128), (8, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_read_as_the_library_reads_it(tmp_path, symmetric, bits, group, layout):
    strategy = "channel" if group is None else "group"
    weights = Q.QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group
    )
    expected = compressed_model(weights, tmp_path / "theirs", layout)
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["quantization_config"]["format"] == layout
    report = import_checkpoint(tmp_path / "theirs", tmp_path / "ours", progress=False)
    assert report.source == "compressed-tensors"
    assert len(report.layers) == len(expected) == 14
    assert report.notes == ()
    model = load_quantized(tmp_path / "ours")
    for layer in report.layers:
        theirs = expected[f"{layer.name}.weight"]
        ours = model.get_submodule(layer.name).dequantize()
        if group is None:
            assert layer.error == 0
            assert torch.equal(ours, theirs)
        error = (ours - theirs).double().norm() / theirs.double().norm()
        assert error.item() == pytest.approx(layer.error, rel=1e-3, abs=1e-6)
        assert layer.error < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_is_equal_to_the_bit(tmp_path, symmetric, bits, layout, dtype):
    """In each precision of scales; every code, scales of both signs."""
    half, (n, k) = 2 ** (bits - 1), (64, 256)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-half, half, (n, k), generator=generator)
    scale = ((torch.rand(n, 1, generator=generator) + 0.5) * 0.01).to(dtype)
    scale[::3] *= -1
    zero = torch.randint(-half + 1, half, (n, 1), generator=generator).to(torch.int8)
    weights = Q.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    scheme = Q.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(layout)
    state = {"weight": codes.double() - (0 if symmetric else zero), "weight_scale": scale.double()}
    state["weight"] *= scale.double()
    if not symmetric:
        state["weight_zero_point"] = zero
    stored = compressor.compress(state, scheme) | {"weight_scale": scale}
    theirs = compressor.decompress(stored, scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    source = foreign.write(tmp_path / "source", {"a": stored}, settings)
    report = import_checkpoint(source, tmp_path / "out", progress=False)
    tensors = load_file(tmp_path / "out/model.safetensors")
    names = ("qweight", "qscale", "qoffset", "scale")
    ours = QuantizedWeight(
        *(tensors[f"a.{name}"] for name in names), k, columns=tensors.get("a.columns")
    )
    assert report.layers[0].error == 0
    assert theirs.dtype == dtype
    assert torch.equal(dequantize_weight(ours, dtype), theirs)
    assert len(theirs.unique()) > 10


def test_awq_is_read_as_the_library_reads_it(tmp_path):
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    converter = getattr(converters, "AutoAWQConverter", None)
    if converter is None:
        pytest.skip("this version of compressed-tensors does not read AutoAWQ")
    codes, scales, zeros = foreign.random_grid(-1)
    tensors = foreign.awq(codes, scales, zeros)
    source = foreign.write(tmp_path / "awq", {"a": tensors}, foreign.SETTINGS["awq"])
    import_checkpoint(source, tmp_path / "one", progress=False)
    converted = converter().process({f"a.{key}": tensor for key, tensor in tensors.items()})
    settings = foreign.SETTINGS["compressed-tensors"]
    other = foreign.write(tmp_path / "theirs", {}, settings)
    save_file({**load_file(other / "model.safetensors"), **converted}, other / "model.safetensors")
    import_checkpoint(other, tmp_path / "two", progress=False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)
