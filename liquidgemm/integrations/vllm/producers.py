"""RMSNorm and SiLU-and-multiply that quantize for the layers of ours after them.

vLLM asks for `RMSNorm` and gets a class of ours, as its out-of-tree registry allows; for
`SiluAndMul` too, unless it has a table of activations that quantize (`fusion`). Where one of them
stands before a layer of ours in a decoder layer, its output has the quantized tokens as an
attribute, which that layer takes. The output itself is computed as vLLM does it, for whatever else
takes it; the compiler leaves that out where nothing does. So this is for compiled models alone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from operator import attrgetter

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor import custom_op
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from . import fusion
from .settings import setting

# What takes the output of a producer, by the name of the producer in the module that has both.
_CONSUMERS = {
    "input_layernorm": "self_attn.qkv_proj",
    "post_attention_layernorm": "mlp.gate_up_proj",
    "act_fn": "down_proj",
}


class QuantizingRMSNorm(RMSNorm):
    """vLLM's RMSNorm, which in compiled models quantizes as well once `quantizes` is set."""

    quantizes = False

    def forward(self, x: Tensor, residual: Tensor | None = None):
        if not (self.quantizes and torch.compiler.is_compiling()):
            return super().forward(x, residual)
        x8, scale, h, _ = torch.ops.liquidgemm.rms_norm_quantize(
            x, self.weight, self.variance_epsilon, residual
        )
        y = super().forward(x if residual is None else h)
        fusion.attach(y, x8, scale)
        return y if residual is None else (y, h)

    def can_quantize(self) -> bool:
        """Whether `rms_norm_quantize` computes this norm: with gains, over whole rows."""
        return self.has_weight and self.variance_size_override is None


class QuantizingSiluAndMul(SiluAndMul):
    """vLLM's SiLU-and-multiply, likewise."""

    quantizes = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.quantizes and torch.compiler.is_compiling():
            x8, scale, _ = torch.ops.liquidgemm.glu_quantize(x, "silu_mul", False)
            fusion.attach(y, x8, scale)
        return y

    def can_quantize(self) -> bool:
        """Always: `glu_quantize` has all that `SiluAndMul` can be."""
        return True


PRODUCERS = {"RMSNorm": QuantizingRMSNorm, "SiluAndMul": QuantizingSiluAndMul}


class Producers:
    """A model's producers: found while vLLM builds it, switched on once its layers are packed."""

    def __init__(self) -> None:
        self._why_not: str | None = None
        self._found: list[tuple[weakref.ref[nn.Module], str]] = []
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._on: Counter[str] = Counter()

    def find(self) -> None:
        """Watch for producers in the model that vLLM builds under its current config."""
        if self._hook is None and not self._on and self._why_not is None:
            self._why_not = _why_not()
            if self._why_not is None:
                hook = nn.modules.module.register_module_module_registration_hook
                self._hook = hook(self._made)

    def _made(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(module, tuple(PRODUCERS.values())) and name in _CONSUMERS:
            self._found.append((weakref.ref(parent), name))

    def switch_on(self) -> None:
        """Let each producer that feeds a layer of ours quantize for it from now on."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._on.clear()
        for reference, name in self._found:
            parent = reference()
            try:
                consumer = attrgetter(_CONSUMERS[name])(parent)
            except AttributeError:
                continue
            producer = getattr(parent, name)
            ours = hasattr(consumer, "liquid_pad") and not consumer.liquid_exact
            producer.quantizes = ours and producer.can_quantize()
            self._on[name] += producer.quantizes

    def state(self, *names: str) -> str:
        """Whether any producer of these names quantizes; if none does, why."""
        if any(self._on[name] for name in names):
            return "yes"
        return f"no: {self._why_not or 'none is before a layer of ours'}"

    def __reduce__(self):
        """A config that is sent to another process has not made a model yet."""
        return Producers, ()


def _why_not() -> str | None:
    """Why norms do not quantize; makes vLLM take ours if they do.

    Raises:
        ValueError: settings of ours that are not understood, in whatever mode vLLM is.
    """
    if not setting("fused_producers"):
        return "switched off"
    config = get_current_vllm_config_or_none()
    if config is None or not config.compilation_config.mode:
        return "layers are not compiled"
    if config.lora_config is not None:
        return "adapters take floats"
    if config.parallel_config.tensor_parallel_size > 1:
        return "vLLM sums over GPUs before them"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT asks for vLLM's own"
    registry = getattr(custom_op, "op_registry_oot", None)
    if registry is None:
        return "this vLLM has no registry of classes out of its tree"
    for name, ours in PRODUCERS.items():
        if name == "SiluAndMul" and fusion.state() == "yes":
            continue  # vLLM's table has an op for it, and knows activations by their class
        if registry.setdefault(name, ours) is not ours:
            return f"{registry[name].__module__} has replaced {name} already"
    return None
