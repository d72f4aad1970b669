"""Import of other projects' 4-bit checkpoints: exact where the grids agree, near elsewhere."""

import json

import foreign
import pytest
import torch
from foreign import (
    SETTINGS,
    K,
    N,
    gptq_settings,
    packed,
    random_grid,
    run,
    values_of,
    weight_of,
    write,
)
from safetensors.torch import load_file
from typer.testing import CliRunner

from liquidgemm import import_checkpoint, quantize_weight
from liquidgemm.cli import main as cli
from liquidgemm.weights.weight import QuantizedWeight, dequantize_weight

FLOAT_FORMATS = [("ct-sym", 1), ("ct-asym", 1), ("awq", 1), ("gptq", 1), ("gptq", 2)]


@pytest.mark.parametrize(("name", "version"), FLOAT_FORMATS)
def test_one_scale_per_channel_is_exact(tmp_path, name, version):
    tensors, settings, weight = packed(name, -1, version)
    bias = torch.randn(N).half()
    values, found, layer = run(tmp_path, {**tensors, "bias": bias}, settings)
    assert torch.equal(values, weight)
    assert layer.error == 0
    assert layer.group_size == -1
    assert found.equal(bias)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(("name", "version"), FLOAT_FORMATS)
def test_float_group_scales(tmp_path, name, version, group):
    """The reported error is the true one; it is small, and less than requantizing would give."""
    tensors, settings, weight = packed(name, group, version)
    values, _, layer = run(tmp_path, tensors, settings)
    error = float((values - weight).norm() / weight.norm())
    assert layer.error == pytest.approx(error, rel=1e-9)
    assert layer.group_size == group
    again = values_of(quantize_weight(weight.float()))
    assert ((values - weight).norm(dim=1) <= (again - weight).norm(dim=1)).all()
    # Half a step of the largest integer scale, 17 at most, is 3 % of it; zeros far from the
    # middle make the range of codes, and with it the unit, up to twice as large.
    assert 0 < error < (0.04 if name == "ct-sym" else 0.06)


def test_equal_group_scales_are_exact(tmp_path):
    """In groups, but with the same scale all along the row; the zeros may differ."""
    codes, scales, zeros = random_grid(64)
    scales = scales[:, :1].expand(-1, K // 64).contiguous()
    values, _, layer = run(tmp_path, foreign.awq(codes, scales, zeros), SETTINGS["awq"])
    assert torch.equal(values, weight_of(codes, scales, zeros))
    assert layer.error == 0


@pytest.mark.parametrize("group", [32, 64])
def test_equal_steps_of_fine_groups_are_exact(tmp_path, group):
    """Groups of 32 whose steps are whole multiples of one unit per row keep every value."""
    codes, scales, zeros = random_grid(group)
    zeros = torch.full_like(zeros, 8)
    units = torch.randint(1, 16, scales.shape, generator=torch.Generator().manual_seed(3))
    units[:, 0] = 1
    scales = (units * 2.0**-10).to(scales.dtype)  # which float16 holds
    values, _, layer = run(tmp_path, foreign.awq(codes, scales, zeros), SETTINGS["awq"])
    assert torch.equal(values, weight_of(codes, scales, zeros))
    assert (layer.error, layer.group_size) == (0, group)


@pytest.mark.parametrize(("name", "version"), FLOAT_FORMATS)
def test_groups_of_32_stay_groups_of_32(tmp_path, name, version):
    """The codes stay, as in groups of 64; 4.5 bits, and a checkpoint that says so."""
    tensors, settings, weight = packed(name, 32, version)
    source = write(tmp_path / "source", {"a.b": tensors}, settings)
    report = import_checkpoint(source, tmp_path / "out", False)
    state = load_file(tmp_path / "out/model.safetensors")
    parts = (state[f"a.b.{key}"] for key in ("qweight", "qscale", "qoffset", "scale"))
    found = QuantizedWeight(*parts, K)
    assert found.group_size == 32
    values = values_of(found)
    error = ((values - weight).norm() / weight.norm()).item()
    assert report.layers[0].error == pytest.approx(error, rel=1e-9)
    again = values_of(quantize_weight(weight.float(), 32))
    assert ((values - weight).norm(dim=1) <= (again - weight).norm(dim=1)).all()
    assert 0 < error < 0.06
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["format_version"] == 3
    assert settings["layers"] == {"a.b": 0}
    assert settings["group_sizes"] == {"a.b": 32}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("name", "version"), FLOAT_FORMATS)
def test_groups_of_16(tmp_path, name, version, bits):
    """Finer than ours: 8 bits by one scale per row, or 4 that are searched anew."""
    tensors, settings, weight = packed(name, 16, version)
    source = write(tmp_path / "source", {"a.b": tensors}, settings)
    report = import_checkpoint(source, tmp_path / "out", False, fine_bits=bits)
    state = load_file(tmp_path / "out/model.safetensors")
    parts = (state[f"a.b.{key}"] for key in ("qweight", "qscale", "qoffset", "scale"))
    found = QuantizedWeight(*parts, K, state.get("a.b.columns"))
    error = ((dequantize_weight(found) - weight).norm() / weight.norm()).item()
    assert report.layers[0].error == pytest.approx(error, rel=1e-3)
    assert report.layers[0].group_size == 16
    assert 0 < error < (0.01 if bits == 8 else 0.15)
    assert bool(found.augment) == (bits == 8)


@pytest.mark.parametrize("group", [64, 128])
def test_qoq_progressive_is_exact(tmp_path, group):
    """Steps up to 16, zeros whose product with the step overflows a byte."""
    generator = torch.Generator().manual_seed(1)
    shape = (N, K // group)
    s2 = torch.randint(1, 17, shape, generator=generator)
    zeros = torch.randint(0, 16, shape, generator=generator)
    codes = torch.randint(16, (N, K), generator=generator).unflatten(1, (K // group, group))
    # Only codes whose weight is within the protective range.
    low = zeros - (119 // s2)
    high = zeros + (119 // s2)
    codes = codes.clamp(low.unsqueeze(2), high.unsqueeze(2)).clamp(0, 15).flatten(1)
    assert ((-zeros * s2) < -128).any()
    s1 = torch.rand(N, generator=generator).half() * 0.01
    values, _, layer = run(tmp_path, foreign.qoq(codes.to(torch.uint8), s1, s2, zeros), None)
    w8 = s2.repeat_interleave(group, 1) * (codes - zeros.repeat_interleave(group, 1))
    assert torch.equal(values, w8.double() * s1.double().unsqueeze(1))
    assert (layer.error, layer.group_size) == (0, group)


def test_qoq_per_channel_is_exact(tmp_path):
    codes, s1, zeros = random_grid(-1)
    values, _, layer = run(tmp_path, foreign.qoq(codes, s1[:, 0], zeros=zeros), None)
    assert torch.equal(values, weight_of(codes, s1, zeros))
    assert layer.error == 0


def test_qoq_with_zeros_that_are_no_integers(tmp_path):
    """The codes stay; the offset is as near as one INT8 unit, of which a step has several."""
    codes, s1, zeros = random_grid(-1)
    tensors = foreign.qoq(codes, s1[:, 0], zeros=zeros + 0.3)
    values, _, layer = run(tmp_path, tensors, None)
    weight = codes * s1.double() - tensors["s1_szeros"].double().unsqueeze(1)
    assert layer.error == pytest.approx(float((values - weight).norm() / weight.norm()))
    assert 0 < layer.error < 0.01
    assert (torch.diff(values.sort(1).values, dim=1).abs() > 1e-12).sum(1).eq(15).all()


def test_qoq_that_wraps_is_refused(tmp_path):
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    codes[:, 0] = 15
    zeros = torch.full((32, 1), 7)
    tensors = foreign.qoq(codes, torch.ones(32), torch.full((32, 1), 18), zeros)
    with pytest.raises(ValueError, match=r"a\.b: s2_scales, s2_zeros: .* wrap"):
        run(tmp_path, tensors, None)


def test_qqq_per_channel_is_exact(tmp_path):
    codes, s_channel, _ = random_grid(-1)
    values, _, layer = run(tmp_path, foreign.qqq(codes, s_channel[:, 0]), SETTINGS["qqq"])
    assert torch.equal(values, weight_of(codes, s_channel, 8))
    assert (layer.error, layer.group_size) == (0, -1)


@pytest.mark.parametrize("integer", [True, False])
def test_qqq_in_groups(tmp_path, integer):
    """Exact if the group scales are integers; else the source rounds each weight to INT8."""
    generator = torch.Generator().manual_seed(2)
    codes, s_channel, _ = random_grid(-1, seed=2)
    s_group = 1 + 15 * torch.rand(N, K // 128, generator=generator)
    s_group = s_group.round() if integer else s_group.half()
    tensors = foreign.qqq(codes, s_channel[:, 0], s_group)
    values, _, layer = run(tmp_path, tensors, SETTINGS["qqq"])
    w8 = (s_group.double().repeat_interleave(128, 1) * (codes.double() - 8)).round()
    weight = w8 * s_channel.double()
    error = float((values - weight).norm() / weight.norm())
    assert layer.error == pytest.approx(error)
    assert layer.group_size == 128
    if integer:
        assert torch.equal(values, weight)
    else:
        assert 0 < error < 0.04


def test_gptq_whose_last_group_is_short(tmp_path):
    codes, scales, zeros = random_grid(128, k=320)  # 2 scales: made 3 below
    scales, zeros = (torch.cat((p, p[:, :1]), 1) for p in (scales, zeros))
    tensors = foreign.gptq(codes, scales, zeros, 128)
    values, _, layer = run(tmp_path, tensors, gptq_settings(128))
    spread = [p.double().repeat_interleave(128, 1)[:, :320] for p in (scales, zeros)]
    weight = spread[0] * (codes - spread[1])
    assert layer.error == pytest.approx(float((values - weight).norm() / weight.norm()))
    assert layer.error < 0.06


def test_compressed_tensors_of_odd_sizes(tmp_path):
    """7 rows and 100 columns: neither fills its last word."""
    codes, scales, zeros = (p[:7, :100] for p in random_grid(-1))
    tensors = foreign.compressed_tensors(codes, scales, zeros)
    values, _, _ = run(tmp_path, tensors, SETTINGS["compressed-tensors"])
    assert torch.equal(values, weight_of(codes, scales, zeros))


def test_a_row_of_zeros_and_groups_of_one_value(tmp_path):
    codes, scales, _ = random_grid(64)
    codes[0] = 8  # all zero
    codes[1, :64] = 15  # all alike
    scales[2, 1] = 0
    tensors = foreign.compressed_tensors(codes, scales)
    values, _, layer = run(tmp_path, tensors, SETTINGS["compressed-tensors"])
    weight = weight_of(codes, scales, 8)
    assert values[0].abs().max() == 0
    assert layer.error == pytest.approx(float((values - weight).norm() / weight.norm()))
    assert ((values - weight).norm(dim=1) <= 0.04 * weight.norm(dim=1)).all()


def test_output_is_never_overwritten(tmp_path):
    tensors, settings, _ = packed("awq", 128)
    source = write(tmp_path / "source", {"a.b": tensors}, settings)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        import_checkpoint(source, tmp_path / "out", progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_shards_and_pickles(tmp_path, monkeypatch):
    """The same weights whether they come as safetensors or as pytorch_model.bin, in one file or
    in several."""
    tensors, settings, _ = packed("awq", 128)
    layers = {"a.b": tensors, "c": tensors}
    source = write(tmp_path / "source", layers, settings)
    import_checkpoint(source, tmp_path / "whole", progress=False)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    monkeypatch.setattr("liquidgemm.importers.folder.SHARD_BYTES", 10_000)
    import_checkpoint(source, tmp_path / "shards", progress=False)
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    assert {file.name for file in files} == set(index["weight_map"].values())
    state = {key: tensor for file in files for key, tensor in load_file(file).items()}
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert state.keys() == whole.keys() == index["weight_map"].keys()
    assert all(state[key].equal(whole[key]) for key in whole)
    assert (tmp_path / "shards/tokenizer.json").exists()


def test_command(tmp_path):
    tensors, settings, _ = packed("gptq", -1)
    lossy, _, _ = packed("gptq", -1)
    source = write(tmp_path / "source", {"a.b": tensors, "c": lossy}, settings)
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, ["import", str(source), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "2 layers imported from gptq, 2 without any loss" in " ".join(result.stdout.split())
    report = json.loads((out / "liquidgemm_import.json").read_text())
    assert [layer["error"] for layer in report["layers"]] == [0, 0]
    result = CliRunner().invoke(cli.app, ["import", str(source), "-o", str(out)])
    assert result.exit_code == 1
    assert "expected a new or empty folder" in " ".join(result.stderr.split())
