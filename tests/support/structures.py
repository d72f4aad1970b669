"""Tiny models of every structure that quantize_ meets, with inputs of their kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
T = transformers

IDS = torch.arange(3, 19)[None]
_SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TEXT = {"input_ids": IDS}
_WIDE = {**_SIZES, "intermediate_size": 128}
_TOKENS = {key: _SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id")}
_TOKENS |= {"eos_token_id": 2, "decoder_start_token_id": 1}


@dataclass(frozen=True)
class Structure:
    """A model, an input, and how many layers are quantized.

    Attributes:
        make: the float model.
        inputs: what it is called with.
        layers: number of quantized layers, found by counting what the architecture has.
        kept: for some layers or parameters that stay in floats, a part of the reason.
    """

    make: Callable[[], nn.Module]
    inputs: dict[str, Any]
    layers: int
    kept: dict[str, str]


def _of(model_class: str, config: Any, inputs: dict[str, Any], layers: int, **kept: str):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return getattr(T, model_class)(config).eval()

    return Structure(make, inputs, layers, {k.replace("__", "."): v for k, v in kept.items()})


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def structures() -> dict[str, Structure]:
    pixels = torch.randn(1, 3, 32, 32, generator=_generator())
    vision = {"image_size": 32, "patch_size": 8}
    encoder_decoder = {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
    }
    audio = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "conv_dim": (32, 32),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    experts = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 16}
    both = {**_TEXT, "decoder_input_ids": IDS[:, :8]}
    read = "its weight is read by"
    return {
        "T5": _of(
            "T5ForConditionalGeneration",
            T.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, **_TOKENS),
            both,
            2 * 6 + 2 * 10,
            lm_head="lm_head",
        ),
        "BART": _of(
            "BartForConditionalGeneration",
            T.BartConfig(**encoder_decoder, **_TOKENS),
            both,
            2 * 6 + 2 * 10,
        ),
        "Whisper": _of(
            "WhisperForConditionalGeneration",
            T.WhisperConfig(
                **encoder_decoder,
                **_TOKENS,
                num_mel_bins=8,
                max_source_positions=20,
                max_target_positions=20,
            ),
            {
                "input_features": torch.randn(1, 8, 40, generator=_generator()),
                "decoder_input_ids": IDS[:, :8],
            },
            2 * 6 + 2 * 10,
            proj_out="lm_head",
        ),
        "BERT, classification": _of(
            "BertForSequenceClassification", T.BertConfig(**_WIDE), _TEXT, 2 * 6 + 1
        ),
        "ViT, classification": _of(
            "ViTForImageClassification",
            T.ViTConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                **vision,
            ),
            {"pixel_values": pixels},
            2 * 6,
            classifier="lm_head",
        ),
        "CLIP": _of(
            "CLIPModel",
            T.CLIPConfig(
                text_config={**_WIDE, "max_position_embeddings": 32},
                vision_config={**_WIDE, **vision},
                projection_dim=64,
            ),
            {**_TEXT, "pixel_values": pixels},
            2 * 2 * 6 + 2,
        ),
        "LLaVA": _of(
            "LlavaForConditionalGeneration",
            T.LlavaConfig(
                text_config=T.LlamaConfig(**_WIDE),
                vision_config=T.CLIPVisionConfig(**{**_WIDE, **vision}),
                image_token_index=99,
                image_seq_length=16,
            ),
            {"input_ids": torch.cat((torch.full((1, 16), 99), IDS), 1), "pixel_values": pixels},
            2 * 6 + 2 * 7 + 2,
        ),
        "Mamba": _of(
            "MambaForCausalLM",
            T.MambaConfig(**{k: v for k, v in _SIZES.items() if "heads" not in k}, state_size=8),
            _TEXT,
            2,
            backbone__layers__0__mixer__dt_proj=read,
            backbone__layers__0__mixer__out_proj=read,
        ),
        "RWKV": _of(
            "RwkvForCausalLM",
            T.RwkvConfig(
                vocab_size=100,
                hidden_size=64,
                num_hidden_layers=2,
                attention_hidden_size=64,
                context_length=32,
                rescale_every=1,
            ),
            _TEXT,
            2 * 5,
            rwkv__blocks__0__attention__output=read,
        ),
        "BLOOM": _of(
            "BloomForCausalLM",
            T.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **_TOKENS),
            _TEXT,
            2 * 4,
        ),
        "MPT": _of(
            "MptForCausalLM",
            T.MptConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=64, **_TOKENS),
            _TEXT,
            2 * 4,
        ),
        "GPT-Neo": _of(
            "GPTNeoForCausalLM",
            T.GPTNeoConfig(
                hidden_size=64,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                max_position_embeddings=64,
                **_TOKENS,
            ),
            _TEXT,
            2 * 6,
        ),
        "GPT-2": _of(
            "GPT2LMHeadModel",
            T.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **_TOKENS),
            _TEXT,
            2 * 4,
        ),
        "Mixtral": _of(
            "MixtralForCausalLM",
            T.MixtralConfig(**_WIDE, num_local_experts=4, **experts),
            _TEXT,
            2 * 5,
        ),
        "Qwen3-MoE": _of(
            "Qwen3MoeForCausalLM",
            T.Qwen3MoeConfig(**_WIDE, moe_intermediate_size=64, num_experts=4, **experts),
            _TEXT,
            2 * 5,
        ),
        "ALBERT": _of(
            "AlbertForMaskedLM", T.AlbertConfig(**_WIDE, embedding_size=32), _TEXT, 1 + 6
        ),
        "WavLM": _of(
            "WavLMModel",
            T.WavLMConfig(**audio),
            {"input_values": torch.randn(1, 400, generator=_generator())},
            1 + 2 * 3,
            encoder__layers__0__attention__q_proj=read,
        ),
    }


class Recurrent(nn.Module):
    """An LSTM between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(48, 64), nn.Linear(64, 80)
        self.lstm = nn.LSTM(64, 64, batch_first=True)

    def forward(self, x):
        return self.after(self.lstm(self.before(x))[0])


class ExpertsInAList(nn.Module):
    """Each token goes to one of four experts; one of them gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48)) for _ in range(4)
        )

    def forward(self, x):
        out = torch.zeros_like(x)
        for index in range(3):
            out[:, index::3] = self.experts[index](x[:, index::3])
        return x + out


class Shared(nn.Module):
    """One block in three places, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU())
        self.blocks = nn.ModuleList([block, block, block])

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def encoder_of_torch() -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def plain_structures() -> dict[str, Structure]:
    def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def make_it() -> nn.Module:
            torch.manual_seed(0)
            return make().eval()

        return make_it

    x = torch.randn(2, 12, 48, generator=_generator())
    return {
        "LSTM": Structure(seeded(Recurrent), {"x": x}, 2, {"lstm": "LSTM"}),
        "experts in a list": Structure(seeded(ExpertsInAList), {"x": x}, 8, {}),
        "shared blocks": Structure(seeded(Shared), {"ids": IDS}, 1, {"head": "tied"}),
        "TransformerEncoder": Structure(seeded(encoder_of_torch), {"src": x}, 4, {}),
    }
