"""The small Llama that engines serve in tests, and what they are asked."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 192
PROMPT = [(7 * i) % VOCABULARY for i in range(40)]
# Engine and transformers both compute in float32. What differs, the order of sums in attention and
# norms, moves a few activations by one step of INT8.
BOUND = 2e-3


def float_model(tied: bool = False, **changes) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        **changes,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model
