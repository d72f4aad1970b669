"""LoRA adapters (PEFT) on top of quantized layers.

PEFT lets a configuration name the adapter layer for a kind of module that PEFT does not know. Here
every new ``LoraConfig`` gets that for `LiquidLinear`, also those that PEFT makes itself from files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..nn._stand_in import WeightStandIn
from ..nn.linear import LiquidLinear


class LiquidLora(Linear):
    """PEFT's ``lora.Linear``, whose base has no float weight here: no merging, no DoRA."""

    def __init__(self, base_layer: LiquidLinear, *args, **kwargs) -> None:
        if getattr(kwargs.get("config"), "use_dora", kwargs.get("use_dora")):
            raise ValueError("use_dora: expected False, as a quantized layer has no float weight")
        with warnings.catch_warnings():  # that PEFT does not know LiquidLinear
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(base_layer, *args, **kwargs)

    @property
    def weight(self) -> WeightStandIn:
        """The base layer's, where PEFT's own gives the packed codes of quantized layers."""
        return self.get_base_layer().weight

    def merge(self, *args, **kwargs) -> None:
        raise NotImplementedError(
            "an adapter cannot be merged into 4-bit weights: merge it into the float model and "
            "quantize that"
        )


_post_init = LoraConfig.__post_init__


def _post_init_and_register(config: LoraConfig) -> None:
    _post_init(config)
    config._register_custom_module({LiquidLinear: LiquidLora})


LoraConfig.__post_init__ = _post_init_and_register


def left_for_training(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What has to stay in floats for the adapters in a module of PEFT, and the reasons."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        for child in module.modules():
            yield child, f"in a {type(module).__name__} of PEFT, which trains it"
    if not isinstance(module, BaseTunerLayer):
        return
    kind = f"{type(module).__name__} of PEFT"
    base = module.get_base_layer()
    inside = set(base.modules())
    for child in module.modules():
        if child not in inside:
            yield child, f"part of an adapter, a {kind}"
    if type(module) is not Linear or any(module.use_dora.values()):
        yield base, f"the base of an adapter, a {kind}, that may read its weight"
    elif module.merged:
        yield base, f"an adapter, a {kind}, is merged into it"


def adopt(model: nn.Module) -> None:
    """Adapters whose base has been quantized refuse to be merged, as new ones on it do."""
    module: Any  # of any class
    for module in model.modules():
        if type(module) is Linear and isinstance(module.get_base_layer(), LiquidLinear):
            module.__class__ = LiquidLora


def release(model: nn.Module) -> None:
    """Adapters whose base is a float layer again are PEFT's own."""
    for module in model.modules():
        if type(module) is LiquidLora and not isinstance(module.get_base_layer(), LiquidLinear):
            module.__class__ = Linear
