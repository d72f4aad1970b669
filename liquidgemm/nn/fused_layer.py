"""Decoder layers of transformers whose norms and activations give INT8 tokens.

A fused layer is the layer itself with another class, made of its own: names, parameters and
state_dict stay, and so do its attention, its cache and everything around it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import QuantizedTokens
from .linear import LiquidLinear
from .projections import Projected, Projections


@dataclass(frozen=True)
class NormKind:
    """How an RMSNorm rounds; see `rms_norm_quantize`."""

    eps: float
    mode: str
    offset: float = 0.0


@dataclass(frozen=True)
class Fusion:
    """What a fused layer needs to know of itself, by names of its modules.

    Attributes:
        first, second: kinds of the norms before attention and MLP.
        second_name: name of the latter.
        after_attention, after_mlp: names of norms of what attention and MLP give, before it is
            added; or None.
        activation: of the gated MLP, as `glu_quantize` takes it.
        composite: compute the same without fusing: norms and activation in the dtype of the model,
            each projection by itself.
    """

    first: NormKind
    second: NormKind
    second_name: str
    after_attention: str | None
    after_mlp: str | None
    activation: str
    composite: bool = False


PROJECTIONS = "liquid_projections"
"""Name under which attention and MLP of a fused layer have their `Projections`."""


_Base: Any = object  # its attributes are those of the class that it is made of


class FusedLayer(_Base):
    """The forward of a fused layer, before a class of transformers in the order of resolution.

    It has no derivative: what asks for one gets the RuntimeError of the ops.
    """

    fusion: Fusion
    self_attn: Any
    mlp: Any
    argument_names: tuple[str, ...]  # of forward, after the hidden states

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """As the class that was fused, of a layer that returns hidden states alone.

        Raises:
            RuntimeError: in training mode, and if a projection has been replaced.
        """
        if self.training:
            raise RuntimeError(
                "training: expected False, as a fused layer has no derivative, got True: call "
                "liquidgemm.unfuse_ on the model"
            )
        attention, mlp, fusion = self.self_attn, self.mlp, self.fusion
        qkv, gate_up = attention._modules[PROJECTIONS], mlp._modules[PROJECTIONS]
        qkv.check(attention)
        gate_up.check(mlp)
        kwargs |= dict(zip(self.argument_names, args, strict=False))

        x, _ = self._normed(self.input_layernorm, fusion.first, hidden_states, None)
        outputs = qkv.apart(x) if fusion.composite else qkv(x)
        projected = Projected(outputs, hidden_states.shape)
        delta = attention(hidden_states=projected, **kwargs)[0]
        if fusion.after_attention is not None:
            delta = self._modules[fusion.after_attention](delta)
        norm = self._modules[fusion.second_name]
        x, h = self._normed(norm, fusion.second, delta, hidden_states)
        whole = torch.cat(gate_up.apart(x), dim=-1) if fusion.composite else gate_up.joined(x)
        delta = mlp.down_proj(self._activated(whole, mlp.down_proj))
        if fusion.after_mlp is not None:
            delta = self._modules[fusion.after_mlp](delta)
        return h + delta

    def _normed(
        self, norm: Any, kind: NormKind, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor | QuantizedTokens, Tensor | None]:
        tokens, h, y = ops.rms_norm_quantize(
            x,
            norm.weight,
            kind.eps,
            residual,
            mode=kind.mode,
            offset=kind.offset,
            return_y=self.fusion.composite,
        )
        return (tokens if y is None else y), h

    def _activated(self, gate_up: Tensor, down: nn.Module) -> Tensor | QuantizedTokens:
        # An adapter, or a layer in floats, takes what is not quantized.
        wide = self.fusion.composite or not isinstance(down, LiquidLinear)
        tokens, y = ops.glu_quantize(gate_up, self.fusion.activation, return_y=wide)
        return tokens if y is None else y

    def __reduce_ex__(self, protocol):
        """For copies and pickles: the class is made, and found nowhere by its name."""
        _, _, state, *_ = super().__reduce_ex__(protocol)
        return _blank, (type(self).__mro__[2],), state


_CLASSES: dict[Any, Any] = {}


def fused_class(base: Any) -> Any:
    """The class of fused layers that were of class base."""
    if base not in _CLASSES:
        names = tuple(inspect.signature(base.forward).parameters)[2:]
        fields = {"__module__": __name__, "argument_names": names}
        _CLASSES[base] = type(f"Fused{base.__name__}", (FusedLayer, base), fields)
    return _CLASSES[base]


def _blank(base: Any) -> nn.Module:
    kind = fused_class(base)
    return kind.__new__(kind)


def fuse_layer(layer: Any, fusion: Fusion, qkv: list[str], gate_up: list[str]) -> None:
    """Make a fused layer of a decoder layer, in place."""
    for owner, names in ((layer.self_attn, qkv), (layer.mlp, gate_up)):
        owner.add_module(PROJECTIONS, Projections(owner, names))
    layer.fusion = fusion
    layer.__class__ = fused_class(type(layer))


def unfuse_layer(layer: Any) -> None:
    """The opposite of `fuse_layer`."""
    for owner in (layer.self_attn, layer.mlp):
        owner._modules.pop(PROJECTIONS).undo()
    del layer.fusion
    layer.__class__ = type(layer).__mro__[2]


def unfuse_(model: nn.Module) -> nn.Module:
    """Take back what `fuse_` has done: the layers of a model are of their own classes again.

    Returns:
        the model.
    """
    for layer in list(model.modules()):
        if isinstance(layer, FusedLayer):
            unfuse_layer(layer)
    return model
