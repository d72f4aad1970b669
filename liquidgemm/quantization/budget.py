"""4, 6 or 8 bits for each layer, so that all have a number of bits on average and lose least.

How much a layer loses is measured: with its weight in 4 bits and all others in floats, by how much
the output of the model changes. The square of that grows with the squared error of the weight, so
that what 6 and 8 bits lose follows from the errors of the weight alone; and it adds up over layers,
as their errors have nothing to do with each other. Layers of the same input (q, k and v; gate and
up) get the same bits, so that they remain one product.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..formats.liquidquant import (
    BLOCK_BYTES,
    BLOCK_BYTES_6,
    BLOCK_BYTES_G32,
    FINE_GROUP,
    GROUP,
    PANEL,
    ceil_div,
)
from ..nn._modules import linear_at
from ..weights.quantize import quantize_weight
from ..weights.weight import QuantizedWeight, dequantize_weight
from .calibration.data import running
from .calibration.gptq import int8_weight
from .calibration.measure import OUTPUT, loss
from .calibration.record import model_inputs
from .config import BITS, LiquidConfig
from .experts import Experts
from .layer import layer_bits

# Of the calibration data, on which layers are measured: batches, and tokens of one.
_BATCHES, _TOKENS = 2, 512
_BLOCK_BYTES = {4: BLOCK_BYTES, 6: BLOCK_BYTES_6, 8: PANEL * GROUP}


def stored_bits(rows: int, columns: int, bits: int, group_size: int = GROUP) -> int:
    """Of a weight ``[rows, columns]`` as `LiquidLinear` holds it, scales and all."""
    blocks = ceil_div(rows, PANEL) * ceil_div(columns, GROUP)
    fine = bits == 4 and group_size == FINE_GROUP
    return 8 * blocks * (BLOCK_BYTES_G32 if fine else _BLOCK_BYTES[bits]) + 32 * rows


@dataclass(frozen=True)
class Choice:
    """Layers that get the same bits, with the loss and the stored bits that each number gives."""

    names: tuple[str, ...]
    losses: Mapping[int, float]
    stored: Mapping[int, int]


def choose(choices: Sequence[Choice], room: float) -> list[int]:
    """Bits for each, within ``room`` stored bits in all.

    The step that lowers the loss most for what it costs comes first; those that no longer fit are
    left out. All have 4 where there is no room even for that.
    """
    chosen = [4] * len(choices)
    room -= sum(choice.stored[4] for choice in choices)
    while True:
        best, most = None, 0.0
        for i, choice in enumerate(choices):
            for bits in BITS:
                cost = choice.stored[bits] - choice.stored[chosen[i]]
                gain = choice.losses[chosen[i]] - choice.losses[bits]
                if bits > chosen[i] and cost <= room and gain / cost > most:
                    best, most = (i, bits, cost), gain / cost
        if best is None:
            return chosen
        i, bits, cost = best
        chosen[i] = bits
        room -= cost


def bits_within(
    model: nn.Module,
    names: Sequence[str],
    config: LiquidConfig,
    batches: Sequence[Tensor | Mapping[str, Any]],
    experts: Experts,
    progress: bool,
) -> dict[str, int]:
    """The ``bits`` of a config that keep to its ``budget``, by the names of the layers.

    Layers that ``keep`` matches have 8 bits, experts 4, and both count.

    Raises:
        ValueError: the budget is too small even if all others have 4 bits.
    """
    assert config.budget is not None
    given, free, fixed, weights = {}, [], 0, 0
    for name in names:
        linear = linear_at(model, name)
        rows, columns = linear.out_features, linear.in_features
        weights += rows * columns
        if experts.of(name) is None and layer_bits(config, name) == 4:
            free.append(name)
        elif experts.of(name) is None:  # by ``keep``, which goes before bits
            fixed += stored_bits(rows, columns, 8)
        else:
            given[name] = 4
            fixed += stored_bits(rows, columns, 4)
    room = config.budget * weights - fixed
    least = sum(_stored(model, name, 4, config.group_size) for name in free)
    if least > room:
        raise ValueError(
            f"budget: expected at least {(least + fixed) / weights:.2f} bits per weight, which "
            f"4-bit codes, their scales and what is kept in 8 bits need, got {config.budget:g}"
        )
    if not free:
        return {}
    step = max(1, len(batches) // _BATCHES)
    sample = [_part_of(batch) for batch in batches[::step][:_BATCHES]]
    choices = _measured(model, free, config, sample, progress)
    for choice, bits in zip(choices, choose(choices, room), strict=True):
        given.update(dict.fromkeys(choice.names, bits))
    # A name is a pattern that also means the end of longer ones: those come first.
    return {name: given[name] for name in sorted(given, key=len, reverse=True)}


def _part_of(batch: Tensor | Mapping[str, Any]) -> Tensor | Mapping[str, Any]:
    """Some tokens of a batch of tokens; of others all."""
    if isinstance(batch, Tensor) and not batch.is_floating_point() and batch.dim() == 2:
        return batch[:1, :_TOKENS]
    return batch


def _stored(model: nn.Module, name: str, bits: int, group_size: int) -> int:
    linear = linear_at(model, name)
    return stored_bits(linear.out_features, linear.in_features, bits, group_size)


def _quantized(weight: Tensor, config: LiquidConfig, bits: int) -> QuantizedWeight:
    if bits == 8:
        return int8_weight(weight)
    method = "rtn" if config.method == "rtn" else "search"
    return quantize_weight(weight, config.group_of(bits), method, bits=bits)


@torch.no_grad()
def _measured(
    model: nn.Module,
    names: Sequence[str],
    config: LiquidConfig,
    batches: Sequence[Tensor | Mapping[str, Any]],
    progress: bool,
) -> list[Choice]:
    """What the layers lose, those of the same input together.

    Raises:
        ValueError: the loss of one is not finite.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        groups, expected = _of_the_same_input(model, names, batches)
        found: list[tuple[list[str], float, dict[int, float]]] = []
        for group in tqdm(groups, desc="sensitivity", unit="layer", disable=not progress):
            errors = dict.fromkeys(BITS, 0.0)
            coarse = {}
            for name in group:
                weight = linear_at(model, name).weight.detach().float()
                for bits in BITS:
                    approximation = dequantize_weight(_quantized(weight, config, bits))
                    errors[bits] += (approximation - weight).square().sum().item()
                    if bits == 4:
                        coarse[name] = approximation
            with _replaced(model, coarse):
                outputs = [_call(model, batch, number) for number, batch in enumerate(batches)]
            measured = sum(
                loss(OUTPUT, model, batch, output, reference)[0] ** 2
                for batch, output, reference in zip(batches, outputs, expected, strict=True)
            )
            if not math.isfinite(measured):
                raise ValueError(
                    f"calibration: expected outputs that are finite, got {measured} for the loss "
                    f"with {', '.join(group)} in 4 bits"
                )
            found.append((group, measured / errors[4] if errors[4] else 0.0, errors))
        # What the sample does not reach counts as much as most others do.
        reached = [unit for _, unit, _ in found if unit > 0]
        usual = statistics.median(reached) if reached else 1.0
        choices = []
        for group, unit, errors in found:
            losses = {bits: (unit or usual) * error for bits, error in errors.items()}
            size = config.group_size
            stored = {
                bits: sum(_stored(model, name, bits, size) for name in group) for bits in BITS
            }
            choices.append(Choice(tuple(group), losses, stored))
        return choices
    finally:
        for module in training:
            module.training = True


def _call(model: nn.Module, batch: Tensor | Mapping[str, Any], number: int) -> Any:
    with running(model, batch, f"calibration: batch {number}"):
        args, kwargs = model_inputs(batch, model)
        return model(*args, **kwargs)


def _of_the_same_input(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor | Mapping[str, Any]]
) -> tuple[list[list[str]], list[Any]]:
    """The layers by what they are given in the first batch, and the outputs of the model.

    A layer that the data does not reach is one by itself.
    """
    inputs: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def note(module: nn.Module, args: tuple, name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                inputs.setdefault(name, args[0])  # held, so that no other gets its place

        handles.append(model.get_submodule(name).register_forward_pre_hook(note))
    try:
        expected = [_call(model, batches[0], 0)]
    finally:
        for handle in handles:
            handle.remove()
    expected += [_call(model, batch, number) for number, batch in enumerate(batches[1:], 1)]
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    return list(groups.values()), expected


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in some layers, and afterwards theirs again."""
    parameters = {name: linear_at(model, name).weight for name in weights}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]
