"""Smoothing: factors that move outliers of activations into the weights, at no run-time cost.

For a layer whose input x comes from a norm or linear, ``W x = (W m)(x / m)``: m goes into the
columns of W, 1 / m into the gain of the norm or the rows of the linear. ``m = max|x|^alpha /
max|W|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, as used by QServe, arXiv 2405.04532), where
alpha is searched per site for the least error at the output, through the quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from ...nn._modules import linear_at, weight_of
from ...weights.quantize import quantize_weight
from ...weights.weight import dequantize_weight
from ..config import LiquidConfig
from .gptq import int8_weight
from .moments import round_activation
from .simulate import SimulatedLinear

_ALPHAS = (0.15, 0.3, 0.45, 0.6, 0.75)
_SAMPLE_TOKENS = 384
_SAMPLE_ROWS = 192
_RANGE = 1e4  # factors stay within a range that no dtype minds


@dataclass(frozen=True)
class Site:
    """Linears with one input, and the module whose output, scaled, is that input."""

    source: str
    linears: tuple[str, ...]


def head_layout(source: Tensor, wide: int, head_size: int | None) -> tuple[int, int, int]:
    """``(heads, repeats, size)``: how outputs of the source become the inputs of a linear.

    Args:
        source: the weight of the source.
        wide: in_features of the linear.
        head_size: features of a head, if there are heads.
    """
    own = source.shape[0]
    if own == wide:
        return 1, 1, wide
    if source.dim() < 2 or not head_size or own % head_size or wide % own:
        raise ValueError(f"expected a source of {wide} features, or of fewer heads, got {own}")
    return own // head_size, wide // own, head_size


def choose_factors(
    x: Tensor,
    amax: Tensor,
    mean_square: Tensor,
    weights: list[Tensor],
    layout: tuple[int, int, int],
    config: LiquidConfig,
    bits: Sequence[int],
) -> tuple[Tensor | None, float | None]:
    """The factors of least output error: ``[K]``, or None if not to smooth is best, and alpha.

    Args:
        x: float32 ``[T, K]``, a sample of the inputs.
        amax, mean_square: of each input feature over all tokens, ``[K]``.
        weights: float32 ``[N, K]`` each, all of the layers with this input.
        layout: as of `head_layout`; factors of repeated heads are tied.
        bits: 4, 6 or 8, of each of the weights.
    """
    stride = max(1, sum(map(len, weights)) // _SAMPLE_ROWS)
    rows = [w[::stride] for w in weights]
    expected = [x @ w.T for w in rows]
    wmax = torch.stack([w.abs().amax(0) for w in weights]).amax(0)

    def error(m: Tensor | None) -> float:
        inputs = round_activation(x if m is None else x / m)
        squares = mean_square if m is None else mean_square / m.square()
        importance = squares if squares.any() else None
        total = 0.0
        for i, w in enumerate(rows):
            scaled = w if m is None else w * m
            quantized = dequantize_weight(
                int8_weight(scaled)
                if bits[i] == 8
                else quantize_weight(
                    scaled, config.group_of(bits[i]), "search", importance, bits[i]
                )
            )
            total += (inputs @ quantized.T - expected[i]).square().sum().item()
        return total

    best, best_alpha, least = None, None, error(None)
    # One token may have what is the largest by far: the mean square hardly knows of it.
    for size in (amax, mean_square.sqrt()):
        for alpha in _ALPHAS:
            m = _factors(size, wmax, alpha, layout)
            if (e := error(m)) < least:
                best, best_alpha, least = m, alpha, e
    return best, best_alpha


def _factors(channels: Tensor, wmax: Tensor, alpha: float, layout: tuple[int, int, int]) -> Tensor:
    def tied(values: Tensor) -> Tensor:
        heads, repeats, size = layout
        return values.view(heads, repeats, size).amax(1, keepdim=True)

    a, w = tied(channels), tied(wmax)
    usable = (a > 0) & (w > 0)
    a, w = torch.where(usable, a, 1), torch.where(usable, w, 1)
    m = a.pow(alpha) / w.pow(1 - alpha)
    m = m / m[usable].log().mean().exp() if usable.any() else torch.ones_like(m)
    m = torch.where(usable, m, 1).clamp(1 / _RANGE, _RANGE)
    heads, repeats, size = layout
    return m.expand(heads, repeats, size).reshape(-1)


@torch.no_grad()
def fold_into_source(source: nn.Module, m: Tensor, layout: tuple[int, int, int]) -> None:
    """Divide what the source gives by m ``[K]``."""
    heads, repeats, size = layout
    if repeats > 1 or isinstance(source, nn.Linear | SimulatedLinear):
        m = m.view(heads, repeats, size)[:, 0].reshape(-1)
    if isinstance(source, SimulatedLinear):
        source.divide_outputs(m)
        return
    weight = weight_of(source)
    if isinstance(source, nn.Linear):
        weight.div_(m.unsqueeze(1))
    elif _gain_is_one_plus(source):
        weight.copy_((1 + weight) / m - 1)
    else:
        weight.div_(m)
    if (bias := getattr(source, "bias", None)) is not None:
        bias.div_(m)


def _gain_is_one_plus(norm: nn.Module) -> bool:
    """Whether a norm multiplies by ``1 + weight``, as Gemma's do: asked of the norm itself."""
    probe = copy.deepcopy(norm)
    weight = weight_of(probe).zero_()
    if (bias := getattr(probe, "bias", None)) is not None:
        bias.zero_()
    ramp = torch.arange(weight.numel(), dtype=weight.dtype, device=weight.device)
    return bool(probe(ramp.unsqueeze(0)).any())


def site_layout(block: nn.Module, site: Site) -> tuple[int, int, int]:
    source = weight_of(block.get_submodule(site.source))
    wide = linear_at(block, site.linears[0]).in_features
    parent = block.get_submodule(site.source.rpartition(".")[0])
    return head_layout(source, wide, getattr(parent, "head_dim", None))


def sample_rows(inputs: list[Tensor], count: int = _SAMPLE_TOKENS) -> Tensor:
    """About ``count`` rows spread evenly over the inputs."""
    total = sum(len(x) for x in inputs)
    step = max(1, total // count)
    return torch.cat([x[::step] for x in inputs]).float()[: 2 * count]


def smooth_site(
    block: nn.Module,
    site: Site,
    inputs: list[Tensor],
    config: LiquidConfig,
    bits: Sequence[int],
) -> tuple[list[Tensor], float | None]:
    """Choose the factors of a site and fold them in; the inputs as they are now, and alpha.

    Args:
        bits: 4, 6 or 8, of each of its linears.
    """
    layout = site_layout(block, site)
    linears = [linear_at(block, name) for name in site.linears]
    amax = torch.stack([x.abs().amax(0) for x in inputs]).amax(0).float()
    tokens = sum(len(x) for x in inputs)
    mean_square = reduce(torch.add, (x.float().square().sum(0) for x in inputs)) / tokens
    weights = [linear.weight.float() for linear in linears]
    m, alpha = choose_factors(sample_rows(inputs), amax, mean_square, weights, layout, config, bits)
    if m is None:
        return inputs, None
    fold_into_source(block.get_submodule(site.source), m, layout)
    for linear in linears:
        linear.weight.mul_(m)
    return [x / m for x in inputs], alpha
