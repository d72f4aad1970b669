"""Models of transformers small enough to be quantized in a moment."""

import pytest
import reference
import torch

transformers = pytest.importorskip("transformers")


def batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (2, 24), generator=generator) for _ in range(count)]


def make(kind="Llama", seed=0, **fields):
    """A tiny model of an architecture, with norms and outliers that are not all alike."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 96,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    if kind == "GPT2":
        sizes = {"vocab_size": 64, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 64}
    if kind == "GPTNeoX":
        del sizes["num_key_value_heads"], sizes["head_dim"]
    config = getattr(transformers, kind + "Config")(**sizes | fields)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or "bias" in name:
            parameter.data.add_(torch.rand_like(parameter))
        elif parameter.dim() == 2:
            parameter.data.mul_(2)
    return model


@torch.no_grad()
def logits(model, tokens=None):
    return model(batches(1, seed=9)[0] if tokens is None else tokens).logits


def error(model, expected):
    return ((logits(model) - expected).norm() / expected.norm()).item()


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model, expected):
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        reference.assert_same(actual[key], value, key=key)
