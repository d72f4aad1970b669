"""The model that a checkpoint is for, as its configuration names it.

Before anything is converted, every quantized layer is looked up in the model; afterwards the
result is loaded once.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..nn._modules import as_linear
from ..nn.float_experts import Layout, layout_of
from ..quantization.readers import weight_readers
from .experts import Place, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOADED_WHOLE_BYTES = 2_000_000_000
"""Up to this size the result is loaded with its values; a larger one on the meta device."""


class Architecture:
    """The class that ``architectures`` names, built without data, or why there is none.

    Args:
        directory: the model's folder; its config.json is read as transformers reads it.
        config: its content, without the settings of the quantization.

    Attributes:
        untried: why there is no model to try; None if there is.
        experts: how each module with experts keeps them, by its name.
        places: by name in the checkpoint, where the layers of experts that were asked for are.

    Raises:
        ValueError: the configuration does not describe such a model.
    """

    def __init__(self, directory: Path, config: dict) -> None:
        self.model: PreTrainedModel | None = None
        self._renames: tuple[list, list] | None = None
        self.experts: dict[str, Layout] = {}
        self.places: dict[str, Place] = {}
        self._class, self.untried = _class_of(config)
        if self._class is None:
            return
        import transformers

        self.name = self._class.__name__
        self._with = f"{self.name} of transformers {transformers.__version__}"
        try:
            with quiet(), torch.device("meta"):
                parsed = self._class.config_class.from_dict(copy.deepcopy(config))
                self.model = self._class(parsed)
                self.model.tie_weights()
        except Exception as error:  # transformers raises whatever a wrong value leads to
            raise ValueError(
                f"{directory / 'config.json'}: does not describe a {self.name} ({error})"
            ) from error
        self._modules = dict(self.model.named_modules(remove_duplicate=False))
        self._keys = self.model.state_dict()
        self._tied: dict[nn.Parameter, list[str]] = {}
        for key, parameter in self.model.named_parameters(remove_duplicate=False):
            self._tied.setdefault(parameter, []).append(key)
        self._readers = weight_readers(self.model)
        for name, module in self._modules.items():
            if isinstance(layout := layout_of(module), Layout):
                self.experts[name] = layout

    def module_of(self, layer: str) -> str:
        """The name in the model of a layer of the checkpoint; those of experts go to places.

        Raises:
            ValueError: there is no linear layer of that name, or its weight is another's as well.
        """
        if self.model is None:
            return layer
        key, merged = self._renamed(f"{layer}.weight")
        name = key.removesuffix(".weight")
        if not merged and as_linear(self._modules.get(name)) is not None:
            if others := [k for k in self._tied[self._modules[name].weight] if k != key]:
                raise ValueError(
                    f"{layer}: expected a weight of its own, got one that {self._with} ties to "
                    f"{others[0]}: set tie_word_embeddings to false in config.json if the "
                    "checkpoint has both"
                )
            return name
        owner = re.sub(r"(^|\.)experts\..*", r"\1experts", name)
        place = place_of(layer, owner)
        if place is not None and owner in self.experts:
            self.places[layer] = place
            return f"{owner}.{place.number}.{place.part}"
        if merged or "experts" in layer.split("."):
            raise ValueError(
                f"{layer}: expected a linear layer or an expert in {self._with}, got a part of "
                f"{key}: a layer that it computes together with others, or an expert of a kind "
                "that there is no kernel for; quantize the float model instead, which keeps those "
                "in float"
            )
        module = self._modules.get(name)
        if module is not None and _multiplies(module):
            return name
        found = "nothing" if module is None else type(module).__name__
        raise ValueError(f"{layer}: expected a linear layer in {self._with}, got {found}")

    def check(self, module: str, n: int, k: int, bias: Tensor | None) -> Tensor | None:
        """The bias that the model's layer takes: zeros are left out where it has none.

        Raises:
            ValueError: the layer is of another size, or has no bias where there is one.
        """
        if self.model is None:
            return bias
        linear = as_linear(self._modules[module]) or self._modules[module]
        rows, columns = cast(Tensor, linear.weight).shape
        if (rows, columns) != (n, k):
            raise ValueError(
                f"weight: expected {rows} x {columns} as in {self._with}, got {n} x {k}"
            )
        if bias is None or getattr(linear, "bias", None) is not None:
            return bias
        if bias.any():
            raise ValueError(f"bias: expected none in {self._with}, got one that is not zero")
        return None

    def reader(self, module: str) -> str | None:
        """The class and method that read the weight of a layer, which has to be in float then."""
        if self.model is None:
            return None
        found = self._modules[module]
        if as_linear(found) is None:
            return f"{type(found).__name__}.forward"
        return self._readers.get(found)

    def try_loading(self, folder: Path) -> str:
        """Loads the result once; returns how, for the report.

        Raises:
            ValueError: it does not load, or not every tensor finds its place.
        """
        if self._class is None:
            return f"not tried: {self.untried}"
        import transformers

        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        whole = size <= LOADED_WHOLE_BYTES
        old = int(transformers.__version__.partition(".")[0]) < 5
        if not whole and (old or importlib.util.find_spec("accelerate") is None):
            return (
                f"not tried: {size / 1e9:.1f} GB, which only transformers 5 with accelerate loads "
                "without values"
            )
        how: dict[str, Any] = {} if whole else {"device_map": {"": "meta"}}
        if old:
            how["dtype"] = torch.float32  # all that its quantizers can load
        try:
            with quiet():
                # They would be in a report that is not shown; here they are told by their names.
                _, info = self._class.from_pretrained(
                    folder, output_loading_info=True, ignore_mismatched_sizes=True, **how
                )
        except Exception as error:
            raise ValueError(f"the result does not load as {self._with}: {error}") from error
        for name, got, expected in info.get("mismatched_keys", ()):
            raise ValueError(
                f"{name}: expected shape {list(expected)} as in {self._with}, got {list(got)}"
            )
        for kind in ("missing_keys", "unexpected_keys", "error_msgs"):
            if found := sorted(map(str, info.get(kind, ()))):
                raise ValueError(
                    f"{found[0]}: expected every tensor to find its place in {self._with}, got "
                    f"{len(found)} {kind.replace('_', ' ')}"
                )
        return f"{self._with}, {'with' if whole else 'on the meta device, without'} its values"

    def _renamed(self, key: str) -> tuple[str, bool]:
        """A key of the checkpoint as from_pretrained renames it, and whether it is merged."""
        if self.model is None or key in self._keys:
            return key, False
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                rename_source_key,
            )
        except ImportError:  # transformers 4 has one table
            table = getattr(self.model, "_checkpoint_conversion_mapping", None) or {}
            for pattern, replacement in table.items():
                key, count = re.subn(pattern, replacement, key)
                if count:
                    break
            return self._with_prefix(key, self.model), False
        if self._renames is None:
            mapping = get_model_conversion_mapping(self.model)
            self._renames = (
                [entry for entry in mapping if isinstance(entry, WeightRenaming)],
                [entry for entry in mapping if isinstance(entry, WeightConverter)],
            )
        key, merged = rename_source_key(
            key, *self._renames, self.model.base_model_prefix, self._keys
        )
        return self._with_prefix(key, self.model), merged is not None

    def _with_prefix(self, key: str, model: PreTrainedModel) -> str:
        prefix = f"{model.base_model_prefix}."
        for name in (key, prefix + key, key.removeprefix(prefix)):
            if name in self._keys:
                return name
        return key


def _multiplies(module: nn.Module) -> bool:
    """Whether it has a matrix for a weight, as routers of experts have, and is no embedding."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _class_of(config: dict) -> tuple[type[PreTrainedModel] | None, str | None]:
    """The class, or why there is none."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        return None, "config.json names no architectures"
    if importlib.util.find_spec("transformers") is None:
        return None, "transformers is not installed"
    import transformers

    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return None, f"transformers {transformers.__version__} has no model {names[0]}"
    return found, None


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress and reports: what matters becomes an error."""
    from transformers.utils import logging as theirs

    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()
