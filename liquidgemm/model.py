"""Quantize whole models in place: plain ``nn.Module``s and those of ``transformers``."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._modules import attach, matches, paths_of_modules, replace_module
from .calibration.data import as_batches
from .calibration.driver import Calibrated, calibrate
from .calibration.gate import check_gate
from .calibration.layer import quantize_layer
from .calibration.plan import plan
from .calibration.report import LayerReport, QuantizationReport
from .calibration.rotate import rotate_
from .config import CALIBRATED, LiquidConfig
from .format import GROUP, MAX_IN_FEATURES, Q_MAX
from .linear import LiquidLinear
from .ops import FLOATS
from .quantize import check_finite
from .weight import QuantizedWeight


@torch.no_grad()
def quantize_(
    model: nn.Module,
    config: LiquidConfig | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    progress: bool = True,
    *,
    calibration: Iterable[Any] | None = None,
    held_out: Iterable[Any] | None = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    resume: str | os.PathLike | None = None,
    dry_run: bool = False,
) -> QuantizationReport:
    """Replace the linear layers of a model by `LiquidLinear`, in place, on their own devices.

    All weights are checked before the first layer is replaced. A layer used in several places
    stays one layer. With calibration data the model is quantized block by block, each on what the
    quantized blocks before it give, and nothing of it is replaced before the last block is done;
    only a rotation, which leaves its function as it is, comes first.

    Args:
        model: any module that contains ``nn.Linear`` layers.
        config: method, patterns and so on; the defaults if None.
        filter_fn: called with the name and module of each ``nn.Linear`` that is about to be
            quantized; it is left alone where this returns False.
        progress: show a progress bar.
        calibration: token batches (int64 ``[B, T]``, or mappings of the model's arguments) or
            texts. The methods "hessian" and "gptq" and smoothing need it.
        held_out: text of other kinds, likewise, for the config's gate. The model must have logits.
        tokenizer: for texts; called with a text, gives ``input_ids``.
        device: where blocks are calibrated, one at a time; None for where the model is.
        resume: a folder in which finished blocks are kept and, if the same call was interrupted,
            found again.
        dry_run: change nothing; the report says what would become of each layer.

    Raises:
        ValueError, TypeError: the model itself is an ``nn.Linear``; a weight is NaN, infinite or on
            the meta device; the data is missing or no data; the architecture does not permit what
            the config asks for; resume holds another calibration. The message names the layer or
            argument.
        RuntimeError: on held-out text the calibrated model is worse than a data-free one, and the
            gate is "raise".
    """
    config = config or LiquidConfig()
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a module that contains nn.Linear layers, got an nn.Linear, which "
            "cannot be replaced in place: use LiquidLinear.from_linear(model)"
        )
    paths = paths_of_modules(model)
    names, skipped = _sort_out(model, paths, config, filter_fn)
    for name in names:
        weight = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(f"{name}: expected a weight with data, got one on the meta device")
        try:
            check_finite(weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if dry_run:
        return QuantizationReport(tuple(names), skipped, plan=plan(model, names, config))
    if calibration is None and config.needs_calibration:
        wanted = "smooth" if config.smooth else "tune"
        if config.method in CALIBRATED:
            wanted = f"method {config.method!r}"
        raise ValueError(f"calibration: expected token batches or texts for {wanted}, got None")
    batches = None if calibration is None else as_batches(calibration, tokenizer)
    unseen = None if held_out is None else as_batches(held_out, tokenizer, "held_out")
    if config.rotate or config.rotate_heads:
        rotate_(model, config)

    if batches is None:
        layers, coarse_rows, sizes = _quantize_without_data(model, names, paths, config, progress)
        losses = {}
    else:
        folder = None if resume is None else Path(resume)
        found = calibrate(model, names, config, batches, unseen, device, folder, progress)
        layers, losses = found.layers, found.held_out
        check_gate(losses, config.gate)
        coarse_rows, sizes = _install(model, names, paths, found)
    model.liquid_config = config
    attach(model)
    return QuantizationReport(
        tuple(names),
        skipped,
        *map(sum, zip(*sizes, strict=True)) if sizes else (0, 0),
        coarse_rows,
        tuple(layers),
        losses,
    )


def _quantize_without_data(
    model: nn.Module,
    names: list[str],
    paths: dict[nn.Module, list[str]],
    config: LiquidConfig,
    progress: bool,
) -> tuple[list[LayerReport], dict[str, int], list[tuple[int, int]]]:
    layers, coarse_rows, sizes = [], {}, []
    # By name, so that each float weight is freed as soon as it is replaced.
    for name in tqdm(names, desc="quantizing", unit="layer", disable=not progress):
        linear = model.get_submodule(name)
        start = time.perf_counter()
        weight, method = quantize_layer(linear.weight, config, name)
        report = LayerReport.of(name, method, linear.weight, weight)
        report.seconds = time.perf_counter() - start
        layers.append(report)
        sizes.append(_replace(model, paths[linear], weight, linear.bias, coarse_rows))
    return layers, coarse_rows, sizes


def _install(
    model: nn.Module, names: list[str], paths: dict[nn.Module, list[str]], found: Calibrated
) -> tuple[dict[str, int], list[tuple[int, int]]]:
    parameters = dict(model.named_parameters())
    for key, value in found.tensors.items():
        parameters[key].copy_(value)
    coarse_rows, sizes = {}, []
    for name in names:
        linear = model.get_submodule(name)
        bias = found.biases.get(name)
        if bias is not None:
            bias = bias.to(linear.bias.dtype)
        weight = found.weights.pop(name).to(linear.weight.device)
        sizes.append(_replace(model, paths[linear], weight, bias, coarse_rows))
    return coarse_rows, sizes


def _replace(
    model: nn.Module,
    paths: list[str],
    weight: QuantizedWeight,
    bias: Tensor | None,
    coarse_rows: dict[str, int],
) -> tuple[int, int]:
    """Put a quantized layer into its places; the bytes before and after."""
    linear = model.get_submodule(paths[0])
    layer = LiquidLinear.from_quantized(weight, bias, linear.weight.dtype)
    layer.train(linear.training)
    if coarse := _count_coarse_rows(linear.weight, layer.scale):
        coarse_rows[paths[0]] = coarse
    for path in paths:
        replace_module(model, path, layer)
    return linear.weight.nbytes, layer.packed.nbytes + layer.scale.nbytes


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
