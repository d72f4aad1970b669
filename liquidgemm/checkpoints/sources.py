"""Where models and texts come from: folders, GGUF files and hub names; text files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._pretrained import is_quantized
from .checkpoint import MANIFEST_FILE, load_quantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of transformers in eval mode, and its tokenizer.

    Args:
        source: a folder of `save_quantized` or of transformers, a GGUF file, or the name of a
            model on the Hugging Face hub.
        device: where to put it.
        dtype: of its floats; None for bfloat16 on a GPU, float32 elsewhere. A quantized
            checkpoint keeps its own.

    Raises:
        ValueError, FileNotFoundError: there is no such model, it is damaged or incomplete,
            transformers does not know it, it has no tokenizer, or a package that loads it is
            missing.
    """
    path = Path(source)
    packages = ["transformers", *(["gguf", "accelerate"] if path.suffix == ".gguf" else [])]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{source}: needs {' and '.join(missing)}: pip install 'liquidgemm[demo]'")
    _check_is_there(source)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # If everything is there, transformers must not look for more of it on a hub.
    options: dict[str, Any] = {"local_files_only": path.exists()}
    folder: str | Path = source
    is_gguf = path.suffix == ".gguf"
    if is_gguf:
        folder, options["gguf_file"] = path.parent, path.name
    else:
        kinds = "a folder with a model, a GGUF file or a model on the hub"
        with _explaining(f"{source}: expected {kinds}"):
            config = AutoConfig.from_pretrained(folder, **options)
    with _explaining(f"{source}: expected a tokenizer that transformers can load"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if path.is_dir() and ((path / MANIFEST_FILE).exists() or is_quantized(config.to_dict())):
        return load_quantized(path).to(device), tokenizer
    model_class = AutoModelForCausalLM if is_gguf else _class_of(config, source)
    with _explaining(f"{source}: expected weights that transformers can load"):
        model, found = model_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **options
        )
    # They would be random numbers.
    if not is_gguf and (lost := sorted(found["missing_keys"])):
        raise ValueError(f"{source}: {len(lost)} tensors are missing, {lost[0]} among them")
    return model.to(device).eval(), tokenizer


def _check_is_there(source: str) -> None:
    """Raises a FileNotFoundError if a source on the disk, which is no hub's name, is not there."""
    path = Path(source)
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", MANIFEST_FILE)):
            raise FileNotFoundError(
                f"{source}: expected a model's folder, got no config.json in it"
            )
    elif path.exists() and path.suffix != ".gguf":
        raise ValueError(f"{source}: expected a model folder or a GGUF file, got another file")
    elif not path.exists():
        on_disk = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
        if on_disk or path.suffix == ".gguf":
            raise FileNotFoundError(f"{source}: no such file or folder")


def _class_of(config: PretrainedConfig, source: str) -> type[PreTrainedModel]:
    """The class that the model was saved from."""
    import transformers

    names = config.architectures or []
    if not names:
        return transformers.AutoModelForCausalLM
    model_class = getattr(transformers, names[0], None)
    if not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        raise ValueError(
            f"{source}: transformers {transformers.__version__} has no model {names[0]}: load it "
            "yourself and call liquidgemm.quantize_"
        )
    return model_class


@contextmanager
def _explaining(expected: str) -> Iterator[None]:
    """Errors of transformers and what it calls, of whatever class, as a ValueError that says what
    was expected."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{error}" if isinstance(error, OSError | ValueError) else repr(error)
        raise ValueError(f"{expected}: {reason}") from error


def folders_of(source: str) -> list[Path]:
    """Where a model is read from, in which nothing may be written: its folder, and the cache of
    the hub."""
    found = [Path(source)] if Path(source).is_dir() else []
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import constants

        found.append(Path(constants.HF_HUB_CACHE))
    return found


def check_vocabulary(batches: Iterable[Tensor], model: PreTrainedModel) -> None:
    """Raises a ValueError if a token has no embedding: the tokenizer is another model's."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        largest = max((int(tokens.max()) for tokens in batches if tokens.numel()), default=0)
        if largest >= embedding.num_embeddings:
            raise ValueError(
                f"tokenizer: expected tokens below {embedding.num_embeddings}, the model's "
                f"embeddings, got {largest}: it is another model's"
            )


def read_texts(files: Iterable[str | os.PathLike]) -> list[str]:
    """Contents of UTF-8 text files.

    Raises:
        ValueError: a file is not there, empty or not UTF-8; the message names it.
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
