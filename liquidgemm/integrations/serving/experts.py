"""Layers of experts of engines: what is asked of a checkpoint's, and what is computed with.

Once loaded, an engine's layer has the parameters ``gate_up_packed``, ``gate_up_row_scale`` and, if
there is one, ``gate_up_row_bias``, and those of ``down`` (see `ExpertStack`), its activation as
``liquid_activation``, and how many experts all GPUs have as ``liquid_total_experts``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ... import ops
from ...nn.experts import LiquidExperts
from .tensors import EngineLayer

STACKS = ("gate_up", "down")
_HELD = ("packed", "row_scale", "row_bias")


def check_sizes(
    name: str, model: Mapping[str, Any], checkpoint: Mapping[str, Any], hint: str = ""
) -> None:
    """Raises a ValueError if the checkpoint's experts are others than the model's."""
    if differing := [key for key, value in model.items() if checkpoint[key] != value]:
        wanted, got = ({key: of[key] for key in differing} for of in (model, checkpoint))
        raise ValueError(
            f"{name}: expected {wanted} of the model, got {got} in the checkpoint{hint}"
        )


def load_stack(name: str, experts: LiquidExperts, stack: str, loaded: Mapping[str, Tensor]) -> None:
    """Pack one of the stacks.

    Args:
        name: of the layer, for messages.
        loaded: logical tensors by their names in the stack; missing ones are not there.

    Raises:
        ValueError: one is missing, or does not fit.
    """
    own = getattr(experts, stack)
    if missing := sorted(own.state_dict().keys() - loaded.keys()):
        raise ValueError(f"{name}.{stack}.{missing[0]}: expected it to be loaded, got nothing")
    try:
        own.load_logical(loaded, loaded["scale"].device)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}.{stack}: {error}") from None


def held(experts: LiquidExperts) -> Iterator[tuple[str, Tensor | None]]:
    """What a layer has, by its names there."""
    for stack in STACKS:
        for key in _HELD:
            yield f"{stack}_{key}", getattr(getattr(experts, stack), key)


def compute(layer: EngineLayer, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """What the experts of this GPU add to each token; int32 ids of -1 add nothing."""
    return ops.moe(
        x,
        topk_ids,
        topk_weights,
        layer.gate_up_packed,
        layer.gate_up_row_scale,
        layer.down_packed,
        layer.down_row_scale,
        layer.gate_up_row_bias,
        layer.down_row_bias,
        layer.liquid_activation,
        layer.liquid_total_experts,
    )
