"""Folders of ``transformers`` with quantized layers: whose the files are, and loading them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .._files import follow_umask
from ..nn._modules import attach, is_from_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST_FILE = "liquidgemm.json"
TRANSFORMERS_WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")

_OURS = ".qoffset"  # a tensor of each quantized layer that no other format has


# Whose files they are, by what is in them.


def check_replaceable(directory: Path, names: Iterable[str]) -> None:
    """Raises a FileExistsError if a file of these names is there and none of ours."""
    for name in names:
        file = directory / name
        if file.exists() and not _is_ours(file):
            raise FileExistsError(
                f"{file}: expected a folder without a model, or with a checkpoint of liquidgemm to "
                "replace, got another model's: choose another folder, nothing is overwritten"
            )


def _is_ours(file: Path) -> bool:
    if file.name.endswith(".safetensors"):
        return any(key.endswith(_OURS) for key in _keys(file))
    if file.name in CONFIG_FILES:
        return is_quantized(_read_object(file.with_name("config.json")))
    return file.name == MANIFEST_FILE


def is_quantized(config: dict) -> bool:
    """Whether a ``config.json`` says that the weights beside it are ours."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == "liquidgemm"


def shards_of_ours(directory: Path) -> list[str]:
    """The index of a checkpoint of ours that is in shards, and those; [] if there is none."""
    shards = _read_object(directory / INDEX_FILE).get("weight_map")
    if not isinstance(shards, dict) or not any(key.endswith(_OURS) for key in shards):
        return []
    names = {name for name in shards.values() if isinstance(name, str) and Path(name).name == name}
    return [INDEX_FILE, *sorted(name for name in names if (directory / name).is_file())]


@contextmanager
def finishing_save_pretrained(directory: Path) -> Iterator[None]:
    """Around save_pretrained of transformers: its files get the permissions of the umask, and
    those of an older checkpoint of ours that they make obsolete go.

    The latter would be taken for the model: transformers prefers one file to shards, and this
    package what its manifest names.
    """
    before = _states(directory)
    yield
    written = {name for name, state in _states(directory).items() if before.get(name) != state}
    follow_umask([directory / name for name in written if name.endswith(".safetensors")])
    for name in _obsolete(directory, written):
        (directory / name).unlink()


def _states(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Of each file, what changes when it is written."""
    files = directory.iterdir() if directory.is_dir() else ()
    stats = {file.name: file.stat() for file in files if file.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def _obsolete(directory: Path, written: set[str]) -> list[str]:
    single = directory / TRANSFORMERS_WEIGHTS_FILE
    if INDEX_FILE in written:
        old = [single.name] if single.exists() and _is_ours(single) else []
    elif single.name in written:
        old = shards_of_ours(directory)
    else:
        return []  # a variant, or another process's part
    if _read_object(directory / MANIFEST_FILE).get("weights") == TRANSFORMERS_WEIGHTS_FILE:
        old.append(MANIFEST_FILE)
    return [name for name in old if name not in written]


def is_latest(directory: Path, manifest: dict | None, with_model: bool) -> bool:
    """Whether save_pretrained wrote the checkpoint to load, not save_quantized.

    Raises:
        ValueError: the weights are not those of the manifest, and not quantized.
    """
    weights = directory / TRANSFORMERS_WEIGHTS_FILE
    ours = is_quantized(_read_object(directory / "config.json"))
    if manifest is None:
        return ours
    if manifest.get("weights") != TRANSFORMERS_WEIGHTS_FILE:
        return ours and not with_model and (weights.exists() or bool(_weights(directory)))
    if not weights.exists():
        return ours and bool(_weights(directory))
    keys = _keys(weights)
    if keys and not any(key.endswith(_OURS) for key in keys):
        raise ValueError(
            f"{weights}: expected the quantized weights that {MANIFEST_FILE} was saved with, got "
            "those of a float model, saved since: load it with from_pretrained"
        )
    return len(shards_of_ours(directory)) > 1


def _keys(file: Path) -> list[str]:
    """Names of the tensors; none if it is no safetensors file."""
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError):
        return []


def _read_object(file: Path) -> dict:
    """What a JSON file holds; nothing if it is not there or holds no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _weights(directory: Path) -> dict[str, str | None]:
    """Files that transformers would begin with, and what it calls the variant."""
    found: dict[str, str | None] = {}
    for name in (TRANSFORMERS_WEIGHTS_FILE, INDEX_FILE):
        if (directory / name).exists():
            found[name] = None
    for file in sorted(directory.glob("model.*.safetensors*")):
        if match := re.fullmatch(r"model\.(.+)\.safetensors(\.index\.json)?", file.name):
            found[file.name] = re.sub(r"-\d{5}-of-\d{5}$", "", match[1])
    return found


# transformers is optional: only models that come from it make this module import it.


def write_config(model: PreTrainedModel, directory: Path) -> None:
    """config.json and generation_config.json of a quantized model."""
    attach(model)  # how the float model had been stored says nothing about this one
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(directory / "generation_config.json")


def load(directory: Path, model: nn.Module | None) -> nn.Module:
    """What save_pretrained wrote, as a new model of the given one's class or the one it names.

    Raises:
        FileNotFoundError: there are no weights, or a file of them is missing.
        ValueError: the folder is damaged, incomplete or ambiguous, or not known to transformers.
    """
    if model is not None and is_from_transformers(model):
        model_class: Any = type(model)
    else:
        names = _read_object(directory / "config.json").get("architectures")
        if not (isinstance(names, list) and names and isinstance(names[0], str)):
            raise ValueError(f"{directory / 'config.json'}: expected architectures, got {names!r}")
        model_class = class_of(directory, names[0])
    variant = _variant(directory)
    try:
        loaded, found = model_class.from_pretrained(
            directory, variant=variant, local_files_only=True, output_loading_info=True
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers raises whatever a wrong value leads to
        raise ValueError(f"{directory}: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found.get(kind) or ())):
            raise ValueError(f"{directory}: {kind.replace('_', ' ')}: {', '.join(names[:3])}")
    return loaded


def check_one_checkpoint(directory: Path, files: list[str]) -> None:
    """Raises a ValueError if transformers reads one file where a newer model may be in shards."""
    if files == [TRANSFORMERS_WEIGHTS_FILE] and len(shards_of_ours(directory)) > 1:
        raise ValueError(
            f"{directory}: holds two checkpoints, {TRANSFORMERS_WEIGHTS_FILE} and the shards that "
            f"{INDEX_FILE} names: remove one"
        )


def _variant(directory: Path) -> str | None:
    """Of the one checkpoint in the folder."""
    found = _weights(directory)
    if TRANSFORMERS_WEIGHTS_FILE in found:
        check_one_checkpoint(directory, [TRANSFORMERS_WEIGHTS_FILE])
        return None
    variants = set(found.values())
    if not variants:
        raise FileNotFoundError(f"{directory}: holds no {TRANSFORMERS_WEIGHTS_FILE}")
    if None in variants:
        variant = None
    elif len(variants) == 1:
        (variant,) = variants
    else:
        raise ValueError(
            f"{directory}: holds the variants {', '.join(sorted(map(str, variants)))}: load one "
            "with from_pretrained(..., variant=)"
        )
    for name in found:
        if found[name] == variant and name.endswith(".index.json"):
            shards = _read_object(directory / name).get("weight_map")
            for shard in sorted(set(map(str, shards.values() if isinstance(shards, dict) else ()))):
                if not (directory / shard).exists():
                    raise FileNotFoundError(f"{directory / shard}: missing, though {name} names it")
    return variant


def class_of(directory: Path, class_name: str | None) -> type[PreTrainedModel]:
    """The class of transformers of this name.

    Raises:
        ValueError: there is none.
    """
    if class_name is None:
        raise ValueError(f"{directory}: not a transformers model: pass an instance as model=")
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{directory}: needs the transformers package") from None
    model_class = getattr(transformers, class_name, None)
    if not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        raise ValueError(
            f"{directory}: transformers {transformers.__version__} has no model {class_name}: "
            "pass an instance as model="
        )
    return model_class


def build(directory: Path, class_name: str | None) -> PreTrainedModel:
    """A model whose parameters are on the meta device but whose computed buffers are real."""
    model_class = class_of(directory, class_name)
    import transformers

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None):
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    file = directory / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file, though {MANIFEST_FILE} lies beside")
    try:
        config = model_class.config_class.from_pretrained(directory)
        with register_module_parameter_registration_hook(to_meta):
            model = model_class(config)
        if (directory / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    except Exception as error:  # transformers raises whatever a wrong value leads to
        raise ValueError(f"{file}: does not describe a {class_name} ({error})") from error
    return model
