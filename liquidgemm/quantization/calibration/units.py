"""A model as units: the blocks of its lists, and what lies outside them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ...nn._modules import linear_at, paths_of_modules, replace_module
from ...weights.weight import QuantizedWeight
from ..routing import is_routed
from .simulate import SimulatedLinear


class Unit:
    """A part of a model that is calibrated at once.

    Attributes:
        name: its dotted name, empty for the whole model.
        layers: full names of the layers in it that are to be quantized.
    """

    def __init__(self, name: str, layers: list[str]) -> None:
        self.name, self.layers = name, layers

    def inner(self, layer: str) -> str:
        """The name of a layer within what `copy` gives."""
        if layer == self.name:
            return "0"
        return layer.removeprefix(f"{self.name}.") if self.name else layer

    def outer(self, name: str) -> str:
        """Inverse of `inner`, for layers and parameters."""
        if self.layers == [self.name]:
            return name.replace("0", self.name, 1)
        return f"{self.name}.{name}" if self.name else name

    def shared_parameters(self, model: nn.Module) -> set[str]:
        """Names within `copy` of the parameters that modules outside of the unit have as well."""
        original = model.get_submodule(self.name)
        own = paths_of_modules(model)[original]
        outside = {
            id(parameter)
            for name, module in model.named_modules(remove_duplicate=False)
            if not any(name == path or not path or name.startswith(f"{path}.") for path in own)
            for parameter in module.parameters(recurse=False)
        }
        named = original.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if id(parameter) in outside}

    def copy(
        self,
        model: nn.Module,
        device: torch.device | str | None,
        done: Mapping[nn.Module, QuantizedWeight],
    ) -> nn.Module:
        """A float32 copy, with the layers that are done quantized: one may be in two units.

        A unit that is a linear layer comes in an ``nn.Sequential``, so that it can be replaced.
        """
        original = model.get_submodule(self.name)
        block = copy.deepcopy(original).float()
        # Arguments come from behind its own hooks, and what it gives goes to them.
        block._forward_pre_hooks.clear()
        block._forward_hooks.clear()
        if isinstance(original, nn.Linear):
            block = nn.Sequential(block)
        if device is not None:
            block.to(device)
        for path, module in original.named_modules(remove_duplicate=False):
            if module in done and path:
                linear = linear_at(block, path)
                weight = done[module].to(linear.weight.device)
                replace_module(block, path, SimulatedLinear(weight, linear.bias))
        return block


def find_units(model: nn.Module, layers: Iterable[str]) -> list[Unit]:
    """Units that hold all of the layers, in the order of the model.

    They are the entries of each ``nn.ModuleList`` (of nested ones the outermost) and, outside of
    them, the largest modules without such a list; a model without any is one unit. A list of
    experts, of which the data chooses some, is a part of the unit around it.
    """
    layers = list(layers)
    units = [Unit(name, inside) for name, inside in _partition(model, "", layers) if inside]
    return _without_duplicates(model, units)


def dissolve(model: nn.Module, unit: Unit) -> list[Unit]:
    """The units of the children of a unit, for one that is never called itself."""
    module = model.get_submodule(unit.name)
    parts = []
    for child, _ in module.named_children():
        name = f"{unit.name}.{child}" if unit.name else child
        parts += _partition(model, name, unit.layers)
    return _without_duplicates(model, [Unit(name, inside) for name, inside in parts if inside])


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the units that are entries of lists; ``[""]`` for a model without lists."""
    units = find_units(model, layers)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = [unit.name for unit in units if unit.name.rpartition(".")[0] in lists]
    return blocks or [""]


def _partition(model: nn.Module, name: str, layers: list[str]) -> list[tuple[str, list[str]]]:
    module = model.get_submodule(name)
    inside = [n for n in layers if n == name or not name or n.startswith(f"{name}.")]
    if not inside:
        return []
    is_list = isinstance(module, nn.ModuleList)
    if not is_list and not _holds_list(module, name, inside):
        return [(name, inside)]
    parts = []
    for child, entry in module.named_children():
        path = f"{name}.{child}" if name else child
        if is_list and not isinstance(entry, nn.ModuleList):
            held = [n for n in inside if n == path or n.startswith(f"{path}.")]
            parts.append((path, held))
        else:
            parts += _partition(model, path, inside)
    return parts


def _holds_list(module: nn.Module, name: str, layers: list[str]) -> bool:
    prefix = f"{name}." if name else ""
    return any(
        isinstance(child, nn.ModuleList)
        and not is_routed(module.get_submodule(path.rpartition(".")[0]), child)
        and any(layer.startswith(f"{prefix}{path}.") for layer in layers)
        for path, child in module.named_modules()
        if path
    )


def _without_duplicates(model: nn.Module, units: list[Unit]) -> list[Unit]:
    """A module in several places is one unit, under the name that comes first."""
    paths = paths_of_modules(model)
    first: dict[str, Unit] = {}
    for unit in units:
        first.setdefault(paths[model.get_submodule(unit.name)][0], unit)
    return list(first.values())
