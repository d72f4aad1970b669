"""The gate: is a calibrated model better than a data-free one on data it has not seen?"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...nn._modules import replace_module
from ..config import LiquidConfig
from ..layer import quantize_layer
from .data import running
from .flow import Lane, Recordings
from .measure import NEXT_TOKEN, choose_measure, loss
from .simulate import SimulatedLinear
from .units import Unit

REFERENCE, DATA_FREE, CALIBRATED = "reference", "data-free", "calibrated"
UNTUNED = "untuned"  # the calibrated model before tuning, if there is any
UNDISTILLED = "undistilled"  # and before distillation, if there is any
_KINDS = {
    DATA_FREE: "one quantized without data",
    UNTUNED: "the same before tuning",
    UNDISTILLED: "the same before distillation",
}


def check_gate(losses: Mapping[str, float], gate: str, measure: str = NEXT_TOKEN) -> None:
    """Compare losses on held-out data; without any, or with the gate "off", do nothing.

    Raises:
        RuntimeError: the calibrated model is worse than the data-free one, or than before tuning or
            distillation, and the gate is "raise".
    """
    if not losses or gate == "off":
        return
    better = {k: what for k, what in _KINDS.items() if losses.get(k, math.inf) < losses[CALIBRATED]}
    if not better:
        return
    kind = "text" if measure == NEXT_TOKEN else "data"
    others = ", ".join(f"{what} {losses[k]:.4f}" for k, what in better.items())
    learned = "distillation" if UNDISTILLED in better else "tuning" if UNTUNED in better else ""
    help_by = f"fewer steps of {learned}" if learned else "a larger shrinkage or damping"
    message = (
        f"gate: on held-out {kind} the calibrated model has {measure} {losses[CALIBRATED]:.4f}, "
        f"{others} (float: {losses[REFERENCE]:.4f}): "
        f"more and more varied calibration {kind}, or {help_by}, may help"
    )
    if gate == "raise":
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=6)


class HeldOut:
    """Held-out data on its way through several models at once, unit by unit.

    They are the float model, one quantized without data, and the calibrated one.

    Attributes:
        measure: how they are compared, one of `measure`.

    Raises:
        ValueError: at construction, naming held_out: the model cannot be run with it, or what it
            gives cannot be judged.
    """

    def __init__(
        self,
        model: nn.Module,
        recordings: Recordings,
        batches: list[Tensor | Mapping[str, Any]],
        config: LiquidConfig,
    ) -> None:
        self._model, self._batches = model, batches
        self._data_free = LiquidConfig(
            group_size=config.group_size, keep=config.keep, bits=config.bits
        )
        found = []
        for number, batch in enumerate(batches):
            with running(model, batch, f"held_out: batch {number}"):
                found.append(recordings.of(batch))
        self.measure = choose_measure(model, batches, found)
        self._lanes = {
            kind: Lane(recordings.flows(batches, "held_out"), to_end=True)
            for kind in (REFERENCE, DATA_FREE, CALIBRATED, *([UNTUNED] if config.tune else []))
        }

    def reference(self, unit: Unit, block: nn.Module, layers: dict[str, nn.Linear]) -> None:
        """Move the float and the data-free model on, given the float block."""
        self._lanes[REFERENCE].advance(unit.name, block, changes=True)
        data_free = copy.deepcopy(block)
        for name, linear in layers.items():
            weight, _ = quantize_layer(linear.weight, self._data_free, name)
            replace_module(data_free, unit.inner(name), SimulatedLinear(weight, linear.bias))
        self._lanes[DATA_FREE].advance(unit.name, data_free)

    def untuned(self, unit: Unit, block: nn.Module) -> None:
        """Move the model before tuning on, given the block before it is tuned."""
        self._lanes[UNTUNED].advance(unit.name, block, changes=True)

    def calibrated(self, unit: Unit, block: nn.Module) -> None:
        self._lanes[CALIBRATED].advance(unit.name, block)

    def losses(self) -> dict[str, float]:
        """The measure for each of the models, over all batches."""
        totals = dict.fromkeys(self._lanes, 0.0)
        counts = dict.fromkeys(self._lanes, 0.0)
        for index, batch in enumerate(self._batches):
            reference = None
            for kind, lane in self._lanes.items():
                output = lane.flows[index].finish()
                reference = output if kind == REFERENCE else reference
                total, count = loss(self.measure, self._model, batch, output, reference)
                totals[kind] += total
                counts[kind] += count
        return {kind: totals[kind] / counts[kind] for kind in totals}
