"""vLLM's layers without an engine, as any rank of any tensor parallel size."""

import json
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed: make test-serve")

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocab
from vllm.platforms import current_platform

from liquidgemm.integrations.serving.foreign import foreign_layers
from liquidgemm.integrations.serving.names import Names
from liquidgemm.integrations.vllm import register
from liquidgemm.integrations.vllm.config import LiquidGemmConfig

register()

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": [0, 1]}


@contextmanager
def as_rank(rank: int, size: int):
    """As if this were one process of several."""
    with ExitStack() as stack:
        config = VllmConfig(device_config=DeviceConfig("cpu"))
        stack.enter_context(set_current_vllm_config(config))
        if current_platform.is_unspecified():  # a CUDA build of vLLM on a machine without a GPU
            stack.enter_context(patch("liquidgemm.integrations.vllm.config.check_device"))
        for module in ("layers.linear", "layers.vocab_parallel_embedding", "parameter"):
            for name, value in (("rank", rank), ("world_size", size)):
                target = f"vllm.model_executor.{module}.get_tensor_model_parallel_{name}"
                stack.enter_context(patch(target, lambda value=value: value))
        yield


def config_of(layers: dict[str, int], **settings) -> LiquidGemmConfig:
    config = LiquidGemmConfig.from_config(
        {"quant_method": "liquidgemm", "format_version": 1, "config": None, "layers": layers}
        | settings
    )
    config.packed_modules_mapping = FUSED
    return config


def foreign_config(settings: dict, names: list[str]) -> LiquidGemmConfig:
    """Of another project's checkpoint with such tensors."""
    config = LiquidGemmConfig.from_config(settings)
    config.foreign_names = Names(foreign_layers({"config.json": settings}, names))
    config.packed_modules_mapping = FUSED
    return config


def qkv(config, k, head, heads, kv_heads, dtype=torch.bfloat16, bias=False) -> nn.Module:
    return vllm_linear.QKVParallelLinear(
        k, head, heads, kv_heads, bias=bias, params_dtype=dtype, quant_config=config,
        prefix="a.qkv_proj",
    )  # fmt: skip


def gate_up(config, k, sizes, dtype=torch.bfloat16) -> nn.Module:
    return vllm_linear.MergedColumnParallelLinear(
        k, sizes, bias=False, params_dtype=dtype, quant_config=config, prefix="a.gate_up_proj"
    )


def down(config, k, n, dtype=torch.bfloat16, bias=False, reduce=False) -> nn.Module:
    return vllm_linear.RowParallelLinear(
        k, n, bias=bias, params_dtype=dtype, quant_config=config, prefix="a.down_proj",
        reduce_results=reduce,
    )  # fmt: skip


def head(config, n, k, dtype=torch.bfloat16) -> nn.Module:
    return vllm_vocab.ParallelLMHead(
        n, k, params_dtype=dtype, quant_config=config, prefix="lm_head"
    )


def write_config(folder: Path, **changes) -> None:
    """Into the config.json of a folder."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
