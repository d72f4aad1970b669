"""GGUF files of llama.cpp (ggml-org/llama.cpp): settings, tokenizer and weights in one file.

A quantized tensor is blocks of 32 or 256 columns with scales of their own, 16-bit floats that most
types multiply by small integers for 16 or 32 columns. No type keeps its codes here, also not those
of 4 bits in groups of 32: `gguf.quants.dequantize` expands them, one tensor at a time.

llama.cpp pairs the rows of queries and keys for its rotary embedding where transformers has them
in halves, for the architecture "llama" alone: they are put back.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .architecture import Architecture, quiet
from .settings import LayerSettings, SourceLayer
from .wide import FineWeight

if TYPE_CHECKING:
    import gguf

# By its architecture: the class of transformers, and whether rows of queries and keys are in pairs.
_CLASSES = {
    "llama": ("LlamaForCausalLM", True),
    "qwen2": ("Qwen2ForCausalLM", False),
    "qwen3": ("Qwen3ForCausalLM", False),
}
# Our names for the settings of the architecture.
_SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_OPTIONAL_SETTINGS = frozenset(
    {"attention.head_count_kv", "attention.key_length", "rope.freq_base", "vocab_size"}
)
_HEAD_DIMS = ("rope.dimension_count", "attention.value_length")
_OF_THE_FILE = re.compile(r"(GGUF|general|tokenizer|quantize|split)\.")
_TOKENS = {f"{kind}_token_id": f"tokenizer.ggml.{kind}_token_id" for kind in ("bos", "eos")}
_TOKENS["pad_token_id"] = "tokenizer.ggml.padding_token_id"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
_FREQUENCIES = "rope_freqs.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")


class GgufFile:
    """A model in a GGUF file, with the names of transformers.

    Args:
        path: the file; one of several that hold a model together is refused.

    Attributes:
        config: as of a config.json.
        notes: what was not carried over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of a kind that is not understood; the message names the
            setting or the tensor.
        ImportError: the package gguf is not installed.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ImportError(f"{path}: needs the package gguf: pip install gguf") from error
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path}: expected a folder or a GGUF file, got another file")
        try:
            reader = gguf.GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # whatever a damaged file makes of the reader
            raise ValueError(f"{path}: truncated or damaged ({error})") from None
        self._path = path
        self.notes: list[str] = []
        architecture = fields.get("general.architecture")
        if architecture not in _CLASSES:
            raise ValueError(
                f"general.architecture: expected one of {', '.join(_CLASSES)}, got "
                f"{architecture!r}: import another form of the model's checkpoint"
            )
        if fields.get("split.count", 1) not in (0, 1):
            raise ValueError(
                f"split.count: expected a model in one file, got {fields['split.count']}: join "
                "them by llama-gguf-split --merge"
            )
        name, self._in_pairs = _CLASSES[architecture]
        self._tensors: dict[str, gguf.ReaderTensor] = {}
        frequencies = None
        for tensor in reader.tensors:
            if tensor.name == _FREQUENCIES:
                frequencies = self._expand(tensor)
                continue
            key = _name_of(tensor.name)
            if key in self._tensors:
                raise ValueError(f"{tensor.name}: expected each tensor once, got it twice")
            self._tensors[key] = tensor
        self.config = {
            "architectures": [name],
            "model_type": architecture,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",  # as transformers 4 calls it
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **_config(architecture, fields),
        }
        self._complete_config()
        if frequencies is not None:
            self.config["rope_scaling"] = _rope_scaling(frequencies, self.config)

    def _complete_config(self) -> None:
        config = self.config
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise ValueError("token_embd.weight: expected an embedding, got none")
        config.setdefault("vocab_size", int(embedding.shape[1]))
        biases = [f"model.layers.0.self_attn.{x}_proj.bias" for x in "qkvo"]
        if config["model_type"] != "qwen2":
            config["attention_bias"] = any(bias in self._tensors for bias in biases)

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor in the order of transformers; expanded ones as bfloat16."""
        tensor = self._tensors[name]
        values = self._values(name)
        return values if tensor.tensor_type.name in _FLOATS else values.bfloat16()

    def _values(self, name: str) -> Tensor:
        values = self._expand(self._tensors[name])
        part = re.search(r"\.([qk])_proj\.(weight|bias)$", name)
        if part and self._in_pairs:
            kind = "attention" if part[1] == "q" else "key_value"
            heads = self.config[f"num_{kind}_heads"]
            if len(values) % (2 * heads):
                raise ValueError(f"{name}: expected rows for {heads} heads, got {len(values)}")
            values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return values

    @staticmethod
    def _expand(tensor: gguf.ReaderTensor) -> Tensor:
        from gguf.quants import dequantize

        kind = tensor.tensor_type.name
        try:
            if kind in ("F64", "F32", "F16"):
                values = torch.from_numpy(tensor.data.copy())
            elif kind == "BF16":
                values = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16)
            else:
                values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        except (NotImplementedError, KeyError):
            raise ValueError(f"{tensor.name}: expected a type known to gguf, got {kind}") from None
        shape = [int(size) for size in reversed(tensor.shape)]
        if list(values.shape) != shape:
            raise ValueError(f"{tensor.name}: expected shape {shape}, got {list(values.shape)}")
        if not values.isfinite().all():
            raise ValueError(f"{tensor.name}: expected finite values, got a NaN or an infinity")
        return values

    def layers(self, architecture: Architecture) -> list[SourceLayer]:
        """The linear layers with quantized weights."""
        found = []
        for key, tensor in self._tensors.items():
            name, _, what = key.rpartition(".")
            kind = tensor.tensor_type.name
            if what != "weight" or kind in _FLOATS or len(tensor.shape) != 2:
                continue
            if name == "model.embed_tokens":
                self.notes.append(f"{name}: {kind}, expanded to bfloat16")
                continue
            if "_norm" in name:
                raise ValueError(f"{key}: expected floats, got {kind}")
            keys = ("weight", "bias") if f"{name}.bias" in self._tensors else ("weight",)
            module = architecture.module_of(name)
            found.append(SourceLayer(name, module, keys, LayerSettings(kind)))
        return found

    def read(self, layer: SourceLayer) -> FineWeight:
        weight = self._values(f"{layer.name}.weight")
        bias = self._values(f"{layer.name}.bias") if "bias" in layer.keys else None
        return FineWeight(weight, _span_of(layer.settings.layout), bias)

    def copy_other_files(self, staging: Path) -> list[str]:
        """Writes the tokenizer, if transformers can make it; what is left goes to the notes."""
        try:
            import transformers

            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    self._path.parent, gguf_file=self._path.name
                )
                tokenizer.save_pretrained(staging)
        except Exception as error:  # transformers raises whatever a field leads to
            return [f"the tokenizer ({type(error).__name__}: {error}): take the original model's"]
        return []


def _span_of(kind: str) -> int:
    """Columns that share a scale."""
    return 16 if kind in ("Q2_K", "Q3_K", "Q6_K", "NVFP4") else 32


def _name_of(name: str) -> str:
    stem, _, what = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if what in ("weight", "bias"):
        if stem in _NAMES:
            return f"{_NAMES[stem]}.{what}"
        if block and block[2] in _PARTS:
            return f"model.layers.{int(block[1])}.{_PARTS[block[2]]}.{what}"
    raise ValueError(
        f"{name}: expected a tensor of a decoder without experts (blk.N.attn_q and the like), got "
        "one whose meaning is not known"
    )


def _config(architecture: str, fields: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{architecture}."
    own = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    config = {_SETTINGS[key]: own.pop(key) for key in list(own) if key in _SETTINGS}
    missing = [
        key
        for key, ours in _SETTINGS.items()
        if ours not in config and key not in _OPTIONAL_SETTINGS
    ]
    if missing:
        raise ValueError(f"{prefix}{missing[0]}: expected a number, got none")
    for key, value in config.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{prefix}: expected one positive number for {key}, got {value!r}")
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("rope_theta", 10000.0)
    config.setdefault("head_dim", config["hidden_size"] // heads)
    for key in _HEAD_DIMS:
        if own.pop(key, config["head_dim"]) != config["head_dim"]:
            raise ValueError(
                f"{prefix}{key}: expected {config['head_dim']}, the size of a head, got "
                f"{fields[prefix + key]}"
            )
    if own.get("rope.scaling.type") == "none":
        own.pop("rope.scaling.type")
    left = [f"{prefix}{key}" for key in own]
    left += [k for k in fields if not k.startswith(prefix) and not _OF_THE_FILE.match(k)]
    if left:
        value = f"{fields[left[0]]!r:.80}"
        raise ValueError(f"{left[0]}: expected settings whose meaning is known, got {value}")
    for ours, key in _TOKENS.items():
        if key in fields:
            config[ours] = fields[key]
    return config


def _rope_scaling(frequencies: Tensor, config: dict[str, Any]) -> dict[str, Any]:
    """The "llama3" scaling whose divisors of the rotary frequencies the file holds.

    Raises:
        ValueError: they are those of none that is in use.
    """
    half = config["head_dim"] // 2
    turns = config["rope_theta"] ** (torch.arange(half, dtype=torch.float64) / -half)
    wavelength = 2 * torch.pi / turns
    original, low, high = 8192, 1.0, 4.0
    for factor in (8.0, 16.0, 32.0):
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        divisors = 1 / ((1 - smooth) / factor + smooth)
        if frequencies.shape == divisors.shape and torch.allclose(
            frequencies.double(), divisors, rtol=1e-4
        ):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(
        f"{_FREQUENCIES}: expected the divisors of a Llama 3 (factor 8, 16 or 32), got others"
    )
