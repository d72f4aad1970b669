"""Quantize whole models in place: plain ``nn.Module``s and those of ``transformers``."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._files import path_of
from ..formats.liquidquant import GROUP, Q_MAX
from ..nn._modules import (
    as_linear,
    attach,
    conv1d_as_linear,
    linear_at,
    matches,
    paths_of_modules,
    replace_module,
    untie,
)
from ..nn.experts import LiquidExperts
from ..nn.linear import LiquidLinear
from ..weights.quantize import check_finite
from ..weights.weight import QuantizedWeight
from .budget import bits_within
from .calibration.data import as_batches
from .calibration.driver import Calibrated, calibrate
from .calibration.gate import check_gate
from .calibration.plan import plan
from .calibration.rotate import rotate_
from .config import CALIBRATED, LiquidConfig
from .experts import Experts, experts_as_linear
from .layer import quantize_layer
from .report import LayerReport, QuantizationReport
from .selection import DONE, OTHER_KIND, Selection, select
from .verification import Probe

_REASONS = 3  # that an error names


# Autocast would round what is to be held against each other, and the statistics of layers.
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
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
    verify: bool = True,
) -> QuantizationReport:
    """Replace the linear layers of a model by `LiquidLinear`, in place, on their own devices.

    Linear layers are ``nn.Linear`` and GPT-2's Conv1D. Experts in stacked parameters are replaced
    by `LiquidExperts`, one layer of a model after the other; patterns, filter_fn and messages know
    their matrices as ``<experts>.<e>.gate_up`` and ``<experts>.<e>.down``. All experts of a layer
    are quantized, or none. Routers stay in floats. What stays in floats stays for a reason that
    the report gives: other kinds of layers, adapters and what they train, heads, layers whose
    weight is shared or read by other code. A model whose layers are quantized already stays as it
    is; one in which some are gets the others quantized, and no config is recorded where those had
    another.

    All weights are checked before the first layer is replaced. A layer used in several places
    stays one layer. With calibration data the model is quantized block by block, each on what the
    quantized blocks before it give, and nothing of it is replaced before the last block is done;
    only a rotation, which leaves its function as it is, comes first.

    Args:
        model: any module that contains linear layers.
        config: method, patterns and so on; the defaults if None.
        filter_fn: called with the name and module of each linear layer that is about to be
            quantized; it is left alone where this returns False.
        progress: show a progress bar.
        calibration: what the model takes: token batches (int64 ``[B, T]``), mappings of its
            arguments (features, masks, decoder ids, labels) or texts. The methods "hessian" and
            "gptq" and smoothing need it.
        held_out: data of other kinds, likewise, for the config's gate. Judged is the loss of the
            model where there are labels, that of the next token for language models, and for
            others how far outputs are from the float model's.
        tokenizer: for texts; called with a text, gives ``input_ids``.
        device: where blocks are calibrated, one at a time; None for where the model is.
        resume: a folder in which finished blocks are kept and, if the same call was interrupted,
            found again.
        dry_run: change nothing; the report says what would become of each layer.
        verify: run the float model and the quantized one once each on a small input, a part of the
            calibration data or made up from the config of a model of ``transformers``, and hold
            each layer against its own arithmetic. What is off by more than rounding can explain is
            warned of; the report says what was checked. Layers whose weight another module turns
            out to read stay as they are.

    Raises:
        ValueError, TypeError: the model itself is an ``nn.Linear``, or has no layer that can be
            quantized (the message gives the reasons); a weight is NaN, infinite or on
            the meta device; the data is missing or no data, or held_out or resume are given
            without; the architecture does not permit what the config asks for; there is no such
            device; resume holds another calibration. The message names the layer or argument.
        RuntimeError: on held-out text the calibrated model is worse than a data-free one, and the
            gate is "raise"; or the quantized model does not run on the input on which the float
            one did (it is quantized, then).
    """
    config = config or LiquidConfig()
    if as_linear(model) is not None:
        raise ValueError(
            f"model: expected a module that contains nn.Linear layers, got an nn.Linear "
            f"({type(model).__name__}), which cannot be replaced in place: use "
            "LiquidLinear.from_linear(model)"
        )
    with experts_as_linear(model) as experts:
        selection = select(model, config, filter_fn, experts)
        names, whole = selection.names, config
        if selection.heads:
            config = replace(config, keep=(*config.keep, *selection.heads))
        if not names:
            if DONE not in selection.skipped.values():
                raise _nothing(selection)
            return QuantizationReport((), selection.skipped, parameters=selection.parameters)
        _check_weights(model, names)
        if calibration is None and config.needs_calibration and not dry_run:
            asked = (name for name in ("smooth", "tune", "distill") if getattr(config, name))
            wanted = next(asked, "budget")
            if config.method in CALIBRATED:
                wanted = f"method {config.method!r}"
            raise ValueError(f"calibration: expected token batches or texts for {wanted}, got None")
        if calibration is None and not dry_run:
            _check_unused(held_out=held_out, resume=resume)
        _check_device(device)
        _check_patterns(model, names, whole)
        batches = unseen = None
        if calibration is not None:
            batches = as_batches(calibration, tokenizer, "calibration", model)
        if held_out is not None:
            unseen = as_batches(held_out, tokenizer, "held_out", model)
        with conv1d_as_linear(model):
            batch = batches[0] if batches else None
            probe = Probe(model, names, batch, progress) if verify else None
            for name, reader in probe.readers.items() if probe else ():
                selection.leave(name, f"its weight is read by {reader}")
            if not names:
                raise _nothing(selection)
            if config.budget is not None:
                if batches is None:
                    raise ValueError(
                        "calibration: expected token batches or texts for budget, which chooses "
                        "bits by what layers do to the output, got None"
                    )
                bits = bits_within(model, names, config, batches, experts, progress)
                config = replace(config, bits=bits, budget=None)
                whole = replace(whole, bits=bits, budget=None)
            if dry_run:
                lines = plan(model, names, config, batches, experts)
                return QuantizationReport(
                    tuple(experts.fold(names)),
                    selection.skipped,
                    plan=lines,
                    parameters=selection.parameters,
                )
            recorded = _common_config(model, whole)
            places = {names[0]: names for names in paths_of_modules(model).values()}
            if batches is None:
                rotate_(model, config)
                layers, coarse_rows, sizes = _quantize_without_data(
                    model, names, places, config, progress, probe, experts
                )
                losses, measure = dict[str, float](), ""
                unsmoothed = dict[str, str]()
            else:
                folder = None if resume is None else path_of(resume)
                found = calibrate(model, names, config, batches, unseen, device, folder, progress)
                layers, losses, measure = found.layers, found.held_out, found.measure
                unsmoothed = found.unsmoothed
                check_gate(losses, config.gate, measure)
                coarse_rows, sizes = _install(model, names, places, found, config, probe, experts)
            for name in selection.heads:
                untie(model, model.get_submodule(name))
        vars(model)["liquid_config"] = recorded
        attach(model)
        if probe is not None:
            errors = {r.name: r.output_error**0.5 for r in layers if r.output_error is not None}
            probe.compare(config.rotate, errors)
            probe.warn()
        layers, of_experts = experts.fold_reports(layers)
        return QuantizationReport(
            tuple(experts.fold(names)),
            selection.skipped,
            sum(before for before, _ in sizes),
            sum(after for _, after in sizes),
            coarse_rows,
            tuple(layers),
            losses,
            measure=measure,
            unsmoothed=unsmoothed,
            parameters=selection.parameters,
            experts=of_experts,
            verification=None if probe is None else probe.result,
        )


def _quantize_without_data(
    model: nn.Module,
    names: list[str],
    places: dict[str, list[str]],
    config: LiquidConfig,
    progress: bool,
    probe: Probe | None,
    experts: Experts,
) -> tuple[list[LayerReport], dict[str, int], list[tuple[int, int]]]:
    coarse_rows: dict[str, int] = {}
    layers, sizes = [], []
    # By name, so that each float weight is freed as soon as it is replaced.
    for name in tqdm(names, desc="quantizing", unit="layer", disable=not progress):
        linear = linear_at(model, name)
        start = time.perf_counter()
        weight, method = quantize_layer(linear.weight, experts.config_of(name, config), name)
        report = LayerReport.of(name, method, linear.weight, weight)
        report.seconds = time.perf_counter() - start
        layers.append(report)
        sizes.append(_replace(model, places[name], weight, linear.bias, coarse_rows, probe))
        del linear
        _fuse(model, name, experts, probe)
    return layers, coarse_rows, sizes


def _install(
    model: nn.Module,
    names: list[str],
    places: dict[str, list[str]],
    found: Calibrated,
    config: LiquidConfig,
    probe: Probe | None,
    experts: Experts,
) -> tuple[dict[str, int], list[tuple[int, int]]]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, value in found.tensors.items():
        parameters[key].copy_(value)
    coarse_rows: dict[str, int] = {}
    sizes = []
    ways = ("smooth", "rotate", "rotate_heads", "tune", "distill")
    changed = any(getattr(config, way) for way in ways)
    for name in names:
        linear = linear_at(model, name)
        bias = found.biases.get(name)
        if bias is not None:
            bias = bias.to(linear.bias.dtype)
        weight = found.weights.pop(name).to(linear.weight.device)
        sizes.append(_replace(model, places[name], weight, bias, coarse_rows, probe, changed))
        _fuse(model, name, experts, probe)
    return coarse_rows, sizes


def _replace(
    model: nn.Module,
    paths: list[str],
    weight: QuantizedWeight,
    bias: Tensor | None,
    coarse_rows: dict[str, int],
    probe: Probe | None,
    changed: bool = False,
) -> tuple[int, int]:
    """Put a quantized layer into its places; the bytes before and after."""
    linear = linear_at(model, paths[0])
    layer = LiquidLinear.from_quantized(weight, bias, linear.weight.dtype)
    layer.train(linear.training)
    if coarse := _count_coarse_rows(linear.weight, layer.scale):
        coarse_rows[paths[0]] = coarse
    if probe is not None:
        probe.check_layer(paths[0], linear, layer, weight, bias, changed)
    for path in paths:
        replace_module(model, path, layer)
    return linear.weight.nbytes, _nbytes(layer.packed) + _nbytes(layer.scale)


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


def _fuse(model: nn.Module, layer: str, experts: Experts, probe: Probe | None) -> None:
    """Make one layer of experts if this was the last of theirs, and see that it does the same."""
    name = experts.of(layer)
    if name is None:
        return
    separate = model.get_submodule(name)
    if experts.is_fused(layer) and probe is not None:
        probe.check_experts(name, separate, cast(LiquidExperts, model.get_submodule(name)))


def _check_unused(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"calibration: expected data, as {name} is given and of no use without, got None"
            )


def _check_device(device: torch.device | str | None) -> None:
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises whatever the kind of device leads to
        raise ValueError(f"device: expected one that is there, got {device!r}: {error}") from None


def _check_patterns(model: nn.Module, names: list[str], config: LiquidConfig) -> None:
    """A pattern of what is not there is a misspelling, or another model's."""
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    skip = [pattern for pattern in config.skip if pattern not in LiquidConfig.skip]
    counts = config.augment if isinstance(config.augment, dict) else ()
    layers = f"none of the layers to quantize, such as {names[0]}"
    for argument, patterns, among, what in (
        ("skip", skip, every, "nothing in the model"),
        ("keep", config.keep, names, layers),
        ("bits", config.bits, names, layers),
        ("augment", counts, names, layers),
    ):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in among):
                warnings.warn(f"{argument}: {pattern!r} matches {what}", stacklevel=6)
    kept = [name for name in names if any(matches(name, pattern) for pattern in config.keep)]
    firsts = [next((p for p in config.bits if matches(name, p)), None) for name in names]
    decided = {p for name, p in zip(names, firsts, strict=True) if name not in kept}
    for pattern in config.bits:
        if pattern not in decided and any(matches(name, pattern) for name in names):
            warnings.warn(
                f"bits: {pattern!r} decides for no layer: keep, or a pattern before it, matches "
                "first",
                stacklevel=6,
            )


def _check_weights(model: nn.Module, names: list[str]) -> None:
    for name in names:
        weight = cast(nn.Linear, as_linear(model.get_submodule(name))).weight
        if weight.is_meta:
            raise ValueError(f"{name}: expected a weight with data, got one on the meta device")
        try:
            check_finite(weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _nothing(selection: Selection) -> ValueError:
    """The error of a model without a single layer to quantize; linear ones come first."""
    wanted = "expected at least one linear layer to quantize"
    reasons = Counter(selection.skipped.values()).most_common()
    if not reasons:
        return ValueError(f"model: {wanted}, got a module without any matrix")
    first = {reason: name for name, reason in reversed(selection.skipped.items())}
    reasons.sort(key=lambda item: item[0].startswith(OTHER_KIND))
    told = [f"{first[reason] or 'model'}: {reason}" for reason, _ in reasons[:_REASONS]]
    return ValueError(f"{'; '.join(told)}: {wanted}, got none")


def _common_config(model: nn.Module, config: LiquidConfig) -> LiquidConfig | None:
    """The config that holds for all quantized layers; None if older ones had another, or none."""
    if not any(isinstance(m, LiquidLinear | LiquidExperts) for m in model.modules()):
        return config
    return config if getattr(model, "liquid_config", None) == config else None


def _count_coarse_rows(weight: Tensor, scale: Tensor) -> int:
    groups = weight[:, : weight.shape[1] // GROUP * GROUP].unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    spread = high.float() - low.float()
    coarse = (spread > 0) & (spread < Q_MAX * scale.unsqueeze(1))
    return int((coarse.float().mean(1) >= 0.5).sum())
