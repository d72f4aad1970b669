"""A random Llama that is small, as a folder and as quantized models."""

from pathlib import Path

import pytest
import torch
from torch import nn

import liquidgemm
from liquidgemm import LiquidLinear

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12) * 5 % 256


def float_model(folder: Path, dtype=torch.bfloat16, **changes) -> Path:
    """A folder with a random Llama: two layers, biases, sizes that are no multiples of 64."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        pad_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start as zeros
            nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder)
    return folder


def attention_model(**changes):
    """A random decoder whose heads a KV cache takes: of 64 dimensions, two queries to a key."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    kind = changes.pop("kind", "Llama")
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def with_tokenizer(folder: Path, tokens: int = 256) -> Path:
    """The same folder with one whose words are t0, t1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(tokens)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0")
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, auto=transformers.AutoModelForCausalLM, **options):
    return auto.from_pretrained(folder, **options)


def quantized(folder: Path, **fields):
    return load(folder, quantization_config=liquidgemm.LiquidGemmConfig(**fields))


def liquid_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, LiquidLinear)]
