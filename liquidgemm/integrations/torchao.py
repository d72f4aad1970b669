"""``torchao.quantization.quantize_(model, LiquidConfig())``.

torchao calls the handler of a configuration's class for every module that its filter_fn lets
through, ``nn.Linear`` by default, and puts what it returns in the module's place. If it lets
nothing through, no handler is called: hence the function around torchao's.
"""

from __future__ import annotations

import functools
import sys
import warnings

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quant_api
from torchao.quantization.transform_module import register_quantize_module_handler

from ..nn.linear import LiquidLinear
from ..quantization.config import LiquidConfig
from ..quantization.verification import check_arithmetic, random_input

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
    layer = LiquidLinear.from_linear(module, config.group_size, config.method)
    x = random_input(module)
    _, _, fault = check_arithmetic(module, layer, layer.quantized_weight(), layer.bias, x)
    if fault:
        warnings.warn(f"a layer of {module}: {fault}", stacklevel=2)
    return layer


_torchao_quantize = quant_api.quantize_


@functools.wraps(_torchao_quantize)
def _quantize_and_count(model: nn.Module, config: object, *args, **kwargs) -> None:
    ours = isinstance(config, LiquidConfig)
    before = _count(model) if ours else 0
    _torchao_quantize(model, config, *args, **kwargs)
    if ours and _count(model) == before:
        warnings.warn(
            "not one layer was quantized: the filter_fn lets no nn.Linear of the model through",
            stacklevel=2,
        )


def _count(model: nn.Module) -> int:
    return sum(isinstance(module, LiquidLinear) for module in model.modules())


# Packages that are still being imported will take the new one from quant_api.
for _name in ("torchao.quantization.quant_api", "torchao.quantization", "torchao"):
    if getattr(sys.modules[_name], "quantize_", None) is _torchao_quantize:
        vars(sys.modules[_name])["quantize_"] = _quantize_and_count
