"""Finished blocks on disk, so that an interrupted calibration can go on.

Where blocks are tuned, each is kept as it was before too: the gate judges both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..._files import parse_json, write_atomically, write_tensors
from ...nn._modules import replace_module
from ...weights.weight import QuantizedWeight
from ..config import LiquidConfig
from ..report import LayerReport
from .data import digest
from .simulate import SimulatedLinear

_RUN_FILE = "calibration.json"
BEFORE_TUNING = "-before-tuning"
_LOGICAL = ("qweight", "qscale", "qoffset", "scale", "columns")


class Resume:
    """A folder with one file for each finished block; nothing at all if the folder is None.

    Raises:
        ValueError: the folder holds the blocks of another run, other files, or a damaged one. A
            run is a config, calibration data, and the names of the units in their order, each with
            those of its layers.
    """

    def __init__(
        self,
        folder: Path | None,
        config: LiquidConfig,
        batches: list[Tensor | Mapping[str, Any]],
        structure: list[list[str]],
    ) -> None:
        self._folder = folder
        if folder is None:
            return
        run = {
            "config": json.loads(config.to_json()),
            "calibration": digest(batches),
            "structure": structure,
        }
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"resume: expected a folder, got the file {folder}")
        path = folder / _RUN_FILE
        if not path.exists():
            _check_empty(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: file.write_text(json.dumps(run)))
            return
        try:
            stored = dict(parse_json(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"resume: {path}: truncated or damaged ({error})") from None
        for key, value in run.items():
            if stored.get(key) != value:
                raise ValueError(
                    f"resume: {folder} holds a calibration with another {key}: "
                    "expected the same one, or an empty folder"
                )

    @staticmethod
    def _path(folder: Path, index: int, stage: str = "") -> Path:
        return folder / f"block-{index:04}{stage}.safetensors"

    def holds(self, index: int) -> bool:
        """Whether a block is finished."""
        return self._folder is not None and self._path(self._folder, index).exists()

    def save(
        self,
        index: int,
        original: nn.Module,
        block: nn.Module,
        reports: list[LayerReport],
        stage: str = "",
    ) -> None:
        """Write a block that is finished, or at an earlier stage; complete or not at all."""
        if self._folder is None:
            return
        tensors = {key: value.detach() for key, value in block.named_parameters()}
        features = {}
        for name, module in block.named_modules():
            if isinstance(module, SimulatedLinear):
                features[name] = module.in_features
                for key in _LOGICAL:
                    if (value := getattr(module.quantized, key)) is not None:
                        tensors[f"{name}.{key}"] = value
                if module.bias is not None:
                    tensors[f"{name}.bias"] = module.bias
        tensors = {key: value.cpu().clone() for key, value in tensors.items()}
        metadata = {
            "original": _digest(original),
            "features": json.dumps(features),
            "reports": json.dumps([asdict(report) for report in reports]),
        }
        path = self._path(self._folder, index, stage)
        write_atomically(path, lambda file: write_tensors(tensors, file, metadata))

    def load(
        self, index: int, original: nn.Module, block: nn.Module, stage: str = ""
    ) -> list[LayerReport] | None:
        """Bring a float block to what was saved for it; None if nothing was.

        Raises:
            ValueError: what was saved came from other weights, or is damaged.
        """
        if self._folder is None:
            return None
        path = self._path(self._folder, index, stage)
        if not path.exists():
            return None
        device = next(block.parameters()).device
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {k: file.get_tensor(k).to(device) for k in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"resume: {path}: truncated or damaged ({error})") from None
        if metadata["original"] != _digest(original):
            raise ValueError(f"resume: {path} was made from other weights")
        for name, in_features in json.loads(metadata["features"]).items():
            parts = {key: tensors.pop(f"{name}.{key}", None) for key in _LOGICAL}
            weight = QuantizedWeight(**parts, in_features=in_features)
            bias = tensors.pop(f"{name}.bias", None)
            replace_module(block, name, SimulatedLinear(weight, bias))
        parameters = dict(block.named_parameters())
        for key, value in tensors.items():
            parameters[key].copy_(value)
        return [LayerReport(**report) for report in json.loads(metadata["reports"])]


def _check_empty(folder: Path) -> None:
    """Raises a ValueError if there is something that the blocks would lie among."""
    # What begins with a point may be left of a run that was killed.
    held = sorted(file.name for file in folder.glob("[!.]*"))
    if held:
        raise ValueError(
            f"resume: {folder}: expected a new or empty folder, or one of an interrupted "
            f"calibration, got one without {_RUN_FILE} that holds {held[0]}"
        )


def _digest(block: nn.Module) -> str:
    return digest([dict(block.state_dict())])
