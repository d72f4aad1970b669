"""Calls of a block: running them, and what reaches the layers in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .effects import Attributes, Left, attributes_of, left_in, watch
from .masks import Padding, others_of
from .record import hidden_slot, hidden_state
from .trees import map_tensors, tensors


class Stop(BaseException):
    """Ends a forward pass as soon as what was wanted is there; no error that a model may catch."""


@dataclass
class Call:
    """One call of a block.

    Attributes:
        args, kwargs: as the model gives them.
        unit: name of the block.
        padding: masks of the batch.
        decoder: whether the block belongs to the decoder of an encoder-decoder.
        writes: whether it leaves anything in its arguments.
        errors: around a run of the block, says of which batch its errors are.
    """

    args: tuple
    kwargs: dict[str, Any]
    unit: str = ""
    padding: Padding = field(default_factory=lambda: Padding({}))
    decoder: bool = False
    writes: bool = False
    errors: Callable[[], AbstractContextManager] = nullcontext

    @property
    def hidden(self) -> Tensor | None:
        """The first tensor that the block is given, ``[B, T, C]`` as a rule."""
        return hidden_state(self.args, self.kwargs)

    def with_hidden(self, hidden: Tensor) -> Call:
        args, kwargs = self.args, self.kwargs
        slot = hidden_slot(args, kwargs)
        if isinstance(slot, str):
            kwargs = {**kwargs, slot: hidden}
        elif slot == 0:
            args = (hidden, *args[1:])
        return replace(self, args=args, kwargs=kwargs)

    def cloned(self) -> Call:
        """With arguments of its own."""
        args, kwargs = map_tensors((self.args, self.kwargs), torch.clone)
        return replace(self, args=args, kwargs=kwargs)

    def on(self, block: nn.Module) -> tuple[tuple, dict[str, Any], dict[int, Tensor]]:
        """Arguments on the block's device, floats as float32, and by id what they come from."""
        mine = next((t.device for t in (*block.parameters(), *block.buffers())), None)
        sources: dict[int, Tensor] = {}

        def convert(value: Tensor) -> Tensor:
            device = value.device if mine is None else mine
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            converted = value.to(device, dtype, copy=self.writes)
            sources[id(converted)] = value
            return converted

        args, kwargs = map_tensors((self.args, self.kwargs), convert)
        return args, kwargs, sources

    def tokens(self, x: Tensor, hidden: Tensor | None, others: list[Tensor]) -> Tensor:
        """Inputs of a layer as rows ``[T, K]``, without those of padding."""
        rows = self.padding.rows(x, hidden, others, self.unit, self.decoder)
        if rows is not None:
            return x[rows.to(x.device)].reshape(-1, x.shape[-1])
        return x.reshape(-1, x.shape[-1])


def run_block(block: nn.Module, call: Call) -> Any:
    """What the block gives for a call, in float32 on the block's device.

    What it was given and gives back is the tensor that the call has, not its float32 copy.
    """
    return run_call(block, call)[0]


def run_call(
    block: nn.Module, call: Call, attributes: Iterable[tuple[str, str]] = ()
) -> tuple[Any, Left, Attributes]:
    """What the block gives, what it leaves in its arguments, and in those attributes of its own."""
    args, kwargs, sources = call.on(block)
    watched = watch(args, kwargs) if call.writes else []
    with call.errors():
        out = block(*args, **kwargs)
    left = left_in(watched)
    written = {id(value) for value in left.values()}

    def as_given(tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in written else sources.get(id(tensor), tensor)

    out, left = map_tensors((out, left), as_given)
    wanted = set(attributes)
    kept = attributes_of(block) if wanted else {}
    return out, left, {where: kept[where] for where in wanted & kept.keys()}


def main_tensor(out: Any) -> Tensor:
    """The first tensor of what a block gives: its hidden state."""
    return next(t for t in tensors(out) if t.is_floating_point())


def find_stages(
    block: nn.Module, layers: Mapping[str, nn.Module], call: Call
) -> tuple[list[list[str]], set[str]]:
    """Layers of a block in the order of their calls; those with the same input stand together.

    Layers that are not called at all are missing. The second value has those that are called more
    than once.
    """
    stages: list[list[str]] = []
    repeated: set[str] = set()
    inputs: list[Tensor] = []  # kept alive, so that no two have one identity

    def record(name: str):
        def hook(module, args, kwargs):
            x = _input(args, kwargs)
            if any(name in stage for stage in stages):
                repeated.add(name)
                return
            if inputs and inputs[-1] is x:
                stages[-1].append(name)
            else:
                stages.append([name])
                inputs.append(x)

        return hook

    handles = [
        layer.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        run_block(block, call)
    finally:
        for handle in handles:
            handle.remove()
    return stages, repeated


def stage_inputs(
    block: nn.Module, layer: nn.Module, calls: Iterable[Call], repeated: bool = False
) -> list[Tensor]:
    """Inputs ``[T, K]`` of a layer, one tensor for each time that it is called."""
    found: list[Tensor] = []
    for call in calls:
        args, kwargs, _ = call.on(block)
        hidden = hidden_state(args, kwargs)
        others = others_of(args, kwargs, hidden)

        def hook(module, args, kwargs, call=call, hidden=hidden, others=others):
            found.append(call.tokens(_input(args, kwargs), hidden, others))
            if not repeated:
                raise Stop

        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with suppress(Stop), call.errors():
                block(*args, **kwargs)
        finally:
            handle.remove()
    return [x for x in found if len(x)]


def _input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]
