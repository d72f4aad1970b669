"""Model folders: reading tensors one at a time, and writing a new folder whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._files import parse_json, write_tensors

# Files that say how the source was stored.
SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".onnx", ".h5"),
    *(".msgpack", ".ot"),
)
# The same model in the names of another library, and adapters, which are not of the model.
_NOT_OF_THE_MODEL = ("consolidated", "adapter_model")

SHARD_BYTES = 5_000_000_000


class Source:
    """The tensors of a folder by name, each read when it is asked for.

    Where there is an index, a tensor comes from the file that the index names.

    Attributes:
        notes: what was left out, and what lies beside the index.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: a file is damaged, the index names what is not there, or without an index two
            files hold a tensor of the same name.
    """

    def __init__(self, directory: Path) -> None:
        self.notes: list[str] = []
        self._tensors: dict[str, Path | Tensor] = {}
        if (directory / "adapter_config.json").exists():
            raise ValueError(
                f"{directory / 'adapter_config.json'}: expected a model, got one with an adapter: "
                "merge the adapter, or move it to a folder of its own"
            )
        files, index, read = _weights(directory)
        weight_map = None if index is None else _weight_map(index)
        if weight_map is not None:
            files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            for name, where in read(file).items():
                self._add(name, where, file, weight_map)
        if index is not None and weight_map is not None:
            self._check_complete(index, weight_map)
        left = sorted(
            file.name
            for file in directory.iterdir()
            if file.is_file() and file.name.endswith(_WEIGHTS) and file not in (*files, index)
        )
        if left:
            self.notes.append(f"left out: {', '.join(left)}")

    def _add(
        self, name: str, where: Path | Tensor, file: Path, weight_map: dict[str, str] | None
    ) -> None:
        if weight_map is not None and weight_map.get(name, file.name) != file.name:
            return
        if name in self._tensors:
            raise ValueError(
                f"{file}: expected each tensor in one file, got {name} in several, and no index "
                "that says which is right: remove the files that are not of the model"
            )
        self._tensors[name] = where

    def _check_complete(self, index: Path, weight_map: dict[str, str]) -> None:
        if missing := sorted(weight_map.keys() - self._tensors.keys()):
            raise ValueError(
                f"{index.parent}: {missing[0]} is missing, though {index.name} says that it is in "
                f"{weight_map[missing[0]]}"
            )
        if unnamed := sorted(self._tensors.keys() - weight_map.keys()):
            self.notes.append(
                f"not in {index.name}, but in the files that it names: {', '.join(unnamed[:3])}"
                + (f" and {len(unnamed) - 3} more" if len(unnamed) > 3 else "")
            )

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        found = self._tensors[name]
        if isinstance(found, Tensor):
            return found.clone()  # names of a pickle may share memory, which safetensors refuses
        with safe_open(found, framework="pt") as handle:
            return handle.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        found = self._tensors[name]
        if isinstance(found, Tensor):
            return list(found.shape)
        with safe_open(found, framework="pt") as handle:
            return handle.get_slice(name).get_shape()

    def part(self, name: str, index: int) -> Tensor:
        """One of the tensors along the first axis; no other is read."""
        found = self._tensors[name]
        if isinstance(found, Tensor):
            return found[index].clone()
        with safe_open(found, framework="pt") as handle:
            return handle.get_slice(name)[index]


def _weights(
    directory: Path,
) -> tuple[list[Path], Path | None, Callable[[Path], Mapping[str, Path | Tensor]]]:
    """The files with weights, their index if there is one, and what reads such a file."""
    readers: tuple[tuple[str, Callable[[Path], Mapping[str, Path | Tensor]]], ...] = (
        ("*.safetensors", _names_of_safetensors),
        ("pytorch_model*.bin", _load_pickle),
    )
    for pattern, read in readers:
        files, indices = (
            sorted(f for f in directory.glob(p) if not f.name.startswith(_NOT_OF_THE_MODEL))
            for p in (pattern, f"{pattern}.index.json")
        )
        if len(indices) > 1:
            names = ", ".join(index.name for index in indices)
            indices = [i for i in indices if i.name == "model.safetensors.index.json"]
            if not indices:
                raise ValueError(f"{directory}: expected one index, got {names}")
        if files or indices:
            return files, indices[0] if indices else None, read
    held = ", ".join(sorted(f.name for f in directory.iterdir() if f.name.endswith(_WEIGHTS)))
    raise FileNotFoundError(
        f"{directory}: holds no *.safetensors or pytorch_model*.bin"
        + (f", but {held}" if held else "")
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor.

    Raises:
        ValueError: it is no such index, or names a file that is not in the folder.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index}: expected a weight_map of files by tensor, got {names!r:.80}")
    for name, file in names.items():
        if Path(file).name != file:
            raise ValueError(f"{index}: expected the name of a file for {name}, got {file!r}")
        if not (index.parent / file).is_file():
            raise ValueError(
                f"{index.parent}: {name} is missing, though {index.name} says that it is in {file}"
            )
    return names


def _names_of_safetensors(file: Path) -> dict[str, Path]:
    with file.open("rb"):  # where it must not be read, safetensors says that it is not there
        pass
    try:
        with safe_open(file, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or damaged ({error})") from None


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
        content = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file: expected a model folder") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: expected a file, got a folder") from None
    except ValueError as error:
        raise ValueError(f"{path}: truncated or damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def copy_other_files(directory: Path, staging: Path) -> list[str]:
    """Tokenizer, generation settings and the like, in folders below too: all but weights and what
    described them. Returns what else was left out: weights below, links to folders, which may lead
    anywhere, and what is no file."""
    described = {*SETTINGS_FILES, "config.json", "liquidgemm.json"}
    left = []
    for path, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(path).relative_to(directory)
        left += [f"{below / name}/" for name in folders if Path(path, name).is_symlink()]
        for name in sorted(files):
            if name.endswith(_WEIGHTS):
                left += [] if below == Path() else [str(below / name)]
            elif not Path(path, name).is_file():
                left.append(str(below / name))
            elif below != Path() or name not in described:
                (staging / below).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(path, name), staging / below / name)
    return left


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
        write_tensors(self._pending, self._shard(len(self._shards)), metadata={"format": "pt"})
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
