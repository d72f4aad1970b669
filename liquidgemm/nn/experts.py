"""A layer of gated experts with LiquidQuant weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..weights.quantize import quantize_weight
from ..weights.weight import QuantizedWeight, joined
from ._modules import as_linear
from .float_experts import Layout, layout_of, mapped, without_data
from .stack import STATE, ExpertStack, _check_range, stack_of


class LiquidExperts(nn.Module):
    """``sum_j w_j * down(act(gate(x)) * up(x))`` over the experts that each token is routed to.

    It has the signature of transformers' experts and takes their place. Weights have 4 bits,
    activations are quantized to INT8 on the fly, and all of it is one op, `liquidgemm.ops.moe`. A
    token's output depends on that token and its own experts alone, which are added in the order in
    which the router names them.

    The children ``gate_up`` and ``down`` hold the weights (`ExpertStack`): in ``state_dict``, in
    the logical layout with a leading axis of experts, rows of the gate before those of up.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: "silu_mul", "gelu_tanh_mul" or "swiglu_clamped".
        bias: whether experts have biases.
        device: where the buffers live.
        dtype: of the biases, and the one that the float weights had.

    Attributes:
        first_expert: id of the first expert that is here; `narrow_experts` sets it.
        total_experts: of the whole layer; as many as here but for parts of `narrow_experts`.

    Shapes: hidden_states ``[..., H]`` of T tokens in all, top_k_index ``[T, k]``, top_k_weights
    ``[T, k]`` to ``[..., H]`` of the dtype of hidden_states. Ids of experts that are not here add
    nothing.

    Raises:
        ValueError: an unknown activation, or a size out of range.
        RuntimeError: in forward, as `liquidgemm.ops.moe`.
    """

    # The float module in whose place it is, without its weights, and how they lie in it.
    _float: tuple[nn.Module, Layout] | None = None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu_mul",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner, hidden = intermediate_size, hidden_size
        self._set(
            ExpertStack(num_experts, hidden, 2 * inner, True, bias, device, dtype),
            ExpertStack(num_experts, inner, hidden, False, bias, device, dtype),
            activation,
        )

    def _set(self, gate_up: ExpertStack, down: ExpertStack, activation: str) -> None:
        if activation not in ops.GATED:
            raise ValueError(f"activation: expected one of {ops.GATED}, got {activation!r}")
        self.num_experts = gate_up.num_experts
        self.hidden_size, self.intermediate_size = gate_up.in_features, down.in_features
        self.activation, self.first_expert = activation, 0
        self.total_experts = self.num_experts
        self.gate_up, self.down = gate_up, down

    @classmethod
    def from_stacks(
        cls, gate_up: ExpertStack, down: ExpertStack, activation: str = "silu_mul"
    ) -> LiquidExperts:
        """A layer around two stacks.

        Raises:
            ValueError: they do not fit together, or the activation is unknown.
        """
        experts = (gate_up.num_experts, gate_up.out_features, gate_up.in_features)
        if not gate_up.gated or experts != (
            down.num_experts,
            2 * down.in_features,
            down.out_features,
        ):
            raise ValueError(
                f"gate_up, down: expected gated [E, 2 I, H] and [E, H, I], got {gate_up} and {down}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(gate_up, down, activation)
        return layer

    @classmethod
    def from_quantized(
        cls,
        gate_up: Sequence[QuantizedWeight],
        down: Sequence[QuantizedWeight],
        activation: str = "silu_mul",
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> LiquidExperts:
        """A layer of quantized weights ``[2 I, H]``, the gate's rows first, and ``[H, I]``.

        Args:
            gate_up_bias: ``[E, 2 I]``, the gate's first.
            down_bias: ``[E, H]``.
            dtype: that the float weights had; torch's default if None.

        Raises:
            ValueError: sizes that do not fit together.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        stacks = []
        for weights, bias, gated in ((gate_up, gate_up_bias, True), (down, down_bias, False)):
            biases = [None] * len(weights) if bias is None else bias
            pairs = zip(weights, biases, strict=True)
            stacks.append(stack_of(pairs, len(weights), gated, dtype))
        return cls.from_stacks(stacks[0], stacks[1], activation)

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module | Iterable[nn.Module],
        activation: str | None = None,
        method: str = "search",
    ) -> LiquidExperts:
        """Quantize experts, one at a time, on their own device.

        Args:
            experts: a module of transformers that keeps its experts in stacked parameters; or one
                module per expert, with linear layers ``gate_proj``, ``up_proj`` and ``down_proj``,
                or ``w1``, ``w3`` and ``w2``.
            activation: of the latter, "silu_mul" if None; the former know theirs.
            method: as in `quantize_weight`.

        Raises:
            TypeError: they are no such experts; the message says why.
            ValueError: as `quantize_weight`, or sizes that differ.
        """
        if not isinstance(experts, nn.Module) or isinstance(experts, nn.ModuleList):
            return cls._from_list(list(experts), activation or "silu_mul", method)
        layout = layout_of(experts)
        if not isinstance(layout, Layout):
            raise TypeError(
                f"experts: {layout or f'expected experts, got a {type(experts).__name__}'}"
            )
        if activation not in (None, layout.activation):
            raise ValueError(f"activation: expected {layout.activation!r}, got {activation!r}")
        order = layout.order()

        def halves():
            for e in range(layout.num_experts):
                weight = quantize_weight(layout.gate_up(experts, e), method=method)
                bias = layout.biases(experts, e)[0]
                yield in_order(weight, bias, order)

        def downs():
            for e in range(layout.num_experts):
                weight = quantize_weight(layout.down(experts, e), method=method)
                yield weight, layout.biases(experts, e)[1]

        dtype = experts.get_parameter(layout.parameters[0]).dtype
        layer = cls.from_stacks(
            stack_of(halves(), layout.num_experts, True, dtype),
            stack_of(downs(), layout.num_experts, False, dtype),
            layout.activation,
        )
        layer.stands_for(experts, layout)
        return layer.train(experts.training)

    @classmethod
    def _from_list(cls, experts: list[nn.Module], activation: str, method: str) -> LiquidExperts:
        names = ("gate_proj", "up_proj", "down_proj")
        if experts and not hasattr(experts[0], "gate_proj"):
            names = ("w1", "w3", "w2")
        layers = []
        for e, expert in enumerate(experts):
            found = [as_linear(getattr(expert, name, None)) for name in names]
            three = [layer for layer in found if layer is not None]
            if len(three) < len(names):
                raise TypeError(f"experts: expected linear layers {', '.join(names)} in expert {e}")
            layers.append(three)
        if not layers:
            raise ValueError("experts: expected at least one, got none")

        def halves():
            for gate, up, _ in layers:
                weight = quantize_weight(torch.cat((gate.weight, up.weight)), method=method)
                yield (
                    weight,
                    None if gate.bias is None else torch.cat((gate.bias, up.bias)).detach(),
                )

        def downs():
            for _, _, down in layers:
                weight = quantize_weight(down.weight, method=method)
                yield weight, None if down.bias is None else down.bias.detach()

        dtype = layers[0][0].weight.dtype
        return cls.from_stacks(
            stack_of(halves(), len(layers), True, dtype),
            stack_of(downs(), len(layers), False, dtype),
            activation,
        ).train(experts[0].training)

    def stands_for(self, experts: nn.Module, layout: Layout) -> None:
        """Take note of the float module in whose place it is, for `to_float`."""
        self._float = (without_data(experts), layout)
        # What the model's code may ask it for.
        for key, value in vars(experts).items():
            if isinstance(value, int | float | str) and not hasattr(self, key):
                setattr(self, key, value)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The float module that it stands for, with the values of the quantized weights.

        Raises:
            ValueError: it stands for none.
        """
        if self._float is None:
            raise ValueError("experts: expected some that took a float module's place, got others")
        shell, layout = self._float
        dtype = dtype or self.gate_up.dtype
        device = self.gate_up.packed.device
        module = mapped(shell, lambda t: torch.empty_like(t, dtype=dtype, device=device))
        for e in range(self.num_experts):
            gate_up, down = self.gate_up.dequantize(e, dtype), self.down.dequantize(e, dtype)
            biases = self.gate_up.bias(e), self.down.bias(e)
            layout.write(module, e, gate_up, down, biases)
        return module.train(self.training)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        size = hidden_states.shape[-1] if hidden_states.dim() else 0
        if size != self.hidden_size:
            raise RuntimeError(
                f"hidden_states: expected {self.hidden_size} features in the last dimension, got "
                f"shape {list(hidden_states.shape)}"
            )
        x = hidden_states.reshape(-1, size)
        if top_k_index is None or top_k_weights is None:
            top_k_index, top_k_weights = self._in_turn(x)
        ids = top_k_index.reshape(len(x), -1)
        if self.first_expert:
            ids = ids - self.first_expert
        first, second = self.gate_up, self.down
        y = ops.moe(
            x,
            ids,
            top_k_weights.reshape(len(x), -1),
            first.packed,
            first.row_scale,
            second.packed,
            second.row_scale,
            first.row_bias,
            second.row_bias,
            self.activation,
            self.total_experts,
        )
        return y.view(hidden_states.shape)

    def _in_turn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The routing of rows that come sorted, as many for each expert.

        A row of zeros is of a token that is not routed there: it adds nothing.
        """
        if self._float is None or not self._float[1].in_turn:
            raise TypeError("forward: expected top_k_index and top_k_weights, got None")
        ids = torch.arange(self.num_experts, device=x.device).unsqueeze(1)
        ids = ids.expand(self.num_experts, len(x) // self.num_experts).reshape(-1, 1)
        ids = torch.where((x != 0).any(1, keepdim=True), ids, -1)
        return ids, torch.ones_like(ids, dtype=torch.float32)

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments that a layer of this kind is made with."""
        return {
            "num_experts": self.num_experts,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "activation": self.activation,
            "bias": self.down.row_bias is not None,
        }

    def expert(self, index: int) -> tuple[QuantizedWeight, QuantizedWeight]:
        """An expert's weights ``[2 I, H]``, the gate's rows first, and ``[H, I]``."""
        return self.gate_up.quantized_weight(index), self.down.quantized_weight(index)

    def narrow_experts(self, start: int, length: int) -> LiquidExperts:
        """Experts ``start`` to ``start + length`` alone, copied, for expert parallelism.

        The result takes the same ids as this layer, and what it gives, added up over all parts, is
        what this layer gives but for the order of the sum.

        Raises:
            ValueError: the range is empty or not within the experts.
        """
        part = LiquidExperts.from_stacks(
            self.gate_up.narrow_experts(start, length),
            self.down.narrow_experts(start, length),
            self.activation,
        )
        part.first_expert = self.first_expert + start
        part.total_experts = self.total_experts
        return part.train(self.training)

    def narrow(self, start: int, length: int) -> LiquidExperts:
        """Inner channels ``start`` to ``start + length`` of every expert, for tensor parallelism.

        What it gives has to be added up over all parts. The bias of the second matrix is in the
        first part alone.

        Raises:
            ValueError: the range is empty, not within 0 to I, or does not begin and end at a
                multiple of 64 or at I.
        """
        inner = self.intermediate_size
        _check_range("channels", start, length, inner)

        def first(weight: QuantizedWeight, bias: Tensor | None):
            parts = [weight.narrow_rows(at + start, length) for at in (0, inner)]
            if bias is not None:
                bias = torch.cat([bias.narrow(0, at + start, length) for at in (0, inner)])
            return joined(*parts), bias

        def second(weight: QuantizedWeight, bias: Tensor | None):
            kept = None if bias is None else bias * (start == 0)
            return weight.narrow_columns(start, length), kept

        hidden, has_bias = self.hidden_size, self.down.row_bias is not None
        part = LiquidExperts.from_stacks(
            self.gate_up.mapped(first, hidden, 2 * length, self.gate_up.row_bias is not None),
            self.down.mapped(second, length, hidden, has_bias),
            self.activation,
        )
        part.first_expert, part.total_experts = self.first_expert, self.total_experts
        return part.train(self.training)

    def extra_repr(self) -> str:
        start = f", first_expert={self.first_expert}" if self.first_expert else ""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation}{start}"
        )


def in_order(
    weight: QuantizedWeight, bias: Tensor | None, order: Tensor | None
) -> tuple[QuantizedWeight, Tensor | None]:
    """A weight and its bias with their rows in another order."""
    if order is None:
        return weight, bias
    order = order.to(weight.scale.device)
    rows: dict[str, Any] = {name: getattr(weight, name)[order] for name in STATE}
    return replace(weight, **rows), None if bias is None else bias[order]


def without_values(experts: nn.Module) -> LiquidExperts:
    """A layer of zeros in the place of float experts whose layout is known, on their device."""
    layout = cast(Layout, layout_of(experts))
    parameter = experts.get_parameter(layout.parameters[0])
    layer = LiquidExperts(**layout.sizes, device=parameter.device, dtype=parameter.dtype)
    layer.stands_for(experts, layout)
    return layer.train(experts.training)
