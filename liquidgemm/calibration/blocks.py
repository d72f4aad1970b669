"""A model as a sequence of blocks: finding them, and running them one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class _Stop(Exception):
    """Ends a forward pass as soon as what was wanted is there."""


@dataclass
class Batch:
    """One batch on its way through the blocks.

    Attributes:
        hidden: the input of the next block, ``[B, T, C]`` as a rule.
        calls: for each block, the other arguments of its forward.
        mask: bool ``[B, T]``, the tokens that are no padding; None if there is no padding.
    """

    hidden: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]
    mask: Tensor | None = None

    def tokens(self, x: Tensor) -> Tensor:
        """Inputs of a layer as rows ``[T, K]``, without those of padding."""
        if self.mask is not None and x.shape[: self.mask.dim()] == self.mask.shape:
            return x[self.mask.to(x.device)]
        return x.reshape(-1, x.shape[-1])


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the blocks: the entries of the ``nn.ModuleList`` that holds most of the layers.

    A model without such a list, or with one block in several places, is one block: ``[""]``.
    """
    layers = list(layers)
    best, most = [""], 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({id(m) for m in module}) != len(module):
            continue
        names = [f"{name}.{child}" for child, _ in module.named_children()]
        inside = sum(layer.startswith(name + ".") for layer in layers)
        # Of nested lists the outermost counts.
        if inside > most:
            best, most = names, inside
    if len({type(model.get_submodule(name)) for name in best}) > 1:
        return [""]
    return best


def model_inputs(batch: Tensor | Mapping[str, Tensor], model: nn.Module) -> tuple[tuple, dict]:
    """Arguments of the model for a batch."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    if isinstance(batch, Tensor):
        return (batch.to(device),), _no_cache(model)
    return (), {key: value.to(device) for key, value in batch.items()} | _no_cache(model)


@contextmanager
def _forward_replaced(module: nn.Module, forward) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _split(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """The hidden state and the other arguments of a block's forward."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    name = "hidden_states" if "hidden_states" in rest else next(iter(rest))
    return rest.pop(name), (), rest


def _as_float(value: Any, device: torch.device) -> Any:
    """Tensors on the device, floats among them as float32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_as_float(v, device) for v in value)
    if isinstance(value, dict):
        return {key: _as_float(v, device) for key, v in value.items()}
    return value


def capture(model: nn.Module, names: list[str], batch: Tensor | Mapping[str, Tensor]) -> Batch:
    """What reaches the blocks: everything before them is run, the blocks themselves are not."""
    args, kwargs = model_inputs(batch, model)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = mask.bool() if mask is not None and not mask.bool().all() else None
    if names == [""]:
        hidden, rest, kwargs = _split(args, kwargs)
        return Batch(hidden, [(rest, kwargs)], mask)
    blocks = [model.get_submodule(name) for name in names]
    hidden: list[Tensor] = []
    calls: list[tuple[tuple, dict]] = []

    def passing(*args, **kwargs):
        x, rest, kwargs = _split(args, kwargs)
        hidden.append(x)
        calls.append((rest, {k: v for k, v in kwargs.items() if not _is_cache(v)}))
        if len(calls) == len(blocks):
            raise _Stop
        return x

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_forward_replaced(block, passing))
        stack.enter_context(suppress(_Stop))
        model(*args, **kwargs)
    if len(calls) != len(blocks):
        raise ValueError(
            f"model: expected every one of {len(blocks)} blocks ({names[0]}, ...) to be called "
            f"once per forward, got {len(calls)} calls"
        )
    return Batch(hidden[0], calls, mask)


def _no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def _is_cache(value: Any) -> bool:
    return "Cache" in type(value).__name__


def run_block(block: nn.Module, batch: Batch, index: int, hidden: Tensor | None = None) -> Tensor:
    """The block's output for a batch, in float32 on the block's device."""
    hidden = batch.hidden if hidden is None else hidden
    device = next((t.device for t in (*block.parameters(), *block.buffers())), hidden.device)
    args, kwargs = _as_float(batch.calls[index], device)
    out = block(_as_float(hidden, device), *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def finish(model: nn.Module, names: list[str], raw: Any, hidden: Tensor) -> Any:
    """The model's output if the last block had given ``hidden``."""
    if names == [""]:
        return hidden
    args, kwargs = model_inputs(raw, model)
    blocks = [model.get_submodule(name) for name in names]
    dtype = next(model.parameters()).dtype

    def passing(*args, **kwargs):
        x, _, _ = _split(args, kwargs)
        return hidden.to(x.device, dtype)

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_forward_replaced(block, passing))
        return model(*args, **kwargs)


def find_stages(
    block: nn.Module, layers: dict[str, nn.Module], batch: Batch, index: int
) -> list[list[str]]:
    """Layers of a block in the order of their calls; those with the same input stand together.

    Layers that are not called at all are missing.
    """
    stages: list[list[str]] = []
    inputs: list[Tensor] = []  # kept alive, so that no two have one identity

    def record(name: str):
        def hook(module, args):
            if any(name in stage for stage in stages):
                return
            if inputs and inputs[-1] is args[0]:
                stages[-1].append(name)
            else:
                stages.append([name])
                inputs.append(args[0])

        return hook

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        run_block(block, batch, index)
    finally:
        for handle in handles:
            handle.remove()
    return stages


def stage_inputs(
    block: nn.Module, layer: nn.Module, batches: list[Batch], index: int
) -> list[Tensor]:
    """Inputs ``[T, K]`` of a layer, one tensor for each batch in which it is called."""
    found: list[Tensor] = []
    for batch in batches:
        seen: list[Tensor] = []

        def hook(module, args, batch=batch, seen=seen):
            seen.append(batch.tokens(args[0]))
            raise _Stop

        handle = layer.register_forward_pre_hook(hook)
        try:
            with suppress(_Stop):
                run_block(block, batch, index)
        finally:
            handle.remove()
        found += seen
    return found
