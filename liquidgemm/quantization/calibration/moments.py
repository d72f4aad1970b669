"""Second moments of a layer's inputs, as the kernel will see them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import quantize_activation

# How often damping is multiplied by ten before a Cholesky factor is given up.
_ATTEMPTS = 4


def round_activation(x: Tensor) -> Tensor:
    """x rounded to INT8 per token and expanded again, in the dtype of x: ``[..., K]``."""
    x8, scale = quantize_activation(x)
    return (x8.float() * scale.unsqueeze(-1)).to(x.dtype)


@dataclass(frozen=True)
class Moments:
    """Mean of ``xᵀ x`` over tokens.

    Attributes:
        hessian: float32 ``[K, K]``.
        tokens: how many it is the mean of.
    """

    hessian: Tensor
    tokens: int

    @classmethod
    def of(cls, inputs: Iterable[Tensor]) -> Moments | None:
        """From rounded inputs ``[T, K]``; None if there is not one token."""
        total: Tensor | None = None
        tokens = 0
        for x in inputs:
            product = x.float().T @ x.float()
            total = product if total is None else total.add_(product)
            tokens += len(x)
        return None if total is None or not tokens else cls(total / tokens, tokens)

    def importance(self, shrinkage: float) -> Tensor:
        """diag(H), shrunk towards its mean: ``[K]``."""
        diagonal = self.hessian.diagonal()
        return torch.lerp(diagonal, diagonal.mean().expand_as(diagonal), shrinkage)

    def regularized(self, damping: float, shrinkage: float) -> Tensor:
        """``(1 - rho) H + rho diag(H) + lambda mean(diag(H)) I``; 1 on the diagonal if dead."""
        diagonal = self.hessian.diagonal()
        h = self.hessian * (1 - shrinkage)
        mean = diagonal.mean()
        h.diagonal().copy_(diagonal + damping * mean)
        dead = diagonal <= 0
        h.diagonal()[dead] = mean if mean > 0 else 1.0
        return h


def inverse_factor(hessian: Tensor, name: str = "layer") -> Tensor | None:
    """Upper U with ``Uᵀ U = H⁻¹``, float32 ``[K, K]``; None, with a warning, if there is none.

    If float32 fails, tenfold damping is tried, then float64.
    """
    for dtype in (torch.float32, torch.float64):
        h = hessian.to(dtype, copy=True)
        damping = 0.01 * h.diagonal().mean()
        for attempt in range(_ATTEMPTS):
            if attempt:
                h.diagonal().add_(damping * 10 ** (attempt - 1))
            factor, failed = torch.linalg.cholesky_ex(h)
            if failed:
                continue
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and upper.isfinite().all():
                if attempt or dtype == torch.float64:
                    warnings.warn(
                        f"{name}: H was not positive definite; {attempt} rounds of more damping "
                        f"in {dtype} have mended it",
                        stacklevel=2,
                    )
                return upper.float()
    warnings.warn(
        f"{name}: H has no Cholesky factor, not even in float64 with more damping: "
        'quantized with method "hessian" instead of "gptq"',
        stacklevel=2,
    )
    return None
