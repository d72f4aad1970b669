"""Tiny models of each structure, with features that are outliers, and batches that they take."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TOWERS = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}  # fmt: skip
IMAGES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
          "num_attention_heads": 4, "image_size": 32, "patch_size": 8}  # fmt: skip


def tokens(generator, *shape, low=3, high=64):
    return torch.randint(low, high, shape, generator=generator)


def whisper(T):
    config = T.WhisperConfig(
        vocab_size=64, num_mel_bins=8, max_source_positions=32, max_target_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **TOWERS,
    )  # fmt: skip
    return T.WhisperForConditionalGeneration(config), lambda g: {
        "input_features": torch.randn(2, 8, 64, generator=g),
        "decoder_input_ids": tokens(g, 2, 12),
    }


def bart(T):
    config = T.BartConfig(
        vocab_size=64, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2, **TOWERS,
    )  # fmt: skip
    return T.BartForConditionalGeneration(config), lambda g: {
        "input_ids": tokens(g, 2, 16),
        "labels": tokens(g, 2, 12),
    }


def t5(T):
    config = T.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T.T5ForConditionalGeneration(config), lambda g: {
        "input_ids": tokens(g, 2, 16),
        "labels": tokens(g, 2, 12),
    }


def bert(T):
    config = T.BertConfig(num_hidden_layers=2, max_position_embeddings=32, **TEXT)
    return T.BertModel(config), lambda g: {"input_ids": tokens(g, 2, 16)}


def bert_head(T):
    config = T.BertConfig(num_hidden_layers=2, max_position_embeddings=32, num_labels=5, **TEXT)
    return T.BertForSequenceClassification(config), lambda g: {
        "input_ids": tokens(g, 2, 16),
        "labels": tokens(g, 2, low=0, high=5),
    }


def albert(T):
    config = T.AlbertConfig(embedding_size=64, num_hidden_layers=3, **TEXT)
    return T.AlbertModel(config), lambda g: {"input_ids": tokens(g, 2, 16)}


def vit(T):
    config = T.ViTConfig(num_labels=5, **IMAGES)
    return T.ViTForImageClassification(config), lambda g: {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=g)
    }


def llava(T):
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**IMAGES),
        text_config=T.LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, **TEXT),
        image_token_index=63,
    )

    def batch(generator):
        ids = tokens(generator, 2, 24, high=60)
        ids[:, 2:18] = 63  # one for each of 4 x 4 patches
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}

    return T.LlavaForConditionalGeneration(config), batch


MODELS = {make.__name__: make for make in (whisper, bart, t5, bert, bert_head, albert, vit, llava)}


def build(name, count=8, seed=0):
    """A model with outlier features before its linear layers, and batches for it."""
    torch.manual_seed(seed)
    model, batch = MODELS[name](transformers)
    model.eval()
    for key, parameter in model.named_parameters():
        if "bias" in key:
            nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 2 and "embed" not in key:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
        if "norm" in key.lower() and key.endswith("weight"):
            parameter.data[3::16] *= 12
    generator = torch.Generator().manual_seed(seed + 1)
    return model, [batch(generator) for _ in range(count)]


@torch.no_grad()
def outputs(model, batch):
    """What a model is for: logits, or hidden states."""
    out = model(**batch)
    return out.logits if "logits" in out else out.last_hidden_state


def off(model, batches, expected):
    errors = [
        ((outputs(model, batch) - y).norm() / y.norm()).item()
        for batch, y in zip(batches, expected, strict=True)
    ]
    return sum(errors) / len(errors)
