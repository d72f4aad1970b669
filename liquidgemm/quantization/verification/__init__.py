"""The check at the end: does the quantized model give what rounding lets one expect?

The float model runs once on a small input before its weights are replaced, and the quantized one
runs after on the same. Each layer is also held against the arithmetic of its own weight. It costs
two forward passes of a few dozen tokens; what is kept of the float model is bounded.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...nn._modules import linear_at
from ...nn.experts import LiquidExperts
from ...nn.linear import LiquidLinear
from ...ops import quantize_activation
from ...weights.weight import QuantizedWeight, dequantize_weight
from .inputs import small_inputs
from .outputs import distance_of, values_of
from .run import Observer, RunError

_BUDGET = 256 << 20  # bytes of layer inputs that are kept
_ROWS = 8  # tokens per layer that are kept, at most
_CHANNELS = 128  # output channels per layer that are compared
_EXACT = 1e-3  # relative distance of two float32 evaluations of one formula, and much to spare
_SAME_EXPERTS = 2e-2  # a few activations between the products, rounded the other way
_SEED = 21

# Outputs of a model are further off than those of its layers, as errors add up: rounded to nearest,
# by 2.7 times at most over the models of tests/support/structures.py. Outputs that have nothing to
# do with those of the float model are off by 1.4. A few numbers may happen to be close to zero.
_GROWTH = 6.0
_LEAST, _MOST, _OF_FEW = 0.1, 0.75, 1.0
_FEW = 16
# Where errors grow by more than that, they are measured: over the same models and deeper ones,
# outputs are off by 0.6 to 2.5 times as much as random errors of the same size move them, where
# one block is repeated by 3.7 times at most.
_EXPLAINED = 4.0
_OUTLIER = 3.0


@dataclass
class Verification:
    """What the check of a quantized model has found.

    Attributes:
        input: what the model was run on; "" if it was not.
        reason: why the model as a whole was not run; "" if it was.
        layers: by name of a layer, ``‖x̂ Ŵᵀ - x Wᵀ‖ / ‖x Wᵀ‖`` on a few of its own inputs in the
            float model (random ones if it was not reached), rounding of activations included; only
            where calibration has not changed what the layer computes.
        unreached: layers that the input does not reach.
        outputs: by name, ``‖quantized - float‖ / ‖float‖`` of the model's outputs; of those with
            fewer than 16 numbers only if there are no others.
        bound: the largest of ``outputs`` that rounding can explain: 6 times the root mean square
            of ``layers``, within 0.1 and 0.75; 1 where outputs have fewer than 16 numbers. Where
            that is exceeded it is measured how far random errors of the size of each layer's move
            the outputs, and up to 4 times as far, but not beyond 0.75, is explained.
        faults: what is off by more than that, by name of the layer or output.
    """

    input: str = ""
    reason: str = ""
    layers: dict[str, float] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    outputs: dict[str, float] = field(default_factory=dict)
    bound: float | None = None
    faults: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.faults:
            return "; ".join(f"FAULT: {name}: {what}" for name, what in self.faults.items())
        if self.reason:
            return f"not verified as a whole: {self.reason}"
        worst, bound = max(self.outputs.values()), 1 if self.bound is None else self.bound
        text = f"verified on {self.input}: outputs off by {100 * worst:.1f} %"
        more = f", {len(self.unreached)} layers not reached" if self.unreached else ""
        return f"{text} (rounding explains up to {100 * bound:.0f} %){more}"


Seen = Callable[[str, nn.Module, Tensor | None, Any], None]  # called after each module has run


class Probe:
    """The float model's side of the check, taken before its weights are replaced."""

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        batch: Tensor | Mapping[str, Any] | None,
        progress: bool = False,
    ) -> None:
        self.result = Verification()
        self._model, self._names, self._progress = model, set(names), progress
        layers = {name: linear_at(model, name) for name in names}
        width = sum(layer.in_features * layer.weight.itemsize for layer in layers.values())
        self._rows = max(1, min(_ROWS, _BUDGET // max(1, width)))
        self._generator = torch.Generator().manual_seed(_SEED)
        self._samples: dict[str, Tensor] = {}
        self._blocks: dict[str, Tensor] = {}
        self._given: dict[str, Tensor] = {}  # to these blocks
        self._before: dict[str, float] = {}  # how far off that is, in the quantized model
        self._expected: dict[str, Tensor] = {}
        self._arguments: tuple[tuple, dict] | None = None
        self.readers: dict[str, str] = {}
        tracked = {b for b in _blocks(model) if any(n.startswith(b + ".") for n in names)}

        def seen(name: str, module: nn.Module, x: Tensor | None, output: Any) -> None:
            if name in layers:
                if name not in self._samples and x is not None and x.numel():
                    rows = x.reshape(-1, x.shape[-1])
                    chosen = torch.linspace(0, len(rows) - 1, min(self._rows, len(rows))).long()
                    self._samples[name] = rows[chosen.to(x.device)].clone()
            elif name in tracked:
                self._blocks.update(values_of(output, name, first=True))
                self._given.update(values_of(x, name, first=True))

        for what, arguments in small_inputs(model, batch):
            try:
                with self._counted("running the float model", seen) as counted:
                    observer = Observer(model, layers, counted)
                    output = observer.run(*arguments)
            except RunError as error:
                reason = f"the float model does not run on {what}: {error}"
                self.result.reason = self.result.reason or reason
                self._samples.clear()
                continue
            self._expected = dict(values_of(output))
            if not self._expected:
                self.result.reason = f"the output on {what} has no finite float"
                continue
            self.readers = observer.readers
            self.result.input, self.result.reason = what, ""
            self._arguments = arguments
            break
        else:
            self.result.reason = self.result.reason or (
                "no input is known for it: pass calibration="
            )

    @torch.no_grad()
    def check_layer(
        self,
        name: str,
        linear: nn.Linear,
        layer: LiquidLinear,
        weight: QuantizedWeight,
        bias: Tensor | None,
        changed: bool = False,
    ) -> None:
        """Hold a layer against the arithmetic of its weight, and against the float layer.

        Args:
            linear: the float layer.
            layer: the one in its place.
            weight, bias: what it is made of.
            changed: whether calibration has given it another function than the float layer has.
        """
        x = self._samples.pop(name, None)
        if x is None and not self.result.reason:
            self.result.unreached += (name,)
        if x is None:
            x = random_input(linear, self._generator)
        product, expected, fault = check_arithmetic(linear, layer, weight, bias, x)
        if fault:
            self.result.faults[name] = fault
        if changed:
            return
        off = self.result.layers[name] = distance_of(product, expected)
        if off > _MOST:
            self.result.faults.setdefault(name, _too_far(off, _MOST))

    @torch.no_grad()
    def check_experts(self, name: str, separate: nn.Module, experts: LiquidExperts) -> None:
        """Hold experts as one layer against the same as linear layers, on a token for each two.

        Args:
            separate: their quantized linear layers, and the float module's own code between them.
        """
        count, device = experts.num_experts, experts.gate_up.packed.device
        size = (max(2, count), experts.hidden_size)
        x = torch.randn(size, generator=self._generator, device="cpu").to(device)
        ids = torch.arange(len(x), device=device).unsqueeze(1) + torch.arange(2, device=device)
        ids, weights = ids % count, torch.tensor([0.75, 0.25], device=device).expand(len(x), 2)
        off = distance_of(experts(x, ids, weights), separate(x, ids, weights))
        if off > _SAME_EXPERTS:
            self.result.faults.setdefault(
                name, f"its outputs are off by {100 * off:.3g} % from those of its experts alone"
            )

    def compare(self, rotated: bool = False, errors: Mapping[str, float] | None = None) -> None:
        """Run the quantized model; faults go to the result.

        Args:
            rotated: whether hidden states are not what they were.
            errors: more relative errors of layers, that calibration has measured.

        Raises:
            RuntimeError: it does not run, where the float model did; the message names the layer.
        """
        result = self.result
        known = {**(errors or {}), **result.layers}
        finite = [error for error in known.values() if math.isfinite(error)]
        rms = math.sqrt(sum(e * e for e in finite) / len(finite)) if finite else 1.0
        result.bound = min(_MOST, max(_LEAST, _GROWTH * rms))
        if self._arguments is None:
            return
        tracked = {} if rotated else self._blocks
        try:
            blocks, found = self._run(tracked)
        except RunError as error:
            raise RuntimeError(
                f"{error}: the quantized model does not run on {result.input}, on which the float "
                "model did: leave out layers whose weight is used there by the config's skip"
            ) from error.error
        many = {name: x for name, x in self._expected.items() if x.numel() >= _FEW}
        limit = result.bound
        result.bound = limit if many else _OF_FEW
        for name, expected in (many or self._expected).items():
            if name in found and found[name].shape == expected.shape:
                result.outputs[name] = distance_of(found[name], expected)
            else:
                result.faults[name] = "the quantized model does not give this output"
        off = {name: distance_of(x, tracked[name]) for name, x in blocks.items()}
        limits = {name: limit + self._before.get(name, 0.0) for name in off}
        far = {name: bound for name, bound in limits.items() if off[name] > bound}
        far |= {name: result.bound for name, x in result.outputs.items() if x > result.bound}
        if not far:
            return
        moved = self._moved(tracked, {**blocks, **found}, known)
        excess = {}
        for name, bound in far.items():
            distance, explained = {**off, **result.outputs}[name], _EXPLAINED * moved.get(name, 0.0)
            own = max(bound, min(_MOST, explained))
            if name in result.outputs:
                result.bound = max(result.bound, own)
            if distance > own:
                excess[name] = _too_far(distance, own, moved.get(name, 0.0))
        # What a block is off by goes on to those after it.
        for name in [*[n for n in excess if n not in result.outputs][:1], *result.outputs]:
            if name in excess:
                result.faults[name] = excess[name]

    def _moved(
        self,
        tracked: Mapping[str, Tensor],
        found: Mapping[str, Tensor],
        errors: Mapping[str, float],
    ) -> dict[str, float]:
        """How far outputs of blocks and model move as layers are off once more by their errors.

        Models differ in how much errors grow on their way. A layer that stands out is no measure.
        """
        usual = statistics.median(errors.values()) if errors else 0.0
        errors = {name: min(error, _OUTLIER * usual) for name, error in errors.items()}
        try:
            with _shaken(self._model, errors, usual):
                blocks, outputs = self._run(tracked)
        except RunError:  # as what is random leads it elsewhere
            return {}
        return {
            name: distance_of(x, found[name])
            for name, x in {**blocks, **outputs}.items()
            if name in found and x.shape == found[name].shape
        }

    def _run(self, tracked: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the model as it is now: outputs of tracked blocks, of the shapes that those have, and
        its own. How far off what they are given is, is kept."""
        blocks: dict[str, Tensor] = {}

        def seen(name: str, module: nn.Module, x: Tensor | None, output: Any) -> None:
            if name in tracked:
                for key, value in values_of(output, name, first=True):
                    if value.shape == tracked[key].shape:
                        blocks[key] = value
                for key, value in values_of(x, name, first=True):
                    # An expert may be given other tokens; that, too, is nothing of its own.
                    if key in self._given and value.shape == self._given[key].shape:
                        self._before[key] = distance_of(value, self._given[key])

        args, kwargs = cast(tuple[tuple, dict], self._arguments)
        with self._counted("running the quantized model", seen) as counted:
            output = Observer(self._model, seen=counted).run(args, kwargs)
        return blocks, dict(values_of(output, finite=False))

    @contextmanager
    def _counted(self, what: str, seen: Seen) -> Iterator[Seen]:
        """Shows how many of the layers have run; the bar goes when the run is over."""
        with tqdm(
            total=len(self._names),
            desc=what,
            unit="layer",
            leave=False,
            delay=1,
            disable=not self._progress,
        ) as bar:

            def counted(name: str, module: nn.Module, x: Tensor | None, output: Any) -> None:
                seen(name, module, x, output)
                if name in self._names and bar.n < len(self._names):
                    bar.update()

            yield counted

    def warn(self) -> None:
        """Loudly, of all faults."""
        if self.result.faults:
            warnings.warn(
                "the quantized model does not do what the float one did: "
                + "; ".join(f"{name}: {what}" for name, what in self.result.faults.items()),
                stacklevel=6,
            )


def random_input(linear: nn.Linear, generator: torch.Generator | None = None) -> Tensor:
    """One token, the same in every call if no generator is given."""
    generator = generator or torch.Generator().manual_seed(_SEED)
    # On the generator's device, whatever the default one is.
    x = torch.randn(1, linear.in_features, generator=generator, device="cpu")
    return x.to(linear.weight.device, linear.weight.dtype)


def check_arithmetic(
    linear: nn.Linear, layer: LiquidLinear, weight: QuantizedWeight, bias: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor, str | None]:
    """Hold some channels of a layer against a float evaluation of its formula.

    Returns:
        for these channels ``x̂ Ŵᵀ``, ``x Wᵀ``, and what is wrong, if anything is.
    """
    x = x.to(linear.weight.dtype)
    step = max(1, layer.out_features // _CHANNELS)
    rows = torch.arange(0, layer.out_features, step, device=x.device)[:_CHANNELS]
    weight = weight.to(x.device)
    names = ("qweight", "qscale", "qoffset", "scale")
    some = replace(weight, **{name: getattr(weight, name)[rows] for name in names})
    x8, scale = quantize_activation(x)
    product = F.linear(x8.float() * scale.unsqueeze(-1), dequantize_weight(some))
    formula = product if bias is None else product + bias.to(x.device)[rows].float()
    off = distance_of(layer(x)[:, rows].float(), formula.to(x.dtype).float())
    expected = F.linear(x.float(), linear.weight[rows].float())
    fault = None
    gone = (product == 0).all(0) & (expected.abs().amax(0) > _EXACT * expected.abs().amax())
    if off > _EXACT + 4 * torch.finfo(x.dtype).eps:
        fault = f"its outputs are off by {100 * off:.3g} % from what its weights and bias give"
    elif (bias is None) != (linear.bias is None):
        fault = "it has lost its bias, or got one"
    elif gone.any():
        fault = f"{int(gone.sum())} of {len(rows)} output channels looked at give nothing"
    return product, expected, fault


def _too_far(off: float, bound: float, moved: float = 0.0) -> str:
    if off <= _EXPLAINED * moved:
        return f"off by {100 * off:.0f} %, as rounding grows to {100 * moved:.0f} % in this model"
    return f"off by {100 * off:.0f} %, more than the {100 * bound:.0f} % that rounding explains"


@contextmanager
def _shaken(model: nn.Module, errors: Mapping[str, float], usual: float) -> Iterator[None]:
    """Within, each quantized layer is off once more by its own error, in a random direction."""
    generator = torch.Generator().manual_seed(_SEED)

    def shake(error: float) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
            noise = torch.randn(y.shape, generator=generator, device="cpu").to(y.device)
            size = y.float().square().mean(-1, keepdim=True).sqrt()
            return y + (error * size * noise).to(y.dtype)

        return hook

    handles = [
        module.register_forward_hook(shake(errors.get(name, usual)))
        for name, module in model.named_modules()
        if isinstance(module, LiquidLinear | LiquidExperts)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            yield from (f"{name}.{child}".removeprefix(".") for child, _ in module.named_children())
