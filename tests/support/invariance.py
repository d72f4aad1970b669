"""What a batch changes for one of its rows, module by module."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liquidgemm import LiquidLinear


@dataclass(frozen=True)
class Call:
    """Input and output of a module for one row of the batch, ``[1, length, features]`` each."""

    x: Tensor
    y: Tensor


def first_tensor(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    inside = value.values() if isinstance(value, dict) else value
    if not isinstance(inside, list | tuple | type({}.values())):
        return None
    return next((item for item in inside if isinstance(item, Tensor)), None)


@torch.inference_mode()
def calls_of_row(model: nn.Module, ids: Tensor, row: int) -> tuple[dict[str, Call], Tensor]:
    """Every module's call for one row of int64 ids ``[batch, length]``, and the row's logits."""
    calls: dict[str, Call] = {}

    def keep(name: str):
        def hook(module, args, kwargs, output) -> None:
            x, y = first_tensor([*args, *kwargs.values()]), first_tensor(output)
            if x is not None and y is not None and len(x) == len(y) == len(ids):
                calls[name] = Call(x[row : row + 1].clone(), y[row : row + 1].clone())

        return hook

    hooks = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        logits = model(input_ids=ids, use_cache=False).logits[row : row + 1].clone()
    finally:
        for hook in hooks:
            hook.remove()
    return calls, logits


def batch_around(prompt: Tensor, size: int, vocabulary: int) -> tuple[Tensor, int]:
    """Ids ``[size, length]`` with the prompt ``[length]`` in the middle of others, and its row."""
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(0, vocabulary, (size, len(prompt)), generator=generator).to(prompt.device)
    row = size // 2
    ids[row] = prompt
    return ids, row


@torch.inference_mode()
def changed_layers(model: nn.Module, calls: dict[str, Call]) -> list[str]:
    """Quantized layers that give the row, alone, other bits than they gave it in the batch."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, LiquidLinear) and not torch.equal(layer(calls[name].x), calls[name].y)
    ]


def changed_kinds(
    model: nn.Module, alone: dict[str, Call], batched: dict[str, Call]
) -> dict[str, tuple[int, int]]:
    """By class: modules that got the same input in both runs, and those that made others of it."""
    same, changed = Counter(), Counter()
    for name, module in model.named_modules():
        kind = type(module).__name__
        # Of the modules with parts, attention alone computes something itself.
        computes = not any(module.children()) or kind.endswith("Attention")
        if not computes or name not in alone or name not in batched:
            continue
        if torch.equal(alone[name].x, batched[name].x):
            same[kind] += 1
            changed[kind] += not torch.equal(alone[name].y, batched[name].y)
    return {kind: (count, changed[kind]) for kind, count in same.items()}
