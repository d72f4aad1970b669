"""Import 4-bit checkpoints of other projects.

A format is a module with

- ``MARKS``: names of tensors by which a layer is known to be quantized;
- ``SYNONYMS`` and ``HARMLESS``: other names of settings, and settings that change nothing;
- ``scheme(settings)``: what the settings say of each layer;
- ``names(layer)``: the tensors that a layer of such settings must have, and may have;
- ``read(tensors, layer)``: the weight as a `SourceWeight` or a `ByteWeight`.

The rest is common.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._files import check_new_folder, new_folder, path_of
from ..ops import FLOATS
from ..weights.weight import QuantizedWeight
from . import awq, compressed_tensors, gptq, qoq, qqq
from .architecture import Architecture
from .experts import Place, prefix_of, stacks
from .folder import SETTINGS_FILES, ShardWriter, Source, copy_other_files, read_json
from .settings import LayerScheme, LayerSettings, Settings, merged
from .source import ByteWeight, SourceWeight, fit

__all__ = ["ImportReport", "ImportedLayer", "import_checkpoint"]

FORMATS: dict[str, ModuleType] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gptq": gptq,
    "qoq": qoq,
    "qqq": qqq,
}
_KEPT = (*FLOATS, torch.float64)  # dtypes of weights that stay as they are
REPORT_FILE = "liquidgemm_import.json"


@dataclass(frozen=True)
class ImportedLayer:
    """One layer of an `ImportReport`.

    Attributes:
        name: of the layer in the model.
        out_features, in_features: N and K.
        group_size: columns that share a scale in the source, -1 for a whole row.
        error: ``|W' - W| / |W|`` of the imported weight W' and the source's dequantized weight W;
            0 where the source's grid is one of ours.
    """

    name: str
    out_features: int
    in_features: int
    group_size: int
    error: float


@dataclass(frozen=True)
class ImportReport:
    """What `import_checkpoint` did.

    Attributes:
        source: the source's format.
        layers: every quantized layer.
        loaded_as: the model as which the result was loaded once, or why that was not tried.
        notes: what was left out or not carried over.
    """

    source: str
    layers: tuple[ImportedLayer, ...]
    loaded_as: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        exact = sum(layer.error == 0 for layer in self.layers)
        lines = [f"{len(self.layers)} layers imported from {self.source}, {exact} without any loss"]
        lossy = sorted(self.layers, key=lambda layer: -layer.error)[: len(self.layers) - exact]
        if lossy:
            mean = sum(layer.error for layer in lossy) / len(lossy)
            lines.append(
                f"weight error of the others: {mean:.2%} on average, at most {lossy[0].error:.2%} "
                f"({lossy[0].name})"
            )
        lines.append(f"loaded as {self.loaded_as}".replace("loaded as not tried", "not tried"))
        lines += self.notes
        return "\n".join(lines)


def import_checkpoint(
    directory: str | os.PathLike, output: str | os.PathLike, progress: bool = True
) -> ImportReport:
    """Convert a checkpoint of another project to one of ours.

    Reads compressed-tensors (``pack-quantized`` and ``int-quantized``), AutoAWQ (``gemm``), GPTQ
    (versions 1 and 2), QoQ as of QServe, and QQQ, of 4 bits in groups of 64 columns or multiples
    of it, or per channel; compressed-tensors of 8 bits per channel, too. Weights whose grid is one
    of ours (QoQ, QQQ with integer group scales, all that is scaled per channel) keep every value.
    Scales of groups that are floats have to become integer multiples of one scale per row; the
    report has what that costs. Layers of single experts, of 4 bits, become the `LiquidExperts` of
    their layer where the model keeps experts in stacked parameters; all of a layer or none.

    The output can be loaded by `load_quantized` and by ``from_pretrained`` of transformers: it is
    loaded once as the model that config.json names, where transformers has it; the report says so.
    It appears when it is complete, or not at all.

    Args:
        directory: the source: ``config.json`` and ``*.safetensors`` (or ``pytorch_model*.bin``).
            Where there is an index, the files that it names.
        output: the folder to create.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        OSError: reading or writing fails otherwise.
        FileExistsError: output is there and not empty, or inside of the source.
        ValueError: the checkpoint is damaged, in no format above, has a setting whose meaning is
            not known, something that our format cannot hold (groups of 32, columns out of order,
            transforms of activations), or does not load as the model that it is for. The message
            names the layer and the tensor, or the setting.
    """
    directory, output = path_of(directory), path_of(output)
    config = read_json(directory / "config.json")
    check_new_folder(output, directory)
    files = _settings_by_file(directory, config)
    source = Source(directory)
    name, module = _format(files, source.names())
    settings = merged(files, module.SYNONYMS, module.HARMLESS)
    settings.pop("quant_method", None)
    architecture = Architecture(directory, config)
    scheme = module.scheme(Settings(settings))
    layers = layers_of(module, source.names(), scheme, architecture.module_of)
    imported, names, notes = [], {}, list(source.notes)
    with new_folder(output, directory) as staging:
        writer = ShardWriter(staging)
        taken = {f"{layer.name}.{key}" for layer in layers for key in layer.keys}
        for key in source.names():
            if key not in taken:
                writer.add(key, _in_float(key, source[key]))
        places = architecture.places
        bar = tqdm(layers, "importing", unit="layer", disable=not progress)
        for layer in (layer for layer in bar if layer.name not in places):
            try:
                weight = _read(module, source, layer)
                n, k = weight.shape
                bias = architecture.check(layer.module, n, k, weight.bias)
                if weight.bias is not None and bias is None:
                    notes.append(f"{layer.name}.bias: left out, all zeros and not in the model")
                if reader := architecture.reader(layer.module):
                    writer.add(f"{layer.name}.weight", weight.dequantize())
                    if bias is not None:
                        writer.add(f"{layer.name}.bias", bias)
                    notes.append(f"{layer.name}: in float, since {reader} reads its weight")
                    continue
                quantized, error = fit(weight)
            except ValueError as problem:
                raise ValueError(f"{layer.name}: {problem}") from None
            for key, tensor in _tensors(quantized, bias):
                writer.add(f"{layer.name}.{key}", tensor)
            imported.append(ImportedLayer(layer.name, n, k, _group(weight), error))
            names[layer.module] = quantized.augment
        by_name = {layer.name: layer for layer in layers}

        def read(name: str) -> tuple[QuantizedWeight, Tensor | None]:
            try:
                weight = _read(module, source, by_name[name])
                quantized, error = fit(weight)
            except ValueError as problem:
                raise ValueError(f"{name}: {problem}") from None
            n, k = weight.shape
            imported.append(ImportedLayer(name, n, k, _group(weight), error))
            return quantized, weight.bias

        experts = {}
        for owner, parts in _by_experts(places).items():
            layout = architecture.experts[owner]
            prefix = prefix_of(next(iter(parts.values())))
            for key, tensor in stacks(layout, parts, read):
                writer.add(f"{prefix}.{key}", tensor)
            experts[owner] = layout.sizes
        if not imported:
            raise ValueError(f"weights: expected layers of 4 bits, got none: {'; '.join(notes)}")
        writer.close()
        if left := copy_other_files(directory, staging):
            notes.append(f"left out: {', '.join(left)}")
        config["quantization_config"] = {
            "quant_method": "liquidgemm",
            "format_version": 2 if experts else 1,
            "config": None,
            "layers": names,
            **({"experts": experts} if experts else {}),
        }
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        loaded_as = architecture.try_loading(staging)
        notes += dict.fromkeys(layer.settings.note for layer in layers if layer.settings.note)
        report = ImportReport(name, tuple(imported), loaded_as, tuple(notes))
        (staging / REPORT_FILE).write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


def _read(module: ModuleType, source: Source, layer: SourceLayer) -> SourceWeight | ByteWeight:
    return module.read({k: source[f"{layer.name}.{k}"] for k in layer.keys}, layer.settings)


def _group(weight: SourceWeight | ByteWeight) -> int:
    return -1 if weight.span >= weight.shape[1] else weight.span


def _by_experts(places: dict[str, Place]) -> dict[str, dict[tuple[int, str], str]]:
    """By name of the experts in the model, the names in the checkpoint by number and part."""
    found: dict[str, dict[tuple[int, str], str]] = {}
    for name, place in places.items():
        found.setdefault(place.experts, {})[place.number, place.part] = name
    return found


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


@dataclass(frozen=True)
class SourceLayer:
    """A quantized layer: its name in the checkpoint and in the model, and its tensors' keys."""

    name: str
    module: str
    keys: tuple[str, ...]
    settings: LayerSettings


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
        layer, _, key = name.rpartition(".")
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


def _in_float(key: str, tensor: Tensor) -> Tensor:
    """A tensor that is not of a quantized layer, known not to be a weight in yet another format."""
    if key.rpartition(".")[2] not in ("weight", "bias"):
        return tensor
    if tensor.dtype not in _KEPT:
        raise ValueError(
            f"{key}: expected floats, as it is not of a layer of 4 bits, got {tensor.dtype}: it is "
            "in a format of its own"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{key}: expected finite values, got a NaN or an infinity")
    return tensor


def _tensors(weight: QuantizedWeight, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    for key in ("qweight", "qscale", "qoffset", "scale", "columns"):
        if (tensor := getattr(weight, key)) is not None:
            yield key, tensor
    if bias is not None:
        yield "bias", bias
