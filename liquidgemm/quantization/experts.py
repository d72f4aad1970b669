"""Stacked experts as linear layers while a model is quantized, and one layer of all of them after.

`experts_as_linear` puts a module of linear layers, ``<experts>.<e>.gate_up`` and ``.down``, which
share the memory of the float experts, in the place of each module of stacked experts. What is true
of linear layers (selection, checks, statistics, codes) is true of experts then. As soon as all of
a module are quantized, a `LiquidExperts` takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..nn._modules import imported, paths_of_modules, replace_module
from ..nn.experts import LiquidExperts, in_order
from ..nn.float_experts import Layout, layout_of, without_data
from ..nn.linear import LiquidLinear
from ..nn.stack import stack_of
from .config import LiquidConfig
from .report import ExpertsReport, LayerReport, ParameterReport

PARTS = ("gate_up", "down")


class SeparateExpert(nn.Module):
    """The two linear layers of one expert."""

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        super().__init__()
        self.gate_up, self.down = layers


class SeparateExperts(nn.Module):
    """Stacked experts as linear layers, which are views of them.

    Attributes:
        layout: how they lie in the float module.
        shell: that module, without its weights.
    """

    shell: nn.Module

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.__dict__["shell"] = without_data(module)  # not as a submodule
        self.training = module.training
        for key, value in vars(module).items():
            if isinstance(value, int | float | str) and not hasattr(self, key):
                setattr(self, key, value)
        for e in range(layout.num_experts):
            weights = layout.gate_up(module, e), layout.down(module, e)
            pairs = zip(weights, layout.biases(module, e), strict=True)
            expert = SeparateExpert(_linear(weight, bias) for weight, bias in pairs)
            self.add_module(str(e), expert.train(module.training))

    def experts(self) -> list[SeparateExpert]:
        return [cast(SeparateExpert, child) for child in self.children()]

    def gate(self, gate_up: Tensor) -> Tensor:
        """``[T, 2 I]`` to ``[T, I]`` by the float module's own code."""
        return self.layout.gate(self.shell, gate_up)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for e, rows, weights in self.routed(x, top_k_index, top_k_weights):
            expert = cast(SeparateExpert, self.get_submodule(str(e)))
            y = expert.down(self.gate(expert.gate_up(x[rows])))
            total.index_add_(0, rows, y.float() * weights.float().unsqueeze(1))
        return total.to(x.dtype).view(hidden_states.shape)

    def routed(
        self, x: Tensor, ids: Tensor | None, weights: Tensor | None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Experts that get any token, with the rows of x that they get and their weights."""
        if ids is None or weights is None:
            there = (x != 0).any(1).view(self.layout.num_experts, -1)
            for e in range(self.layout.num_experts):
                rows = there[e].nonzero().squeeze(1) + e * there.shape[1]
                if len(rows):
                    yield e, rows, torch.ones_like(rows)
            return
        ids, weights = ids.reshape(len(x), -1), weights.reshape(len(x), -1)
        for e in ids.unique().tolist():
            if 0 <= e < self.layout.num_experts:
                rows, slots = (ids == e).nonzero(as_tuple=True)
                yield e, rows, weights[rows, slots]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class Experts:
    """The stacked experts of a model, within `experts_as_linear`.

    Attributes:
        paths: by the first name of each module of experts, all of its names.
        refused: by float module, why its experts stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._originals: dict[str, nn.Module] = {}
        self.paths: dict[str, list[str]] = {}
        self.refused: dict[nn.Module, str] = {}
        self._left: dict[str, int] = {}
        parents = {child: module for module in model.modules() for child in module.children()}
        for module, names in paths_of_modules(model).items():
            layout = layout_of(module)
            if layout is None:
                continue
            if isinstance(layout, str):
                self.refused[module] = layout
                continue
            if reason := _why_not(module, parents.get(module)):
                self.refused[module] = reason
                continue
            self._originals[names[0]], self.paths[names[0]] = module, names
            self._put(names[0], SeparateExperts(module, layout))
            self._left[names[0]] = 2 * layout.num_experts

    def _put(self, name: str, module: nn.Module) -> None:
        for path in self.paths[name]:
            replace_module(self._model, path, module)

    def of(self, layer: str) -> str | None:
        """The name of the experts to which a layer belongs."""
        name = layer.rpartition(".")[0].rpartition(".")[0]
        return name if name in self.paths else None

    def config_of(self, layer: str, config: LiquidConfig) -> LiquidConfig:
        """The config that holds for a layer."""
        return config if self.of(layer) is None else config.for_experts()

    def parameters(self, name: str) -> dict[str, ParameterReport]:
        """Reports of their stacked parameters."""
        found = {}
        for key, p in self._originals[name].named_parameters():
            if p.ndim > 1:
                reason = "a bias" if key.endswith("_bias") else None
                found[f"{name}.{key}"] = ParameterReport(tuple(p.shape), reason, not reason)
        return found

    def is_fused(self, layer: str) -> bool:
        """Take note that a layer is quantized; whether that has made one layer of its experts."""
        name = self.of(layer)
        if name is None:
            return False
        self._left[name] -= 1
        if self._left[name]:
            return False
        self._put(name, _fused(cast(SeparateExperts, self._model.get_submodule(name))))
        del self._originals[name]  # so that its floats are freed
        return True

    def restore(self) -> None:
        """Put back the float experts that are not quantized as a whole."""
        for name, module in self._originals.items():
            self._put(name, module)

    def fold(self, names: Iterable[str]) -> list[str]:
        """Names of layers, with one for all layers of some experts."""
        return list(dict.fromkeys(self.of(name) or name for name in names))

    def fold_plan(self, lines: dict[str, str]) -> dict[str, str]:
        """Lines for layers, with one for each part of some experts."""
        folded: dict[str, str] = {}
        for layer, line in lines.items():
            name = self.of(layer)
            if name is None:
                folded[layer] = line
                continue
            count = cast(SeparateExperts, self._model.get_submodule(name)).layout.num_experts
            part = layer.rpartition(".")[2]
            folded.setdefault(f"{name}.{part}", f"{count} experts of {line}")
        return folded

    def fold_reports(
        self, layers: Iterable[LayerReport]
    ) -> tuple[list[LayerReport], dict[str, ExpertsReport]]:
        """Reports of layers, with one for all of some experts, and what becomes of each expert."""
        folded: dict[str, list[LayerReport]] = {}
        for layer in layers:
            name = self.of(layer.name)
            part = layer.name if name is None else f"{name}.{layer.name.rpartition('.')[2]}"
            folded.setdefault(part, []).append(layer)
        experts: dict[str, ExpertsReport] = {}
        result = []
        for part, group in folded.items():
            owner = part.rpartition(".")[0]
            if owner not in self.paths:
                result += group
                continue
            result.append(_mean_report(part, group))
            usual = result[-1].method
            report = experts.setdefault(owner, ExpertsReport([layer.tokens for layer in group], {}))
            for e, layer in enumerate(group):
                if layer.note or layer.method != usual:
                    why = layer.note or f'method "{layer.method}"'
                    report.fell_back.setdefault(e, why)
        return result, experts


def _why_not(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why experts whose layout is known stay as they are."""
    if parent is None:
        return "experts that are the model itself: use LiquidExperts.from_experts"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "it has hooks, which would be lost"
    adapters = imported("peft.tuners.tuners_utils")
    if adapters is not None and isinstance(parent, adapters.BaseTunerLayer):
        return "the base of an adapter"
    return None


@contextmanager
def experts_as_linear(model: nn.Module) -> Iterator[Experts]:
    """Within, stacked experts are linear layers; those that are not quantized turn back after."""
    experts = Experts(model)
    try:
        yield experts
    finally:
        experts.restore()


def _fused(separate: SeparateExperts) -> LiquidExperts:
    layout, order = separate.layout, separate.layout.order()
    stacks = []
    for part in PARTS:
        layers: list[LiquidLinear] = [getattr(expert, part) for expert in separate.experts()]
        rows = order if part == "gate_up" else None
        pairs = (in_order(layer.quantized_weight(), layer.bias, rows) for layer in layers)
        dtype = layers[0].weight.dtype
        stacks.append(stack_of(pairs, len(layers), part == "gate_up", dtype))
    result = LiquidExperts.from_stacks(stacks[0], stacks[1], layout.activation)
    result.stands_for(separate.shell, layout)
    return result.train(separate.training)


def _mean_report(name: str, layers: list[LayerReport]) -> LayerReport:
    """One report for a stack: errors are means over its experts, tokens and seconds sums."""

    known = [layer.output_error for layer in layers if layer.output_error is not None]
    rounded = [e for layer in layers if (e := layer.activation_error) is not None]
    method = Counter(layer.method for layer in layers).most_common(1)[0][0]
    notes = {layer.note for layer in layers}
    return replace(
        layers[0],
        name=name,
        method=method,
        weight_error=sum(layer.weight_error for layer in layers) / len(layers),
        output_error=sum(known) / len(known) if known else None,
        activation_error=sum(rounded) / len(rounded) if rounded else None,
        outlier=max((v for layer in layers if (v := layer.outlier) is not None), default=None),
        tokens=sum(layer.tokens for layer in layers),
        seconds=sum(layer.seconds for layer in layers),
        note=notes.pop() if len(notes) == 1 else "",
    )
