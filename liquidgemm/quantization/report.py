"""What quantization did to each layer: numbers, a table, a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..formats.liquidquant import padded
from ..weights.weight import QuantizedWeight, dequantize_weight
from .calibration.moments import round_activation
from .layer import relative_error

if TYPE_CHECKING:
    from rich.table import Table

    from .verification import Verification

_LARGEST = 3  # parameters in floats that a report names


@dataclass
class LayerReport:
    """One layer.

    Attributes:
        name: its dotted name.
        method: how it was quantized: a method of `LiquidConfig`, or "int8".
        bits: stored bits per weight.
        weight_error: ``‖Ŵ - W‖² / ‖W‖²``, against the weight after smoothing.
        output_error: ``‖x̂ Ŵᵀ - x Wᵀ‖² / ‖x Wᵀ‖²`` over a sample of inputs, rounding of the
            activations included; None without calibration.
        outlier: largest ``max|x_k|`` over the median of it over the features k; None without
            calibration.
        alpha: exponent of the smoothing before it, or that which its fit started from; None if
            there is none.
        tokens: number of tokens it was calibrated on.
        seconds: time it took.
        note: why it was quantized without data although there was some; empty as a rule.
        activation_error: ``‖(x̂ - x) Wᵀ‖² / ‖x Wᵀ‖²`` over that sample: what of output_error is left
            if the weight were exact; None without calibration.
    """

    name: str
    method: str
    bits: float
    weight_error: float
    output_error: float | None = None
    outlier: float | None = None
    alpha: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    note: str = ""
    activation_error: float | None = None

    @property
    def activation_share(self) -> float | None:
        """The part of output_error that rounding the activations alone causes, 0 to about 1."""
        if self.activation_error is None or not self.output_error:
            return None
        return self.activation_error / self.output_error

    @classmethod
    def of(
        cls,
        name: str,
        method: str,
        weight: Tensor,
        quantized: QuantizedWeight,
        sample: Tensor | None = None,
        alpha: float | None = None,
    ) -> LayerReport:
        """Measured on a sample of inputs ``[T, K]``."""
        approximation = dequantize_weight(quantized)
        weight = weight.detach().float()
        report = cls(name, method, bits_per_weight(quantized), 0.0, alpha=alpha)
        report.weight_error = relative_error(approximation, weight)
        if sample is not None:
            rounded, expected = round_activation(sample), F.linear(sample, weight)
            report.output_error = relative_error(F.linear(rounded, approximation), expected)
            report.activation_error = relative_error(F.linear(rounded, weight), expected)
            amax = sample.abs().amax(0)
            report.outlier = (amax.max() / amax.median().clamp_min(1e-30)).item()
        return report


@dataclass
class ExpertsReport:
    """The experts of one layer.

    Attributes:
        tokens: of the calibration data that were routed to each expert.
        fell_back: by number of an expert, why it was quantized otherwise than most.
    """

    tokens: list[int]
    fell_back: dict[int, str]


@dataclass
class ParameterReport:
    """What became of one parameter of two or more dimensions.

    Attributes:
        shape: of the float parameter, as the model holds it.
        reason: why it is still in floats, or why there was nothing to do; None if this call has
            quantized it.
        quantized: whether it is in four bits now.
    """

    shape: tuple[int, ...]
    reason: str | None
    quantized: bool

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_` did.

    Attributes:
        quantized: names of the layers that are now `LiquidLinear` or `LiquidExperts`.
        skipped: name and reason of every other module that holds a matrix; "" is the model itself.
        bytes_before, bytes_after: size of the weights of the quantized layers.
        coarse_rows: per layer that has any, the number of rows in which at least half of the
            groups span less than 15 steps of the INT8 grid, so that not even s = 1 gives them 4
            bits. Mostly it is one huge weight that leaves the others so little of the range.
        layers: errors of each quantized layer; of experts, for their first matrices and for their
            second ones, means over all experts.
        held_out: mean loss on held-out data of the model "reference", quantized "data-free" and
            "calibrated", "untuned" with each block as it was before its tuning, and "undistilled"
            as it was before distillation; empty if there was none.
        measure: what kind of loss that is: "loss" of the next token, "loss on labels", or "relative
            output error", ``‖y - r‖ / ‖r‖`` with r what the float model gives.
        unsmoothed: with ``smooth=True``, by name of a layer why nothing can be folded into it.
        plan: of a dry run, what would become of each layer.
        parameters: by name, every parameter of two or more dimensions that the model had, one that
            is used in several places once; weights of layers that were quantized before, too.
        experts: by name of a `LiquidExperts`, what became of each of its experts.
        verification: what the check at the end has found; None if it was not wanted.
    """

    quantized: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: int = 0
    bytes_after: int = 0
    coarse_rows: dict[str, int] = field(default_factory=dict)
    layers: tuple[LayerReport, ...] = ()
    held_out: dict[str, float] = field(default_factory=dict)
    measure: str = ""
    unsmoothed: dict[str, str] = field(default_factory=dict)
    plan: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, ParameterReport] = field(default_factory=dict)
    experts: dict[str, ExpertsReport] = field(default_factory=dict)
    verification: Verification | None = None

    @property
    def kept(self) -> dict[str, ParameterReport]:
        """The parameters that stay in floats, the largest first."""
        kept = {name: p for name, p in self.parameters.items() if not p.quantized}
        return dict(sorted(kept.items(), key=lambda item: -item[1].size))

    def accounting(self) -> str:
        """One line: how many weights of how many are quantized, and the largest that are not."""
        total = sum(p.size for p in self.parameters.values())
        kept = self.kept
        done = total - sum(p.size for p in kept.values())
        line = f"{done} of {total} weights quantized ({100 * done / max(1, total):.1f} %)"
        if kept:
            largest = (f"{name} {list(p.shape)}" for name, p in list(kept.items())[:_LARGEST])
            line += f"; the largest in floats: {', '.join(largest)}"
        return line

    def __str__(self) -> str:
        if self.plan:
            width = max(map(len, self.plan))
            lines = [f"{name:{width}}  {what}" for name, what in self.plan.items()]
            lines += [f"{name or 'the model'}: {why}" for name, why in self.skipped.items()]
            return "\n".join([*lines, self.accounting()])
        lines = [
            f"{len(self.quantized) - len(self.experts)} linear layers{self._with_experts()} "
            f"quantized, {self.bytes_before / 1e6:.1f} MB to "
            f"{self.bytes_after / 1e6:.1f} MB",
            self.accounting(),
        ]
        lines += _by_reason("skipped", self.skipped)
        if self.coarse_rows:
            rows = sum(self.coarse_rows.values())
            lines.append(f"{rows} rows in {len(self.coarse_rows)} layers have outliers")
        if self.held_out:
            losses = ", ".join(f"{kind} {loss:.4f}" for kind, loss in self.held_out.items())
            kind = "text" if self.measure == "loss" else "data"
            lines.append(f"{self.measure} on held-out {kind}: {losses}")
        elif any(layer.tokens for layer in self.layers):
            lines.append("no held-out text: nothing says how this does on text of other kinds")
        lines += _by_reason("not smoothed", self.unsmoothed)
        for note in dict.fromkeys(layer.note for layer in self.layers if layer.note):
            names = [layer.name for layer in self.layers if layer.note == note]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"quantized without data {', '.join(names[:3])}{more}: {note}")
        lines += self._tokens_of_experts()
        if self.quantized:
            lines.append(str(self.verification or "not verified: verify=False"))
        return "\n".join(lines)

    def _with_experts(self) -> str:
        if not self.experts:
            return ""
        count = sum(len(report.tokens) for report in self.experts.values())
        return f" and {count} experts in {len(self.experts)} layers"

    def _tokens_of_experts(self) -> Iterator[str]:
        """How many tokens experts were calibrated on, and which fell back."""
        counts = sorted(n for report in self.experts.values() for n in report.tokens)
        if counts and counts[-1]:
            middle = counts[len(counts) // 2]
            yield f"tokens per expert: {counts[0]} at least, {middle} median, {counts[-1]} at most"
        by_reason: dict[str, list[str]] = {}
        for name, report in self.experts.items():
            for expert, reason in report.fell_back.items():
                by_reason.setdefault(reason, []).append(f"{name}.{expert}")
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield f"experts {', '.join(names[:3])}{more}: {reason}"

    def to_json(self) -> str:
        """All of it, layers in the order of the model."""
        return json.dumps(asdict(self), indent=1)

    def expert_table(self) -> Table:
        """Tokens per expert of each layer with experts, as a table of rich."""
        from rich.table import Table

        table = Table(title="tokens per expert")
        for heading in ("experts", "number", "least", "median", "most", "none", "fell back"):
            table.add_column(heading, justify="left" if heading == "experts" else "right")
        for name, report in self.experts.items():
            counts = sorted(report.tokens)
            numbers = (len(counts), counts[0], counts[len(counts) // 2], counts[-1])
            table.add_row(
                name, *map(str, numbers), str(counts.count(0)), str(len(report.fell_back))
            )
        return table

    def table(self, worst: int = 10) -> Table:
        """The layers with the largest error, as a table of rich."""
        return layer_table(self.layers, worst)

    def plot(self, path: str | os.PathLike) -> None:
        """Write a PNG of the error of each layer.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plot_layers(self.layers, path)


def _by_reason(what: str, reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for each reason; "" is the name of the model."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name or "the model")
    for reason, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{what} {', '.join(names[:3])}{more}: {reason}"


def bits_per_weight(quantized: QuantizedWeight) -> float:
    """4.25 for each stored column, or 6.25 or 8, and the scale of the row, per column that is
    used."""
    whole = 8 if quantized.is_int8 else 6.25 if quantized.is_six_bits else None
    if whole is not None:
        return (whole * padded(quantized.in_features) + 32) / quantized.in_features
    stored = 8 * (quantized.qweight.nbytes + 2 * quantized.qscale.nbytes + quantized.scale.nbytes)
    return stored / (quantized.out_features * quantized.in_features)


def layer_table(layers: Sequence[LayerReport], worst: int = 10) -> Table:
    """The layers with the largest output error, or weight error where there is none."""
    from rich.table import Table

    table = Table(title=f"the {min(worst, len(layers))} layers with the largest error")
    errors = ("weight error", "output error", "of activations")
    for heading in ("layer", "method", "bits", *errors, "outlier", "alpha"):
        table.add_column(heading, justify="left" if heading in ("layer", "method") else "right")

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for layer in worst_layers(layers)[:worst]:
        table.add_row(
            layer.name,
            layer.method,
            f"{layer.bits:.2f}",
            shown(layer.weight_error, ".2e"),
            shown(layer.output_error, ".2e"),
            shown(layer.activation_share, ".0%"),
            shown(layer.outlier, ".0f"),
            shown(layer.alpha, ".2f"),
        )
    return table


def worst_layers(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """Largest error first."""

    def error(layer: LayerReport) -> float:
        return layer.weight_error if layer.output_error is None else layer.output_error

    return sorted(layers, key=error, reverse=True)


def plot_layers(layers: Sequence[LayerReport], path: str | os.PathLike) -> None:
    """A PNG: output error by layer, one colour for each kind of layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from None
    kinds: dict[str, list[tuple[int, float]]] = {}
    for index, layer in enumerate(layers):
        error = layer.weight_error if layer.output_error is None else layer.output_error
        kinds.setdefault(layer.name.rpartition(".")[2], []).append((index, error))
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for kind, points in kinds.items():
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=0.8, label=kind)
    axes.set(xlabel="layer", ylabel="relative squared error", yscale="log")
    axes.set_title("error at the output of each layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)
