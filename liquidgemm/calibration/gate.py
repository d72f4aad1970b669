"""The gate: is a calibrated model better than a data-free one on text it has not seen?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from .._modules import replace_module
from ..config import LiquidConfig
from . import blocks as B
from .layer import quantize_layer
from .simulate import SimulatedLinear

REFERENCE, DATA_FREE, CALIBRATED = "reference", "data-free", "calibrated"


def check_gate(losses: Mapping[str, float], gate: str) -> None:
    """Compare losses on held-out text; without any, or with the gate "off", do nothing.

    Raises:
        RuntimeError: the calibrated model is worse than the data-free one and the gate is "raise".
    """
    if not losses or gate == "off" or losses[CALIBRATED] <= losses[DATA_FREE]:
        return
    message = (
        f"gate: on held-out text the calibrated model has loss {losses[CALIBRATED]:.4f}, one "
        f"quantized without data {losses[DATA_FREE]:.4f} (float: {losses[REFERENCE]:.4f}): more "
        "and more varied calibration text, or a larger shrinkage or damping, may help"
    )
    if gate == "raise":
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=3)


class HeldOut:
    """Held-out text on its way through three models at once, block by block.

    They are the float model, one quantized without data, and the calibrated one.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        batches: list[Tensor | Mapping[str, Tensor]],
        config: LiquidConfig,
    ) -> None:
        self._model, self._names, self._batches = model, names, batches
        self._data_free = LiquidConfig(group_size=config.group_size, keep=config.keep)
        streams = [B.capture(model, names, batch) for batch in batches]
        self._streams = streams
        kinds = (REFERENCE, DATA_FREE, CALIBRATED)
        self._hidden = {kind: [s.hidden for s in streams] for kind in kinds}

    def reference(self, block: nn.Module, layers: dict[str, nn.Linear], index: int) -> None:
        """Move the float and the data-free model on, given the float block."""
        self._advance(REFERENCE, block, index)
        data_free = copy.deepcopy(block)
        paths = {module: path for path, module in block.named_modules()}
        for name, linear in layers.items():
            weight, _ = quantize_layer(linear.weight, self._data_free, name)
            replace_module(data_free, paths[linear], SimulatedLinear(weight, linear.bias))
        self._advance(DATA_FREE, data_free, index)

    def calibrated(self, block: nn.Module, index: int) -> None:
        self._advance(CALIBRATED, block, index)

    def _advance(self, kind: str, block: nn.Module, index: int) -> None:
        hidden = self._hidden[kind]
        for i, stream in enumerate(self._streams):
            hidden[i] = B.run_block(block, stream, index, hidden[i])

    def losses(self) -> dict[str, float]:
        """Mean negative log-likelihood of the next token for each of the three.

        Raises:
            ValueError: the model's output has no logits.
        """
        return {kind: self._loss(hidden) for kind, hidden in self._hidden.items()}

    def _loss(self, hidden: list[Tensor]) -> float:
        total, count = 0.0, 0
        for batch, last in zip(self._batches, hidden, strict=True):
            output = B.finish(self._model, self._names, batch, last)
            logits = getattr(output, "logits", None)
            if logits is None:
                raise ValueError(
                    "held_out: expected None, or a model whose output has logits, "
                    f"got {type(output).__name__}"
                )
            ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
            target = ids[:, 1:].reshape(-1).to(logits.device)
            flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
            total += F.cross_entropy(flat, target, reduction="sum").item()
            count += target.numel()
        return total / count
