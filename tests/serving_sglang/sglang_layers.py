"""SGLang's layers without an engine, as any rank of any tensor parallel size."""

import stand_ins  # noqa: F401, I001 - before SGLang

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from sglang.srt.layers import linear, vocab_parallel_embedding
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from torch import nn

from liquidgemm.integrations.sglang import register
from liquidgemm.integrations.sglang.config import LiquidGemmConfig

register()


@contextmanager
def as_rank(rank: int, size: int):
    """As if this were one process of several."""
    group = SimpleNamespace(rank_in_group=rank, world_size=size)
    parallel = SimpleNamespace(tp_rank=rank, tp_size=size, tp_group=group)
    with (
        patch.object(linear, "get_parallel", lambda: parallel),
        patch.object(vocab_parallel_embedding, "get_parallel", lambda: parallel),
    ):
        yield


def config_of(layers: dict[str, int], **settings) -> LiquidGemmConfig:
    return LiquidGemmConfig.from_config(
        {"quant_method": "liquidgemm", "format_version": 1, "config": None, "layers": layers}
        | {"packed_modules_mapping": {}}
        | settings
    )


def foreign_config(settings: dict, names: list[str]) -> LiquidGemmConfig:
    """Of another project's checkpoint with such tensors, which a file of it has."""
    with TemporaryDirectory() as folder:
        tensors = {name: torch.zeros(1) for name in names}
        save_file(tensors, Path(folder) / "model.safetensors")
        given = {"packed_modules_mapping": {}, "hf_config": SimpleNamespace(_name_or_path=folder)}
        return LiquidGemmConfig.from_config(settings | given)


def qkv(config, k, head, heads, kv_heads, dtype=torch.bfloat16) -> nn.Module:
    return linear.QKVParallelLinear(
        k, head, heads, kv_heads, bias=False, params_dtype=dtype, quant_config=config,
        prefix="a.qkv_proj",
    )  # fmt: skip


def gate_up(config, k, sizes, dtype=torch.bfloat16) -> nn.Module:
    return linear.MergedColumnParallelLinear(
        k, sizes, bias=False, params_dtype=dtype, quant_config=config, prefix="a.gate_up_proj"
    )


def down(config, k, n, dtype=torch.bfloat16) -> nn.Module:
    return linear.RowParallelLinear(
        k, n, bias=False, params_dtype=dtype, quant_config=config, prefix="a.down_proj",
        reduce_results=False,
    )  # fmt: skip


def replicated(config, k, n) -> nn.Module:
    return linear.ReplicatedLinear(
        k, n, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix="a.o_proj"
    )


def head(config, n, k, dtype=torch.bfloat16) -> nn.Module:
    return vocab_parallel_embedding.ParallelLMHead(
        n, k, params_dtype=dtype, quant_config=config, prefix="lm_head"
    )


def embedding(kind: str = "ParallelLMHead") -> nn.Module:
    return nn.Module.__new__(getattr(vocab_parallel_embedding, kind))


def experts() -> nn.Module:
    return FusedMoE.__new__(FusedMoE)
