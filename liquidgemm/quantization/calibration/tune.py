"""Learned scales: row scales and norm gains of a block, fitted to what the float model gives.

With codes and grids fixed, Adam fits one factor per output channel (it goes into sigma) and the
gains of the norms, by the error at the block's output relative to each token, against the float
model on its own stream. So a block also makes up for what the blocks before it have lost. A part of
the text is set aside: the best step on that counts, and none may be the best.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from .blocks import Call, main_tensor, run_block
from .simulate import SimulatedLinear

_RATE = 1e-3  # relative to the size of what is learned
_TOKENS = 4096  # per step, in whole batches
_CHECKS = 20
_ASIDE = 8  # every eighth batch is for choosing the step


def tune_block(
    block: nn.Module,
    calls: list[Call],
    targets: list[Tensor],
    steps: int,
    seed: int,
    shared: Collection[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> float:
    """Fit a quantized block in place.

    Args:
        block: with `SimulatedLinear` layers.
        calls: of the block in the quantized model.
        targets: what the float block gives in the float model, for each of them.
        steps: steps of Adam.
        seed: of the order of batches.
        shared: names of parameters that are used outside of the block too, and stay as they are.
        progress: is told the step and the error after it.

    Returns:
        error on the text set aside after over before, 1 if nothing was better than to leave it.
    """
    block.requires_grad_(False)
    aside = list(range(_ASIDE - 1, len(calls), _ASIDE)) or [len(calls) - 1]
    used = [i for i in range(len(calls)) if i not in aside] or aside
    layers = [module for module in block.modules() if isinstance(module, SimulatedLinear)]
    gains = [p for name, p in block.named_parameters() if p.dim() == 1 and name not in shared]
    with torch.enable_grad():
        factors = [torch.ones_like(layer.quantized.scale).requires_grad_() for layer in layers]
        groups = [{"params": factors, "lr": _RATE}]
        for gain in gains:
            gain.requires_grad_()
            groups.append({"params": [gain], "lr": _RATE * gain.detach().abs().mean().item()})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for layer, factor in zip(layers, factors, strict=True):
        layer.factor = factor
    learned = [*factors, *gains]
    per_batch = max(1, targets[0][..., 0].numel())
    count = max(1, _TOKENS // per_batch)

    def loss(i: int) -> Tensor:
        target = targets[i]
        off = (main_tensor(run_block(block, calls[i])) - target).square().sum(-1)
        relative = (off / target.square().sum(-1)).unsqueeze(-1)
        return calls[i].tokens(relative, calls[i].hidden, []).mean()

    def error() -> float:
        with torch.no_grad():
            return sum(loss(i).item() for i in aside) / len(aside)

    first = least = error()
    best = [p.detach().clone() for p in learned]
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(used), generator=generator, device="cpu")[:count].tolist()
        optimizer.zero_grad()
        with torch.enable_grad():
            for i in chosen:
                (loss(used[i]) / len(chosen)).backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            now = error()
            progress(f"tuning {step}/{steps}, {now / first if first > 0 else 1:.3f}")
            if now < least:
                least, best = now, [p.detach().clone() for p in learned]
    for parameter, value in zip(learned, best, strict=True):
        parameter.detach().copy_(value)
    for gain in gains:
        gain.requires_grad_(False)
        gain.grad = None
    for layer, factor in zip(layers, factors, strict=True):
        layer.factor = None
        layer.scale_rows(factor.detach())
    return least / first if first > 0 else 1.0
