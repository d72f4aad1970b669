"""A drop-in for ``nn.Linear`` that holds a LiquidQuant weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..formats.liquidquant import BLOCK_BYTES, BLOCK_BYTES_G32, FINE_GROUP, GROUP, group_of
from ..weights.quantize import quantize_weight
from ..weights.weight import Form, QuantizedWeight, dequantize_weight, zeros
from ._modules import as_linear, is_linear
from ._packing import bits_of, pack, unpack
from ._product import product
from ._stand_in import WeightStandIn, no_float_weight
from ._state import read_state

_LOGICAL = ("qweight", "qscale", "qoffset")
_STATE = (*_LOGICAL, "scale")


class LiquidLinear(nn.Module):
    """``y = x @ W.T + bias`` with a 4-bit weight and activations quantized to INT8 on the fly.

    The weight is held once, packed for the kernel: as INT8 or with 6-bit codes, without residual
    columns, where all columns are stored twice (`formats.int8`, `formats.liquidquant6`).
    ``state_dict`` holds the logical layout instead (``qweight``, ``qscale``, ``qoffset``,
    ``scale``, ``bias``), so that checkpoints do not depend on the kernel. Pickling and copying the
    module keep the packed layout.

    The names of the state_dict are attributes as well. Read, they are copies. Assigned (by the
    user, by torch.func.functional_call for the time of a call, or by accelerate), they go before
    the packed weight: every call packs them anew, until None is assigned in their place, or
    ``eval()``, ``train()``, ``to()`` or one of its kind packs them for good. A layer on the meta
    device has them alone, as there is nothing to pack.

    A new layer is zero until it is loaded. Nothing in it is trained, but gradients flow through it
    to x. Casts such as ``.half()`` change the bias alone: the scale stays float32, and the output
    has the dtype of x. ``weight`` tells shape, dtype and device, and holds no values.

    Attributes:
        out_dtype: dtype of the output; None for that of x. Of a head, ``torch.float32`` gives
            logits without a last rounding to 16 bits. Copies and pickles keep it, the
            ``state_dict`` does not.

    Args:
        in_features: K, 1 to 132 104.
        out_features: N, at least 1.
        bias: whether there is a bias.
        device: where the buffers live.
        dtype: dtype of the bias, and the one that ``weight`` tells: float32, bfloat16 or float16.
        augment: number of residual columns (see `QuantizedWeight`), a multiple of 64. Their
            activations are repeated at run time; the buffer ``columns`` says which.
        group_size: columns that share a step and an offset: 64 or 32. A weight that is loaded may
            have other groups.

    Shapes: x float32, bfloat16 or float16 ``[..., K]`` to y ``[..., N]`` of the dtype of x. Or x is
    `QuantizedTokens` of that shape, and y of the dtype that they had: the same bits, no derivative.

    Raises:
        ValueError: a size out of range, or another dtype.
        RuntimeError: in forward, for an x of other than K features and as `liquidgemm.linear`.
        TypeError: in forward, for an x that is neither; as ``weight`` is assigned or registered, or
            its values are used.
    """

    # Of the state_dict; a newer one is refused.
    _version = 1
    # Of the float weight, as casts change it. A default for pickles of older versions.
    _dtype = torch.float32

    packed: Tensor | None
    scale: Tensor
    bias: Tensor | None
    columns: Tensor | None
    # The class of the float layer in whose place it is: nn.Linear, or one that holds it transposed.
    replaces: type[nn.Module] = nn.Linear
    out_dtype: torch.dtype | None = None
    _part_of_merged = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        augment: int = 0,
        group_size: int = GROUP,
    ) -> None:
        super().__init__()
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        if self._dtype not in ops.FLOATS:
            raise ValueError(
                f"dtype: expected float32, bfloat16 or float16, got {self._dtype}"
                + (" (torch's default)" if dtype is None else "")
            )
        if out_features < 1:
            raise ValueError(f"out_features: expected at least 1, got {out_features}")
        zero = zeros(in_features, out_features, Form(augment, group_size), device)
        zero_bias = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self._set(zero, zero_bias)

    def _set(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.register_buffer("scale", weight.scale.clone())
        self.register_buffer("bias", bias)
        columns = weight.columns if weight.augment else None
        self.register_buffer("columns", None if columns is None else columns.clone())
        logical = [getattr(weight, name) for name in _LOGICAL]
        if weight.qweight.is_meta:
            self._hold(None, logical)
        else:
            self._hold(pack(logical, columns, self.in_features))

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
        linear: nn.Module,
        group_size: int = GROUP,
        method: str = "search",
        importance: Tensor | None = None,
    ) -> LiquidLinear:
        """Quantize a linear layer, on its own device; see `quantize_weight` for the arguments.

        GPT-2's Conv1D is one as well. A layer that computes something else with its weight, such as
        one with an adapter, is none.

        Raises:
            TypeError: linear is no linear layer.
            TypeError, ValueError: as `quantize_weight`.
        """
        plain = as_linear(linear)
        if plain is None or not (type(plain).forward is nn.Linear.forward or is_linear(plain)):
            raise TypeError(
                f"linear: expected an nn.Linear or a Conv1D, got {type(linear).__name__}, whose "
                "output may be more than the product with its weight"
            )
        weight = quantize_weight(plain.weight.detach(), group_size, method, importance)
        layer = cls.from_quantized(weight, plain.bias, plain.weight.dtype)
        layer.train(linear.training)
        if plain is not linear:
            layer.replaces = type(linear)
        return layer

    def forward(self, x: Tensor | ops.QuantizedTokens) -> Tensor:
        shape = getattr(x, "shape", None)  # faster than to ask for a Tensor
        if shape is None:
            raise TypeError(f"x: expected a Tensor or QuantizedTokens, got {type(x).__name__}")
        if len(shape) == 0 or shape[-1] != self.in_features:
            raise RuntimeError(
                f"x: expected K = {self.in_features} features in the last dimension, "
                f"got shape {list(shape)}"
            )
        # Not as attributes: that look-up is Python's last resort, and costs as much as the checks.
        held: dict[str, Any] = self._buffers
        if self.out_dtype is not None:
            if isinstance(x, ops.QuantizedTokens):
                x = x._replace(dtype=self.out_dtype)
            else:
                x = x.to(self.out_dtype)
        packed = held["packed"] if self._is_packed() else ops.pack_weight(*self._logical())
        return product(x, held["columns"], packed, held["scale"], held["bias"])

    def _is_packed(self) -> bool:
        """Whether the layer computes with ``packed``: nothing goes before it, or it before them."""
        given = self._buffers
        if given["qweight"] is None and given["qscale"] is None and given["qoffset"] is None:
            return True
        return given["packed"] is not None and "packed" not in self._non_persistent_buffers_set

    def _logical(self) -> list[Tensor]:
        """The logical tensors that the layer computes with."""
        packed = self._is_packed()
        given = [None if packed else self._buffers[name] for name in _LOGICAL]
        tensors = [tensor for tensor in given if tensor is not None]
        if len(tensors) == len(given):
            return tensors
        if self.packed is None:
            raise RuntimeError(f"{', '.join(_LOGICAL)}: expected tensors, got None")
        own = unpack(self.packed, self.out_features)
        return [b if a is None else a for a, b in zip(given, own, strict=True)]

    def _pack_for_good(self) -> None:
        """Hold the weight once, packed, or as logical tensors where it has no values."""
        packed = self.packed
        if self._is_packed() and packed is not None and not packed.is_meta:
            if self.columns is not None and packed.shape[-1] == BLOCK_BYTES:  # an older pickle's
                packed = pack(self._logical(), self.columns, self.in_features, packed)
            self._hold(packed)
            return
        tensors = self._logical()
        if any(tensor.is_meta for tensor in tensors):
            if self._is_packed():
                self._hold(None, tensors)
            return
        try:
            packed = pack(tensors, self.columns, self.in_features)
        except RuntimeError:  # of memory that is yet to be written to; forward says why
            return
        self._hold(packed)

    def _hold(self, packed: Tensor | None, logical: Iterable[Tensor | None] = (None,) * 3) -> None:
        weight = {"packed": packed, **dict(zip(_LOGICAL, logical, strict=True))}
        buffers = weight | self._buffers | weight
        self._buffers.clear()
        # torch.export counts on it that those which are None come last.
        self._buffers.update(sorted(buffers.items(), key=lambda buffer: buffer[1] is None))
        # Not persistent, as the state_dict has the logical tensors in its place. accelerate looks
        # for the values of all that are listed here.
        self._non_persistent_buffers_set.discard("packed")
        if packed is not None:
            self._non_persistent_buffers_set.add("packed")

    def train(self, mode: bool = True) -> LiquidLinear:
        self._pack_for_good()
        return super().train(mode)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight in the logical layout (unpacked anew on each call)."""
        qweight, qscale, qoffset = self._logical()
        return QuantizedWeight(qweight, qscale, qoffset, self.scale, self.in_features, self.columns)

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
    def group_size(self) -> int:
        """Columns that share a step and an offset in ``state_dict``: 64 or 32."""
        packed = self._buffers["packed"]
        if packed is not None and self._is_packed():
            return FINE_GROUP if packed.shape[-1] == BLOCK_BYTES_G32 else GROUP
        return group_of(*self._logical()[:2])

    @property
    def qweight(self) -> Tensor:
        """The codes as in ``state_dict``, uint8 ``[N, K / 2]``: a copy."""
        return self._logical()[0]

    @property
    def qscale(self) -> Tensor:
        """The steps as in ``state_dict``, uint8 ``[N, K / 64]`` or ``[N, K / 32]``: a copy."""
        return self._logical()[1]

    @property
    def qoffset(self) -> Tensor:
        """The offsets as in ``state_dict``, of the shape of the steps: a copy."""
        return self._logical()[2]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats ``[N, K]``."""
        return dequantize_weight(self.quantized_weight(), dtype)

    def extra_repr(self) -> str:
        more = "" if self.columns is None else f", augment={len(self.columns)}"
        if self.packed is not None and (bits := bits_of(self.packed)) != 4:
            more = f", bits={bits}"  # its columns are those of the checkpoint alone
        if self.group_size != GROUP:
            more += f", group_size={self.group_size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}{more}"
        )

    def _apply(self, fn, recurse: bool = True) -> LiquidLinear:
        scale = self.scale
        self._pack_for_good()
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            # A cast to another float type came along; only its change of device is wanted.
            self.scale = scale.to(self.scale.device)
        self._pack_for_good()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name in _LOGICAL:  # not there in pickles of older versions
            self._buffers.setdefault(name, None)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tensors = zip(_LOGICAL, self._logical(), strict=True)
        destination.update((prefix + name, tensor) for name, tensor in tensors)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Checks everything before it changes anything; problems go to error_msgs, as in torch."""
        optional = [name for name in ("bias", "columns") if getattr(self, name) is not None]
        names = [*_STATE, *optional]
        found = read_state(
            self, names, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
            error_msgs,
        )  # fmt: skip
        if found is None or not all(name in found for name in names if name != "bias"):
            return
        try:
            loaded = self._checked(found)
        except (ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix}{error}")
            return
        for name, tensor in loaded.items():
            if local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, tensor)
            elif self.scale.is_meta:
                error_msgs.append(f"{prefix}{name}: is on the meta device; load with assign=True")
            elif (old := self._buffers[name]) is None or old.shape != tensor.shape:
                setattr(self, name, tensor.to(self.scale.device, copy=True))
            elif name == "columns" and self._part_of_merged:
                # A merged layer knows them by their tensor, and has to notice other values.
                if not torch.equal(old, tensor.to(old.device)):
                    self.columns = tensor.to(old.device, copy=True)
            else:
                old.copy_(tensor)
        if not self.scale.is_meta:
            self._hold(self.packed)

    def _checked(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The buffers for a state, or an error that names the tensor, what was expected and got."""
        weight = QuantizedWeight(
            found["qweight"],
            found["qscale"],
            found["qoffset"],
            found["scale"],
            self.in_features,
            found.get("columns"),
        )
        if weight.out_features != self.out_features:
            raise ValueError(
                f"scale: expected shape [{self.out_features}], got [{weight.out_features}]"
            )
        if self.columns is not None and weight.augment != len(self.columns):
            raise ValueError(
                f"columns: expected shape [{len(self.columns)}], got [{weight.augment}]"
            )
        logical = [getattr(weight, name) for name in _LOGICAL]
        packed = pack(logical, weight.columns, self.in_features)
        buffers = {"packed": packed, "scale": weight.scale}
        if weight.columns is not None and weight.augment:
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
