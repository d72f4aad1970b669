"""``torchao.quantization.quantize_(model, LiquidConfig())``.

torchao calls the handler of a configuration's class for every module that its filter_fn lets
through, ``nn.Linear`` by default, and puts what it returns in the module's place.
"""

from __future__ import annotations

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from ..config import LiquidConfig
from ..linear import LiquidLinear

AOBaseConfig.register(LiquidConfig)  # a virtual subclass: torchao asks isinstance


@register_quantize_module_handler(LiquidConfig)
def _quantize(module: nn.Module, config: LiquidConfig) -> nn.Module:
    """A `LiquidLinear` in place of the module.

    torchao shows one layer at a time and tells no names, so that all that needs more is refused;
    which layers are quantized is for its filter_fn to say, ``skip`` has no say here.
    """
    if type(module) is not nn.Linear:
        raise ValueError(f"module: expected an nn.Linear, got {type(module).__name__}")
    layerwise = LiquidConfig(config.method, config.group_size, config.skip)
    if config.needs_calibration or config != layerwise:
        raise ValueError(
            "config: expected a method and group_size alone, which one layer at a time can be "
            f"quantized by, got {config}: use liquidgemm.quantize_"
        )
    return LiquidLinear.from_linear(module, config.group_size, config.method)
