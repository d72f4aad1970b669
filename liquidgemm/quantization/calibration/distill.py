"""Distillation: the whole quantized model is fitted to what the float model gives.

Tuning sees the output of a block, and not what later blocks make of it. Here Adam fits one factor
per output channel of every quantized layer (it goes into sigma) and all vectors among the other
parameters (gains of norms, and where there are any their biases and those of float layers), by what
comes out of the model in the end: for language models the divergence of the distributions of the
next token, else the squared error relative to the output. A part of the data is set aside: the best
step on that counts, and none may be the best.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...nn._modules import linear_at, paths_of_modules, replace_module
from ...weights.weight import QuantizedWeight
from .data import running
from .measure import divergence, loss
from .record import model_inputs
from .simulate import SimulatedLinear
from .trees import map_tensors
from .tune import Layer, set_aside

_RATE = 1e-3  # relative to the size of what is learned, falling to 0
_TOKENS = 4096  # per step, in whole batches
_CHECKS = 10

Batches = list[Tensor | Mapping[str, Any]]


class Student:
    """A copy of a model in float32 with simulated quantized layers.

    Args:
        model: in floats; it stays as it is.
        weights: quantized weight of each layer by name.
        tensors: new values of parameters of other layers, by name.
        biases: the same for biases of quantized layers.
        device: where to put it; None for that of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, QuantizedWeight],
        tensors: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        device: torch.device | str | None,
    ) -> None:
        self._teacher = model
        self._device = device or next(model.parameters()).device
        self.model = copy.deepcopy(model)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            # Not by methods of the model: those of transformers refuse it for what was a GGUF file.
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensor.data = tensor.data.to(self._device, dtype)
        paths = paths_of_modules(self.model)
        self.layers: dict[str, SimulatedLinear] = {}
        for name, weight in weights.items():
            linear = linear_at(self.model, name)
            bias = biases.get(name, linear.bias)
            bias = None if bias is None else bias.detach().to(self._device).float().clone()
            self.layers[name] = SimulatedLinear(weight.to(torch.device(self._device)), bias)
            for path in paths[linear]:
                replace_module(self.model, path, self.layers[name])
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for key, value in tensors.items():
            self._parameters[key].detach().copy_(value)
        self.model.requires_grad_(False)

    def fit(self, batches: Batches, steps: int, seed: int, progress: bool) -> float:
        """Fit it in place; the error on the data set aside after over before."""
        used, aside = set_aside(len(batches))
        with torch.enable_grad():
            learning = [Layer(layer) for layer in self.layers.values()]
        factors = [layer.factor for layer in learning]
        groups: list[dict[str, Any]] = [{"params": factors, "lr": _RATE}]
        gains = [p for p in self.model.parameters() if p.dim() == 1]
        for gain in gains:
            gain.requires_grad_()
            groups.append({"params": [gain], "lr": _RATE * gain.detach().abs().mean().item()})
        learned = [*factors, *gains]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

        def error() -> float:
            with torch.no_grad():
                return sum(self._error(batches[i], i).item() for i in aside) / len(aside)

        first = least = error()
        best = [p.detach().clone() for p in learned]
        generator = torch.Generator().manual_seed(seed)
        bar = tqdm(range(1, steps + 1), desc="distilling", unit="step", disable=not progress)
        for step in bar:
            optimizer.zero_grad()
            order = torch.randperm(len(used), generator=generator, device="cpu").tolist()
            chosen = _of_tokens(batches, [used[i] for i in order])
            for i in chosen:
                with torch.enable_grad():
                    (self._error(batches[i], i) / len(chosen)).backward()
            optimizer.step()
            schedule.step()
            if step % max(1, steps // _CHECKS) == 0 or step == steps:
                now = error()
                bar.set_postfix_str(f"{now / first if first > 0 else 1:.3f}")
                if now < least:
                    least, best = now, [p.detach().clone() for p in learned]
        for parameter, value in zip(learned, best, strict=True):
            parameter.detach().copy_(value)
        for gain in gains:
            gain.requires_grad_(False)
        for layer in learning:
            layer.finish()
        return least / first if first > 0 else 1.0

    def changed(self) -> dict[str, Tensor]:
        """What it has learned of parameters of layers that are not quantized, by name."""
        before = dict(self._teacher.named_parameters(remove_duplicate=False))
        return {
            key: value.detach().to(before[key].device)
            for key, value in self._parameters.items()
            if value.dim() == 1 and key in before
        }

    @torch.no_grad()
    def loss(self, measure: str, batches: Batches) -> float:
        """The mean loss of the student on held-out data."""
        total = count = 0.0
        for number, batch in enumerate(batches):
            with running(self.model, batch, f"held_out: batch {number}"):
                part, parts = loss(measure, self.model, batch, *self._outputs(batch))
            total, count = total + part, count + parts
        return total / count

    def _error(self, batch: Tensor | Mapping[str, Any], number: int) -> Tensor:
        with running(self.model, batch, f"calibration: batch {number}"):
            return divergence(self.model, batch, *self._outputs(batch))

    def _outputs(self, batch: Tensor | Mapping[str, Any]) -> tuple[Any, Any]:
        """The outputs of the student, and those of the float model."""
        with torch.no_grad():
            args, kwargs = model_inputs(batch, self._teacher)
            expected = map_tensors(self._teacher(*args, **kwargs), lambda t: t.to(self._device))
        args, kwargs = map_tensors(
            model_inputs(batch, self.model), lambda t: t.float() if t.is_floating_point() else t
        )
        return self.model(*args, **kwargs), expected


def _of_tokens(batches: Batches, order: list[int]) -> list[int]:
    """The first batches, in this order, that together have the tokens of a step."""
    chosen, tokens = [], 0
    for i in order:
        chosen.append(i)
        batch = batches[i]
        values = [batch] if isinstance(batch, Tensor) else list(batch.values())
        sizes = [v.shape[:2].numel() for v in values if isinstance(v, Tensor) and v.dim() > 1]
        tokens += max(sizes, default=1)
        if tokens >= _TOKENS:
            break
    return chosen
