"""Layers of single experts in a checkpoint, as the two stacks of a `LiquidExperts`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn.experts import in_order, joined
from ..nn.float_experts import Layout
from ..weights.weight import QuantizedWeight

_PLACE = re.compile(r"(?:^|\.)experts\.(\d+)\.(\w+)$")
PARTS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "gate_up_proj": "gate_up",
}


@dataclass(frozen=True)
class Place:
    """Where a layer of the checkpoint is in the model.

    Attributes:
        experts: name of the module with all experts of a layer.
        number: of the expert.
        part: "gate", "up", "gate_up" or "down".
    """

    experts: str
    number: int
    part: str


def place_of(layer: str, experts: str) -> Place | None:
    """The place of a layer by its name in the checkpoint; None if that is of no expert."""
    match = _PLACE.search(layer)
    if match is None or match[2] not in PARTS:
        return None
    return Place(experts, int(match[1]), PARTS[match[2]])


def prefix_of(layer: str) -> str:
    """What the names of all experts of a layer begin with, in the checkpoint."""
    return re.sub(r"\.\d+\.\w+$", "", layer)


def stacks(
    layout: Layout,
    layers: dict[tuple[int, str], str],
    read: Callable[[str], tuple[QuantizedWeight, Tensor | None]],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of some experts by name, each with a leading axis of experts.

    Args:
        layers: names in the checkpoint by number and part.
        read: the weight and bias of a layer.

    Raises:
        ValueError: an expert is missing, or a weight or bias does not fit; the message names it.
    """
    fused = any(part == "gate_up" for _, part in layers)
    first = ("gate_up",) if fused else ("gate", "up")
    known = next(iter(layers.values()))
    numbers = range(layout.num_experts)
    for e in numbers:
        for part in (*first, "down"):
            if (e, part) not in layers:
                raise ValueError(
                    f"{prefix_of(known)}.{e}: expected all experts to be quantized, as "
                    f"{known} is, got one whose {part} is not"
                )
    if more := next((name for (e, _), name in layers.items() if e not in numbers), None):
        raise ValueError(f"{more}: expected {layout.num_experts} experts in the model")
    hidden, inner = layout.hidden, layout.inner
    shapes = {"gate_up": (2 * inner, hidden), "gate": (inner, hidden), "up": (inner, hidden)}
    shapes["down"] = (hidden, inner)

    def whole(e: int, parts: Iterable[str]) -> tuple[QuantizedWeight, Tensor | None]:
        found = [_checked(layers[e, part], shapes[part], layout, read) for part in parts]
        biases = [bias for _, bias in found if bias is not None]
        bias = torch.cat(biases) if biases else None
        weight = joined(*(weight for weight, _ in found))
        return in_order(weight, bias, layout.order() if fused and parts == first else None)

    for stack, parts in (("gate_up", first), ("down", ("down",))):
        pairs = [whole(e, parts) for e in numbers]
        for key in ("qweight", "qscale", "qoffset", "scale"):
            yield f"{stack}.{key}", torch.stack([getattr(weight, key) for weight, _ in pairs])
        if layout.bias:
            yield f"{stack}.bias", torch.stack([bias for _, bias in pairs if bias is not None])


def _checked(
    layer: str,
    shape: tuple[int, int],
    layout: Layout,
    read: Callable[[str], tuple[QuantizedWeight, Tensor | None]],
) -> tuple[QuantizedWeight, Tensor | None]:
    weight, bias = read(layer)
    size = (weight.out_features, weight.in_features)
    if size != shape:
        raise ValueError(
            f"{layer}: weight: expected {shape[0]} x {shape[1]} as in the model, got {size[0]} x "
            f"{size[1]}"
        )
    if weight.augment:
        raise ValueError(f"{layer}: expected 4 bits, got 8, for which experts have no form")
    if layout.bias and bias is None:
        raise ValueError(f"{layer}: expected a bias as in the model, got none")
    if not layout.bias and bias is not None:
        if bias.any():
            raise ValueError(f"{layer}: bias: expected none as in the model, got one")
        bias = None
    return weight, bias
