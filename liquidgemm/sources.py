"""Where models and texts come from: folders, GGUF files and hub names; text files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import MANIFEST_FILE, load_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        source: a folder of `save_quantized` or of transformers, a GGUF file, or the name of a
            model on the Hugging Face hub.
        device: where to put it.
        dtype: of its floats; None for bfloat16 on a GPU, float32 elsewhere. A quantized
            checkpoint keeps its own.

    Raises:
        ValueError: there is no such model, or a package that loads it is missing.
    """
    path = Path(source)
    packages = ["transformers", *(["gguf", "accelerate"] if path.suffix == ".gguf" else [])]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{source}: needs {' and '.join(missing)}: pip install 'liquidgemm[demo]'")
    if path.exists():
        # Everything is there: transformers must not look for more of it on a hub.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device)
    if (path / MANIFEST_FILE).exists():
        return load_quantized(path).to(device), AutoTokenizer.from_pretrained(path)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options: dict[str, Any] = {}
    folder: str | Path = source
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{source}: no such file")
        folder, options = path.parent, {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except OSError as error:
        raise ValueError(
            f"{source}: expected a folder with a model, a GGUF file or a model on the hub: {error}"
        ) from error
    return model.to(device).eval(), tokenizer


def read_texts(files: Iterable[str | os.PathLike]) -> list[str]:
    """Contents of UTF-8 text files.

    Raises:
        ValueError: a file is not there, empty or not UTF-8.
    """
    texts = []
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: expected a UTF-8 text file: {error}") from None
        if not text.strip():
            raise ValueError(f"{file}: expected a text, got an empty file")
        texts.append(text)
    return texts
