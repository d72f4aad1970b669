"""The projections of one input, computed before the module that asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import QuantizedTokens
from .linear import LiquidLinear
from .merged import MergedLinear, why_not_merged


class Projected(NamedTuple):
    """What a fused layer hands to its attention in the place of hidden states.

    Attributes:
        outputs: of each projection, in the order of `Projections`.
        shape: of the hidden states.
    """

    outputs: tuple[Tensor, ...]
    shape: torch.Size


class ProjectionLinear(LiquidLinear):
    """A `LiquidLinear` that also takes `Projected`, of which it gives its own."""

    slot: int

    def forward(self, x: Tensor | QuantizedTokens | Projected) -> Tensor:
        if isinstance(x, Projected):
            return x.outputs[self.slot]
        return super().forward(x)


class Projections(nn.Module):
    """The layers of one input, those that agree merged to one product.

    In a model it is registered beside the layers, after them, as `MergedLinear` is.

    Args:
        owner: the module that has the layers.
        names: of the layers in it.

    Attributes:
        parts: the layers.
        why_apart: why not all are one product, where they are not.
    """

    parts: tuple[LiquidLinear, ...]

    def __init__(self, owner: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.parts = tuple(getattr(owner, name) for name in names)
        groups: list[list[int]] = []
        self.why_apart = ""
        for slot, part in enumerate(self.parts):
            for group in groups:
                reason = why_not_merged([*(self.parts[i] for i in group), part])
                if reason is None:
                    group.append(slot)
                    break
                self.why_apart = reason
            else:
                groups.append([slot])
        self.alone = [group[0] for group in groups if len(group) == 1]
        self.groups = [group for group in groups if len(group) > 1]
        self.merged = nn.ModuleList(
            MergedLinear([self.parts[slot] for slot in group]) for group in self.groups
        )
        self.training = owner.training
        for slot, part in enumerate(self.parts):
            part.__class__ = ProjectionLinear
            assert isinstance(part, ProjectionLinear)
            part.slot = slot

    def forward(self, x: Tensor | QuantizedTokens) -> tuple[Tensor, ...]:
        """The output of each layer ``[..., N]``, in the order of the names."""
        outputs: dict[int, Tensor] = {slot: self.parts[slot](x) for slot in self.alone}
        for group, merged in zip(self.groups, self.merged, strict=True):
            sizes = [self.parts[slot].out_features for slot in group]
            outputs |= dict(zip(group, merged(x).split(sizes, dim=-1), strict=True))
        return tuple(outputs[slot] for slot in range(len(self.parts)))

    def joined(self, x: Tensor | QuantizedTokens) -> Tensor:
        """The outputs one after the other, ``[..., sum of N]``."""
        if not self.alone and len(self.merged) == 1:
            return self.merged[0](x)
        return torch.cat(self(x), dim=-1) if len(self.parts) > 1 else self.parts[0](x)

    def apart(self, x: Tensor) -> tuple[Tensor, ...]:
        """As forward, each layer by itself."""
        return tuple(part(x) for part in self.parts)

    def check(self, owner: nn.Module) -> None:
        """Raises a RuntimeError if a layer of the owner is not the one that was fused."""
        for name, part in zip(self.names, self.parts, strict=True):
            now = owner._modules.get(name)
            if now is not part:
                raise RuntimeError(
                    f"{name}: expected the layer that was fused, got a {type(now).__name__}: call "
                    "liquidgemm.unfuse_ before layers are replaced, as by adapters"
                )

    def undo(self) -> None:
        """The layers are plain again, each with memory of its own."""
        for merged in self.merged:
            assert isinstance(merged, MergedLinear)
            merged.unmerge()
        for part in self.parts:
            part.__class__ = LiquidLinear
            del part.slot

    def extra_repr(self) -> str:
        return f"names={self.names}"
