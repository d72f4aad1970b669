"""A drop-in for ``nn.Linear`` that holds a LiquidQuant weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from ._stand_in import WeightStandIn, no_float_weight
from .format import GROUP, ceil_div
from .quantize import quantize_weight
from .weight import QuantizedWeight, dequantize_weight

_LOGICAL = ("qweight", "qscale", "qoffset", "scale")


class LiquidLinear(nn.Module):
    """``y = x @ W.T + bias`` with a 4-bit weight and activations quantized to INT8 on the fly.

    The weight is held once, packed for the kernel. ``state_dict`` holds the logical layout instead
    (``qweight``, ``qscale``, ``qoffset``, ``scale``, ``bias``), so that checkpoints do not depend
    on the kernel. Pickling and copying the module keep the packed layout.

    A new layer is zero until it is loaded. Nothing in it is trained, but gradients flow through it
    to x. Casts such as ``.half()`` change the bias alone: the scale stays float32, and the output
    always has the dtype of x. ``weight`` tells shape, dtype and device, and holds no values.

    Args:
        in_features: K, 1 to 132 104.
        out_features: N, at least 1.
        bias: whether there is a bias.
        device: where the buffers live.
        dtype: dtype of the bias, and the one that ``weight`` tells: float32, bfloat16 or float16.
        augment: number of residual columns (see `QuantizedWeight`), a multiple of 64. Their
            activations are repeated at run time; the buffer ``columns`` says which.

    Shapes: x float32, bfloat16 or float16 ``[..., K]`` to y ``[..., N]`` of the dtype of x.

    Raises:
        ValueError: a size out of range.
        RuntimeError: in forward, for an x of other than K features and as `liquidgemm.linear`.
        TypeError: as ``weight`` is assigned or registered, or its values are used.
    """

    # Of the state_dict; a newer one is refused.
    _version = 1
    # Of the float weight, as casts change it. A default for pickles of older versions.
    _dtype = torch.float32

    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    columns: Tensor | None
    # The class of the float layer in whose place it is: nn.Linear, or one that holds it transposed.
    replaces: type[nn.Module] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        augment: int = 0,
    ) -> None:
        super().__init__()
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        if out_features < 1:
            raise ValueError(f"out_features: expected at least 1, got {out_features}")
        if augment < 0 or augment % GROUP:
            raise ValueError(f"augment: expected a multiple of {GROUP}, got {augment}")
        groups = ceil_div(in_features, GROUP) + augment // GROUP
        zero = QuantizedWeight(
            qweight=torch.zeros(
                out_features, groups * GROUP // 2, dtype=torch.uint8, device=device
            ),
            qscale=torch.ones(out_features, groups, dtype=torch.uint8, device=device),
            qoffset=torch.full((out_features, groups), 128, dtype=torch.uint8, device=device),
            scale=torch.zeros(out_features, dtype=torch.float32, device=device),
            in_features=in_features,
            columns=torch.zeros(augment, dtype=torch.int32, device=device) if augment else None,
        )
        zero_bias = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self._set(zero, zero_bias)

    def _set(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        # Not persistent: the state_dict has the logical tensors in its place.
        self.register_buffer("packed", _pack(weight), persistent=False)
        self.register_buffer("scale", weight.scale.clone())
        self.register_buffer("bias", bias)
        self.register_buffer("columns", weight.columns.clone() if weight.augment else None)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> LiquidLinear:
        """A layer around a quantized weight; the bias ``[N]`` is copied to the weight's device.

        A layer without a bias takes the dtype that its ``weight`` tells from ``dtype``.
        """
        layer = cls(
            weight.in_features, weight.out_features, bias is not None, device="meta", dtype=dtype
        )
        if bias is not None:
            if list(bias.shape) != [weight.out_features] or bias.dtype not in ops.FLOATS:
                raise ValueError(
                    f"bias: expected float32, bfloat16 or float16 of shape "
                    f"[{weight.out_features}], got {bias.dtype} of shape {list(bias.shape)}"
                )
            bias = bias.detach().to(weight.scale.device, copy=True)
        layer._set(weight, bias)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = GROUP,
        method: str = "search",
        importance: Tensor | None = None,
    ) -> LiquidLinear:
        """Quantize a linear layer, on its own device; see `quantize_weight` for the arguments.

        Raises:
            TypeError, ValueError: as `quantize_weight`.
        """
        weight = quantize_weight(linear.weight.detach(), group_size, method, importance)
        layer = cls.from_quantized(weight, linear.bias, linear.weight.dtype)
        layer.train(linear.training)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise RuntimeError(
                f"x: expected K = {self.in_features} features in the last dimension, "
                f"got shape {list(x.shape)}"
            )
        if self.columns is not None:
            # Before they are rounded: the scale of a token does not change by it, nor do the bits,
            # and gradients find their way.
            whole = F.pad(x, (0, -self.in_features % GROUP))
            x = torch.cat((whole, x.index_select(-1, self.columns)), dim=-1)
        return ops.linear(x, self.packed, self.scale, self.bias)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight in the logical layout (unpacked anew on each call)."""
        tensors = ops.unpack_weight(self.packed, self.out_features)
        return QuantizedWeight(*tensors, self.scale, self.in_features, self.columns)

    @property
    def weight(self) -> WeightStandIn:
        """Shape ``[N, K]``, dtype and device of the float weight; it has no values."""
        dtype = self._dtype if self.bias is None else self.bias.dtype
        return WeightStandIn((self.out_features, self.in_features), dtype, self.scale.device)

    @weight.setter
    def weight(self, value: object) -> None:
        raise TypeError(no_float_weight("weight = ..."))

    @weight.deleter
    def weight(self) -> None:
        raise TypeError(no_float_weight("del weight"))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise TypeError(no_float_weight("weight = ..."))
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if name == "weight":
            raise TypeError(no_float_weight("weight = ..."))
        super().register_buffer(name, tensor, persistent)

    @property
    def qweight(self) -> Tensor:
        """The codes as in ``state_dict``, uint8 ``[N, K / 2]`` (unpacked anew on each call)."""
        return ops.unpack_weight(self.packed, self.out_features)[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats ``[N, K]``."""
        return dequantize_weight(self.quantized_weight(), dtype)

    def extra_repr(self) -> str:
        augment = "" if self.columns is None else f", augment={len(self.columns)}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}{augment}"
        )

    def _apply(self, fn, recurse: bool = True) -> LiquidLinear:
        scale = self.scale
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            # A cast to another float type came along; only its change of device is wanted.
            self.scale = scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        names = ("qweight", "qscale", "qoffset")
        tensors = ops.unpack_weight(self.packed, self.out_features)
        destination.update((prefix + name, t) for name, t in zip(names, tensors, strict=True))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Checks everything before it changes anything; problems go to error_msgs, as in torch."""
        optional = [name for name in ("bias", "columns") if getattr(self, name) is not None]
        names = [*_LOGICAL, *optional]
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing_keys += [prefix + name for name in names if name not in found]
        if strict:
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix) and key.removeprefix(prefix) not in names
            ]
        if (version := local_metadata.get("version", self._version)) > self._version:
            error_msgs.append(
                f"{prefix}: expected state of version {self._version} or older, got {version}: "
                "it was saved by a newer liquidgemm"
            )
            return
        if not all(name in found for name in names if name != "bias"):
            return
        try:
            loaded = self._checked(found)
        except (ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix}{error}")
            return
        for name, tensor in loaded.items():
            if local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, tensor)
            elif getattr(self, name).is_meta:
                error_msgs.append(f"{prefix}{name}: is on the meta device; load with assign=True")
            else:
                getattr(self, name).copy_(tensor)

    def _checked(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The buffers for a state, or an error that names the tensor, what was expected and got."""
        weight = QuantizedWeight(
            *(found[name] for name in _LOGICAL), self.in_features, found.get("columns")
        )
        if weight.out_features != self.out_features:
            raise ValueError(
                f"scale: expected shape [{self.out_features}], got [{weight.out_features}]"
            )
        if self.columns is not None and weight.augment != len(self.columns):
            raise ValueError(
                f"columns: expected shape [{len(self.columns)}], got [{weight.augment}]"
            )
        buffers = {"packed": _pack(weight), "scale": weight.scale}
        if weight.augment:
            buffers["columns"] = weight.columns
        if "bias" in found:
            bias = found["bias"]
            if list(bias.shape) != [self.out_features] or bias.dtype not in ops.FLOATS:
                raise ValueError(
                    f"bias: expected float32, bfloat16 or float16 of shape [{self.out_features}], "
                    f"got {bias.dtype} of shape {list(bias.shape)}"
                )
            buffers["bias"] = bias
        return buffers


def _pack(weight: QuantizedWeight) -> Tensor:
    return ops.pack_weight(weight.qweight, weight.qscale, weight.qoffset)
