"""Layers in the 4-bit formats of other projects, packed code by code as their papers have it.

Every function takes codes uint8 ``[N, K]`` of 0 to 15 and parameters ``[N, G]`` and returns a
layer's tensors by name. Loops on purpose: what is read back by reshaping is written by index here.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from liquidgemm import QuantizedWeight, dequantize_weight, import_checkpoint


def words(nibbles: np.ndarray) -> Tensor:
    """``[rows, 8 * columns]`` to int32 ``[rows, columns]``, the first of eight lowest."""
    packed = np.zeros((nibbles.shape[0], nibbles.shape[1] // 8), dtype=np.uint32)
    for i in range(8):
        packed |= nibbles[:, i::8].astype(np.uint32) << (4 * i)
    return torch.from_numpy(packed.view(np.int32))


def pad8(nibbles: np.ndarray) -> np.ndarray:
    return np.pad(nibbles, ((0, 0), (0, -nibbles.shape[1] % 8)))


def compressed_tensors(codes, scales, zeros=None) -> dict[str, Tensor]:
    """zeros in 0..15, like codes; None: symmetric around 8."""
    tensors = {
        "weight_packed": words(pad8(codes.numpy())),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if zeros is not None:
        tensors["weight_zero_point"] = words(pad8(zeros.numpy().T)).t().contiguous()
    return tensors


def awq(codes, scales, zeros) -> dict[str, Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def shuffled(matrix):  # [rows, N]: nibble i holds channel order[i] of its eight
        return matrix.reshape(len(matrix), -1, 8)[..., order].reshape(matrix.shape)

    return {
        "qweight": words(shuffled(codes.numpy().T)),
        "qzeros": words(shuffled(zeros.numpy().T)),
        "scales": scales.t().contiguous(),
    }


def gptq(codes, scales, zeros, group, version=1) -> dict[str, Tensor]:
    stored = zeros.numpy().T
    if version == 1:
        stored = (stored.astype(np.int64) - 1) % 16
    return {
        "qweight": words(codes.numpy()).t().contiguous(),
        "qzeros": words(stored),
        "scales": scales.t().contiguous(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // group,
    }


def qoq(codes, s1, s2=None, zeros=None) -> dict[str, Tensor]:
    """QServe: s2 and zeros ``[N, G]`` integers; per channel if s2 is None, zeros ``[N, 1]``."""
    n, k = codes.shape
    source = codes.numpy()
    blocks = np.zeros((n // 32, k // 32, 8, 4, 2, 2, 4), dtype=np.uint8)
    for block in np.ndindex(blocks.shape):
        row, column, c, e, d, b, f = block
        feature = 32 * column + 16 * d + 4 * e + f
        low, high = (source[32 * row + 16 * a + 8 * b + c, feature] for a in (0, 1))
        blocks[block] = low | high << 4
    qweight = torch.from_numpy(blocks.reshape(n, k // 2).view(np.int8))
    if s2 is None:
        return {
            "qweight": qweight,
            "s1_scales": s1.half(),
            "s1_szeros": zeros[:, 0].half() * s1.half(),
        }
    channel = [32 * (j // 32) + 8 * (j % 4) + j % 32 // 4 for j in range(n)]
    product = (-zeros.int() * s2.int()).numpy().astype(np.int8)  # wraps around
    return {
        "qweight": qweight,
        "s1_scales": s1.half(),
        "s2_scales": s2.to(torch.int8)[channel].t().contiguous(),
        "s2_zeros": torch.from_numpy(product)[channel].t().contiguous(),
    }


def qqq(codes, s_channel, s_group=None) -> dict[str, Tensor]:
    """Codes around 8; s_group float16 ``[N, G]``; per channel if None."""
    n, k = codes.shape
    grouped = s_group is not None
    interleave = [0, 2, 4, 6, 1, 3, 5, 7] if grouped else [4, 0, 5, 1, 6, 2, 7, 3]
    order = []
    for i in range(32):
        column = i // 4
        eight = [
            16 * (4 * (i % 4) + row) + column + 8 * half for half in (0, 1) for row in range(4)
        ]
        for tile in range(4):
            order += [256 * tile + eight[place] for place in interleave]
    source = codes.numpy() if grouped else codes.numpy() ^ 8  # two's complement
    tiles = source.T.reshape(k // 16, 16, n // 16, 16).transpose(0, 2, 1, 3)
    stored = tiles.reshape(-1, 1024)[:, order].reshape(k // 16, 16 * n)
    tensors = {
        "B": words(stored),
        "s_channel": (s_channel.float() if grouped else s_channel.float() / 16).view(1, n),
        "s_group": torch.empty(0, dtype=torch.float16),
    }
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    tensors["s_channel"] = tensors["s_channel"].view(-1, 32)[:, single].reshape(1, n)
    if grouped:
        channel = [i + 8 * j for i in range(8) for j in range(8)]
        rows = s_group.half().t().reshape(-1, 64)[:, channel]
        tensors["s_group"] = rows.reshape(k // (k // s_group.shape[1]), n).contiguous()
    return tensors


# Folders with such layers, and what `import_checkpoint` makes of them.

N, K = 64, 256


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
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
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
        tensors = compressed_tensors(codes, scales)
        return tensors, SETTINGS["compressed-tensors"], weight_of(codes, scales, 8)
    weight = weight_of(codes, scales, zeros)
    if name == "ct-asym":
        tensors = compressed_tensors(codes, scales, zeros)
        return tensors, SETTINGS["compressed-tensors"], weight
    if name == "awq":
        return awq(codes, scales, zeros), {**SETTINGS["awq"], "group_size": group}, weight
    tensors = gptq(codes, scales, zeros, K // scales.shape[1], version)
    return tensors, gptq_settings(group, version), weight
