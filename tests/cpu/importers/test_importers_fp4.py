"""MXFP4 and NVFP4 as compressed-tensors writes them, and what it reads from them."""

import foreign
import pytest
import torch
from safetensors.torch import load_file
from test_importers_library import compressed_model

from liquidgemm import QuantizedWeight, dequantize_weight, import_checkpoint, load_quantized
from liquidgemm.integrations.serving.foreign import foreign_layers

pytest.importorskip("compressed_tensors")
from compressed_tensors import quantization as Q
from compressed_tensors.compressors import BaseCompressor

N, K = 16, 256
SPANS = {"mxfp4": 32, "nvfp4": 16}


def arguments(kind: str) -> "Q.QuantizationArgs":
    return Q.QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="group" if kind == "mxfp4" else "tensor_group",
        group_size=SPANS[kind],
        scale_dtype=torch.uint8 if kind == "mxfp4" else torch.float8_e4m3fn,
    )


def layer(kind: str, spread: int = 2) -> tuple[dict, dict, torch.Tensor]:
    """A layer's tensors, settings, and the library's own weight; every code occurs.

    Args:
        spread: of the exponents of a row's groups.
    """
    generator = torch.Generator().manual_seed(spread)
    scheme = Q.QuantizationScheme(targets=["Linear"], weights=arguments(kind))
    compressor = BaseCompressor.get_value_from_registry(f"{kind}-pack-quantized")
    shape = N, K // SPANS[kind]
    state = {}
    if kind == "mxfp4":
        exponent = torch.randint(0, spread + 1, shape, generator=generator)
        exponent[:, 0], exponent[:, -1] = 0, spread
        scale = (exponent - 12).float().exp2()
    else:
        scale = (torch.rand(shape, generator=generator) * 400 + 1).to(torch.float8_e4m3fn).float()
        state["weight_global_scale"] = torch.tensor([3000.0])
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = table[torch.randint(8, (N, K), generator=generator)]
    codes *= torch.randint(0, 2, (N, K), generator=generator) * 2 - 1
    codes[:, :: SPANS[kind]], codes[:, 1 :: SPANS[kind]] = 0.5, 6.0
    unit = scale / state.get("weight_global_scale", 1)
    state |= {"weight": codes * unit.repeat_interleave(SPANS[kind], 1), "weight_scale": scale}
    stored = compressor.compress(state, scheme)
    # Their scales are bfloat16 and are divided in float32.
    theirs = compressor.decompress(stored, scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-pack-quantized",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    stored = {k: t.data if isinstance(t, torch.nn.Parameter) else t for k, t in stored.items()}
    return stored, settings, theirs


def imported(folder, stored: dict, settings: dict, **options):
    """The entry of the report, and the weight in float32."""
    source = foreign.write(folder / "source", {"a": stored}, settings)
    report = import_checkpoint(source, folder / "out", progress=False, **options)
    state = load_file(folder / "out/model.safetensors")
    names = ("qweight", "qscale", "qoffset", "scale")
    weight = QuantizedWeight(*(state[f"a.{n}"] for n in names), K, columns=state.get("a.columns"))
    return report.layers[0], weight


@pytest.mark.parametrize("spread", [0, 1, 3])
def test_mxfp4_keeps_every_value_of_rows_whose_exponents_are_near(tmp_path, spread):
    stored, settings, theirs = layer("mxfp4", spread)
    found, weight = imported(tmp_path, stored, settings)
    assert len(theirs.unique()) >= 15
    assert found.error == 0
    assert found.group_size == 32
    assert torch.equal(dequantize_weight(weight, torch.bfloat16), theirs)


def test_mxfp4_rounds_rows_whose_exponents_are_not(tmp_path):
    stored, settings, theirs = layer("mxfp4", 4)
    stored["weight_scale"][: N // 2] = 115  # half of the rows are as before
    theirs[: N // 2] = layer("mxfp4", 0)[2][: N // 2]
    stored["weight_packed"][: N // 2] = layer("mxfp4", 0)[0]["weight_packed"][: N // 2]
    found, weight = imported(tmp_path, stored, settings)
    ours = dequantize_weight(weight)
    assert torch.equal(ours[: N // 2], theirs[: N // 2].float())
    assert 0 < found.error < 0.01
    error = (ours - theirs).norm() / theirs.float().norm()
    assert found.error == pytest.approx(float(error), rel=1e-4)
    step = theirs.float().abs().amax(1, keepdim=True) / 127
    assert ((ours - theirs).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_four_bits_are_searched_anew(tmp_path, kind):
    stored, settings, theirs = layer(kind)
    found, weight = imported(tmp_path, stored, settings, fine_bits=4)
    assert weight.columns is None
    error = (dequantize_weight(weight) - theirs).norm() / theirs.float().norm()
    assert found.error == pytest.approx(float(error), rel=1e-2)
    assert 0.01 < found.error < 0.15


def test_nvfp4_is_near(tmp_path):
    stored, settings, theirs = layer("nvfp4")
    found, weight = imported(tmp_path, stored, settings)
    ours = dequantize_weight(weight)
    # In our arithmetic scales are not rounded to bfloat16 before they are divided: 2^-9 of theirs.
    step = theirs.float().abs().amax(1, keepdim=True) / 127
    assert ((ours - theirs).abs() <= 0.501 * step + theirs.float().abs() * 2**-8).all()
    assert found.group_size == 16
    assert 0 < found.error < 0.01


def test_a_model_of_the_library(tmp_path):
    weights = arguments("mxfp4")
    expected = compressed_model(weights, tmp_path / "theirs", "mxfp4-pack-quantized")
    report = import_checkpoint(tmp_path / "theirs", tmp_path / "ours", progress=False)
    assert len(report.layers) == len(expected) == 14
    assert "with its values" in report.loaded_as
    model = load_quantized(tmp_path / "ours")
    for found in report.layers:
        assert found.error == 0
        ours = model.get_submodule(found.name).dequantize()
        assert torch.equal(ours, expected[f"{found.name}.weight"].to(ours.dtype))


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("mxfp4", lambda t: t["weight_scale"].fill_(255), "weight_scale: .*254, got 255"),
        ("mxfp4", lambda t: t["weight_scale"].fill_(254), "weight: expected finite values"),
        ("mxfp4", lambda t: t.update(weight_scale=t["weight_scale"][:, 1:]), "weight_scale: "),
        ("mxfp4", lambda t: t.update(weight_packed=t["weight_packed"].short()), "weight_packed: "),
        ("mxfp4", lambda t: t.update(weight_packed=t["weight_packed"][:, 1:]), "whole groups"),
        ("mxfp4", lambda t: t.pop("weight_scale"), "weight_scale: missing"),
        ("mxfp4", lambda t: t.update(weight_zero_point=t["weight_scale"]), "weight_zero_point: "),
        ("nvfp4", lambda t: t.update(weight_scale=t["weight_scale"].float()), "weight_scale: "),
        ("nvfp4", lambda t: t.pop("weight_global_scale"), "weight_global_scale: missing"),
        ("nvfp4", lambda t: t["weight_global_scale"].zero_(), "weight_global_scale: .*zeros"),
        ("nvfp4", lambda t: t.update(bias=torch.ones(3)), "bias: expected"),
    ],
)
def test_damage_is_refused_before_anything_is_there(tmp_path, kind, change, match):
    stored, settings, _ = layer(kind)
    stored = {key: tensor.clone() for key, tensor in stored.items()}
    change(stored)
    stored = {key: tensor.contiguous() for key, tensor in stored.items()}
    with pytest.raises(ValueError, match=match):
        imported(tmp_path, stored, settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("group_size", 64), ("strategy", "channel"), ("symmetric", False), ("type", "int")],
)
def test_settings_of_another_kind_are_refused(tmp_path, key, value):
    stored, settings, _ = layer("mxfp4")
    settings["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(ValueError, match=rf"weights\.{key}: expected"):
        imported(tmp_path, stored, settings)


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_engines_refuse_it_before_anything_is_loaded(kind):
    stored, settings, _ = layer(kind)
    names = [f"a.{key}" for key in stored]
    with pytest.raises(ValueError, match=f"expected integer codes, got {kind}: .*import"):
        foreign_layers({"config.json": settings}, names)


@pytest.mark.parametrize(
    ("method", "why"), [("bitsandbytes", "liquidgemm import"), ("fp8", "grid")]
)
def test_engines_say_what_to_do_with_formats_that_they_do_not_convert(method, why):
    expected = rf"expected one of compressed-tensors, awq, gptq, .*qqq to .*, got '{method}'.*{why}"
    with pytest.raises(ValueError, match=expected):
        foreign_layers({"config.json": {"quant_method": method}}, ["a.weight"])
