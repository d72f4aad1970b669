"""Tiny models with experts, one for each way in which transformers keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

IDS = torch.arange(24).view(2, 12)


@dataclass
class Family:
    """Fields of the config beyond those of all, and how many layers have experts."""

    fields: dict = field(default_factory=dict)
    layers: int = 2


_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_FEW = {"moe_intermediate_size": 48, "num_experts": 4}
_LOCAL = {"intermediate_size": 48, "num_local_experts": 4}
FAMILIES = {
    "Mixtral": Family({"num_local_experts": 4}),
    "Qwen2Moe": Family({**_FEW, "shared_expert_intermediate_size": 96}),
    "Qwen3Moe": Family(_FEW),
    "DeepseekV2": Family(
        {**_GROUPS, **_LATENT, "moe_intermediate_size": 48, "n_shared_experts": 1}, 1
    ),
    "DeepseekV3": Family({**_GROUPS, **_LATENT, "moe_intermediate_size": 48}, 1),
    "Glm4Moe": Family({**_GROUPS, "moe_intermediate_size": 48}, 1),
    "GptOss": Family({"num_local_experts": 4}),
    "Llama4": Family(
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96}
    ),
    "Olmoe": Family({"intermediate_size": 48, "num_experts": 4, "eos_token_id": 1}),
    "GraniteMoe": Family(_LOCAL),
    "GraniteMoeShared": Family({**_LOCAL, "shared_intermediate_size": 96}),
    "Ernie4_5_Moe": Family(
        {"moe_intermediate_size": 48, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}
    ),
    "MiniMax": Family(_LOCAL),
    "Phimoe": Family(_LOCAL),
    "Jamba": Family(
        {
            "intermediate_size": 48,
            "num_experts": 4,
            "mamba_d_state": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        1,
    ),
}


def moe_model(family: str, seed: int = 0, **fields) -> nn.Module:
    """A random model of a family, with experts that matter."""
    transformers = pytest.importorskip("transformers", minversion="5")
    common = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **FAMILIES[family].fields,
        **fields,
    }
    if family in ("DeepseekV3", "GraniteMoe", "Olmoe", "Phimoe", "Jamba", "Qwen2Moe"):
        del common["head_dim"]
    text = "Text" if family == "Llama4" else ""
    config = getattr(transformers, f"{family}{text}Config")(**common)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.05)
    return model
