"""Calibration, unit by unit: each block of each list, and what lies outside of them.

Units are calibrated in the order in which the model calls them: an encoder before the decoder, a
vision tower before the language model. Each is copied in float32 to the device and quantized there,
stage by stage: a stage is the layers that share an input. Its inputs are what the stages and units
before it give *as quantized*. The model itself is not touched until all units are done, and no more
than one unit and the activations between two units are on the device. A unit that is called again
later stays there until its last call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...nn._modules import linear_at, replace_module
from ...weights.weight import QuantizedWeight
from ..config import LiquidConfig
from ..experts import PARTS, SeparateExperts
from ..layer import layer_bits, quantize_layers
from ..report import LayerReport
from .blocks import Call, find_stages, main_tensor, stage_inputs
from .data import running
from .distill import Student
from .experts import quantize_experts
from .flow import Lane, Recordings
from .gate import CALIBRATED, UNDISTILLED, HeldOut
from .moments import Moments, round_activation
from .record import order_units
from .resume import BEFORE_TUNING, Resume
from .rotate import rotate_
from .simulate import SimulatedLinear
from .sites import Sites
from .smooth import Site, sample_rows, smooth_site
from .tune import tune_block
from .units import Unit, find_units

_NOT_REACHED = "no token of the calibration data reaches it"


@dataclass
class Calibrated:
    """What calibration has found, not yet in the model.

    Attributes:
        weights: quantized weight of each layer by name.
        tensors: new values of parameters of layers that are not quantized, by name.
        biases: the same for biases of quantized layers.
        layers: one report per layer.
        held_out: losses on held-out data by name, if there was any.
        measure: what kind of loss that is, one of `gate`.
        unsmoothed: by name of a layer, why nothing can be folded into it, for ``smooth=True``.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)
    measure: str = ""
    unsmoothed: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    names: list[str],
    config: LiquidConfig,
    batches: list[Tensor | Mapping[str, Any]],
    held_out: list[Tensor | Mapping[str, Any]] | None = None,
    device: torch.device | str | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> Calibrated:
    """Quantize the named layers of a model with calibration data.

    The model stays as it is, but for the rotation that the config may ask for.

    Raises:
        ValueError: the model cannot be run with the data, or what it gives cannot be judged on
            held-out data; nothing has been calibrated yet.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        run = _Run(model, names, config, batches, held_out, device, folder)
        bar = tqdm(run.units, desc="calibrating", unit="block", disable=not progress)
        for index, unit in enumerate(bar):
            run.calibrate(unit, index, bar)
        if run.unseen is not None:
            run.result.held_out = run.unseen.losses()
            run.result.measure = run.unseen.measure
        if config.distill:
            _distill(model, run.result, config, batches, held_out, device, progress)
    finally:
        for module in training:
            module.training = True
    return run.result


def _distill(
    model: nn.Module,
    result: Calibrated,
    config: LiquidConfig,
    batches: list[Tensor | Mapping[str, Any]],
    held_out: list[Tensor | Mapping[str, Any]] | None,
    device: torch.device | str | None,
    progress: bool,
) -> None:
    """Distill: fit the calibrated layers together, as one model."""
    student = Student(model, result.weights, result.tensors, result.biases, device)
    if held_out is not None:
        result.held_out[UNDISTILLED] = student.loss(result.measure, held_out)
    student.fit(batches, config.distill, config.seed, progress)
    for name, layer in student.layers.items():
        result.weights[name] = layer.quantized.to(result.weights[name].scale.device)
    result.tensors |= student.changed()
    if held_out is not None:
        result.held_out[CALIBRATED] = student.loss(result.measure, held_out)


class _Run:
    """The units in their order, and the batches on their way through them."""

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        config: LiquidConfig,
        batches: list[Tensor | Mapping[str, Any]],
        held_out: list[Tensor | Mapping[str, Any]] | None,
        device: torch.device | str | None,
        folder: Path | None,
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.result = Calibrated()
        self.done: dict[nn.Module, QuantizedWeight] = {}
        recordings = Recordings(model, find_units(model, names))
        self.sites = Sites(model, recordings.units, config, device)
        for number, batch in enumerate(batches):
            with running(model, batch, f"calibration: batch {number}"):
                recordings.of(batch, self.sites.observe)
        self.sites.find()
        self.result.unsmoothed = self.sites.unsmoothed
        self.unseen = HeldOut(model, recordings, held_out, config) if held_out else None
        rotate_(model, config)  # what has been recorded stays as it is
        self.units = order_units(recordings.units, list(recordings.found.values()))
        structure = [[unit.name, *unit.layers] for unit in self.units]
        self.resume = Resume(folder, config, batches, structure)
        self.lane = Lane(recordings.flows(batches, "calibration"))
        # The float model; no batches if what it gives is not wanted.
        tuned = batches if config.tune else []
        self.floats = Lane(recordings.flows(tuned, "calibration"), to_end=True)

    def calibrate(self, unit: Unit, index: int, bar: tqdm) -> None:
        original = self.model.get_submodule(unit.name)
        block = unit.copy(self.model, self.device, self.done)
        layers = {
            name: linear_at(block, unit.inner(name))
            for name in unit.layers
            if self.model.get_submodule(name) not in self.done
        }
        calls = self.lane.calls(unit.name)
        if self.unseen is not None:
            self.unseen.reference(unit, block, layers)
        shapes = [_shape(call) for call in self.floats.calls(unit.name)]
        targets = [main_tensor(out) for out in self.floats.advance(unit.name, block, changes=True)]
        finished = self.resume.holds(index)
        # A finished block is wanted as it was before tuning only to be judged.
        stage = BEFORE_TUNING if self.config.tune and self.unseen is not None else ""
        reports = self.resume.load(index, original, block, stage) if finished else None
        if reports is None:
            inputs = calls + self.lane.later_calls(unit.name)
            sites = self.sites.of(unit)
            reports = _quantize_unit(unit, block, layers, sites, self.config, inputs, bar)
            if self.config.tune:
                self.resume.save(index, original, block, reports, BEFORE_TUNING)
        if self.config.tune and self.unseen is not None:
            self.unseen.untuned(unit, block)
        if finished and stage:
            block = unit.copy(self.model, self.device, self.done)
            self.resume.load(index, original, block)
        if not finished:
            # An expert may get other tokens than in the float model.
            alike = [i for i, shape in enumerate(shapes) if shape == _shape(calls[i])]
            if alike:
                tune_block(
                    block,
                    [calls[i] for i in alike],
                    [targets[i] for i in alike],
                    self.config.tune,
                    self.config.seed,
                    unit.shared_parameters(self.model),
                    bar.set_postfix_str,
                )
            self.resume.save(index, original, block, reports)
        self.lane.advance(unit.name, block)
        if self.unseen is not None:
            self.unseen.calibrated(unit, block)
        self._collect(unit, original, block, list(layers), reports)

    def _collect(
        self,
        unit: Unit,
        original: nn.Module,
        block: nn.Module,
        names: list[str],
        reports: list[LayerReport],
    ) -> None:
        device = next(self.model.parameters()).device
        result = self.result
        for name in names:
            layer = cast(SimulatedLinear, block.get_submodule(unit.inner(name)))
            result.weights[name] = layer.quantized.to(device)
            self.done[self.model.get_submodule(name)] = result.weights[name]
            if layer.bias is not None:
                result.biases[name] = layer.bias.to(device)
        before = dict(original.named_parameters())
        for key, value in block.named_parameters():
            # Where it is still a parameter it is of no quantized layer; most stay as they are.
            if not torch.equal(value, before[key].to(value.device, value.dtype)):
                result.tensors[unit.outer(key)] = value.detach().to(device)
        result.layers += reports


def _parts(experts: SeparateExperts) -> list[tuple[int, str]]:
    return [(e, part) for e in range(experts.layout.num_experts) for part in PARTS]


def _without(stage: list[str], owners: Mapping[str, nn.Module]) -> list[list[str]]:
    """A stage, and the experts in it as stages of their own."""
    rest = [name for name in stage if name not in owners]
    return [*([rest] if rest else []), *([name] for name in stage if name in owners)]


def _shape(call: Call) -> torch.Size | None:
    return None if call.hidden is None else call.hidden.shape


def _quantize_unit(
    unit: Unit,
    block: nn.Module,
    layers: dict[str, nn.Linear],
    sites: list[Site],
    config: LiquidConfig,
    calls: list[Call],
    bar: tqdm,
) -> list[LayerReport]:
    reports = []
    experts = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, SeparateExperts) and unit.outer(f"{name}.0.gate_up") in layers
    }
    of_experts = {f"{e}.{i}.{part}" for e, m in experts.items() for i, part in _parts(m)}
    layers = {name: layer for name, layer in layers.items() if unit.inner(name) not in of_experts}
    owners = {unit.outer(name): module for name, module in experts.items()}
    called_ones: dict[str, nn.Module] = {**layers, **owners}
    stages, repeated = find_stages(block, called_ones, calls[0]) if calls else ([], set())
    # The router has the same input, and whatever else the block computes from it.
    stages = [part for stage in stages for part in _without(stage, owners)]
    called = {name for stage in stages for name in stage}
    stages += [[name] for name in (*layers, *owners) if name not in called]
    for stage in stages:
        if stage[0] in owners:
            inner = unit.inner(stage[0])
            bar.set_postfix_str(inner, refresh=False)
            reports += quantize_experts(block, inner, stage[0], calls, config)
            continue
        bar.set_postfix_str(unit.inner(stage[0]), refresh=False)
        start = time.perf_counter()
        inputs = stage_inputs(block, layers[stage[0]], calls, stage[0] in repeated)
        alpha = None
        inside = {unit.inner(name) for name in stage}
        site = next((site for site in sites if inside == set(site.linears)), None)
        if site is not None and inputs:
            bits = [layer_bits(config, unit.outer(name)) for name in site.linears]
            inputs, alpha = smooth_site(block, site, inputs, config, bits)
        moments = Moments.of(map(round_activation, inputs))
        sample = sample_rows(inputs) if inputs else None
        weights = {name: layers[name].weight for name in stage}
        found = quantize_layers(weights, config, moments)
        for name, (quantized, method) in zip(stage, found, strict=True):
            linear = layers[name]
            simulated = SimulatedLinear(quantized, linear.bias)
            if config.tune and layer_bits(config, name) == 4:
                simulated.original = linear.weight.detach().float()
            report = LayerReport.of(name, method, linear.weight, quantized, sample, alpha)
            report.tokens = moments.tokens if moments is not None else 0
            report.note = "" if moments is not None else _NOT_REACHED
            report.seconds = (time.perf_counter() - start) / len(stage)
            reports.append(report)
            replace_module(block, unit.inner(name), simulated)
        del inputs, moments
    return reports
