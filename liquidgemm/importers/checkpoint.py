"""A model folder of another project: which format it is, its layers, and their weights.

A format is a module with

- ``MARKS``: names of tensors by which a layer is known to be quantized;
- ``SYNONYMS`` and ``HARMLESS``: other names of settings, and settings that change nothing;
- ``scheme(settings)``: what the settings say of each layer;
- ``names(layer)``: the tensors that a layer of such settings must have, and may have;
- ``read(tensors, layer)``: the weight as a `SourceWeight`, `ByteWeight` or `FineWeight`.

The rest is common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from torch import Tensor

from . import awq, bitsandbytes, compressed_tensors, gptq, mxfp4, qoq, qqq
from .architecture import Architecture
from .folder import SETTINGS_FILES, Source, copy_other_files, read_json
from .settings import LayerScheme, Settings, SourceLayer, merged
from .source import AnyWeight
from .stacked import Unstacked

FORMATS: dict[str, ModuleType] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gptq": gptq,
    "qoq": qoq,
    "qqq": qqq,
    "bitsandbytes": bitsandbytes,
    "mxfp4": mxfp4,
}


class FolderCheckpoint:
    """``config.json`` and weights, in one of the `FORMATS`.

    Attributes:
        format: its name.
        config: the content of config.json, without the settings of the quantization.
        notes: what was left out, and what is not carried over.

    Raises:
        FileNotFoundError, ValueError: as `import_checkpoint`.
    """

    def __init__(self, directory: Path) -> None:
        self.config = read_json(directory / "config.json")
        files = _settings_by_file(directory, self.config)
        self._directory = directory
        source = Source(directory)
        self.format, self._module = _format(files, source.names())
        self._source = Unstacked(source, self._module.MARKS)
        settings = merged(files, self._module.SYNONYMS, self._module.HARMLESS)
        settings.pop("quant_method", None)
        self._settings = settings
        self.notes = list(source.notes)

    def names(self) -> list[str]:
        return self._source.names()

    def __getitem__(self, name: str) -> Tensor:
        return self._source[name]

    def layers(self, architecture: Architecture) -> list[SourceLayer]:
        scheme = self._module.scheme(Settings(self._settings))
        return layers_of(self._module, self.names(), scheme, architecture.module_of)

    def read(self, layer: SourceLayer) -> AnyWeight:
        tensors = {key: self._source[f"{layer.name}.{key}"] for key in layer.keys}
        return self._module.read(tensors, layer.settings)

    def copy_other_files(self, staging: Path) -> list[str]:
        return copy_other_files(self._directory, staging)


def _settings_by_file(directory: Path, config: dict) -> dict[str, dict]:
    """How the source says that it is quantized, by file; removed from the config."""
    found: dict[str, object] = dict(_pop_settings(config, "config.json"))
    for file in SETTINGS_FILES:
        if (directory / file).exists():
            found[file] = read_json(directory / file)
    objects: dict[str, dict] = {}
    for file, settings in found.items():
        if not isinstance(settings, dict):
            raise ValueError(f"{file}: expected an object, got {type(settings).__name__}")
        if settings:
            objects[file] = settings
    return objects


def _pop_settings(config: dict, path: str) -> Iterator[tuple[str, object]]:
    """Those of the whole model, and of its parts: of a text_config, for one."""
    for key, value in list(config.items()):
        if key in ("quantization_config", "compression_config"):
            del config[key]
            if value is not None:
                yield f"{path}: {key}", value
        elif isinstance(value, dict):
            yield from _pop_settings(value, f"{path}: {key}")


def _format(files: dict[str, dict], names: list[str]) -> tuple[str, ModuleType]:
    said = {f: m for f, s in files.items() if (m := s.get("quant_method")) is not None}
    methods = [m.lower() if isinstance(m, str) else m for m in said.values()]
    if any(method != methods[0] for method in methods):
        raise ValueError(f"quant_method: expected one, got {said}")
    method = methods[0] if methods else None
    if method is None:  # QServe writes none; QQQ, AutoAWQ and AutoGPTQ have not always done so
        ends = {name.rpartition(".")[2] for name in names}
        keys = {key for settings in files.values() for key in settings}
        unmistakable = (
            ("compressed-tensors", ends >= {"weight_packed", "weight_scale"}),
            ("qoq", ends >= qoq.MARKS),
            ("qqq", ends >= {"B", "s_channel"}),
            ("awq", ends >= awq.MARKS and bool(keys & {"zero_point", "w_bit", "q_group_size"})),
            ("gptq", ends >= gptq.MARKS and bool(keys & {"desc_act", "sym", "bits"})),
        )
        method = next((method for method, is_so in unmistakable if is_so), None)
        if method is None and ends >= awq.MARKS:
            raise ValueError(
                "quant_method: expected settings that tell AutoAWQ from GPTQ, got none in "
                f"{', '.join(files or ('config.json', *SETTINGS_FILES))}"
            )
    if not isinstance(method, str) or method not in FORMATS:
        nothing = f"none in {', '.join(files)}" if files else "no quantization"
        raise ValueError(
            f"quant_method: expected one of {', '.join(FORMATS)}, got "
            f"{nothing if method is None else repr(method)}"
        )
    return method, FORMATS[method]


def layers_of(
    module: ModuleType,
    names: list[str],
    scheme: LayerScheme,
    module_of: Callable[[str], str] = str,
) -> list[SourceLayer]:
    """Every quantized layer.

    Args:
        module: the format.
        names: of all tensors of the checkpoint.
        module_of: the name in the model by that in the checkpoint.

    Raises:
        ValueError: a layer lacks a tensor, has one more, or is not what the settings say.
    """
    by_layer: dict[str, list[str]] = {}
    for name in names:
        layer, key = _parts(name)
        by_layer.setdefault(layer, []).append(key)
    layers = []
    for name, keys in by_layer.items():
        if not module.MARKS & set(keys):
            continue
        if not name:
            raise ValueError(f"{keys[0]}: expected a tensor of a layer, got one without its name")
        in_model = module_of(name)
        settings = scheme(name, in_model)
        required, optional = module.names(settings)
        if missing := sorted(required - set(keys)):
            raise ValueError(f"{name}.{missing[0]}: missing beside {name}.{keys[0]}")
        if unknown := sorted(set(keys) - required - optional):
            raise ValueError(
                f"{name}.{unknown[0]}: expected nothing but "
                f"{', '.join(sorted(required | optional))}"
            )
        layers.append(SourceLayer(name, in_model, tuple(keys), settings))
    if not layers:
        raise ValueError(
            f"weights: expected layers with {' or '.join(sorted(module.MARKS))}, got none"
        )
    return layers


def _parts(name: str) -> tuple[str, str]:
    """A layer's name and the rest, which begins with "weight." where that is no tensor itself."""
    layer, found, key = name.partition(".weight.")
    if found:
        return layer, f"weight.{key}"
    layer, _, key = name.rpartition(".")
    return layer, key
