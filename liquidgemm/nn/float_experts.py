"""Float experts that a layer keeps in stacked parameters: how they lie, and what they compute.

Those of transformers 5 are told by what its decorator leaves on them (``has_gate``,
``is_transposed``, ``is_concatenated``, ``has_bias``), not by the names of their classes, which are
some sixty. What their gate computes is tried, not read: it is one of `ops.GATED` if it gives what
that gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import GATED
from ..ops._moe import float_gated

_DECORATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
# A grid of gates and ups that tells apart clamps, slopes and every activation in use.
_GRID = (-30.0, -8.0, -7.0, -3.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 3.0, 6.5, 7.5, 12.0, 30.0)


@dataclass(frozen=True)
class Layout:
    """Where the weights of E gated experts lie in a module.

    Attributes:
        num_experts, hidden, inner: E, H and I.
        activation: one of `ops.GATED`.
        transposed: whether the parameters are ``[E, H, 2 I]`` and ``[E, I, H]``.
        interleaved: whether gate and up alternate, channel by channel.
        bias: whether there are ``gate_up_proj_bias [E, 2 I]`` and ``down_proj_bias [E, H]``.
        flat: whether they are three matrices in a module ``mlp``, as DBRX has them.
        in_turn: whether tokens come sorted, as many for each expert, as Llama 4 has them.
    """

    num_experts: int
    hidden: int
    inner: int
    activation: str
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    flat: bool = False
    in_turn: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters: weights, then biases."""
        if self.flat:
            return ("mlp.w1", "mlp.v1", "mlp.w2")
        names = ("gate_up_proj", "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if self.bias else names

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments of the `LiquidExperts` in their place."""
        return {
            "num_experts": self.num_experts,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "activation": self.activation,
            "bias": self.bias,
        }

    def gate_up(self, module: Any, expert: int) -> Tensor:
        """An expert's first matrix ``[2 I, H]``, in the order in which it lies; mostly a view."""
        if self.flat:
            rows = slice(expert * self.inner, (expert + 1) * self.inner)
            return torch.cat((module.mlp.w1.detach()[rows], module.mlp.v1.detach()[rows]))
        weight = module.gate_up_proj.detach()[expert]
        return weight.T if self.transposed else weight

    def down(self, module: Any, expert: int) -> Tensor:
        """An expert's second matrix ``[H, I]``, a view."""
        if self.flat:
            return module.mlp.w2.detach()[expert * self.inner : (expert + 1) * self.inner].T
        weight = module.down_proj.detach()[expert]
        return weight.T if self.transposed else weight

    def biases(self, module: Any, expert: int) -> tuple[Tensor | None, Tensor | None]:
        if not self.bias:
            return None, None
        return module.gate_up_proj_bias.detach()[expert], module.down_proj_bias.detach()[expert]

    def order(self) -> Tensor | None:
        """Rows of the first matrix, gate before up; None if it lies so."""
        if not self.interleaved:
            return None
        return torch.arange(2 * self.inner).view(-1, 2).T.flatten()

    def gate(self, module: Any, gate_up: Tensor) -> Tensor:
        """``[T, 2 I]`` to ``[T, I]`` by the module's own code."""
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(gate_up)
        act = module.mlp.activation_fn if self.flat else module.act_fn
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up

    def write(self, module: Any, expert: int, gate_up: Tensor, down: Tensor, biases: tuple) -> None:
        """Put float weights, gate before up, and biases into a module's parameters."""
        if (order := self.order()) is not None:
            gate_up = torch.empty_like(gate_up).index_copy_(0, order.to(gate_up.device), gate_up)
        with torch.no_grad():
            if self.flat:
                rows = slice(expert * self.inner, (expert + 1) * self.inner)
                for name, value in zip(("w1", "v1"), gate_up.chunk(2), strict=True):
                    getattr(module.mlp, name)[rows] = value
                module.mlp.w2[rows] = down.T
                return
            module.gate_up_proj[expert] = gate_up.T if self.transposed else gate_up
            module.down_proj[expert] = down.T if self.transposed else down
            if self.bias:
                first = (
                    biases[0]
                    if order is None
                    else biases[0]
                    .new_empty(len(order))
                    .index_copy_(0, order.to(biases[0].device), biases[0])
                )
                module.gate_up_proj_bias[expert] = first
                module.down_proj_bias[expert] = biases[1]


def layout_of(module: Any) -> Layout | str | None:
    """How a module keeps its experts; why it cannot be quantized; None if it keeps none."""
    kind = type(module).__name__
    if kind == "DbrxExperts" and hasattr(module, "mlp"):
        return _judged(module, _flat(module))
    stacked = [key for key, p in module._parameters.items() if p is not None and p.ndim == 3]
    if all(hasattr(module, name) for name in _DECORATED) and stacked:
        if not module.has_gate:
            return "experts without a gate: there is no kernel for them"
        if getattr(module, "has_post_expert_norm", False):
            return "experts with a norm behind them: there is no kernel for them"
        return _judged(module, _stacked(module, module.is_transposed, module.is_concatenated))
    if kind == "Llama4TextExperts" and stacked:
        return _judged(module, _stacked(module, True, True, in_turn=True))
    if stacked and "expert" in kind.lower():
        return f"experts of {kind}, whose layout is unknown"
    return None


def _stacked(
    module: nn.Module, transposed: bool, concatenated: bool, in_turn: bool = False
) -> Layout | str:
    first, second = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return "experts without gate_up_proj and down_proj"
    experts, hidden, inner = second.shape
    if transposed:
        hidden, inner = inner, hidden
    wanted = [experts, hidden, 2 * inner] if transposed else [experts, 2 * inner, hidden]
    if list(first.shape) != wanted:
        return f"experts whose gate_up_proj is {list(first.shape)}, not {wanted}"
    return Layout(
        experts,
        hidden,
        inner,
        "",
        transposed,
        not concatenated,
        bool(getattr(module, "has_bias", False)),
        in_turn=in_turn,
    )


def _flat(module: Any) -> Layout | str:
    experts = module.num_experts
    rows, hidden = module.mlp.w1.shape
    return Layout(experts, hidden, rows // experts, "", flat=True)


def _judged(module: nn.Module, layout: Layout | str) -> Layout | str:
    """With the activation that it is found to compute."""
    if isinstance(layout, str):
        return layout
    with torch.device("cpu"):  # whatever the default one is: a model is built on the meta device
        found = _activation(module, layout)
    if found is None:
        return f"experts whose activation is none of {', '.join(GATED)}"
    return replace(layout, activation=found)


@torch.no_grad()
def _activation(module: nn.Module, layout: Layout) -> str | None:
    grid = torch.tensor(_GRID)
    gate, up = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
    missing = -len(gate) % layout.inner
    gate, up = (F.pad(t, (0, missing)).view(-1, layout.inner) for t in (gate, up))
    parts = (
        torch.stack((gate, up), -1).flatten(1) if layout.interleaved else torch.cat((gate, up), 1)
    )
    try:
        got = layout.gate(module, parts)
    except Exception:  # code of any model, on an input of ours
        return None
    for name in GATED:
        expected = float_gated(name, gate, up)
        if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
            return name
    return None


def without_data(module: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device."""
    return mapped(module, lambda tensor: torch.empty_like(tensor, device="meta"))


def mapped(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module and its children with other parameters."""
    result = copy.copy(module)
    result.__dict__ = {key: copy.copy(value) for key, value in vars(module).items()}
    for key, parameter in result._parameters.items():
        if parameter is not None:
            new = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
            result._parameters[key] = new
    for key, child in result._modules.items():
        result._modules[key] = None if child is None else mapped(child, function)
    return result
