"""Import quantized checkpoints of other projects: `checkpoint` reads folders, `gguf` files.

Both have the names and tensors of a checkpoint, its quantized layers and their weights; the way to
our grid (`source`) and the folder that is written are common.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._files import check_new_folder, new_folder, path_of
from ..formats.liquidquant import FINE_GROUP, GROUP
from ..ops import FLOATS
from ..weights.weight import QuantizedWeight
from .architecture import Architecture
from .checkpoint import FORMATS, FolderCheckpoint, layers_of
from .experts import Place, prefix_of, stacks
from .folder import ShardWriter
from .gguf import GgufFile
from .source import AnyWeight, fit, is_finer

__all__ = ["FORMATS", "ImportReport", "ImportedLayer", "import_checkpoint", "layers_of"]

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
    source: str | os.PathLike,
    output: str | os.PathLike,
    progress: bool = True,
    fine_bits: int | None = None,
) -> ImportReport:
    """Convert a checkpoint of another project to one of ours.

    Reads compressed-tensors (``pack-quantized`` and ``int-quantized``), AutoAWQ (``gemm``), GPTQ
    (versions 1 and 2), QoQ as of QServe, and QQQ, of 4 bits in groups or per channel;
    compressed-tensors of 8 bits per channel, MXFP4 and NVFP4, too; MXFP4 as of gpt-oss;
    bitsandbytes of 4 bits (NF4, FP4); and GGUF files of decoders (Llama, Mistral, Qwen2 and Qwen3)
    of every type that the package gguf can expand, such as Q4_0, Q4_K, Q6_K and Q8_0.

    Weights whose grid is one of ours (QoQ, QQQ with integer group scales, all that is scaled per
    channel) keep every value. Scales of groups that are floats have to become integer multiples of
    one scale per row. Groups of 32 columns stay so, with 4.5 bits in place of 4.25. Groups of 16,
    and all that is no integer code times a step (GGUF, bitsandbytes, MXFP4, NVFP4) get 8 bits with
    one scale per row, or 4 bits that are searched anew. In 8 bits, rows of MXFP4 whose exponents
    span 3 or less keep every value. The report has what each layer loses. Experts, of 4 bits, one
    by one or stacked along a first axis, become the `LiquidExperts` of their layer where the model
    keeps experts in stacked parameters; all of a layer or none. Those in groups finer than 64 get
    4 bits that are searched anew, since experts have no form of 8 bits and no finer groups. The
    report names experts that stay in float.

    The output can be loaded by `load_quantized` and by ``from_pretrained`` of transformers: it is
    loaded once as the model that config.json names, where transformers has it; the report says so.
    It appears when it is complete, or not at all.

    Args:
        source: a folder with ``config.json`` and ``*.safetensors`` (or ``pytorch_model*.bin``;
            where there is an index, the files that it names), or a GGUF file.
        output: the folder to create.
        progress: show a progress bar.
        fine_bits: of layers whose groups are finer than 64 columns: 8, or 4, which loses about as
            much again as the source's own 4 bits. None: 4 where they are of 32 columns and can stay
            so, else 8.

    Raises:
        FileNotFoundError: the source or a file of it is missing.
        OSError: reading or writing fails otherwise.
        FileExistsError: output is there and not empty, or inside of the source.
        ValueError: the checkpoint is damaged, in no format above, has a setting whose meaning is
            not known, something that our format cannot hold (columns out of order, transforms of
            activations), or does not load as the model that it is for. The message names the layer
            and the tensor, or the setting. Or fine_bits is none of those.
        ImportError: a GGUF file needs the package gguf, and transformers.
    """
    if fine_bits not in (None, 8, 4) or isinstance(fine_bits, bool):
        raise ValueError(f"fine_bits: expected 8, 4 or None, got {fine_bits!r}")
    source, output = path_of(source), path_of(output)
    check_new_folder(output, source)
    with tqdm(desc="reading", unit="layer", disable=not progress) as bar:
        return _import(source, output, fine_bits, bar)


def _import(source: Path, output: Path, fine_bits: int | None, bar: tqdm) -> ImportReport:
    checkpoint = GgufFile(source) if source.is_file() else FolderCheckpoint(source)
    architecture = Architecture(source, checkpoint.config)
    layers = checkpoint.layers(architecture)
    imported, names, notes = [], {}, list(checkpoint.notes)
    fine_groups: dict[str, int] = {}
    finest = GROUP if fine_bits == 8 else FINE_GROUP
    bar.reset(len(layers))
    with new_folder(output, source) as staging:
        writer = ShardWriter(staging)
        taken = {f"{layer.name}.{key}" for layer in layers for key in layer.keys}
        for key in checkpoint.names():
            if key not in taken:
                writer.add(key, _in_float(key, checkpoint[key]))
        places = architecture.places
        bar.set_description("importing")
        for layer in (layer for layer in layers if layer.name not in places):
            bar.update()
            try:
                weight = checkpoint.read(layer)
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
                quantized, error = fit(weight, fine_bits or 8, finest)
            except ValueError as problem:
                raise ValueError(f"{layer.name}: {problem}") from None
            for key, tensor in _tensors(quantized, bias):
                writer.add(f"{layer.name}.{key}", tensor)
            imported.append(ImportedLayer(layer.name, n, k, _group(weight), error))
            names[layer.module] = quantized.augment
            if quantized.group_size != GROUP:
                fine_groups[layer.module] = quantized.group_size
        by_name = {layer.name: layer for layer in layers}

        def read(name: str) -> tuple[QuantizedWeight, Tensor | None]:
            bar.update()
            try:
                weight = checkpoint.read(by_name[name])
                quantized, error = fit(weight, 4, GROUP)
            except ValueError as problem:
                raise ValueError(f"{name}: {problem}") from None
            if fine_bits != 4 and is_finer(weight, GROUP):
                notes.append(
                    f"{prefix_of(name)}: 4 bits searched anew, since its groups are finer than 64 "
                    "columns and experts have no form of 8 bits, and no finer groups"
                )
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
        notes += [
            f"{owner}: {layout.num_experts} experts in float, as in the source"
            for owner, layout in architecture.experts.items()
            if owner not in experts
        ]
        if not imported:
            raise ValueError(f"weights: expected quantized layers, got none: {'; '.join(notes)}")
        writer.close()
        if left := checkpoint.copy_other_files(staging):
            notes.append(f"left out: {', '.join(left)}")
        config = dict(checkpoint.config)
        config["quantization_config"] = {
            "quant_method": "liquidgemm",
            "format_version": 3 if fine_groups else 2 if experts else 1,
            "config": None,
            "layers": names,
            **({"experts": experts} if experts else {}),
            **({"group_sizes": fine_groups} if fine_groups else {}),
        }
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        bar.set_description("loading the result once")
        loaded_as = architecture.try_loading(staging)
        notes += [layer.settings.note for layer in layers if layer.settings.note]
        unique = tuple(dict.fromkeys(notes))
        report = ImportReport(checkpoint.format, tuple(imported), loaded_as, unique)
        (staging / REPORT_FILE).write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


def _group(weight: AnyWeight) -> int:
    return -1 if weight.span >= weight.shape[1] else weight.span


def _by_experts(places: dict[str, Place]) -> dict[str, dict[tuple[int, str], str]]:
    """By name of the experts in the model, the names in the checkpoint by number and part."""
    found: dict[str, dict[tuple[int, str], str]] = {}
    for name, place in places.items():
        found.setdefault(place.experts, {})[place.number, place.part] = name
    return found


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
