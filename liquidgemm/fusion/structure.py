"""What a decoder layer is made of, by the names and the behaviour of its modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import ops
from ..nn.fused_layer import Fusion, NormKind
from ..nn.linear import LiquidLinear

_NORM_KINDS = (("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0))
_ACTIVATIONS = ("silu_mul", "gelu_tanh_mul")
# Sums in another order and a root that is not rounded to nearest change one value in thousands, by
# one step of bfloat16. Other roundings change one in four, and another function nearly all.
_FLIPS = 0.01
_STEP = 2.0**-7
_NOTHING = 1e-5  # where a GELU is next to nothing, torch's has cancelled
_ROWS, _SEED = 64, 21


class Unfit(Exception):
    """A layer cannot be fused; the message says why."""


@dataclass(frozen=True)
class Parts:
    """A layer that can be fused.

    Attributes:
        qkv, gate_up: names of the projections in attention and MLP.
    """

    fusion: Fusion
    qkv: list[str]
    gate_up: list[str]


def is_decoder_layer(module: nn.Module) -> bool:
    """Whether it looks like one, fit or not."""
    children = module._modules
    return all(isinstance(children.get(n), nn.Module) for n in ("self_attn", "mlp")) and any(
        "norm" in name for name in children
    )


def examine(layer: Any) -> Parts:
    """
    Raises:
        Unfit: the layer is made in another way, or computes something else.
    """
    if "forward" in vars(layer):
        raise Unfit("it has a forward of its own, such as accelerate gives to layers it moves")
    for name in ("input_layernorm", "post_attention_layernorm"):
        _child(layer, name)
    sandwich = "pre_feedforward_layernorm" in layer._modules
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if sandwich:
        known |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
        _child(layer, "post_feedforward_layernorm")
    for name, child in layer._modules.items():
        if name not in known and not isinstance(child, nn.Dropout):
            raise Unfit(f"{name}: a {type(child).__name__}, of which there is no rule")
    second = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
    qkv = _projections(
        layer.self_attn, "self_attn", (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
    )
    gate_up = _projections(layer.mlp, "mlp", (("gate_proj", "up_proj"), ("gate_up_proj",)))
    _child(layer.mlp, "down_proj", "mlp.")
    for name, module in _bypassed(layer, second):
        if _hooked(module):
            raise Unfit(f"{name}: it has hooks, which would not be called")
    return Parts(
        Fusion(
            first=_norm_kind(layer.input_layernorm, "input_layernorm"),
            second=_norm_kind(layer._modules[second], second),
            second_name=second,
            after_attention="post_attention_layernorm" if sandwich else None,
            after_mlp="post_feedforward_layernorm" if sandwich else None,
            activation=_activation(layer.mlp),
        ),
        list(qkv),
        list(gate_up),
    )


def _child(owner: nn.Module, name: str, prefix: str = "") -> nn.Module:
    child = owner._modules.get(name)
    if child is None:
        raise Unfit(f"{prefix}{name}: expected, but not there")
    return child


def _projections(
    owner: nn.Module, prefix: str, choices: tuple[tuple[str, ...], ...]
) -> tuple[str, ...]:
    names = next((c for c in choices if all(n in owner._modules for n in c)), None)
    if names is None:
        wanted = " or ".join(", ".join(choice) for choice in choices)
        raise Unfit(f"{prefix}: expected {wanted}")
    for name in names:
        layer = owner._modules[name]
        if type(layer) is not LiquidLinear:
            raise Unfit(f"{prefix}.{name}: expected a LiquidLinear, got a {type(layer).__name__}")
        if layer.scale.is_meta:
            raise Unfit(f"{prefix}.{name}: on the meta device, where nothing can be tried")
    return names


def _bypassed(layer: Any, second: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a fused layer does not call, or calls with something else."""
    yield "input_layernorm", layer.input_layernorm
    yield second, layer._modules[second]
    yield "mlp", layer.mlp
    for name in ("self_attn", "mlp"):
        for child, module in layer._modules[name]._modules.items():
            if isinstance(module, LiquidLinear):
                yield f"{name}.{child}", module


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _random(*shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    cpu = torch.randn(shape, generator=generator, device="cpu")
    return cpu.to(device, torch.bfloat16)


def _norm_kind(norm: nn.Module, name: str) -> NormKind:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        raise Unfit(f"{name}: expected a norm with a weight [K], got a {type(norm).__name__}")
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        raise Unfit(f"{name}: expected a norm with variance_epsilon or eps, got {eps!r}")
    x = 3 * _random(_ROWS, len(weight), device=weight.device)
    # Weights of its own may be all alike, which would not tell one kind from the other.
    other = 1 + _random(len(weight), device=weight.device) / 2
    try:
        expected = functional_call(norm, {"weight": other}, (x,))
    except Exception as error:  # whatever the module makes of it
        raise Unfit(f"{name}: {type(error).__name__}: {error}") from None
    for mode, offset in _NORM_KINDS:
        _, _, y = ops.rms_norm_quantize(x, other, eps, mode=mode, offset=offset, return_y=True)
        if _same_but_for_flips(y, expected):
            return NormKind(eps, mode, offset)
    raise Unfit(f"{name}: a {type(norm).__name__} that computes none of the known norms")


def _activation(mlp: Any) -> str:
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    if not callable(function):
        raise Unfit("mlp: expected act_fn or activation_fn, got none")
    device = mlp._modules["down_proj"].weight.device
    gate_up = 3 * _random(_ROWS, 2 * 96, device=device)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = function(gate) * up
    for activation in _ACTIVATIONS:
        _, y = ops.glu_quantize(gate_up, activation, return_y=True)
        if _same_but_for_flips(y, expected):
            return activation
    raise Unfit(f"mlp: its activation, {type(function).__name__}, is none that can be fused")


def _same_but_for_flips(y: Tensor | None, expected: Tensor) -> bool:
    """Whether two bfloat16 results differ in few values, and there by a step of the last place."""
    if not isinstance(y, Tensor) or not isinstance(expected, Tensor):
        return False
    if (y.shape, y.dtype) != (expected.shape, expected.dtype):
        return False
    one, other = y.float(), expected.float()
    difference = (one - other).abs()
    near = difference <= _STEP * torch.maximum(one.abs(), other.abs()) + _NOTHING
    return bool(near.all()) and (difference > _NOTHING).float().mean().item() <= _FLIPS
