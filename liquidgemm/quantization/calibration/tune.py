"""Tuning: a quantized block is fitted to what the float model gives.

Adam fits codes (`codes`), one factor per output channel (it goes into sigma) and the gains of the
norms, by the error at the block's output relative to each token, against the float model on its own
stream. So a block also makes up for what the blocks before it have lost. A part of the text is set
aside: the best step on that counts, and none may be the best.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...ops._cpu import cpu_kernels
from ...weights.weight import dequantize_weight
from .blocks import Call, main_tensor, run_block
from .codes import LearnedCodes
from .simulate import SimulatedLinear

_RATE = 1e-3  # of factors and gains, relative to their size, falling to 0
# The rates of all steps, in steps of the grid: as they fall to 0, codes that hop to and fro come to
# rest, which brings most of the gain.
_PATH = 0.5
_TOKENS = 2048  # per step, in whole batches
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
        block: with `SimulatedLinear` layers; those that know their original weight learn their
            codes, and forget it.
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
    used, aside = set_aside(len(calls))
    gains = [p for name, p in block.named_parameters() if p.dim() == 1 and name not in shared]
    with torch.enable_grad():
        layers = [Layer(m) for m in block.modules() if isinstance(m, SimulatedLinear)]
    factors = [layer.factor for layer in layers]
    positions = [layer.codes.position for layer in layers if layer.codes is not None]
    groups: list[dict[str, Any]] = [{"params": factors, "lr": _RATE}]
    for gain in gains:
        gain.requires_grad_()
        groups.append({"params": [gain], "lr": _RATE * gain.detach().abs().mean().item()})
    if positions:
        groups.append({"params": positions, "lr": 2 * _PATH / steps, "betas": (0.9, 0.99)})
    learned = [*factors, *gains, *positions]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
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
        for layer in layers:
            layer.gather()
        optimizer.step()
        schedule.step()
        for layer in layers:
            layer.follow()
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
    for layer in layers:
        layer.finish()
    return least / first if first > 0 else 1.0


def set_aside(count: int) -> tuple[list[int], list[int]]:
    """Which of so many batches are for learning, and which for choosing the step."""
    aside = list(range(_ASIDE - 1, count, _ASIDE)) or [count - 1]
    return [i for i in range(count) if i not in aside] or aside, aside


class Layer:
    """What is learned of a layer, in the place of its weight until `finish`."""

    def __init__(self, module: SimulatedLinear) -> None:
        quantized = module.quantized
        self._module = module
        self.factor = torch.ones_like(quantized.scale).requires_grad_()
        self.codes: LearnedCodes | None = None
        if module.original is not None:
            self.codes = LearnedCodes(quantized, module.original)
        unit = dequantize_weight(replace(quantized, scale=torch.ones_like(quantized.scale)))
        self._units = unit.to(_operand_dtype(unit)).requires_grad_(self.codes is not None)
        module.learned = self._units, self.factor

    def gather(self) -> None:
        """Hand the gradient of the weight on to the codes."""
        if self.codes is not None and self._units.grad is not None:  # else it was not called
            self.codes.backward(self._units.grad)
            self._units.grad = None

    def follow(self) -> None:
        """Take the codes as they are now."""
        if self.codes is not None:
            self._units.detach().copy_(self.codes.units())

    def finish(self) -> None:
        self._module.learned = self._module.original = None
        quantized = self._module.quantized if self.codes is None else self.codes.weight()
        scale = quantized.scale * self.factor.detach()
        self._module.replace_weight(replace(quantized, scale=scale))


def _operand_dtype(weight: Tensor) -> torch.dtype:
    """bfloat16, which holds the integers, where it is faster than float32."""
    if weight.is_cuda or (weight.is_cpu and "amx" in cpu_kernels()):
        return torch.bfloat16
    return torch.float32
