"""The weights of some experts, one shape, packed one after the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import ops
from ..formats.liquidquant import BLOCK_BYTES, GROUP, PANEL, ceil_div
from ..ops import INTERLEAVE
from ..weights.weight import QuantizedWeight, dequantize_weight
from ._state import read_state

_LOGICAL = ("qweight", "qscale", "qoffset")
STATE = (*_LOGICAL, "scale")
_EMPTY = dict(zip(_LOGICAL, (0, 1, 128), strict=True))  # what decodes to zero


class ExpertStack(nn.Module):
    """Quantized weights ``[N, K]`` of E experts, as `LiquidExperts` holds them.

    Held once, packed for the kernel. ``state_dict`` holds the logical layout with a leading axis of
    experts: ``qweight`` uint8 ``[E, N, K / 2]``, ``qscale`` and ``qoffset`` uint8
    ``[E, N, K / 64]``, ``scale`` float32 ``[E, N]`` and, if there is one, ``bias`` ``[E, N]``. K is
    padded to a multiple of 64 in it. New experts are zero.

    Args:
        num_experts: E.
        in_features: K.
        out_features: N.
        gated: whether the rows are the two halves of a gated layer, which are interleaved for
            `liquidgemm.ops.grouped_gemm`; N is even.
        bias: whether there is one.
        device: where the buffers live.
        dtype: of the bias, and the one that the float weights had.

    Attributes:
        packed, row_scale, row_bias: what the ops take.
        dtype: of the float weights, as casts have changed it.
    """

    _version = 1

    packed: Tensor
    row_scale: Tensor
    row_bias: Tensor | None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        gated: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if self.dtype not in ops.FLOATS:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype}")
        for name, size in (("num_experts", num_experts), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if gated and out_features % 2:
            raise ValueError(f"out_features: expected two halves, got {out_features}")
        self.num_experts, self.in_features, self.out_features = (
            num_experts,
            in_features,
            out_features,
        )
        self.gated = gated
        groups = ceil_div(in_features, GROUP)
        zero = [torch.full((out_features, groups * GROUP // 2), 0, dtype=torch.uint8)]
        zero += [torch.full((out_features, groups), _EMPTY[name]).byte() for name in _LOGICAL[1:]]
        packed = ops.pack_weight(*map(self._to_rows, zero, _EMPTY.values()))
        rows = self._rows()
        expanded = packed.expand(num_experts, *packed.shape)
        self.register_buffer("packed", expanded.to(device, copy=True).contiguous(), False)
        scale = torch.zeros(num_experts, rows, dtype=torch.float32, device=device)
        self.register_buffer("row_scale", scale, persistent=False)
        zero_bias = torch.zeros(num_experts, rows, dtype=self.dtype, device=device)
        self.register_buffer("row_bias", zero_bias if bias else None, persistent=False)

    def _rows(self) -> int:
        """Rows that are packed: those of a gated layer are filled up to whole eights."""
        if not self.gated:
            return self.out_features
        return 2 * INTERLEAVE * ceil_div(self.out_features // 2, INTERLEAVE)

    def _to_rows(self, tensor: Tensor, filler: float = 0) -> Tensor:
        """Logical rows ``[N, ...]`` in the order in which they are packed."""
        if not self.gated:
            return tensor
        halves = tensor.unflatten(0, (2, -1))
        missing = -halves.shape[1] % INTERLEAVE
        if missing:
            fill = halves.new_full((2, missing, *halves.shape[2:]), filler)
            halves = torch.cat((halves, fill), 1)
        return halves.unflatten(1, (-1, INTERLEAVE)).transpose(0, 1).flatten(0, 2)

    def _from_rows(self, tensor: Tensor) -> Tensor:
        """Inverse of `_to_rows`."""
        if not self.gated:
            return tensor
        halves = tensor.unflatten(0, (-1, 2, INTERLEAVE)).transpose(0, 1).flatten(1, 2)
        return halves[:, : self.out_features // 2].flatten(0, 1)

    def set(self, expert: int, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """Give an expert its weight; the tensors are copied to the stack's device.

        Raises:
            ValueError: another size, residual columns, groups of 32, or a bias where there is none
                or the other way round.
        """
        size = (weight.out_features, weight.in_features)
        if size != (self.out_features, self.in_features):
            raise ValueError(
                f"weight: expected {self.out_features} x {self.in_features} as of the other "
                f"experts, got {size[0]} x {size[1]}"
            )
        if weight.augment:
            raise ValueError(
                f"weight: expected no residual columns in an expert, got {weight.augment}"
            )
        if weight.group_size != GROUP:
            raise ValueError(
                f"weight: expected groups of {GROUP} in an expert, got {weight.group_size}"
            )
        if (bias is None) != (self.row_bias is None):
            raise ValueError(
                f"bias: expected {'none' if bias is not None else 'one'} in expert {expert}"
            )
        weight = weight.to(self.packed.device)
        self.packed[expert] = self._pack(*(getattr(weight, name) for name in _LOGICAL))
        self.row_scale[expert] = self._to_rows(weight.scale)
        if bias is not None and self.row_bias is not None:
            self.row_bias[expert] = self._to_rows(bias.to(self.row_bias))

    def _pack(self, *logical: Tensor) -> Tensor:
        return ops.pack_weight(*map(self._to_rows, logical, _EMPTY.values()))

    def quantized_weight(self, expert: int) -> QuantizedWeight:
        """An expert's weight in the logical layout (unpacked anew on each call)."""
        logical = ops.unpack_weight(self.packed[expert], self._rows())
        qweight, qscale, qoffset = map(self._from_rows, logical)
        scale = self._from_rows(self.row_scale[expert])
        return QuantizedWeight(qweight, qscale, qoffset, scale, self.in_features)

    def dequantize(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An expert's weight as floats ``[N, K]``."""
        return dequantize_weight(self.quantized_weight(expert), dtype)

    def bias(self, expert: int) -> Tensor | None:
        """An expert's bias ``[N]``."""
        return None if self.row_bias is None else self._from_rows(self.row_bias[expert])

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.row_bias is not None}"
        )

    def _apply(self, fn, recurse: bool = True) -> ExpertStack:
        scale = self.row_scale
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        if self.row_scale.dtype != torch.float32:
            # A cast to another float type came along; only its change of device is wanted.
            self.row_scale = scale.to(self.row_scale.device)
        return self

    def _state(self) -> dict[str, Tensor]:
        """The logical tensors, one expert at a time."""
        groups = ceil_div(self.in_features, GROUP)
        e, n = self.num_experts, self.out_features
        shapes = ((e, n, groups * GROUP // 2), (e, n, groups), (e, n, groups))
        state = {
            name: self.packed.new_empty(shape) for name, shape in zip(_LOGICAL, shapes, strict=True)
        }
        for expert in range(0 if self.packed.is_meta else e):
            logical = ops.unpack_weight(self.packed[expert], self._rows())
            for name, tensor in zip(_LOGICAL, logical, strict=True):
                state[name][expert] = self._from_rows(tensor)
        state["scale"] = self._logical_rows(self.row_scale)
        if self.row_bias is not None:
            state["bias"] = self._logical_rows(self.row_bias)
        return state

    def _logical_rows(self, tensor: Tensor) -> Tensor:
        """``[E, rows]`` to ``[E, N]``, contiguous."""
        return self._from_rows(tensor.T).T.contiguous()

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update((prefix + name, tensor) for name, tensor in self._state().items())

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Checks everything before it changes anything; problems go to error_msgs, as in torch."""
        names = STATE if self.row_bias is None else (*STATE, "bias")
        found = read_state(
            self, names, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
            error_msgs,
        )  # fmt: skip
        if found is None or len(found) < len(names):
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        if self.packed.is_meta and not assign:
            error_msgs.append(f"{prefix}qweight: is on the meta device; load with assign=True")
            return
        try:
            self.load_logical(found, found["scale"].device if assign else self.packed.device)
        except (ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix}{error}")

    def load_logical(self, found: dict[str, Tensor], device: torch.device) -> None:
        """Take the tensors of a state, and pack them on a device.

        Raises:
            ValueError: a wrong shape, dtype or value; nothing has changed.
        """
        e, n = self.num_experts, self.out_features
        for name, tensor in found.items():
            if tensor.dim() < 2 or list(tensor.shape[:2]) != [e, n]:
                raise ValueError(
                    f"{name}: expected shape [{e}, {n}, ...], got {list(tensor.shape)}"
                )
        if "bias" in found and (found["bias"].dim() != 2 or found["bias"].dtype not in ops.FLOATS):
            raise ValueError(
                f"bias: expected floats [{e}, {n}], got {found['bias'].dtype} of "
                f"{list(found['bias'].shape)}"
            )
        rows = self._rows()
        panels, groups = ceil_div(rows, PANEL), ceil_div(self.in_features, GROUP)
        packed = torch.empty(e, panels, groups, BLOCK_BYTES, dtype=torch.uint8, device=device)
        for expert in range(e):
            try:
                qweight, qscale, qoffset, scale = (found[name][expert] for name in STATE)
                weight = QuantizedWeight(qweight, qscale, qoffset, scale, self.in_features)
                if weight.group_size != GROUP:
                    got = weight.group_size
                    raise ValueError(f"qscale: expected groups of {GROUP}, got {got}")
            except ValueError as error:
                raise ValueError(f"expert {expert}: {error}") from None
            packed[expert] = self._pack(*(getattr(weight, name).to(device) for name in _LOGICAL))
        self.packed = packed
        self.row_scale = self._to_rows(found["scale"].T).T.contiguous().to(device)
        if "bias" in found and self.row_bias is not None:
            dtype = found["bias"].dtype if self.row_bias.is_meta else self.row_bias.dtype
            self.row_bias = self._to_rows(found["bias"].T).T.contiguous().to(device, dtype)

    @classmethod
    def like(cls, other: ExpertStack, num_experts: int, device: torch.device) -> ExpertStack:
        """Zeros of the other's kind for some number of experts."""
        return cls(
            num_experts,
            other.in_features,
            other.out_features,
            other.gated,
            other.row_bias is not None,
            device,
            other.dtype if other.row_bias is None else other.row_bias.dtype,
        )

    def narrow_experts(self, start: int, length: int) -> ExpertStack:
        """Experts ``start`` to ``start + length``, copied."""
        _check_range("experts", start, length, self.num_experts)
        part = ExpertStack.like(self, 1, torch.device("meta"))
        part.num_experts = length
        for name in ("packed", "row_scale", "row_bias"):
            tensor = getattr(self, name)
            setattr(part, name, None if tensor is None else tensor.narrow(0, start, length).clone())
        return part.train(self.training)

    def mapped(self, function, in_features: int, out_features: int, bias: bool) -> ExpertStack:
        """A stack of what ``function(weight, bias)`` makes of each expert."""
        result = ExpertStack(
            self.num_experts,
            in_features,
            out_features,
            self.gated,
            bias,
            self.packed.device,
            self.dtype if self.row_bias is None else self.row_bias.dtype,
        )
        for e in range(self.num_experts):
            result.set(e, *function(self.quantized_weight(e), self.bias(e)))
        return result.train(self.training)


def stack_of(
    experts: Iterable[tuple[QuantizedWeight, Tensor | None]],
    num_experts: int,
    gated: bool,
    dtype: torch.dtype,
) -> ExpertStack:
    """A stack of weights and biases, which are taken one by one."""
    stack = None
    for e, (weight, bias) in enumerate(experts):
        if stack is None:
            stack = ExpertStack(
                num_experts,
                weight.in_features,
                weight.out_features,
                gated,
                bias is not None,
                weight.scale.device,
                dtype if bias is None else bias.dtype,
            )
        stack.set(e, weight, bias)
    if stack is None:
        raise ValueError("experts: expected at least one, got none")
    return stack


def _check_range(what: str, start: int, length: int, size: int) -> None:
    if start < 0 or length < 1 or start + length > size:
        raise ValueError(
            f"{what}: expected a non-empty slice of 0 to {size}, got {start} to {start + length}"
        )
