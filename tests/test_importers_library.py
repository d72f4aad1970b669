"""A checkpoint as the library compressed-tensors itself writes it."""

import pytest
import torch
from tiny_models import make

from liquidgemm import import_checkpoint, load_quantized

pytest.importorskip("compressed_tensors")
from compressed_tensors import quantization as Q
from compressed_tensors.compressors import ModelCompressor


def compressed_model(weights: "Q.QuantizationArgs", folder) -> dict[str, torch.Tensor]:
    """Writes a model; returns the weights that the library reads from it again."""
    model = make(
        hidden_size=128, intermediate_size=384, num_attention_heads=8, tie_word_embeddings=False
    )
    scheme = Q.QuantizationScheme(targets=["Linear"], weights=weights)
    Q.apply_quantization_config(
        model,
        Q.QuantizationConfig(
            config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized"
        ),
    )
    group = weights.group_size
    for name, linear in model.named_modules():
        if type(linear) is not torch.nn.Linear or name == "lm_head":
            continue
        w = linear.weight.detach()
        w = w.view(len(w), -1, group or w.shape[1])
        low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
        if weights.symmetric:
            linear.weight_scale.data = torch.maximum(-low, high) / 7.5
        else:
            linear.weight_scale.data = (high - low) / 15
            zero = (-8 - low / linear.weight_scale).round().clamp(-8, 7)
            linear.weight_zero_point.data = zero.to(linear.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("proj.weight")}


@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_read_as_the_library_reads_it(tmp_path, symmetric, group):
    strategy = "channel" if group is None else "group"
    weights = Q.QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy=strategy, group_size=group
    )
    expected = compressed_model(weights, tmp_path / "theirs")
    report = import_checkpoint(tmp_path / "theirs", tmp_path / "ours", progress=False)
    assert report.source == "compressed-tensors"
    assert len(report.layers) == len(expected) == 14
    model = load_quantized(tmp_path / "ours")
    for layer in report.layers:
        theirs = expected[f"{layer.name}.weight"].double()
        ours = model.get_submodule(layer.name).dequantize().double()
        error = (ours - theirs).norm() / theirs.norm()
        assert error.item() == pytest.approx(layer.error, rel=1e-3, abs=1e-6)
        assert layer.error < (1e-6 if group is None else 0.03)
