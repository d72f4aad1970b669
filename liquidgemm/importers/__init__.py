"""Import 4-bit checkpoints of other projects.

A format is a module with ``REQUIRED`` and ``OPTIONAL``, the names of a layer's tensors, and
``read(tensors, settings)``, which makes a `SourceWeight` of them. The rest is common.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from torch import Tensor
from tqdm.auto import tqdm

from ..weight import QuantizedWeight
from . import awq, compressed_tensors, gptq, qoq, qqq
from .folder import (
    SETTINGS_FILES,
    ShardWriter,
    Source,
    copy_other_files,
    new_folder,
    read_json,
)
from .source import fit

__all__ = ["ImportReport", "ImportedLayer", "import_checkpoint"]

FORMATS: dict[str, ModuleType] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gptq": gptq,
    "qoq": qoq,
    "qqq": qqq,
}
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
    """What `import_checkpoint` did: the source's format, and every quantized layer."""

    source: str
    layers: tuple[ImportedLayer, ...]

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
        return "\n".join(lines)


def import_checkpoint(
    directory: str | os.PathLike, output: str | os.PathLike, progress: bool = True
) -> ImportReport:
    """Convert a 4-bit checkpoint of another project to one of ours.

    Reads compressed-tensors (``pack-quantized``), AutoAWQ (``gemm``), GPTQ (versions 1 and 2), QoQ
    as of QServe, and QQQ, in groups of 64 columns or multiples of it, or per channel. Weights
    whose grid is one of ours (QoQ, QQQ with integer group scales, all that is scaled per channel)
    keep every value. Scales of groups that are floats have to become integer multiples of one
    scale per row; the report has what that costs.

    The output can be loaded by `load_quantized` and by ``from_pretrained`` of transformers. It
    appears when it is complete, or not at all.

    Args:
        directory: the source: ``config.json`` and ``*.safetensors`` (or ``pytorch_model*.bin``).
        output: the folder to create.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        FileExistsError: output is there and not empty.
        ValueError: the checkpoint is damaged, in no format above, or has something that our format
            cannot hold: groups of 32, columns out of order (desc_act), not 4 bits. The message
            names the layer and the tensor.
    """
    directory, output = Path(directory), Path(output)
    config = read_json(directory / "config.json")
    settings = _settings(directory, config)
    source = Source(directory)
    name, module = _format(settings, source.names())
    layers = _layers(module, source.names())
    if not layers:
        raise ValueError(
            f"{directory}: expected layers with {', '.join(sorted(module.REQUIRED))} as {name} has "
            "them, got none"
        )
    imported = []
    with new_folder(output) as staging:
        writer = ShardWriter(staging)
        for layer, keys in tqdm(layers.items(), "importing", unit="layer", disable=not progress):
            try:
                weight = module.read({k: source[f"{layer}.{k}"] for k in keys}, settings)
                quantized, error = fit(weight)
            except ValueError as problem:
                raise ValueError(f"{layer}: {problem}") from None
            for key, tensor in _tensors(quantized, weight.bias):
                writer.add(f"{layer}.{key}", tensor)
            n, k = weight.codes.shape
            group = -1 if weight.span >= k else weight.span
            imported.append(ImportedLayer(layer, n, k, group, error))
        taken = {f"{layer}.{key}" for layer, keys in layers.items() for key in keys}
        for key in source.names():
            if key not in taken:
                writer.add(key, source[key])
        writer.close()
        copy_other_files(directory, staging)
        report = ImportReport(name, tuple(imported))
        config["quantization_config"] = {
            "quant_method": "liquidgemm",
            "format_version": 1,
            "config": None,
            "layers": dict.fromkeys(layers, 0),
        }
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (staging / REPORT_FILE).write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


def _settings(directory: Path, config: dict) -> dict:
    """How the source says that it is quantized, removed from the config; {} if it does not."""
    settings = [config.pop(key, None) for key in ("quantization_config", "compression_config")]
    settings += [read_json(directory / f) for f in SETTINGS_FILES if (directory / f).exists()]
    found = next((s for s in settings if s), {})
    if not isinstance(found, dict):
        raise ValueError(f"quantization_config: expected an object, got {type(found).__name__}")
    return found


def _format(settings: dict, names: Iterable[str]) -> tuple[str, ModuleType]:
    method = settings.get("quant_method")
    if method is None:  # QServe writes none, and some files of QQQ and AutoGPTQ have none
        ends = {name.rpartition(".")[2] for name in names}
        unmistakable = ("compressed-tensors", "qoq", "qqq")
        method = next((m for m in unmistakable if ends >= FORMATS[m].REQUIRED), None)
        if method is None and "desc_act" in settings:
            method = "gptq"
    if not isinstance(method, str) or method not in FORMATS:
        raise ValueError(
            f"quant_method: expected one of {', '.join(FORMATS)}, got "
            f"{'no quantization' if method is None else repr(method)}"
        )
    return method, FORMATS[method]


def _layers(module: ModuleType, names: Iterable[str]) -> dict[str, list[str]]:
    """Every quantized layer with the last parts of its tensors' names."""
    by_layer: dict[str, list[str]] = {}
    for name in names:
        layer, _, key = name.rpartition(".")
        by_layer.setdefault(layer, []).append(key)
    layers = {name: keys for name, keys in by_layer.items() if module.REQUIRED & set(keys)}
    for layer, keys in layers.items():
        if missing := sorted(module.REQUIRED - set(keys)):
            raise ValueError(f"{layer}.{missing[0]}: missing beside {layer}.{keys[0]}")
        if unknown := sorted(set(keys) - module.REQUIRED - module.OPTIONAL):
            raise ValueError(
                f"{layer}.{unknown[0]}: expected nothing but "
                f"{', '.join(sorted(module.REQUIRED | module.OPTIONAL))}"
            )
    return layers


def _tensors(weight: QuantizedWeight, bias: Tensor | None) -> Iterable[tuple[str, Tensor]]:
    for key in ("qweight", "qscale", "qoffset", "scale"):
        yield key, getattr(weight, key)
    if bias is not None:
        yield "bias", bias
