"""Activations that the layer before has quantized: vLLM's contract `QuantizedActivation`.

A linear layer advertises what it takes, and vLLM's MLPs then ask a table for an op that computes
the activation and quantizes it at once. The names are private to vLLM and not in every version.
Without them each layer quantizes its own input, and `state` says why.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from vllm.platforms import current_platform

try:
    from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8DynamicTokenSym
except ImportError:
    QuantizedActivation = kInt8DynamicTokenSym = None

_ATTACHED = "liquid_quantized"


@functools.cache
def state() -> str:
    """Whether SiLU-and-multiply quantizes for the layer after it; tells vLLM, once."""
    if QuantizedActivation is None:
        return "no: this vLLM has no QuantizedActivation"
    key = "CUDA" if current_platform.is_cuda() else "CPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("liquidgemm::glu_quantize", key):
        return f"no: this liquidgemm has no glu_quantize for {key}"
    try:
        from vllm.model_executor.layers.activation import SiluAndMul
        from vllm.model_executor.layers.fusion.fused_act_quant import _FUSED_ACT_QUANT
        from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key
    except ImportError as error:
        return f"no: this vLLM has no table of fused activations ({error})"
    probe = nn.Module()
    probe._input_quant_key = kInt8DynamicTokenSym
    if get_input_quant_key(probe) != kInt8DynamicTokenSym:
        return "no: this vLLM asks for the key of a layer in another way"
    _FUSED_ACT_QUANT[(SiluAndMul, kInt8DynamicTokenSym)] = _silu_mul_quantized
    return "yes"


def _silu_mul_quantized(x: Tensor, linear: nn.Module):
    data, scale, _ = torch.ops.liquidgemm.glu_quantize(x, "silu_mul", False)
    return QuantizedActivation(data, scale, x.dtype, data.shape, kInt8DynamicTokenSym)


def attach(x: Tensor, data: Tensor, scale: Tensor) -> None:
    """Hang the quantized rows on x, where `as_quantized` finds them; x itself stays usable."""
    setattr(x, _ATTACHED, (data, scale))


def advertise(layer: nn.Module) -> None:
    """Tell vLLM that a layer takes quantized activations, if something makes them."""
    if state() == "yes":
        layer._input_quant_key = kInt8DynamicTokenSym


def as_quantized(x: object) -> tuple[Tensor, Tensor, torch.dtype] | None:
    """The INT8 values, the scales of the tokens and the dtype of the output; None for a tensor
    that has none.

    Raises:
        RuntimeError: it is quantized in another way.
    """
    if isinstance(x, Tensor):
        found = getattr(x, _ATTACHED, None)
        return None if found is None else (*found, x.dtype)
    if QuantizedActivation is None or not isinstance(x, QuantizedActivation):
        return None
    if x.quant_key != kInt8DynamicTokenSym:
        raise RuntimeError(f"x: expected INT8 with a scale per token, got {x.quant_key}")
    return x.data, x.scale.flatten().view(x.data.shape[:-1]), x.orig_dtype
