"""Finding and replacing modules by name; linear layers whatever their class."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The second is a mark of transformers on every module that it has made.
_LINEAR_STATE = frozenset((*vars(nn.Linear(1, 1, device="meta")), "_is_hf_initialized"))
# What a subclass may define and still be the same layer.
_PLAIN = frozenset(("__annotations__", "__doc__", "__firstlineno__", "__init__", "__module__"))
_PLAIN |= frozenset(("__qualname__", "__static_attributes__", "forward", "reset_parameters"))


def paths_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module: a module may be used in several places."""
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    return paths


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The module of a path that is known to lead to a linear layer."""
    return cast(nn.Linear, model.get_submodule(path))


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a module that is known to have one, such as a norm."""
    return cast(Tensor, module.weight)


def matches(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern fits a dotted name or the end of it."""
    return fnmatchcase("." + name, "*." + pattern)


def imported(name: str) -> ModuleType | None:
    """A module of an optional library if it has been imported, without importing it."""
    return sys.modules.get(name)


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether it is ``nn.Linear``, or a subclass that shows by trial that it computes the same.

    Falcon has one. A subclass of torch's own is none: attention reads the weight of its one.
    """
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or vars(module).keys() - _LINEAR_STATE:
        return False
    kind: type = type(module)
    return _computes_linear(kind)


@functools.lru_cache(maxsize=256)
def _computes_linear(kind: type[nn.Linear]) -> bool:
    above = kind.__mro__[: kind.__mro__.index(nn.Linear)]
    if any(vars(c).keys() - _PLAIN or c.__module__.startswith("torch.") for c in above):
        return False
    cases = itertools.product((True, False), (True, False), ((5,), (4, 5), (2, 3, 5)))
    return all(_computes_linear_of(kind, *case) for case in cases)


def _computes_linear_of(
    kind: type[nn.Linear], bias: bool, training: bool, shape: tuple[int, ...]
) -> bool:
    linear = nn.Linear(5, 3, bias=bias, device="cpu", dtype=torch.float64)
    for i, parameter in enumerate(linear.parameters()):
        values = torch.arange(1.0, parameter.numel() + 1, dtype=torch.float64)
        parameter.data = torch.sin(values + i).view_as(parameter)
    x = torch.cos(torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64)).view(shape)
    with torch.no_grad():
        expected = F.linear(x, linear.weight, linear.bias)
        linear.train(training).__class__ = kind
        try:
            actual = linear(x)
        except Exception:
            return False
    return (
        isinstance(actual, torch.Tensor)
        and actual.shape == expected.shape
        and torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is ``[K, N]``: no subclass of it."""
    library = imported("transformers.pytorch_utils")
    return library is not None and type(module) is library.Conv1D


def as_linear(module: nn.Module | None) -> nn.Linear | None:
    """A linear layer as ``nn.Linear``; None if it is none.

    That is itself, or for GPT-2's Conv1D one that shares its memory, whose weight is a transposed
    view.
    """
    if isinstance(module, nn.Linear):
        return module
    if module is None or not is_conv1d(module):
        return None
    conv: Any = module
    linear = nn.Linear(conv.nx, conv.nf, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().T, conv.weight.requires_grad)
    linear.bias = conv.bias
    return linear.train(conv.training)


@contextmanager
def conv1d_as_linear(model: nn.Module) -> Iterator[None]:
    """Each Conv1D is an ``nn.Linear`` in here; those that are still there turn back afterwards."""
    paths = paths_of_modules(model)
    views = {
        module: view
        for module in paths
        if is_conv1d(module) and (view := as_linear(module)) is not None
    }

    def replace(old: nn.Module, new: nn.Module) -> None:
        for path in paths[old]:
            replace_module(model, path, new)

    for conv, view in views.items():
        replace(conv, view)
    try:
        yield
    finally:
        for conv, view in views.items():
            now: Any = model.get_submodule(paths[conv][0])
            if now is view:
                replace(conv, conv)
            else:
                now.replaces = type(conv)


def _ties(model: nn.Module) -> dict[str, str]:
    """Names of tied parameters, as a model of transformers has them; empty for others."""
    if not is_from_transformers(model) or not getattr(model.config, "tie_word_embeddings", False):
        return {}
    return getattr(model, "all_tied_weights_keys", None) or {}


def ties_besides(model: nn.Module, head: nn.Module) -> bool:
    """Whether the setting of a model of transformers that ties its head ties more than that."""
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return bool(names) and not _ties(model).keys() <= names


def untie(model: nn.Module, head: nn.Module) -> None:
    """Models of transformers are told that the weight of this head is its own."""
    module: Any
    for module in model.modules():
        names = [name for name, child in module.named_modules() if child is head]
        if names and is_from_transformers(module):
            ties = _ties(module)
            module.config.tie_word_embeddings = False
            for name in names:
                ties.pop(f"{name}.weight", None)


def attach(model: nn.Module) -> None:
    """Tells other libraries which layers are quantized: PEFT, and transformers for each of its
    models in this one."""
    # Absent for versions with which it does not work; that has been warned of.
    if (adapters := imported("liquidgemm.integrations.peft")) is not None:
        adapters.adopt(model)
    integration = imported("liquidgemm.integrations.transformers")
    if integration is None:
        return
    inside = ""
    for name, module in model.named_modules():
        if is_from_transformers(module) and not (inside and name.startswith(inside)):
            integration.attach(module, getattr(model, "liquid_config", None))
            if not name:
                return
            inside = name + "."


def detach(model: nn.Module) -> None:
    """The opposite of `attach`: other libraries are told that there is nothing quantized."""
    if (adapters := imported("liquidgemm.integrations.peft")) is not None:
        adapters.release(model)
    integration = imported("liquidgemm.integrations.transformers")
    for module in model.modules():
        vars(module).pop("liquid_config", None)
        if integration is not None and is_from_transformers(module):
            integration.detach(module)


def is_from_transformers(model: nn.Module) -> bool:
    """Without importing transformers, which is optional."""
    transformers = imported("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)
