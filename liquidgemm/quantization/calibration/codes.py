"""Learned rounding: the codes of a weight as a function of what can be learned.

A code is ``q = round(u)``, within what its group has room for. What is learned is u, which starts
within half a step of the given code, on the side of it on which the float weight lies; rounding is
passed straight through (SignRound, arXiv 2309.05516). Steps and offsets stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats.liquidquant import GROUP, Q_MAX, pack_nibbles, padded, unpack_nibbles
from ...weights.weight import QuantizedWeight, dequantize_weight


class LearnedCodes:
    """The learned codes of one weight.

    Args:
        base: the codes to start from. Its residual columns stay as they are.
        weight: float32 ``[N, K]``, what base stands for.

    Attributes:
        position: u, ``[N, K]``.
    """

    def __init__(self, base: QuantizedWeight, weight: Tensor) -> None:
        self._base, k = base, base.in_features
        groups, columns = padded(k) // base.group_size, base.group_size
        self._step, offset = (
            p[:, :groups].repeat_interleave(columns, 1)[:, :k].float()
            for p in (base.qscale, base.qoffset)
        )
        self._first = unpack_nibbles(base.qweight[:, : padded(k) // 2])[:, :k]
        # v - q s: the offset, and what residual columns add.
        unit = dequantize_weight(replace(base, scale=torch.ones_like(base.scale)))
        self._rest = unit - self._first * self._step
        self._top = ((255 - offset) / self._step).floor_().clamp_(max=Q_MAX)
        sigma = torch.where(base.scale > 0, base.scale, 1).unsqueeze(1)
        off = (weight / sigma - self._rest) / self._step - self._first
        # Spread within half a step: values that start at one place would leave their codes at once.
        self.position = self._first + 0.98 * off / (1 + 2 * off.abs())

    def units(self) -> Tensor:
        """The weight in units of sigma, integers as float32 ``[N, K]``."""
        # Not beyond what rounds to a code: from there no gradient would bring it back soon.
        torch.minimum(self.position.clamp_(min=-0.5), self._top + 0.5, out=self.position)
        return torch.addcmul(self._rest, self._codes(), self._step)

    def backward(self, gradient: Tensor) -> None:
        """Set the gradient of u, of root mean square 1, given that of the weight in units of sigma.

        A loss near 0 has gradients that an optimizer takes for 0.
        """
        change = gradient * self._step
        self.position.grad = change / change.square().mean().sqrt().clamp_min(1e-30)

    def weight(self) -> QuantizedWeight:
        """The base with the codes learned up to now."""
        codes = F.pad(self._codes().to(torch.uint8), (0, -self._base.in_features % GROUP))
        own = pack_nibbles(codes.contiguous())
        return replace(
            self._base, qweight=torch.cat((own, self._base.qweight[:, own.shape[1] :]), 1)
        )

    def moved(self) -> float:
        """The share of weights that have another code than at the start."""
        return (self._codes() != self._first).float().mean().item()

    def _codes(self) -> Tensor:
        return torch.minimum(self.position.round().clamp_(min=0), self._top)
