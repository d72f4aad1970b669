"""Layers whose weight is used by code other than their own forward, by the sources of a model.

A `LiquidLinear` has no float weight to give. Code that asks only what a weight *is* (its dtype,
device or shape) gets along without; where its values are read or written, the layer has to stay.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import nn

from ..nn._modules import imported

# What a weight is, as opposed to what is in it.
METADATA = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "nelement", "is_cuda"}
METADATA |= {"is_meta", "requires_grad", "is_floating_point", "element_size", "itemsize", "nbytes"}
_ASKS = {"isinstance", "hasattr", "type", "id"}

# Methods that are over when a model is complete, or that only adapters and training code call.
_BEFORE = (
    *("init", "_init", "__init", "post_init", "reset_", "from_", "_load", "load_"),
    *("tie_", "_tie", "resize", "_resize", "_get_resized", "merge", "unmerge"),
    *("extra_repr", "__repr__"),
)


def weight_readers(model: nn.Module) -> dict[nn.Module, str]:
    """By layer, the class and method that read or write its weight in some forward pass.

    Classes whose source is not at hand say nothing here.
    """
    found: dict[nn.Module, str] = {}
    for owner in model.modules():
        kind: type = type(owner)
        uses = _uses(kind)
        if not uses:
            continue
        # The base of an adapter goes by the adapter's name, which hands its weight on.
        below = [
            (f".{name}".removesuffix(".base_layer"), module)
            for name, module in owner.named_modules()
            if name
        ]
        for use, where in uses:
            if not all(_holds(test, wanted, owner) for test, wanted in use.conditions):
                continue
            for name, module in below:
                if name == use.path if use.exact else name.endswith(use.path):
                    found.setdefault(module, where)
    return found


@dataclass(frozen=True)
class _Use:
    """A use of the weight of a module below.

    Attributes:
        exact: whether the path is known from the owner on, or only its end.
        path: names of attributes, each with a leading dot.
        conditions: what settings of the owner have to be, and whether true or false, for the use
            to be reached at all.
    """

    exact: bool
    path: str
    conditions: tuple[tuple[ast.expr, bool], ...]


def _holds(test: ast.expr, wanted: bool, owner: nn.Module) -> bool:
    """Whether a setting of the owner is as wanted; True if that cannot be told."""
    code = compile(ast.Expression(test), "<condition>", "eval")
    try:
        return bool(eval(code, {"__builtins__": {}}, {"self": owner})) is wanted
    except Exception:  # a setting that this owner lacks, or has another type
        return True


@cache
def _uses(kind: type) -> tuple[tuple[_Use, str], ...]:
    """Where a class uses the weights of modules below it, each with ``Class.method``."""
    uses: list[tuple[_Use, str]] = []
    overridden: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "builtins")) or _is_foundation(base):
            continue
        definition = _definition(base)
        if definition is None:
            continue
        own = [node for node in definition.body if isinstance(node, ast.FunctionDef)]
        for method in own:
            if method.name in overridden or method.name.startswith(_BEFORE):
                continue
            uses += [(use, f"{base.__name__}.{method.name}") for use in _Method(method).uses]
        overridden |= {method.name for method in own}
    return tuple(uses)


def _definition(kind: type) -> ast.ClassDef | None:
    """The source of a class, if it is at hand."""
    try:
        file = inspect.getsourcefile(kind)
    except (OSError, TypeError):
        return None
    if file is None:
        return None
    lines = linecache.getlines(file, vars(sys.modules[kind.__module__]))
    return _classes("".join(lines)).get(kind.__qualname__)


# inspect.getsource would parse the whole file once for each class in it.
@cache
def _classes(source: str) -> dict[str, ast.ClassDef]:
    """All classes in a file by their qualified names."""
    found: dict[str, ast.ClassDef] = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = child
                collect(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                collect(child, f"{prefix}{child.name}.<locals>.")
            else:
                collect(child, prefix)

    try:
        collect(ast.parse(source), "")
    except (SyntaxError, ValueError):
        found.clear()
    return found


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
        self.uses: list[_Use] = []
        self._conditions: tuple[tuple[ast.expr, bool], ...] = ()
        self._names: dict[str, ast.expr] = {}  # what local names stand for
        self._harmless: set[int] = set()
        for node in ast.walk(method):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target = node.targets[0]
                if isinstance(target, ast.Name):
                    self._names.setdefault(target.id, node.value)
        self.visit(method)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        outside = self._conditions
        for branch, wanted in ((node.body, True), (node.orelse, False)):
            self._conditions = outside + tuple(_settings(node.test, wanted))
            for child in branch if isinstance(branch, list) else [branch]:
                self.visit(child)
        self._conditions = outside

    visit_IfExp = visit_If

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
            self.uses.append(_Use(exact, "." + ".".join(parts), self._conditions))

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


def _settings(test: ast.expr, wanted: bool) -> Iterator[tuple[ast.expr, bool]]:
    """What a branch says of the owner's settings: comparisons of ``self.<path>`` with constants."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _settings(test.operand, not wanted)
    elif isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) is wanted:
        for value in test.values:  # each of them has to be so
            yield from _settings(value, wanted)
    elif _is_setting(test):
        yield test, wanted


def _is_setting(node: ast.expr) -> bool:
    if isinstance(node, ast.Compare):
        parts = (node.left, *node.comparators)
        return any(map(_is_setting, parts)) and all(
            isinstance(part, ast.Constant) or _is_setting(part) for part in parts
        )
    while isinstance(node, ast.Attribute):
        if node.attr == "training":  # may change
            return False
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"
