"""What differs between formats: how weights are held, the products, and what quantizes their input.

All start from the same bf16 weights. A format's tokens are what its producers give and its products
take.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import liquidgemm
from liquidgemm.formats import int8
from liquidgemm.quantization.calibration.gptq import int8_weight

from ..peers.humming import Humming
from .elementwise import EPSILON, FP8_MAX, FP8_STATIC, Elementwise


class Format:
    """bf16, and the base of the others.

    Attributes:
        name: what --formats takes.
        head: name of the format of its head, where that is to have 8 bits.
        bytes_per_weight: about, to tell whether a model fits before it is built.
    """

    name: ClassVar[str] = "bf16"
    head: ClassVar[str] = "bf16"
    bytes_per_weight: ClassVar[float] = 2.0

    def __init__(self, elementwise: Elementwise) -> None:
        self.elementwise = elementwise

    @classmethod
    def why_absent(cls, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None."""
        return None

    def hold(self, weight: Tensor) -> Any:
        """A weight bf16 ``[N, K]`` as `linear` takes it."""
        return weight.clone()

    def nbytes(self, held: Any) -> int:
        """Bytes of it that a product reads."""
        return sum(t.nbytes for t in (held if isinstance(held, tuple) else (held,)))

    def norm(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Any, Tensor]:
        """Tokens of the RMSNorm of ``x + residual``, and that sum."""
        return self.elementwise.add_norm(x, weight, residual)

    def silu_mul(self, gate_up: Tensor) -> Any:
        """Tokens of the gated activation."""
        return self.elementwise.silu_mul(gate_up)

    def tokens(self, x: Tensor) -> Any:
        """Tokens of a bf16 row."""
        return x

    def linear(self, tokens: Any, held: Any) -> Tensor:
        if len(tokens) == 1:
            return self.elementwise.linear_of_one(tokens, held)
        return F.linear(tokens, held)


class Fp8Tensor(Format):
    """e4m3 with one static scale for the activations: Inductor fuses the quantizer."""

    name = "fp8-tensor"
    head = "fp8-tensor"
    bytes_per_weight = 1.0
    # Weights from which on a product of one row is faster as a reduction by Inductor, measured on
    # an H100.
    least_reduced: ClassVar[int] = 1 << 25

    def __init__(self, elementwise: Elementwise) -> None:
        super().__init__(elementwise)
        self._scale: Tensor | None = None

    @classmethod
    def why_absent(cls, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "torch._scaled_mm is measured on a GPU alone"

    def hold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        self._scale = torch.full((), FP8_STATIC, dtype=torch.float32, device=weight.device)
        scale = weight.abs().amax().float() / FP8_MAX
        return _to_fp8(weight, scale), scale

    def norm(self, x, weight, residual):
        x8, h = self.elementwise.add_norm_fp8_tensor(x, weight, residual)
        return (x8, self._scale), h

    def silu_mul(self, gate_up):
        return self.elementwise.silu_mul_fp8_tensor(gate_up), self._scale

    def tokens(self, x):
        return self.elementwise.fp8_tensor(x), self._scale

    def linear(self, tokens, held):
        if len(tokens[0]) == 1 and held[0].numel() >= self.least_reduced:
            return self.elementwise.linear_of_one_fp8(*tokens, *held)
        return torch._scaled_mm(
            tokens[0],
            held[0].t(),
            scale_a=tokens[1],
            scale_b=held[1],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


class Fp8Row(Fp8Tensor):
    """e4m3 with a scale per token and per output channel: Inductor fuses the quantizer."""

    name = "fp8-row"
    head = "fp8-row"
    least_reduced = 0

    def hold(self, weight):
        scale = (weight.abs().amax(1, keepdim=True).float() / FP8_MAX).clamp_min(1e-12)
        return _to_fp8(weight, scale), scale.t().contiguous()

    def norm(self, x, weight, residual):
        return self.elementwise.add_norm_fp8_row(x, weight, residual)

    def silu_mul(self, gate_up):
        return self.elementwise.silu_mul_fp8_row(gate_up)

    def tokens(self, x):
        return self.elementwise.fp8_row(x)


class Fp8RowApart(Fp8Row):
    """The same with its quantizer in a kernel of its own."""

    name = "fp8-row-apart"

    def norm(self, x, weight, residual):
        normed, h = self.elementwise.add_norm(x, weight, residual)
        return self.elementwise.fp8_row(normed), h

    def silu_mul(self, gate_up):
        return self.elementwise.fp8_row(self.elementwise.silu_mul(gate_up))


def _to_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    whole = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = scale.expand(len(weight), 1) if scale.dim() else scale
    for start in range(0, len(weight), 4096):
        rows = slice(start, start + 4096)
        whole[rows] = (weight[rows].float() / (scale[rows] if scale.dim() else scale)).to(
            torch.float8_e4m3fn
        )
    return whole


class HummingFormat(Format):
    """humming's W4A8, groups of 64 with zero points, which quantizes its input itself."""

    name = "humming"
    head = "int8"
    bytes_per_weight = 0.54

    @classmethod
    def why_absent(cls, device):
        return Humming.why_absent() if device.type == "cuda" else "humming needs a GPU"

    def hold(self, weight):
        peer = Humming(weight)
        return peer.layer

    def nbytes(self, held):
        return sum(parameter.nbytes for parameter in held.parameters())

    def linear(self, tokens, held):
        return held(tokens, input_scale=None)


class Linear(Format):
    """Ours by `linear`: bf16 in, quantized by each product's own launch."""

    name = "w4a8-linear"
    head = "int8"
    bytes_per_weight = 0.54

    def hold(self, weight):
        quantized = liquidgemm.quantize_weight(weight, method="rtn")
        logical = (quantized.qweight, quantized.qscale, quantized.qoffset)
        return liquidgemm.pack_weight(*logical), quantized.scale

    def linear(self, tokens, held):
        return liquidgemm.linear(tokens, *held)


class Fused(Linear):
    """Ours with fused producers: their INT8 tokens go to `gemm`."""

    name = "w4a8"

    @classmethod
    def why_absent(cls, device):
        missing = [n for n in ("rms_norm_quantize", "glu_quantize") if not hasattr(liquidgemm, n)]
        return f"liquidgemm has no {missing[0]}" if missing else None

    def norm(self, x, weight, residual):
        tokens, h, _ = liquidgemm.rms_norm_quantize(x, weight, EPSILON, residual)
        return tokens, x if residual is None else h

    def silu_mul(self, gate_up):
        return liquidgemm.glu_quantize(gate_up)[0]

    def linear(self, tokens, held):
        if isinstance(tokens, Tensor):  # of attention, which nothing of ours precedes
            return liquidgemm.linear(tokens, *held)
        return liquidgemm.gemm(tokens.x8, tokens.scale, *held, follows_producer=True)


class Composite(Fused):
    """What `Fused` must equal to the bit: the same norms and activations in bf16, then `linear`."""

    name = "w4a8-composite"

    def norm(self, x, weight, residual):
        _, h, y = liquidgemm.rms_norm_quantize(x, weight, EPSILON, residual, return_y=True)
        return y, x if residual is None else h

    def silu_mul(self, gate_up):
        return liquidgemm.glu_quantize(gate_up, return_y=True)[1]

    def linear(self, tokens, held):
        return liquidgemm.linear(tokens, *held)


class Int8(Linear):
    """A head of ours with 8-bit weights."""

    name = "int8"

    def hold(self, weight):
        quantized = int8_weight(weight.float())
        return liquidgemm.ops.pack_int8_weight(int8.bytes_of(quantized.qweight)), quantized.scale

    def linear(self, tokens, held):
        if isinstance(tokens, Tensor):
            return liquidgemm.linear(tokens, *held)
        return liquidgemm.gemm(tokens.x8, tokens.scale, *held)


class Int8Fused(Int8):
    name = "int8-fused"
    norm = Fused.norm


class Int8Composite(Int8):
    name = "int8-composite"
    norm = Composite.norm


Fused.head, Composite.head = Int8Fused.name, Int8Composite.name

FORMATS: dict[str, type[Format]] = {
    one.name: one for one in (Format, Fp8Tensor, Fp8Row, Fp8RowApart, HummingFormat, Linear, Fused)
}
_ALL = FORMATS | {one.name: one for one in (Composite, Int8, Int8Fused, Int8Composite)}


def make(name: str, elementwise: Elementwise) -> Format:
    return _ALL[name](elementwise)


def head_of(form: Format, head: str) -> Format:
    """The format of the head: bf16 for all, or with 8 bits that of the format."""
    return make("bf16" if head == "bf16" else form.head, form.elementwise)


def parse_formats(text: str) -> list[str]:
    """Names of a comma-separated list of formats, each once, in order.

    Raises:
        ValueError: an unknown name.
    """
    names = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"{name!r} is none of {', '.join(FORMATS)}")
    if not names:
        raise ValueError("no formats given")
    return names
