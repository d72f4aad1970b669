"""Quantize whole models in place: plain ``nn.Module``s and those of ``transformers``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._modules import matches, paths_of_modules, replace_module
from .config import LiquidConfig
from .format import GROUP, MAX_IN_FEATURES, Q_MAX
from .linear import LiquidLinear
from .ops import FLOATS
from .quantize import check_finite


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_` did.

    Attributes:
        quantized: names of the layers that are now `LiquidLinear`.
        skipped: name and reason of every other module that holds a matrix.
        bytes_before, bytes_after: size of the weights of the quantized layers.
        coarse_rows: per layer that has any, the number of rows in which at least half of the
            groups span less than 15 steps of the INT8 grid, so that not even s = 1 gives them 4
            bits. Mostly it is one huge weight that leaves the others so little of the range.
    """

    quantized: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int
    coarse_rows: dict[str, int]

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} linear layers quantized, {self.bytes_before / 1e6:.1f} MB to "
            f"{self.bytes_after / 1e6:.1f} MB"
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"skipped {', '.join(names[:3])}{more}: {reason}")
        if self.coarse_rows:
            rows = sum(self.coarse_rows.values())
            lines.append(f"{rows} rows in {len(self.coarse_rows)} layers have outliers")
        return "\n".join(lines)


@torch.no_grad()
def quantize_(
    model: nn.Module,
    config: LiquidConfig | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Replace the linear layers of a model by `LiquidLinear`, in place, on their own devices.

    All weights are checked before the first layer is replaced. A layer used in several places
    stays one layer.

    Args:
        model: any module that contains ``nn.Linear`` layers.
        config: method, group size and skip patterns; the defaults if None.
        filter_fn: called with the name and module of each ``nn.Linear`` that is about to be
            quantized; it is left alone where this returns False.
        progress: show a progress bar.

    Raises:
        ValueError: the model itself is an ``nn.Linear``, or a weight is NaN, infinite or on the
            meta device; the message names the layer.
    """
    config = config or LiquidConfig()
    if config.needs_calibration or config.keep or config.augment or config.rotate:
        raise NotImplementedError("calibration")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a module that contains nn.Linear layers, got an nn.Linear, which "
            "cannot be replaced in place: use LiquidLinear.from_linear(model)"
        )
    paths = paths_of_modules(model)
    quantized, skipped = _sort_out(model, paths, config, filter_fn)
    for name in quantized:
        weight = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(f"{name}: expected a weight with data, got one on the meta device")
        try:
            check_finite(weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    bytes_before = bytes_after = 0
    coarse_rows = {}
    # By name, so that each float weight is freed as soon as it is replaced.
    for name in tqdm(quantized, desc="quantizing", unit="layer", disable=not progress):
        linear = model.get_submodule(name)
        layer = LiquidLinear.from_linear(linear, config.group_size, config.method)
        bytes_before += linear.weight.nbytes
        bytes_after += layer.packed.nbytes + layer.scale.nbytes
        if coarse := _count_coarse_rows(linear.weight, layer.scale):
            coarse_rows[name] = coarse
        for path in paths[linear]:
            replace_module(model, path, layer)
    model.liquid_config = config
    return QuantizationReport(tuple(quantized), skipped, bytes_before, bytes_after, coarse_rows)


def _sort_out(
    model: nn.Module,
    paths: dict[nn.Module, list[str]],
    config: LiquidConfig,
    filter_fn: Callable[[str, nn.Module], bool] | None,
) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to quantize, and name and reason for the matrices to leave alone."""
    users = Counter(p for module in paths for p in module._parameters.values() if p is not None)
    quantized, skipped = [], {}
    for module, names in paths.items():
        weight = getattr(module, "weight", None)
        if isinstance(module, LiquidLinear):
            skipped[names[0]] = "already quantized"
        elif isinstance(weight, Tensor) and weight.dim() >= 2:
            reason = _reason_to_skip(module, names, users, config, filter_fn)
            if reason is None:
                quantized.append(names[0])
            else:
                skipped[names[0]] = reason
    return quantized, skipped


def _reason_to_skip(
    module: nn.Module,
    names: list[str],
    users: Counter,
    config: LiquidConfig,
    filter_fn: Callable[[str, nn.Module], bool] | None,
) -> str | None:
    # Not isinstance: a subclass may use its weight in ways of its own.
    if type(module) is not nn.Linear:
        return f"not nn.Linear but {type(module).__name__}"
    for pattern in config.skip:
        if any(matches(name, pattern) for name in names):
            return f"matches the pattern {pattern!r}"
    if users[module.weight] > 1:
        return "its weight is tied to another module's"
    if module.weight.dtype not in FLOATS:
        return f"its dtype is {module.weight.dtype}"
    if not (module.weight.numel() > 0 and module.in_features <= MAX_IN_FEATURES):
        return f"its shape is {list(module.weight.shape)}"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "it has hooks, which would be lost"
    if filter_fn is not None and not filter_fn(names[0], module):
        return "rejected by filter_fn"
    return None


def _count_coarse_rows(weight: Tensor, scale: Tensor) -> int:
    groups = weight[:, : weight.shape[1] // GROUP * GROUP].unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    spread = high.float() - low.float()
    coarse = (spread > 0) & (spread < Q_MAX * scale.unsqueeze(1))
    return int((coarse.float().mean(1) >= 0.5).sum())
