"""Other structures than Llama's through vLLM's engine, quantized before and while loading."""

import pytest
import torch
from test_vllm_engine import BOUND, assert_near, engine, expected, logits

from liquidgemm import LiquidConfig, load_quantized, quantize_, save_quantized

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = {
    "vocab_size": 192,
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
MODELS = {
    "norms of heads": ("Qwen3", {"head_dim": 32}),
    "biases": ("Qwen2", {}),
    "sliding windows": ("Gemma2", {"head_dim": 32, "sliding_window": 16}),
    "fused on disk": ("Phi3", {}),
    "no gate": ("GPTNeoX", {"num_key_value_heads": None}),
    "latent attention": (
        "DeepseekV2",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 512,
            "q_lora_rank": 64,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "transposed": ("GPT2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}


def make(kind: str) -> torch.nn.Module:
    name, changes = MODELS[kind]
    fields = {"vocab_size": 192, "pad_token_id": 0} if name == "GPT2" else TEXT
    fields = {key: v for key, v in (fields | changes).items() if v is not None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # so that what follows is no noise
        if parameter.dim() == 2:
            parameter.data.mul_(2)
    return model


# vLLM's latent attention on CPUs wants bfloat16, in which its own logits are off by 0.03.
DTYPES = {"latent attention": (torch.bfloat16, 0.05)}


@pytest.mark.parametrize("kind", MODELS)
def test_structures(kind, tmp_path):
    dtype, bound = DTYPES.get(kind, (torch.float32, BOUND))
    # Both at first, as vLLM may patch the class of transformers.
    model, online = make(kind).to(dtype), make(kind).to(dtype)
    model.save_pretrained(tmp_path / "float")
    quantize_(model, LiquidConfig(augment=64), progress=False, verify=False)
    save_quantized(model, tmp_path / "ours")
    wanted = expected(load_quantized(tmp_path / "ours"))
    quantize_(online, LiquidConfig(), progress=False, verify=False)
    wanted_online = expected(online)
    assert_near(logits(engine(tmp_path / "ours", dtype=dtype)), wanted, bound)
    llm = engine(tmp_path / "float", quantization="liquidgemm", dtype=dtype)
    assert_near(logits(llm), wanted_online, bound)


@pytest.mark.parametrize("kind", ["norms of heads", "fused on disk", "sliding windows"])
def test_compiled_structures(kind, tmp_path):
    """Norms quantize for the layers after them where they are vLLM's `RMSNorm`."""
    model = make(kind)
    quantize_(model, LiquidConfig(augment=64), progress=False, verify=False)
    save_quantized(model, tmp_path)
    wanted = expected(load_quantized(tmp_path))
    llm = engine(tmp_path, enforce_eager=False, max_num_batched_tokens=128)
    assert_near(logits(llm), wanted)
    assert llm.apply_model(_quantizing)[0] == (0 if kind == "sliding windows" else 4)


def _quantizing(model: torch.nn.Module) -> int:
    """Norms of two blocks; Gemma's are of a class of their own."""
    norms = (m for m in model.modules() if type(m).__name__ == "QuantizingRMSNorm")
    return sum(norm.quantizes for norm in norms)
