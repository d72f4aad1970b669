"""bitsandbytes' 4-bit weights as it stores them, against its own dequantization."""

import json

import foreign
import pytest
import torch
from safetensors.torch import load_file

from liquidgemm import QuantizedWeight, dequantize_weight, import_checkpoint

bnb = pytest.importorskip("bitsandbytes").functional

STATE = "weight.quant_state.bitsandbytes__nf4"
SETTINGS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_threshold": 6.0,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_skip_modules": ["lm_head"],
}


def layer(n=32, k=640, kind="nf4", nested=True, block=64) -> tuple[dict, torch.Tensor]:
    """A layer's tensors, and the library's own weight in float32; scales of many sizes."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    # Blocks are of the flattened matrix; on CPUs version 0.50 expands rows of 96 wrongly.
    rows = weight.view(-1, block) if weight.numel() % block == 0 else weight
    codes, state = bnb.quantize_4bit(
        rows, blocksize=block, compress_statistics=nested, quant_type=kind
    )
    theirs = bnb.dequantize_4bit(codes, state).view(n, k)
    state.shape = weight.shape
    tensors = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {"weight": codes, **tensors}, theirs


def imported(folder, tensors: dict, name="a", fine_bits=8, **settings):
    source = foreign.write(folder / "source", {name: tensors}, SETTINGS | settings)
    report = import_checkpoint(source, folder / "out", progress=False, fine_bits=fine_bits)
    state = load_file(folder / "out/model.safetensors")
    names = ("qweight", "qscale", "qoffset", "scale")
    found = report.layers[0]
    parts = (state[f"{name}.{key}"] for key in names)
    return found, QuantizedWeight(*parts, found.in_features, columns=state.get(f"{name}.columns"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("kind", "block"), [("nf4", 64), ("fp4", 64), ("nf4", 128)])
def test_values_are_those_of_the_library(tmp_path, kind, block, nested):
    tensors, theirs = layer(kind=kind, nested=nested, block=block)
    found, weight = imported(tmp_path, tensors, bnb_4bit_quant_type=kind)
    ours = dequantize_weight(weight)
    step = theirs.abs().amax(1, keepdim=True) / 127
    assert ((ours - theirs).abs() <= 0.501 * step).all()
    error = (ours - theirs).norm() / theirs.norm()
    assert found.error == pytest.approx(float(error), rel=1e-3)
    assert (found.out_features, found.in_features, found.group_size) == (32, 640, block)


@pytest.mark.parametrize("shape", [(6, 96), (5, 33), (3, 128)])
def test_blocks_cross_rows_of_the_matrix(tmp_path, shape):
    """They are of the flattened matrix, whose last one may be shorter; codes may be odd."""
    tensors, theirs = layer(*shape)
    found, weight = imported(tmp_path, tensors)
    step = theirs.abs().amax(1, keepdim=True) / 127
    assert ((dequantize_weight(weight) - theirs).abs() <= 0.501 * step).all()
    assert (found.out_features, found.in_features) == shape


def test_four_bits_are_searched_anew(tmp_path):
    tensors, theirs = layer()
    found, weight = imported(tmp_path, tensors, fine_bits=4)
    assert weight.columns is None
    error = (dequantize_weight(weight) - theirs).norm() / theirs.norm()
    assert found.error == pytest.approx(float(error), rel=1e-3)
    assert 0.01 < found.error < 0.15


def test_codes_may_be_stored_as_floats(tmp_path):
    tensors, _ = layer()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    _, expected = imported(tmp_path / "one", tensors)
    tensors["weight"] = tensors["weight"].view(-1, 2).view(torch.bfloat16)
    _, weight = imported(tmp_path / "two", tensors, bnb_4bit_quant_storage="bfloat16")
    assert torch.equal(weight.qweight, expected.qweight)
    assert torch.equal(weight.scale, expected.scale)


def state_with(tensors: dict, **changes) -> None:
    content = json.loads(bytes(tensors[STATE].tolist())) | changes
    tensors[STATE] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("weight"), "weight: missing"),
        (lambda t: t.pop("weight.absmax"), r"weight\.absmax: missing"),
        (lambda t: t.pop("weight.nested_absmax"), r"nested_absmax: missing beside"),
        (lambda t: t.update(weight=t["weight"][1:]), "weight: expected uint8"),
        (lambda t: t.update({"weight.absmax": t["weight.absmax"][1:]}), r"weight\.absmax: "),
        (lambda t: t["weight.nested_absmax"].fill_(torch.nan), "nested_absmax: expected finite"),
        (lambda t: t["weight.quant_map"].zero_(), "quant_map: .*zeros"),
        (lambda t: t.update({STATE: t[STATE][:-3]}), "nf4: damaged"),
        (lambda t: state_with(t, shape=[32]), r"shape: expected the shape of a matrix"),
        (lambda t: state_with(t, shape=[32, 641]), "weight: expected uint8"),
        (lambda t: state_with(t, blocksize=0), "blocksize: expected a positive"),
        (lambda t: state_with(t, nested_blocksize=None), "nested_blocksize: expected"),
        (lambda t: state_with(t, nested_offset=None), "nested_offset: expected a finite"),
        (lambda t: state_with(t, nested_dtype="float16"), "nested_dtype: expected"),
        (lambda t: state_with(t, quant_type="fp4"), "quant_type: expected 'nf4'"),
        (lambda t: state_with(t, unheard=1), "unheard: expected no such setting"),
    ],
)
def test_damage_is_refused_before_anything_is_there(tmp_path, change, match):
    tensors, _ = layer()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    with pytest.raises(ValueError, match=match):
        imported(tmp_path, tensors)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "name", "match"),
    [
        ({"load_in_8bit": True, "_load_in_8bit": True}, "a", "load_in_8bit: expected False"),
        ({"bnb_4bit_quant_type": "fp4"}, "a", "nf4|fp4"),
        ({}, "lm_head", "llm_int8_skip_modules: expected a layer that is not quantized"),
        ({"unheard": 1}, "a", "unheard: expected no such setting"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, name, match):
    with pytest.raises(ValueError, match=match):
        imported(tmp_path, layer()[0], name, **settings)
    assert not (tmp_path / "out").exists()
