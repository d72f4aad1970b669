"""Lists of experts and the routers beside them, by structure."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..nn._modules import is_linear
from ..nn.experts import LiquidExperts
from .experts import SeparateExperts


def count_experts(module: nn.Module) -> int:
    """How many experts a module holds: stacked ones, or a list of modules alike; 0 for others."""
    if isinstance(module, SeparateExperts):
        return module.layout.num_experts
    if isinstance(module, LiquidExperts):
        return module.num_experts
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return 0
    kinds = {type(child) for child in module}
    linear = all(sum(map(is_linear, child.children())) >= 2 for child in module)
    return len(module) if len(kinds) == 1 and linear else 0


def routers(parent: nn.Module, experts: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers beside experts, with a row for each of them, or one for a shared expert."""
    count = count_experts(experts)
    inside = set(experts.modules())
    for child in parent.modules():
        if not count or child in inside or not is_linear(child):
            continue
        if child.out_features in (1, count):
            yield child


def is_routed(parent: nn.Module, child: nn.Module) -> bool:
    """Whether a list is one of experts among which a router chooses by the data."""
    count = count_experts(child)
    return any(router.out_features == count for router in routers(parent, child))
