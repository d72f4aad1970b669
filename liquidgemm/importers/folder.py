"""Model folders: reading tensors one at a time, and writing a new folder whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Files that say how the source was stored.
SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")

SHARD_BYTES = 5_000_000_000


class Source:
    """The tensors of a folder by name, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        files = sorted(directory.glob("*.safetensors"))
        self._tensors: dict[str, Path | Tensor] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    self._tensors.update(dict.fromkeys(handle.keys(), file))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: truncated or damaged ({error})") from None
        if not files:
            files = sorted(directory.glob("pytorch_model*.bin"))
            for file in files:
                self._tensors.update(_load_pickle(file))
        if not files:
            raise FileNotFoundError(f"{directory}: holds no *.safetensors or pytorch_model*.bin")
        self._check_complete(directory)

    def _check_complete(self, directory: Path) -> None:
        for index in sorted(directory.glob("*.index.json")):
            names = read_json(index).get("weight_map", {})
            if missing := sorted(names.keys() - self._tensors.keys()):
                raise ValueError(
                    f"{directory}: {missing[0]} is missing, though {index.name} says that it is in "
                    f"{names[missing[0]]}"
                )

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        found = self._tensors[name]
        if isinstance(found, Tensor):
            return found.clone()  # names of a pickle may share memory, which safetensors refuses
        with safe_open(found, framework="pt") as handle:
            return handle.get_tensor(name)


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file makes of the unpickler
        raise ValueError(f"{file}: truncated, damaged or not a state_dict ({error})") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file}: expected a state_dict of tensors, got {type(state).__name__}")
    return state


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file: expected a model folder") from None
    except ValueError as error:
        raise ValueError(f"{path}: truncated or damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to that becomes output when the block ends, and vanishes if it fails.

    Raises:
        FileExistsError: output exists and is not an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: expected a new or empty folder, got one with content")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def copy_other_files(directory: Path, staging: Path) -> None:
    """Tokenizer, generation settings and the like: all but weights and what described them."""
    for file in sorted(directory.iterdir()):
        described = file.name in (*SETTINGS_FILES, "config.json", "liquidgemm.json")
        if file.is_file() and not described and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, staging / file.name)


class ShardWriter:
    """Writes tensors as ``model.safetensors``, in shards with an index if they are too large."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = sum(t.nbytes for t in self._pending.values())
        if self._pending and size + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()

    def _flush(self) -> None:
        save_file(self._pending, self._shard(len(self._shards)), metadata={"format": "pt"})
        self._bytes += sum(tensor.nbytes for tensor in self._pending.values())
        self._shards.append(list(self._pending))
        self._pending = {}

    def _shard(self, index: int) -> Path:
        return self._folder / f"model-{index + 1:05}.safetensors"

    def close(self) -> None:
        self._flush()
        if len(self._shards) == 1:
            self._shard(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            name = f"model-{index + 1:05}-of-{len(self._shards):05}.safetensors"
            self._shard(index).rename(self._folder / name)
            weight_map.update(dict.fromkeys(names, name))
        content = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
