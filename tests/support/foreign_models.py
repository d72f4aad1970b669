"""Whole models in the formats of other projects, small, with their weights as those have them."""

import json
from pathlib import Path

import foreign
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _text(kind: str, **fields):
    config = getattr(transformers, f"{kind}Config")(**{**TEXT, **fields})
    return transformers.AutoModelForCausalLM.from_config(config)


def _llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=127,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _without(*fields: str) -> dict:
    return {key: value for key, value in TEXT.items() if key not in fields}


MODELS = {
    "grouped queries": lambda: _text("Llama", tie_word_embeddings=False),
    "tied head": lambda: _text("Llama", tie_word_embeddings=True),
    "biases": lambda: _text("Qwen2", tie_word_embeddings=False),
    "one product for three": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**_without("num_key_value_heads", "head_dim"))
    ),
    "encoder with a head": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_without("num_key_value_heads", "head_dim"), num_labels=3)
    ),
    "encoder and decoder": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=128,
            d_model=128,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=256,
            decoder_ffn_dim=256,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=64,
        )
    ),
    "dtype of a weight asked for": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=128, d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4
        )
    ),
    "vision tower": _llava,
    "recurrent": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=128, hidden_size=128, state_size=8, num_hidden_layers=1, time_step_rank=64
        )
    ),
}
TRANSPOSED = {
    "transposed weights": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_embd=128, n_layer=1, n_head=4, n_positions=64)
    ),
}
EXPERTS = {
    "one parameter": lambda: _text(
        "Qwen3Moe", moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    ),
    "one parameter, with a router of its own": lambda: _text(
        "Mixtral", num_local_experts=4, num_experts_per_tok=2
    ),
}


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = {**MODELS, **TRANSPOSED, **EXPERTS}[kind]().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or "bias" in name:
            parameter.data.add_(torch.rand_like(parameter) / 4)
        elif parameter.dim() == 2:
            parameter.data.mul_(3)
    return model


@torch.no_grad()
def outputs(model: torch.nn.Module) -> Tensor:
    """Of some tokens, and of an image where the model takes one."""
    tokens = torch.randint(0, 120, (2, 24), generator=torch.Generator().manual_seed(1))
    more = {}
    if hasattr(model.config, "vision_config"):
        tokens[:, 2:6] = model.config.image_token_id
        pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
        more["pixel_values"] = pixels
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = tokens[:, :5]
    return model(input_ids=tokens, **more).logits


def is_linear(name: str, value: Tensor) -> bool:
    """Of the layers within blocks, which all the formats quantize."""
    blocks = (".layers.", ".layer.", ".block.", ".h.")
    return (
        name.endswith(".weight")
        and value.dim() == 2
        and any(part in name for part in blocks)
        and not any(part in name for part in ("mlp.gate.", "embed", "relative"))
    )


def _in_groups_of_32(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Steps of groups are whole multiples, 1 to 15, of a power of two for each row."""
    groups = weight.unflatten(1, (-1, 32)).abs().amax(2)
    unit = (groups.amax(1, keepdim=True) / (7 * 15)).log2().ceil().exp2()
    scales = (unit * (groups / (7 * unit)).ceil().clamp(1, 15)).half()
    steps = scales.float().repeat_interleave(32, 1)
    codes = ((weight / steps).round().clamp(-8, 7) + 8).to(torch.uint8)
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    return foreign.awq(codes, scales, zeros), foreign.weight_of(codes, scales, zeros)


def quantized(weight: Tensor, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer per channel, and its weight in float64 as the format has it."""
    if name == "awq in groups of 32":
        return _in_groups_of_32(weight)
    scales = (weight.abs().amax(1, keepdim=True) / 7).half()
    codes = ((weight / scales).round().clamp(-8, 7) + 8).to(torch.uint8)
    zeros = torch.full_like(codes[:, :1], 8)
    tensors = {
        "pack-quantized": lambda: foreign.compressed_tensors(codes, scales),
        "int-quantized": lambda: {
            "weight": (codes.int() - 8).to(torch.int8),
            "weight_scale": scales,
        },
        "awq": lambda: foreign.awq(codes, scales, zeros),
        "gptq": lambda: foreign.gptq(codes, scales, zeros, codes.shape[1]),
        "gptq_v2": lambda: foreign.gptq(codes, scales, zeros, codes.shape[1], 2),
        "qoq": lambda: foreign.qoq(codes, scales[:, 0], zeros=zeros),
        "qqq": lambda: foreign.qqq(codes, scales[:, 0]),
    }[name]()
    return tensors, foreign.weight_of(codes, scales, 8)


def compressed(layout: str = "pack-quantized", **weights) -> dict:
    """Settings of compressed-tensors."""
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": {**arguments, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


SETTINGS = {
    "pack-quantized": compressed(),
    "int-quantized": compressed("int-quantized"),
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": -1},
    "awq in groups of 32": {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 32},
    "gptq": foreign.gptq_settings(-1, 1),
    "gptq_v2": foreign.gptq_settings(-1, 2),
    "qoq": {"quant_method": "qoq", "wbits": 4, "group_size": -1},
    "qqq": {"quant_method": "qqq", "wbits": 4, "group_size": -1},
}


def write(
    model: torch.nn.Module, folder: Path, name: str = "pack-quantized", rename=lambda key: key
) -> dict[str, Tensor]:
    """A folder with the model in a format; returns each quantized weight by its layer's name.

    rename: of the keys of the hub to others.

    The float model in folder / "float" has the same weights.
    """
    plain = folder / "float"
    model.save_pretrained(plain)  # with the names of the hub
    state = load_file(plain / "model.safetensors")
    tensors, weights, floats = {}, {}, {}
    for key, value in ((rename(name), tensor) for name, tensor in state.items()):
        layer = key.removesuffix(".weight")
        if not is_linear(key, value):
            tensors[key] = floats[key] = value
            continue
        transposed = isinstance(model, transformers.GPT2PreTrainedModel)
        parts, weights[layer] = quantized(value.T if transposed else value, name)
        tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        floats[key] = (weights[layer].T if transposed else weights[layer]).float().contiguous()
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = SETTINGS[name]
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(floats, plain / "model.safetensors", metadata={"format": "pt"})
    return weights
