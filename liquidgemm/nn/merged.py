"""Layers of one input as one product: q, k and v, or gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..formats.liquidquant import PANEL
from ._product import product
from .linear import LiquidLinear

_SHARED = ("packed", "scale", "bias")
_VIEWED = (*_SHARED, "columns")  # what tells that a layer is as it was merged


def why_not_merged(parts: Sequence[LiquidLinear]) -> str | None:
    """The reason why these layers cannot be one product, in their order; None if they can.

    Layers on the meta device are judged by what is known of them.
    """
    if len(parts) < 2:
        return f"expected at least two layers, got {len(parts)}"
    for part in parts:
        if type(part) is not LiquidLinear:
            return f"expected LiquidLinears, got a {type(part).__name__}"
        if part.out_dtype is not None:
            return f"one has an out_dtype, {part.out_dtype}"
    if len(set(parts)) < len(parts):
        return "a layer is there twice"
    return _why_apart(parts)


def _why_apart(parts: Sequence[LiquidLinear]) -> str | None:
    first = parts[0]
    for part in parts[1:]:
        if part.in_features != first.in_features:
            return f"in_features are {first.in_features} and {part.in_features}"
        if part.scale.device != first.scale.device:
            return f"they are on {first.scale.device} and {part.scale.device}"
        formats = {one.packed.shape[-1] for one in (first, part) if one.packed is not None}
        if len(formats) > 1:
            return "their weights have other numbers of bits, or other groups"
        if not _same_columns(part.columns, first.columns):
            return "their residual columns differ"
        biases = {None if one.bias is None else one.bias.dtype for one in (first, part)}
        if len(biases) > 1:
            return f"their biases are {' and '.join(sorted(map(str, biases)))}"
    for part in parts[:-1]:
        if part.out_features % PANEL:
            return f"out_features are {part.out_features}, no multiple of {PANEL}"
    return None


def _same_columns(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.is_meta or other.is_meta:
        return one is other
    return torch.equal(one, other)


class MergedLinear(nn.Module):
    """Several `LiquidLinear` of the same input as one product, to the bit.

    The weights lie one after the other in one piece of memory. The layers stay what they are, as
    views of it: their names, their ``state_dict``, and what they compute when called by themselves.
    In a model it is registered in the same module as they are, after them::

        self.qkv = MergedLinear((self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.qkv(x).split(self.qkv.sizes, dim=-1)

    It adds nothing to ``state_dict``. ``to()`` and its kind, ``load_state_dict``, ``train()`` and
    ``eval()`` of the module that holds all of them, copies and pickles keep the layers merged.
    Where one of them alone has been moved or given another weight, or has no values yet, each
    computes by itself, with the same result, until one of these calls; `is_merged` tells.

    Attributes:
        parts: the layers.
        sizes: their out_features.

    Shapes: as `LiquidLinear`, with N the sum of ``sizes``.

    Raises:
        ValueError: the layers cannot be merged: other than in_features, devices, bits, groups,
            residual columns and kinds of bias that agree, and out_features that are multiples of
            64 in all but the last.
        RuntimeError: in forward, as `LiquidLinear`.
    """

    parts: tuple[LiquidLinear, ...]
    _weight: Any  # packed, scale and bias of all; None while they are not merged
    _views: list[tuple[Tensor | None, ...]]

    def __init__(self, parts: Sequence[LiquidLinear]) -> None:
        super().__init__()
        reason = why_not_merged(parts)
        if reason:
            raise ValueError(f"parts: {reason}")
        # In a tuple, not as submodules: they have their names elsewhere.
        self.parts = tuple(parts)
        self.sizes = [part.out_features for part in parts]
        self.in_features, self.out_features = parts[0].in_features, sum(self.sizes)
        self.training = parts[0].training
        self._forget()
        self.merge()

    def forward(self, x: Tensor | ops.QuantizedTokens) -> Tensor:
        shape = getattr(x, "shape", None)  # faster than to ask for a Tensor
        if shape is None:
            raise TypeError(f"x: expected a Tensor or QuantizedTokens, got {type(x).__name__}")
        if len(shape) == 0 or shape[-1] != self.in_features:
            raise RuntimeError(
                f"x: expected K = {self.in_features} features in the last dimension, "
                f"got shape {list(shape)}"
            )
        if not self.is_merged:
            return torch.cat([part(x) for part in self.parts], dim=-1)
        return product(x, self.parts[0].columns, *self._weight)

    @property
    def is_merged(self) -> bool:
        """Whether it computes one product: the layers have the weights that were merged."""
        if self._weight is None:
            return False
        for part, views in zip(self.parts, self._views, strict=True):
            if not part._is_packed():
                return False
            for name, view in zip(_VIEWED, views, strict=True):
                if part._buffers[name] is not view:
                    return False
        return True

    def merge(self) -> None:
        """Bring the weights of the layers together, if they are not and have values."""
        if self.is_merged:
            return
        self._forget()
        if _why_apart(self.parts):
            return
        held = [part._buffers for part in self.parts]
        packed = [part.packed for part in self.parts if part._is_packed()]
        if len(packed) < len(held) or any(one is None or one.is_meta for one in packed):
            return
        self._weight = tuple(_merged_into(held, name) for name in _SHARED)
        for part in self.parts:
            part._part_of_merged = True
        self._views = [tuple(one[name] for name in _VIEWED) for one in held]

    def unmerge(self) -> None:
        """Give each layer memory of its own."""
        if self.is_merged:
            for held in (part._buffers for part in self.parts):
                held.update({name: _copy(held[name]) for name in _SHARED})
        for part in self.parts:
            vars(part).pop("_part_of_merged", None)
        self._forget()

    def _forget(self) -> None:
        # No buffers: they would be counted, moved and offloaded a second time.
        self._weight = None
        self._views = []

    # Each of these comes to the layers first, which are registered before this.

    def train(self, mode: bool = True) -> MergedLinear:
        self.merge()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> MergedLinear:
        self.merge()
        return self

    def _load_from_state_dict(self, *args) -> None:
        self.merge()

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key not in ("_weight", "_views")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()
        self.merge()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, sizes={self.sizes}, is_merged={self.is_merged}"


def _merged_into(held: list[dict], name: str) -> Tensor | None:
    """The tensors of this name as one, of which each becomes a view; None if there are none."""
    tensors = [one[name] for one in held]
    if tensors[0] is None:
        return None
    # A parameter, whose sizes torch.compile(dynamic=True) takes as given. Those of another tensor
    # outside of state_dict become symbols, for which it finds no source and fails.
    whole = nn.Parameter(torch.cat(tensors), requires_grad=False)
    views = whole.detach().split([len(tensor) for tensor in tensors])
    for one, view in zip(held, views, strict=True):
        one[name] = view
    return whole


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
