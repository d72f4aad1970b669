"""Calibration, block by block.

Each block is copied in float32 to the device and quantized there, stage by stage: a stage is the
layers that share an input. Its inputs are what the stages and blocks before it give *as quantized*.
The model itself is not touched until all blocks are done, and no more than one block and the
activations between two blocks are on the device.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._modules import replace_module
from ..config import LiquidConfig
from ..weight import QuantizedWeight
from . import blocks as B
from .gate import HeldOut
from .layer import quantize_layer
from .moments import Moments, round_activation
from .report import LayerReport
from .resume import Resume
from .simulate import SimulatedLinear
from .smooth import Site, find_sites, sample_rows, smooth_site, usable_sites
from .tune import tune_block


@dataclass
class Calibrated:
    """What calibration has found, not yet in the model.

    Attributes:
        weights: quantized weight of each layer by name.
        tensors: new values of parameters of layers that are not quantized, by name.
        biases: the same for biases of quantized layers.
        layers: one report per layer.
        held_out: losses on held-out text by name, if there was any.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    names: list[str],
    config: LiquidConfig,
    batches: list[Tensor | Mapping[str, Tensor]],
    held_out: list[Tensor | Mapping[str, Tensor]] | None = None,
    device: torch.device | str | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> Calibrated:
    """Quantize the named layers of a model with calibration data; the model stays as it is."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        block_names = B.find_blocks(model, names)
        streams = [B.capture(model, block_names, batch) for batch in batches]
        unseen = HeldOut(model, block_names, held_out, config) if held_out else None
        resume = Resume(folder, config, batches)
        result = Calibrated()
        bar = tqdm(block_names, desc="calibrating", unit="block", disable=not progress)
        sites: list[Site] | None = None
        # What the float model gives; nothing if that is not wanted.
        targets = [batch.hidden for batch in streams] if config.tune else []
        for index, name in enumerate(bar):
            prefix = f"{name}." if name else ""
            inside = [n for n in names if n.startswith(prefix)]
            original = model.get_submodule(name)
            block = copy.deepcopy(original).float()
            if device is not None:
                block.to(device)
            layers = {n: block.get_submodule(n.removeprefix(prefix)) for n in inside}
            if unseen is not None:
                unseen.reference(block, layers, index)
            if sites is None:
                sites = _sites(block, config, streams[0], index)
            targets = [
                B.run_block(block, stream, index, hidden)
                for stream, hidden in zip(streams, targets, strict=False)
            ]
            reports = resume.load(index, original, block)
            if reports is None:
                reports = _quantize_block(block, prefix, layers, sites, config, streams, index, bar)
                if config.tune:
                    tune_block(block, streams, targets, index, config.tune, config.seed)
                resume.save(index, original, block, reports)
            if index + 1 < len(block_names):
                for batch in streams:
                    batch.hidden = B.run_block(block, batch, index)
            if unseen is not None:
                unseen.calibrated(block, index)
            _collect(result, block, prefix, inside, reports, next(model.parameters()).device)
        for name in names:
            if name not in result.weights:  # outside the blocks
                linear = model.get_submodule(name)
                result.weights[name], method = quantize_layer(linear.weight, config, name)
                report = LayerReport.of(name, method, linear.weight, result.weights[name])
                result.layers.append(report)
        if unseen is not None:
            result.held_out = unseen.losses()
    finally:
        for module in training:
            module.training = True
    return result


def _sites(block: nn.Module, config: LiquidConfig, batch: B.Batch, index: int) -> list[Site]:
    found = find_sites(block, config)
    usable, refused = usable_sites(block, found, lambda b: B.run_block(b, batch, index))
    if refused and isinstance(config.smooth, Mapping):
        site, why = next(iter(refused.items()))
        raise ValueError(f"smooth: {site.source} into {', '.join(site.linears)}: {why}")
    return usable


def _quantize_block(
    block: nn.Module,
    prefix: str,
    layers: dict[str, nn.Linear],
    sites: list[Site],
    config: LiquidConfig,
    streams: list[B.Batch],
    index: int,
    bar: tqdm,
) -> list[LayerReport]:
    reports = []
    stages = B.find_stages(block, layers, streams[0], index)
    called = {name for stage in stages for name in stage}
    stages += [[name] for name in layers if name not in called]
    for stage in stages:
        bar.set_postfix_str(stage[0].removeprefix(prefix), refresh=False)
        start = time.perf_counter()
        inputs = B.stage_inputs(block, layers[stage[0]], streams, index)
        alpha = None
        inside = {name.removeprefix(prefix) for name in stage}
        site = next((site for site in sites if inside == set(site.linears)), None)
        if site is not None and inputs:
            inputs, alpha = smooth_site(block, site, inputs, config)
        moments = Moments.of(map(round_activation, inputs))
        sample = sample_rows(inputs) if inputs else None
        for name in stage:
            linear = layers[name]
            quantized, method = quantize_layer(linear.weight, config, name, moments)
            simulated = SimulatedLinear(quantized, linear.bias)
            report = LayerReport.of(name, method, linear.weight, quantized, sample, alpha)
            report.tokens = moments.tokens if moments is not None else 0
            report.seconds = (time.perf_counter() - start) / len(stage)
            reports.append(report)
            replace_module(block, name.removeprefix(prefix), simulated)
        del inputs, moments
    return reports


def _collect(
    result: Calibrated,
    block: nn.Module,
    prefix: str,
    inside: list[str],
    reports: list[LayerReport],
    device: torch.device,
) -> None:
    quantized = {name.removeprefix(prefix) for name in inside}
    for name in quantized:
        layer = block.get_submodule(name)
        result.weights[prefix + name] = layer.quantized.to(device)
        if layer.bias is not None:
            result.biases[prefix + name] = layer.bias.to(device)
    for key, value in block.named_parameters():
        if key.rpartition(".")[0] not in quantized:
            result.tensors[prefix + key] = value.detach().to(device)
    result.layers += reports
