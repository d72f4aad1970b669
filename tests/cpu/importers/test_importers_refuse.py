"""What the importers refuse, and that nothing is left behind."""

import itertools
import json
import shutil
from pathlib import Path

import foreign
import pytest
import torch
from foreign import SETTINGS, K, N, gptq_settings, packed, random_grid, run, write
from torch import Tensor

from liquidgemm import import_checkpoint, importers
from liquidgemm.importers.settings import Settings, merged
from liquidgemm.importers.source import fit


def change(tensors: dict[str, Tensor], key: str, value: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in {**tensors, key: value}.items() if v is not None}


def refused() -> dict[str, tuple]:
    """Name, tensors, settings and message of each case."""
    ct, awq = SETTINGS["compressed-tensors"], SETTINGS["awq"]
    codes, s128, z128 = random_grid(128)
    sym = foreign.compressed_tensors(codes, s128)
    awq128, gptq128 = foreign.awq(codes, s128, z128), foreign.gptq(codes, s128, z128, 128)
    shuffled = gptq128["g_idx"].flip(0)
    nan = s128.clone()
    nan[3, 1] = torch.nan
    return {
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
        "wrong group": (
            gptq128,
            gptq_settings(64),
            "scales: expected 4 groups for 256 columns and group_size = 64, got 2",
        ),
        "missing": (change(sym, "weight_scale", None), ct, r"a\.b\.weight_scale: missing"),
        "more": (change(sym, "input_scale", nan), ct, r"a\.b\.input_scale: expected nothing but"),
        "cut": (change(sym, "weight_scale", s128[:5]), ct, r"weight_scale: expected .*\[64, 2\]"),
        "dtype": (
            change(awq128, "qzeros", awq128["qzeros"].long()),
            awq,
            "qzeros: expected int32 .* got int64",
        ),
        "nan": (change(sym, "weight_scale", nan), ct, "weight_scale: expected finite values"),
        "unwritten": (change(sym, "weight_scale", 0 * s128), ct, "weight_scale: .*but zeros"),
        "bias": (change(sym, "bias", torch.ones(5)), ct, r"bias: expected shape \[64\]"),
        "method": (sym, {"quant_method": "bitnet"}, "quant_method: .*got 'bitnet'"),
        "float": ({"weight": nan}, None, "quant_method: .*got no quantization"),
        "none": ({"weight": nan}, awq, "expected layers with qweight or qzeros or scales"),
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
        "ct": ({**ct, "weight_g_idx": g_idx}, dict(SETTINGS["compressed-tensors"])),
        "awq": (foreign.awq(codes, scales, zeros), dict(SETTINGS["awq"])),
        "gptq": (foreign.gptq(codes, scales, zeros, 128), gptq_settings(128)),
        "qoq": (two_level, {"quant_method": "qoq"}),
        "qoq per channel": (per_channel, {"quant_method": "qoq"}),
        "qqq": (foreign.qqq(codes, scales[:, 0], scales * 500), dict(SETTINGS["qqq"])),
        "qqq per channel": (foreign.qqq(codes, scales[:, 0]), dict(SETTINGS["qqq"])),
    }


@pytest.mark.parametrize("name", every_format())
def test_mutated_tensors(name):
    """Whatever is wrong with a tensor is a ValueError, or none: never an error of torch's."""
    tensors, settings = every_format()[name]
    module = importers.FORMATS[settings.pop("quant_method")]
    settings = merged({"config.json": settings}, module.SYNONYMS, module.HARMLESS)
    layer = module.scheme(Settings(settings))("a", "a")
    tensors["bias"] = torch.ones(N)
    refused = 0
    for key, mutation in itertools.product(tensors, MUTATIONS):
        changed = MUTATIONS[mutation](tensors[key])
        try:
            weight, _ = fit(module.read({**tensors, key: changed}, layer))
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
