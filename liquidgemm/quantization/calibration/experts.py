"""Experts of one layer: all are calibrated on one capture of what the layer is given.

Few tokens reach some experts. H of an expert's first matrix is that of its own tokens, filled up to
n0 tokens with the mean of all tokens of the layer, which costs one more matrix product for all
experts. What the second matrix is given is only known of tokens that went through the first: up to
n0 tokens, an expert gets others of the layer as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...nn._modules import replace_module
from ..config import LiquidConfig
from ..experts import PARTS, SeparateExperts
from ..layer import quantize_layer
from ..report import LayerReport
from .blocks import Call, Stop
from .masks import others_of
from .moments import Moments, round_activation
from .record import hidden_state
from .simulate import SimulatedLinear
from .smooth import sample_rows

_ENOUGH = 1.0  # n0, as a multiple of the columns of a matrix
_NONE = "no token of the calibration data is routed to it: calibrated on others of its layer"


@dataclass
class Routed:
    """What a layer of experts is given.

    Attributes:
        x: float32 ``[T, H]``, the tokens.
        rows: by expert, int64, the tokens that are routed to it.
    """

    x: Tensor
    rows: dict[int, Tensor]

    def of(self, expert: int) -> Tensor:
        empty = torch.zeros(0, dtype=torch.int64, device=self.x.device)
        return self.rows.get(expert, empty)

    def others(self, expert: int, count: int) -> Tensor:
        """Up to ``count`` tokens, spread evenly, that are not routed to an expert."""
        other = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        other[self.of(expert)] = False
        rows = other.nonzero().squeeze(1)
        count = min(count, len(rows))
        chosen = torch.linspace(0, max(0, len(rows) - 1), count, device=rows.device)
        return rows[chosen.long()]


def capture(block: nn.Module, experts: SeparateExperts, calls: Iterable[Call]) -> Routed | None:
    """The tokens that reach a layer of experts; None if there are none."""
    found: list[Tensor] = []
    rows: dict[int, list[Tensor]] = {}
    count = 0
    for call in calls:
        args, kwargs, _ = call.on(block)
        hidden = hidden_state(args, kwargs)
        others = others_of(args, kwargs, hidden)

        def hook(module, args, kwargs, call=call, hidden=hidden, others=others):
            nonlocal count
            given = [*args, *kwargs.values(), None, None][:3]
            x = given[0].reshape(-1, given[0].shape[-1])
            kept = _tokens(
                module, x, call.padding.rows(given[0], hidden, others, call.unit, call.decoder)
            )
            place = kept.cumsum(0) - 1 + count
            for e, routed, _ in module.routed(x, *given[1:]):
                rows.setdefault(e, []).append(place[routed[kept[routed]]])
            found.append(x[kept].float())
            count += len(found[-1])
            raise Stop

        handle = experts.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with suppress(Stop), call.errors():
                block(*args, **kwargs)
        finally:
            handle.remove()
    if not count:
        return None
    return Routed(torch.cat(found), {e: torch.cat(parts) for e, parts in rows.items()})


def _tokens(experts: SeparateExperts, x: Tensor, kept: Tensor | None) -> Tensor:
    """Which rows of x are tokens, as bool ``[T]``, given those that are not padding."""
    if experts.layout.in_turn:  # a row for each token and expert, of zeros if not routed there
        return (x != 0).any(1)
    return x.new_ones(len(x), dtype=torch.bool) if kept is None else kept.flatten().to(x.device)


def quantize_experts(
    block: nn.Module,
    inner: str,
    outer: str,
    calls: Iterable[Call],
    config: LiquidConfig,
) -> list[LayerReport]:
    """Quantize the experts of a block in place, and report of each of their matrices.

    Args:
        inner: name of the `SeparateExperts` within the block.
        outer: its name in the model.
    """
    experts = cast(SeparateExperts, block.get_submodule(inner))
    routed = capture(block, experts, calls)
    config = config.for_experts()
    places = [(f"{inner}.{e}", f"{outer}.{e}") for e in range(experts.layout.num_experts)]
    reports = []
    if routed is None:
        for place in places:
            for part in PARTS:
                reports.append(_quantize(block, place, part, None, None, config))
                reports[-1].note = "no token of the calibration data reaches it"
        return reports
    rounded = round_activation(routed.x)
    layer = Moments(rounded.T @ rounded / len(rounded), len(rounded))
    for e, (place, expert) in enumerate(zip(places, experts.experts(), strict=True)):
        rows = routed.of(e)
        sample = routed.x[rows if len(rows) else routed.others(e, len(routed.x))]
        moments = _mixed(rounded[rows], layer)
        reports.append(_quantize(block, place, "gate_up", moments, sample, config))
        more = routed.others(e, max(0, int(_ENOUGH * expert.down.in_features) - len(rows)))
        h = experts.gate(expert.gate_up(routed.x[torch.cat((rows, more))]))
        sample = h[: len(rows) or None]
        reports.append(
            _quantize(block, place, "down", Moments.of([round_activation(h)]), sample, config)
        )
        for report in reports[-2:]:
            report.tokens = len(rows)
            report.note = "" if len(rows) else _NONE
    return reports


def _mixed(own: Tensor, layer: Moments) -> Moments:
    """Of an expert's tokens, filled up with the mean of the layer's."""
    share = max(0.0, _ENOUGH * own.shape[1] - len(own))
    total = own.T @ own + share * layer.hessian
    count = len(own) + share
    return Moments(total / count, min(int(count), layer.tokens))


def _quantize(
    block: nn.Module,
    place: tuple[str, str],
    part: str,
    moments: Moments | None,
    sample: Tensor | None,
    config: LiquidConfig,
) -> LayerReport:
    """One matrix, of the expert whose names in the block and in the model are the place."""
    start = time.perf_counter()
    inner, name = (f"{prefix}.{part}" for prefix in place)
    linear = cast(nn.Linear, block.get_submodule(inner))
    weight, method = quantize_layer(linear.weight, config, name, moments)
    sample = None if sample is None or not len(sample) else sample_rows([sample])
    report = LayerReport.of(name, method, linear.weight, weight, sample)
    replace_module(block, inner, SimulatedLinear(weight, linear.bias))
    report.seconds = time.perf_counter() - start
    return report
