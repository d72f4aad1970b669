"""Import of other projects' 4-bit checkpoints: exact where the grids agree, near elsewhere."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import foreign
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from liquidgemm import (
    QuantizedWeight,
    cli,
    dequantize_weight,
    import_checkpoint,
    importers,
    quantize_weight,
)
from liquidgemm.importers.source import fit

N, K = 64, 256
GROUPS = [64, 128, -1]


def groups(group: int, k: int = K) -> int:
    return 1 if group == -1 else k // group


def random_grid(group: int, k: int = K, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, float16 scales and integer zeros ``[N, G]``; every code and zero occurs."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (N, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(N, groups(group, k), generator=generator) + 0.5) * 0.01
    zeros = torch.randint(16, scales.shape, generator=generator, dtype=torch.uint8)
    return codes, scales.half(), zeros


def weight_of(codes: Tensor, scales: Tensor, zeros: Tensor | int) -> Tensor:
    """``scale * (code - zero)`` in float64."""
    span = codes.shape[1] // scales.shape[1]
    scales = scales.double().repeat_interleave(span, 1)
    if isinstance(zeros, Tensor):
        zeros = zeros.double().repeat_interleave(span, 1)
    return scales * (codes.double() - zeros)


def write(folder: Path, layers: dict[str, dict[str, Tensor]], settings: dict | None, **more):
    """A model folder with these layers and a norm that nobody quantizes."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", **({"quantization_config": settings} if settings else {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    state = {
        f"{name}.{key}": tensor.clone()
        for name, tensors in layers.items()
        for key, tensor in tensors.items()
    }
    save_file({**state, "norm.weight": torch.ones(4), **more}, folder / "model.safetensors")
    return folder


SETTINGS = {
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 128},
    "qoq": None,
    "qqq": {"quant_method": "qqq", "wbits": 4},
}


def gptq_settings(group: int, version: int = 1) -> dict:
    name = {1: "gptq", 2: "gptq_v2"}[version]
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "checkpoint_format": name}


def values_of(weight: QuantizedWeight) -> Tensor:
    """The weight in float64, so without any rounding."""
    unit = replace(weight, scale=torch.ones(weight.out_features))
    return dequantize_weight(unit).double() * weight.scale.double().unsqueeze(1)


def run(tmp_path: Path, tensors: dict[str, Tensor], settings: dict | None):
    """Imports one layer; its weight in float64, its bias, and its entry in the report."""
    source = write(tmp_path / "source", {"a.b": tensors}, settings)
    report = import_checkpoint(source, tmp_path / "out", progress=False)
    state = load_file(tmp_path / "out/model.safetensors")
    (layer,) = report.layers
    parts = (state[f"a.b.{key}"] for key in ("qweight", "qscale", "qoffset", "scale"))
    weight = QuantizedWeight(*parts, in_features=layer.in_features)
    values = values_of(weight)
    assert layer.name == "a.b"
    assert state["norm.weight"].equal(torch.ones(4))
    return values, state.get("a.b.bias"), layer


def packed(name: str, group: int, version: int = 1) -> tuple[dict[str, Tensor], dict, Tensor]:
    """Tensors, settings and true weight of a random layer with float scales."""
    codes, scales, zeros = random_grid(group)
    if name == "ct-sym":
        tensors = foreign.compressed_tensors(codes, scales)
        return tensors, SETTINGS["compressed-tensors"], weight_of(codes, scales, 8)
    weight = weight_of(codes, scales, zeros)
    if name == "ct-asym":
        tensors = foreign.compressed_tensors(codes, scales, zeros)
        return tensors, SETTINGS["compressed-tensors"], weight
    if name == "awq":
        return foreign.awq(codes, scales, zeros), SETTINGS["awq"], weight
    tensors = foreign.gptq(codes, scales, zeros, K // scales.shape[1], version)
    return tensors, gptq_settings(group, version), weight


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


# What is refused, and that nothing is left behind.


def change(tensors: dict[str, Tensor], key: str, value: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in {**tensors, key: value}.items() if v is not None}


def refused() -> dict[str, tuple]:
    """Name, tensors, settings and message of each case."""
    ct, awq = SETTINGS["compressed-tensors"], SETTINGS["awq"]
    codes, scales, zeros = random_grid(32)
    g32 = r"group_size: expected a multiple of 64 or a whole row, got 32: .* cannot share"
    _, s128, z128 = random_grid(128)
    sym = foreign.compressed_tensors(codes, s128)
    awq128, gptq128 = foreign.awq(codes, s128, z128), foreign.gptq(codes, s128, z128, 128)
    shuffled = gptq128["g_idx"].flip(0)
    nan = s128.clone()
    nan[3, 1] = torch.nan
    return {
        "ct g32": (foreign.compressed_tensors(codes, scales), ct, g32),
        "awq g32": (foreign.awq(codes, scales, zeros), awq, g32),
        "gptq g32": (foreign.gptq(codes, scales, zeros, 32), gptq_settings(32), g32),
        "desc_act": (change(gptq128, "g_idx", shuffled), gptq_settings(128), "g_idx: .*desc_act"),
        "actorder": (change(sym, "weight_g_idx", shuffled), ct, "weight_g_idx: .*actorder"),
        "8 bits": (
            change(sym, "weight_packed", torch.zeros(N, K // 4, dtype=torch.int32)),
            ct,
            "expected 4 bits per weight, got 8",
        ),
        "gptq 8 bits": (gptq128, {**gptq_settings(128), "bits": 8}, "bits: expected 4, got 8"),
        "gemv": (awq128, {**awq, "version": "gemv"}, "version: expected 'gemm', got 'gemv'"),
        "other ct": (sym, {**ct, "format": "marlin-24"}, "format: .*'marlin-24'"),
        "v3": (gptq128, {**gptq_settings(128), "checkpoint_format": "x"}, "checkpoint_format: .*x"),
        "wrong group": (gptq128, gptq_settings(64), r"qzeros: expected int32 \[4, 8\]"),
        "missing": (change(sym, "weight_scale", None), ct, r"a\.b\.weight_scale: missing"),
        "more": (change(sym, "input_scale", nan), ct, r"a\.b\.input_scale: expected nothing but"),
        "cut": (change(sym, "weight_scale", s128[:5]), ct, r"weight_scale: expected .*\[64, 2\]"),
        "dtype": (
            change(awq128, "qzeros", awq128["qzeros"].long()),
            awq,
            "qzeros: expected int32 .* got int64",
        ),
        "nan": (change(sym, "weight_scale", nan), ct, "scales: expected finite values"),
        "negative": (change(sym, "weight_scale", -s128), ct, "scales: expected values >= 0"),
        "bias": (change(sym, "bias", torch.ones(5)), ct, r"bias: expected shape \[64\]"),
        "method": (sym, {"quant_method": "bitnet"}, "quant_method: .*got 'bitnet'"),
        "float": ({"weight": nan}, None, "quant_method: .*got no quantization"),
        "none": ({"weight": nan}, awq, "expected layers with qweight, qzeros, scales"),
    }


@pytest.mark.parametrize("case", refused())
def test_refused(tmp_path, case):
    tensors, settings, message = refused()[case]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tensors, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MUTATIONS = {
    "no dimension": lambda t: t.flatten()[0] if t.numel() else t.new_zeros(()),
    "one dimension": lambda t: t.flatten(),
    "three dimensions": lambda t: t.unsqueeze(0),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "fewer rows": lambda t: t[:-1],
    "fewer columns": lambda t: t[..., :-1],
    "more rows": lambda t: torch.cat((t, t)),
    "transposed": lambda t: t.t().contiguous() if t.dim() == 2 else t.flip(0),
    "bool": lambda t: t.bool(),
    "float64": lambda t: t.double(),
    "complex": lambda t: t.to(torch.complex64),
    "int64": lambda t: t.long(),
    "zero": torch.zeros_like,
    "large": lambda t: torch.full_like(
        t, torch.finfo(t.dtype).max if t.is_floating_point() else 99
    ),
    "negative": lambda t: -t - 1,
}


def every_format() -> dict[str, tuple]:
    codes, scales, zeros = random_grid(128)
    per_channel = foreign.qoq(codes, scales[:, 0], zeros=zeros[:, :1])
    two_level = foreign.qoq(codes.clamp(3, 12), scales[:, 0], torch.full((N, 2), 9), zeros * 0 + 7)
    g_idx = torch.arange(K, dtype=torch.int32) // 128
    ct = foreign.compressed_tensors(codes, scales, zeros)
    return {
        "ct": ({**ct, "weight_g_idx": g_idx}, SETTINGS["compressed-tensors"]),
        "awq": (foreign.awq(codes, scales, zeros), SETTINGS["awq"]),
        "gptq": (foreign.gptq(codes, scales, zeros, 128), gptq_settings(128)),
        "qoq": (two_level, {"quant_method": "qoq"}),
        "qoq per channel": (per_channel, {"quant_method": "qoq"}),
        "qqq": (foreign.qqq(codes, scales[:, 0], scales * 500), SETTINGS["qqq"]),
        "qqq per channel": (foreign.qqq(codes, scales[:, 0]), SETTINGS["qqq"]),
    }


@pytest.mark.parametrize("name", every_format())
def test_mutated_tensors(name):
    """Whatever is wrong with a tensor is a ValueError, or none: never an error of torch's."""
    tensors, settings = every_format()[name]
    module = importers.FORMATS[settings["quant_method"]]
    tensors["bias"] = torch.ones(N)
    refused = 0
    for key, mutation in itertools.product(tensors, MUTATIONS):
        changed = MUTATIONS[mutation](tensors[key])
        try:
            weight, _ = fit(module.read({**tensors, key: changed}, settings))
        except ValueError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{key}: {mutation}") from error
        else:
            assert weight.out_features > 0
    assert refused > len(tensors) * 5


@pytest.mark.parametrize("name", ["ct", "awq", "gptq"])
def test_mutated_settings(tmp_path, name):
    tensors, settings = every_format()[name]
    for key, value in itertools.product(settings, (None, [], {}, "x", -3, 0, 1.5, True)):
        source = write(tmp_path / "source", {"a": tensors}, {**settings, key: value})
        try:
            import_checkpoint(source, tmp_path / "out", progress=False)
        except ValueError:
            assert not (tmp_path / "out").exists()
        except Exception as error:
            raise AssertionError(f"{key}: {value!r}") from error
        else:
            shutil.rmtree(tmp_path / "out")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: truncate(d / "model.safetensors"), ValueError, "truncated or damaged"),
        (lambda d: truncate(d / "config.json"), ValueError, "config.json: truncated"),
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, "expected a model folder"),
        (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "holds no"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"x.weight": "model-2.safetensors"}})
            ),
            ValueError,
            r"x\.weight is missing, .* in model-2",
        ),
    ],
)
def test_damaged_folders(tmp_path, damage, error, message):
    tensors, settings, _ = packed("awq", 128)
    source = write(tmp_path / "source", {"a.b": tensors}, settings)
    damage(source)
    with pytest.raises(error, match=message):
        import_checkpoint(source, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


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
