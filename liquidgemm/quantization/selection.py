"""Which layers of a model are quantized, and why every other matrix stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.liquidquant import MAX_IN_FEATURES
from ..nn._modules import (
    imported,
    is_conv1d,
    is_from_transformers,
    is_linear,
    matches,
    paths_of_modules,
    ties_besides,
)
from ..nn.experts import LiquidExperts
from ..nn.linear import LiquidLinear
from ..ops import FLOATS
from .config import LiquidConfig
from .experts import Experts
from .layer import layer_bits
from .readers import weight_readers
from .report import ParameterReport
from .routing import count_experts, routers

DONE = "already quantized"
OTHER_KIND = ("not nn.Linear", "unknown")  # how the reasons of other kinds of modules begin
FEW_ROWS = 64
"""With fewer rows than a tile has there is nothing to gain, and all of the rounding reaches the
answer: so it is with the heads of tasks, of a row per label or coordinate, and with routers."""


@dataclass
class Selection:
    """What is to become of a model.

    Attributes:
        names: of the layers to quantize, in the order of the model.
        heads: those of them that are output embeddings and get the precision of the config's head.
        skipped: name and reason for every other module that holds a matrix.
        parameters: every parameter of two or more dimensions, once, and the weights of layers that
            are quantized already.
        experts: those whose layers are among the names, as linear layers; None without any.
    """

    names: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, ParameterReport] = field(default_factory=dict)

    experts: Experts | None = None

    def leave(self, name: str, reason: str) -> None:
        """Take back a layer, and with one of an expert all of its experts.

        Raises:
            ValueError: it is the head, which the config wants quantized.
        """
        experts = self.experts
        owner = None if experts is None else experts.of(name)
        if experts is not None and owner is not None:
            self.names[:] = [n for n in self.names if experts.of(n) != owner]
            name = owner
        elif name in self.names:
            self.names.remove(name)
        self.skipped[name] = reason
        for key, parameter in self.parameters.items():
            if key.rpartition(".")[0] == name or (owner and key.startswith(f"{owner}.")):
                parameter.reason, parameter.quantized = reason, False
        if name in self.heads:
            raise ValueError(_no_int8_head(name, reason))


def _no_int8_head(name: str, reason: str) -> str:
    return f'head: expected one that can be quantized for "int8", got {name}: {reason}'


def select(
    model: nn.Module,
    config: LiquidConfig,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    experts: Experts | None = None,
) -> Selection:
    """Sorts out the modules of a model; the model is not changed.

    Experts are quantized if each layer of each of them is to be.

    Raises:
        ValueError: the config's head is "int8", and there is no head that can be.
    """
    paths = paths_of_modules(model)
    result = Selection(experts=experts)
    rules = _Rules(model, paths, config, filter_fn, experts)
    for module, names in paths.items():
        name = names[0]
        if isinstance(module, LiquidExperts):
            result.skipped[name] = DONE
            for key, stack in (("gate_up", module.gate_up), ("down", module.down)):
                sizes = (stack.num_experts, stack.out_features, stack.in_features)
                result.parameters[f"{name}.{key}"] = ParameterReport(sizes, DONE, True)
            continue
        if isinstance(module, LiquidLinear):
            result.skipped[name] = DONE
            shape = (module.out_features, module.in_features)
            result.parameters[f"{name}.weight"] = ParameterReport(shape, DONE, True)
            continue
        matrices = {key: p for key, p in module._parameters.items() if p is not None and p.ndim > 1}
        if not matrices and not _has_weight(module):
            continue
        reason = rules.reason(module, names)
        if reason is None:
            result.names.append(name)
            if module in rules.int8_heads:
                result.heads.append(name)
        else:
            result.skipped[name] = reason
    if config.head == "int8":
        _check_head(rules, result, paths)
    owners = {id(module): names[0] for module, names in paths.items()}
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            owner = owners[id(model.get_submodule(key.rpartition(".")[0]))]
            reason = result.skipped.get(owner)
            result.parameters[key] = ParameterReport(tuple(parameter.shape), reason, not reason)
    if experts is not None:
        _whole_experts(result, experts)
    return result


def _whole_experts(result: Selection, experts: Experts) -> None:
    """Stacked parameters in the place of linear layers, and all or none of some experts."""
    reasons: dict[str, str] = {}
    for name, reason in list(result.skipped.items()):
        if owner := experts.of(name):
            reasons.setdefault(owner, reason)
            del result.skipped[name]
    for key in [key for key in result.parameters if experts.of(key.rpartition(".")[0])]:
        del result.parameters[key]
    for owner in experts.paths:
        result.parameters |= experts.parameters(owner)
        if owner in reasons:
            result.leave(f"{owner}.0.gate_up", reasons[owner])


def _check_head(rules: _Rules, result: Selection, paths: dict[nn.Module, list[str]]) -> None:
    """Raises a ValueError unless there is a head, and each is quantized, by now or already."""
    heads = [*rules.int8_heads, *(m for m in _outputs(paths) if isinstance(m, LiquidLinear))]
    if not heads:
        raise ValueError(
            'head: expected a model with output embeddings or a layer named lm_head for "int8", '
            "got one without"
        )
    for name in (paths[head][0] for head in heads):
        if result.skipped.get(name, DONE) != DONE:
            raise ValueError(_no_int8_head(name, result.skipped[name]))


def _has_weight(module: nn.Module) -> bool:
    """Whether it computes its weight, or has it as a buffer; not if it is that of a child."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return False
    return all(weight is not parameter for parameter in module.parameters())


class _Rules:
    """The reasons to leave a module alone, with what has to be known of the whole model."""

    def __init__(
        self,
        model: nn.Module,
        paths: dict[nn.Module, list[str]],
        config: LiquidConfig,
        filter_fn: Callable[[str, nn.Module], bool] | None,
        experts: Experts | None,
    ) -> None:
        self._config, self._filter, self._paths = config, filter_fn, paths
        self._experts = experts
        self.int8_heads = set()
        if config.head == "int8":
            self.int8_heads |= {m for m in _outputs(paths) if not isinstance(m, LiquidLinear)}
        self._tied = set(_overlapping(paths))
        self._heads = dict(_heads(paths))
        self._roles = {
            **dict(_routers(model, paths)),
            **dict(_held_elsewhere(paths)),
            **dict(_adapters(paths)),
        }
        self._readers = weight_readers(model)

    def reason(self, module: nn.Module, names: list[str]) -> str | None:
        # Not isinstance: a subclass may use its weight in ways of its own.
        if not is_linear(module) and not is_conv1d(module):
            refused = {} if self._experts is None else self._experts.refused
            return refused.get(module) or _not_linear(module)
        if role := self._roles.get(module):
            return role
        is_head = module in self.int8_heads
        owner = None if self._experts is None else self._experts.of(names[0])
        if self._experts is not None and owner is not None:
            names = [*names, *self._experts.paths[owner]]
        for pattern in self._config.skip:
            if is_head and pattern == "lm_head":
                continue
            if any(matches(name, pattern) for name in names):
                return f"matches the pattern {pattern!r}"
            if pattern == "lm_head" and module in self._heads:
                return f"matches the pattern 'lm_head', being {self._heads[module]}"
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is computed from other parameters"
        if type(weight) is not nn.Parameter:
            return f"its weight is a {type(weight).__name__}, not a plain tensor"
        if id(weight) in self._tied and not (is_head and self._only_embeds(module)):
            return "its weight is tied to another module's"
        if weight.dtype not in FLOATS:
            return f"its dtype is {weight.dtype}"
        rows, columns = weight.shape[::-1] if is_conv1d(module) else weight.shape
        if not (rows > 0 and 0 < columns <= MAX_IN_FEATURES):
            return f"its shape is {list(weight.shape)}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return "it has hooks, which would be lost"
        if reader := self._readers.get(module):
            return f"its weight is read by {reader}"
        if owner is not None:
            for pattern in self._config.keep:
                if any(matches(name, pattern) for name in names):
                    return f"matches the pattern {pattern!r} of keep: experts have no INT8 form"
            if (bits := layer_bits(self._config, names[0])) != 4:
                return f"has {bits} bits by the patterns of bits: experts have 4-bit codes alone"
        if self._filter is not None and not self._filter(names[0], module):
            return "rejected by filter_fn"
        return None

    def _only_embeds(self, head: nn.Module) -> bool:
        """Whether its weight is that of one embedding besides, and nothing else is tied with it."""
        others = {module: names for module, names in self._paths.items() if module is not head}
        owners = [m for m in others if any(p is head.weight for p in m._parameters.values())]
        if len(owners) != 1 or not isinstance(owners[0], nn.Embedding):
            return False
        return id(head.weight) not in _overlapping(others) and not any(
            ties_besides(module, head) for module in others
        )


def _not_linear(module: nn.Module) -> str:
    kind = type(module).__name__
    if type(module).__module__.startswith("torch.") or "weight" in module._parameters:
        return f"not nn.Linear but {kind}"
    return f"unknown: parameters of {kind}, which is no layer that there is a rule for"


def _overlapping(paths: dict[nn.Module, list[str]]) -> Iterator[int]:
    """Ids of tensors whose memory another tensor in the model uses as well.

    One parameter in two modules, a view of it, or a tensor that ``.data`` was assigned.
    """
    spans: dict[tuple, list[tuple[int, int, int]]] = {}
    for module in paths:
        plain = {key: v for key, v in vars(module).items() if isinstance(v, Tensor)}
        for tensor in (*module._parameters.values(), *module._buffers.values(), *plain.values()):
            # Subclasses may have no memory of their own, and are not quantized.
            if tensor is None or type(tensor) not in (nn.Parameter, Tensor) or not tensor.numel():
                continue
            key: tuple
            if tensor.is_meta:
                key, start, size = ("meta", id(tensor)), 0, 1
            elif tensor.layout != torch.strided:
                continue
            else:
                key, start = (tensor.device,), tensor.data_ptr()
                reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                size = (reach + 1) * tensor.itemsize
            spans.setdefault(key, []).append((start, start + size, id(tensor)))
    for group in spans.values():
        group.sort()
        end = last = -1
        for start, stop, identity in group:
            if start < end:
                yield identity
                yield last
            if stop > end:
                end, last = stop, identity


def _heads(paths: dict[nn.Module, list[str]]) -> Iterator[tuple[nn.Module, str]]:
    """The layers that give what a model of transformers is asked for, whatever their names."""
    module: Any  # of transformers
    for module in paths:
        if not is_from_transformers(module):
            continue
        head = None
        with suppress(NotImplementedError):
            head = module.get_output_embeddings()
        if isinstance(head, nn.Module):
            yield head, "the output embeddings"
        base = module.base_model
        if base is module:
            continue
        inside = set(base.modules())
        for child in module.modules():
            if is_linear(child) and child not in inside and child is not head:
                rows = child.out_features
                if rows < FEW_ROWS or rows == getattr(module.config, "num_labels", None):
                    yield child, f"the head of a task, of {rows} rows"


def _outputs(paths: dict[nn.Module, list[str]]) -> Iterator[nn.Module]:
    """Output embeddings: as models of transformers say, in others what is named lm_head."""
    seen = False
    module: Any
    for module in paths:
        if is_from_transformers(module):
            with suppress(NotImplementedError):
                head = module.get_output_embeddings()
                if isinstance(head, nn.Module) and head in paths:
                    seen = True
                    yield head
    if not seen:
        yield from (m for m, names in paths.items() if any(matches(n, "lm_head") for n in names))


def _routers(
    model: nn.Module, paths: dict[nn.Module, list[str]]
) -> Iterator[tuple[nn.Module, str]]:
    """Linear layers beside experts that choose among them, or weigh a shared one."""
    for module, names in paths.items():
        if count_experts(module) and names[0]:
            parent = model.get_submodule(names[0].rpartition(".")[0])
            for child in routers(parent, module):
                yield child, f"the router of {names[0]}, of {child.out_features} rows"


def _held_elsewhere(paths: dict[nn.Module, list[str]]) -> Iterator[tuple[nn.Module, str]]:
    """Modules in plain attributes, in which a replacement would not take their place."""
    for owner in paths:
        for key, value in vars(owner).items():
            if key in ("_modules", "_parameters", "_buffers"):
                continue
            values = value.values() if isinstance(value, dict) else value
            for item in values if isinstance(value, dict | list | tuple | set) else (value,):
                if isinstance(item, nn.Module) and item in paths:
                    yield item, f"{type(owner).__name__} holds it in a plain attribute, {key!r}"


def _adapters(paths: dict[nn.Module, list[str]]) -> Iterator[tuple[nn.Module, str]]:
    """Adapters, of PEFT or by their names, and what is left in floats for them."""
    for module, names in paths.items():
        # Of the module itself or of the dict that holds one per adapter.
        parts = [part for name in names for part in name.lower().split(".")[-2:]]
        if any(part.startswith("lora_") for part in parts):
            yield module, "part of an adapter, by its name"
    integration = imported("liquidgemm.integrations.peft")
    if integration is not None:
        for module in paths:
            yield from integration.left_for_training(module)
