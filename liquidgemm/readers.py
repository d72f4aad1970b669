"""Layers whose weight is used by code other than their own forward, by the sources of a model.

A `LiquidLinear` has no float weight to give. Code that asks only what a weight *is* (its dtype,
device or shape) gets along without; where its values are read or written, the layer has to stay.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from torch import nn

from ._modules import imported

# What a weight is, as opposed to what is in it.
METADATA = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "nelement", "is_cuda"}
METADATA |= {"is_meta", "requires_grad", "is_floating_point", "element_size", "itemsize", "nbytes"}
_ASKS = {"isinstance", "hasattr", "type", "id"}

# Methods that are over when a model is complete, or that only adapters and training code call.
_BEFORE = ("init", "_init", "__init", "reset_", "tie_", "_tie", "resize", "_resize", "_get_resized")
_BEFORE += ("from_", "_load", "load_", "post_init", "extra_repr", "__repr__", "merge", "unmerge")


def weight_readers(model: nn.Module) -> dict[nn.Module, str]:
    """By layer, the class and method that read or write its weight in some forward pass.

    Classes whose source is not at hand say nothing here.
    """
    found: dict[nn.Module, str] = {}
    for owner in model.modules():
        uses = _uses(type(owner))
        if not uses:
            continue
        # The base of an adapter goes by the adapter's name, which hands its weight on.
        below = [
            (f".{name}".removesuffix(".base_layer"), module)
            for name, module in owner.named_modules()
            if name
        ]
        for exact, path, where in uses:
            for name, module in below:
                if name == path if exact else name.endswith(path):
                    found.setdefault(module, where)
    return found


@cache
def _uses(kind: type) -> tuple[tuple[bool, str, str], ...]:
    """Where a class uses the weights of modules below it.

    Returns:
        for each use, whether the path is known from the owner on, the path or its end with a
        leading dot, and ``Class.method``.
    """
    uses: dict[tuple[bool, str], str] = {}
    overridden: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "builtins")) or _is_foundation(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        own = [node for node in tree.body[0].body if isinstance(node, ast.FunctionDef)]
        for method in own:
            if method.name in overridden or method.name.startswith(_BEFORE):
                continue
            for exact, path in _Method(method).uses:
                uses.setdefault((exact, path), f"{base.__name__}.{method.name}")
        overridden |= {method.name for method in own}
    return tuple((exact, path, where) for (exact, path), where in uses.items())


def _is_foundation(kind: type) -> bool:
    """Whether it is no part of any forward pass, or an adapter, for which there are other rules."""
    models = imported("transformers.modeling_utils")
    if models is not None and kind in models.PreTrainedModel.__mro__:
        return True
    adapters = imported("peft.tuners.tuners_utils")
    return adapters is not None and issubclass(kind, adapters.BaseTunerLayer)


class _Method(ast.NodeVisitor):
    """Uses of ``<path>.weight`` in one method."""

    def __init__(self, method: ast.FunctionDef) -> None:
        self.uses: list[tuple[bool, str]] = []
        self._names: dict[str, ast.expr] = {}  # what local names stand for
        self._harmless: set[int] = set()
        for node in ast.walk(method):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target = node.targets[0]
                if isinstance(target, ast.Name):
                    self._names.setdefault(target.id, node.value)
        self.visit(method)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name):
            if node.func.id in _ASKS:
                self._harmless |= {id(argument) for argument in node.args}
            elif node.func.id == "getattr" and len(node.args) >= 2:
                name = node.args[1]
                if isinstance(name, ast.Constant) and name.value == "weight":
                    self._use(node, node.args[0])
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            self._harmless.add(id(node.left))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in METADATA:
            self._harmless.add(id(node.value))
        elif node.attr == "weight":
            self._use(node, node.value)
        self.generic_visit(node)

    def _use(self, node: ast.expr, layer: ast.expr) -> None:
        if id(node) in self._harmless:
            return
        exact, parts = self._path(layer, 0)
        if parts:
            self.uses.append((exact, "." + ".".join(parts)))

    def _path(self, node: ast.expr, depth: int) -> tuple[bool, list[str]]:
        """Whether it begins at self, and the names of attributes at its end."""
        if isinstance(node, ast.Attribute):
            exact, parts = self._path(node.value, depth)
            return exact, [*parts, node.attr]
        if isinstance(node, ast.Name):
            if node.id == "self":
                return True, []
            if node.id in self._names and depth < 4:
                return self._path(self._names[node.id], depth + 1)
        return False, []
