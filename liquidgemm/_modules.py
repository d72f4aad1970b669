"""Finding and replacing modules by name."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase

from torch import nn


def paths_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module: a module may be used in several places."""
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    return paths


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def matches(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern fits a dotted name or the end of it."""
    return fnmatchcase("." + name, "*." + pattern)


def attach(model: nn.Module) -> None:
    """Tells transformers, if the model is one of its, which layers are quantized."""
    # Absent for versions of transformers with which it does not work; that has been warned of.
    integration = sys.modules.get(f"{__package__}.integrations.transformers")
    if integration is not None and is_from_transformers(model):
        integration.attach(model)


def is_from_transformers(model: nn.Module) -> bool:
    """Without importing transformers, which is optional."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)
