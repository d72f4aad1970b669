"""What a checkpoint says of quantized layers, and whether it fits a model not yet touched."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..formats.liquidquant import GROUP
from ..nn._modules import as_linear
from ..nn.experts import LiquidExperts
from ..nn.float_experts import Layout, layout_of
from ..nn.linear import LiquidLinear
from ..nn.stack import STATE
from ..ops import FLOATS
from ..weights.weight import QuantizedWeight

_LOGICAL = ("qweight", "qscale", "qoffset", "scale")
_FREE = ("augment", "group_size")  # what a layer's weight says, not its float one


def experts_of(model: nn.Module) -> dict[str, dict]:
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LiquidExperts):
            if module.first_expert:
                raise ValueError(f"{name}: expected all experts of the layer, got a part of them")
            found[name] = module.sizes
    return found


def layers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: sizes_of(layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LiquidLinear)
    }


def sizes_of(layer: nn.Module) -> dict[str, Any]:
    """Arguments of the `LiquidLinear` that a linear layer, quantized or not, is or may become."""
    linear = layer if isinstance(layer, LiquidLinear) else cast(nn.Linear, as_linear(layer))
    sizes = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }
    if isinstance(linear, LiquidLinear) and linear.columns is not None:
        sizes["augment"] = len(linear.columns)
    if isinstance(linear, LiquidLinear) and linear.group_size != GROUP:
        sizes["group_size"] = linear.group_size
    return sizes


def dtype_of(layer: Any) -> torch.dtype:
    """The one that a quantized layer in the place of a float one has."""
    return layer.weight.dtype if layer.bias is None else layer.bias.dtype


def check_fit(
    model: nn.Module,
    layers: dict[str, dict],
    experts: dict[str, dict],
    state: dict[str, Tensor],
    directory: Path,
) -> None:
    """Raises a ValueError unless the state can be loaded into the model as a whole."""
    own = model.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items()}
    for name, sizes in experts.items():
        _check_experts(model, name, sizes, state, directory)
        for key in [key for key in expected if key.startswith(f"{name}.")]:
            del expected[key]
        found = (key for key in state if key.startswith(f"{name}."))
        expected.update((key, tuple(state[key].shape)) for key in found)
    for name, sizes in layers.items():
        layer = None
        with suppress(AttributeError):
            layer = model.get_submodule(name)
        if layer is None or not (isinstance(layer, LiquidLinear) or as_linear(layer)):
            kind = type(layer).__name__ if layer is not None else "nothing"
            raise ValueError(f"{name}: expected a linear layer in the model, got {kind}")
        got, wanted, augment, group_size = sizes_of(layer), sizes, 0, GROUP
        if not isinstance(layer, LiquidLinear) and (dtype := dtype_of(layer)) not in FLOATS:
            raise ValueError(
                f"{name}: expected a layer of float32, bfloat16 or float16 in the model, got one "
                f"of {dtype}"
            )
        if isinstance(sizes, dict):  # of residual columns a layer can get any number, and groups
            wanted = {key: value for key, value in sizes.items() if key not in _FREE}
            augment, group_size = sizes.get("augment", 0), sizes.get("group_size", GROUP)
            for key in _FREE:
                got.pop(key, None)
            for key, number in zip(_FREE, (augment, group_size), strict=True):
                if type(number) is not int:
                    raise ValueError(
                        f"{name}: expected an integer for {key} in {directory}, got {number!r}"
                    )
        if not _same(got, wanted):
            raise ValueError(f"{name}: expected {wanted} as in {directory}, got {got}")
        for key in ("weight", "columns"):
            expected.pop(f"{name}.{key}", None)
        keys = (*_LOGICAL, "columns") if augment else _LOGICAL
        if missing := [key for key in keys if f"{name}.{key}" not in state]:
            raise ValueError(f"{name}: {', '.join(missing)} missing in {directory}")
        tensors: dict[str, Any] = {key: state[f"{name}.{key}"] for key in keys}
        try:
            weight = QuantizedWeight(**tensors, in_features=got["in_features"])
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
        if weight.out_features != got["out_features"]:
            raise ValueError(
                f"{name}.scale: expected {got['out_features']} rows, got {weight.out_features}"
            )
        if weight.augment != augment:
            raise ValueError(f"{name}.columns: expected {augment} columns, got {weight.augment}")
        if weight.group_size != group_size:
            raise ValueError(
                f"{name}.qscale: expected groups of {group_size!r}, got {weight.group_size}"
            )
        expected.update((f"{name}.{key}", tuple(t.shape)) for key, t in tensors.items())
    for key in sorted(expected.keys() | state.keys()):
        if key not in state:
            raise ValueError(f"{key}: in the model, but missing in {directory}")
        if key not in expected:
            raise ValueError(f"{key}: in {directory}, but not in the model")
        if tuple(state[key].shape) != expected[key]:
            raise ValueError(
                f"{key}: expected shape {list(expected[key])} as in the model, "
                f"got {list(state[key].shape)}"
            )
        if key in own and not _loads_as(state[key].dtype, own[key].dtype):
            raise ValueError(
                f"{key}: expected dtype {own[key].dtype} as in the model, got {state[key].dtype}"
            )


def _check_experts(
    model: nn.Module, name: str, sizes: object, state: dict[str, Tensor], directory: Path
) -> None:
    """Raises a ValueError unless the model has such experts there, and the state all of theirs."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    layout = None if module is None else layout_of(module)
    if not isinstance(module, LiquidExperts) and not isinstance(layout, Layout):
        kind = layout or (type(module).__name__ if module is not None else "nothing")
        raise ValueError(f"{name}: expected experts in the model, got {kind}")
    got = (module if isinstance(module, LiquidExperts) else cast(Layout, layout)).sizes
    if not _same(got, sizes):
        raise ValueError(f"{name}: expected {sizes} as in {directory}, got {got}")
    like = LiquidExperts(**got, device="meta")
    for part, stack in (("gate_up", like.gate_up), ("down", like.down)):
        for key, tensor in stack.state_dict().items():
            full = f"{name}.{part}.{key}"
            if full not in state:
                raise ValueError(f"{full}: missing in {directory}")
            stored = state[full]
            if stored.shape != tensor.shape or not _loads_as(stored.dtype, tensor.dtype):
                raise ValueError(
                    f"{full}: expected {tensor.dtype} {list(tensor.shape)}, got {stored.dtype} "
                    f"{list(stored.shape)}"
                )
        for e in range(stack.num_experts):
            try:
                qweight, qscale, qoffset, scale = (
                    state[f"{name}.{part}.{key}"][e] for key in STATE
                )
                QuantizedWeight(qweight, qscale, qoffset, scale, stack.in_features)
            except ValueError as error:
                raise ValueError(f"{name}.{part}.{error}: expert {e}") from None
    known = {f"{name}.{key}" for key in like.state_dict()}
    if extra := sorted(k for k in state if k.startswith(f"{name}.") and k not in known):
        raise ValueError(f"{extra[0]}: in {directory}, but not in the model")


def _same(got: dict[str, Any], wanted: object) -> bool:
    """Whether they are equal, of the same types: 64.0 is no size of a tensor."""
    return (
        isinstance(wanted, dict)
        and got == wanted
        and all(type(value) is type(wanted[key]) for key, value in got.items())
    )


def _loads_as(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Floats are converted to the precision of the model; everything else has to be the same."""
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point)
