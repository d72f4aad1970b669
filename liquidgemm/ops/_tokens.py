"""What a producer hands to the product behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QuantizedTokens(NamedTuple):
    """Activations that are INT8 already, for a `LiquidLinear`, which then multiplies alone.

    A tuple, so that torch.compile, torch.export, hooks and pytrees see the tensors in it.
    ``QuantizedTokens(*liquidgemm.quantize_activation(x), x.dtype)`` are those of x.

    Attributes:
        x8: int8 ``[..., K]`` with values in -127..127.
        scale: float32 ``[...]``, one per token.
        dtype: of the activations before they were quantized, and of what a layer makes of them.
    """

    x8: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """That of the activations, ``[..., K]``."""
        return self.x8.shape

    def to(self, dtype: torch.dtype) -> QuantizedTokens:
        """The same tokens, of which a layer makes another dtype."""
        return self._replace(dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.x8.device
