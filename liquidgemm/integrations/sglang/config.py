"""SGLang's quantization config "liquidgemm": which method each layer gets, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import nn

from ...ops import FLOATS
from ..serving import summary
from ..serving.names import Names
from ..transformers import LiquidGemmConfig as Settings
from .experts import LiquidExpertsMethod
from .linear import LiquidLinearMethod

logger = logging.getLogger("sglang.srt.liquidgemm")

# Not all models of SGLang say of what their layers are made.
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# SGLang takes the float weight of these apart, or puts it together, itself.
_OF_MLA = ("kv_b_proj", "fused_qkv_a_proj_with_mqa")
# What SGLang itself adds to the settings of a checkpoint.
_OF_SGLANG = ("packed_modules_mapping", "hf_config")
_REMEDY = "run `liquidgemm quantize` or `liquidgemm import`, and serve its output"


class Summary(summary.Summary):
    def say(self, line: str) -> None:
        logger.info("%s", line)


class LiquidGemmConfig(QuantizationConfig):
    """Which layers are ours, from the ``quantization_config`` of config.json.

    Raises:
        ValueError: a setting that is not understood, or a checkpoint that is not of ours.
    """

    METHOD = "liquidgemm"

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        if settings is None or settings.layers is None:
            raise ValueError(
                "quantization: expected a checkpoint that liquidgemm has quantized, got one in "
                f"floats, which the plug-in for SGLang does not quantize while loading: {_REMEDY}"
            )
        self.settings = settings
        self.names: Names[int] = Names(settings.layers)
        self.experts: Names[Mapping[str, Any]] = Names(settings.experts)
        self.summary = Summary()

    @classmethod
    def from_config(cls, config: dict) -> LiquidGemmConfig:
        method = config.get("quant_method")
        if method != cls.METHOD:
            raise ValueError(
                f"quant_method: expected 'liquidgemm', got {method!r}, which the plug-in for "
                f"SGLang does not convert while loading: {_REMEDY}"
            )
        own = {key: value for key, value in config.items() if key not in _OF_SGLANG}
        found = cls(Settings(**own))
        found.update_packed_modules_mapping(config.get("packed_modules_mapping") or {})
        return found

    def get_name(self) -> str:
        return self.METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(FLOATS)

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # check_device says more than that a number is too small, and of newer GPUs too

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_scaled_act_names(self) -> list[str]:
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper) -> None:
        self.names = Names(hf_to_sglang_mapper.apply_dict(dict(self.names.layers)))
        self.experts = Names(hf_to_sglang_mapper.apply_dict(dict(self.experts.layers)))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        found = self.names.of(prefix, _FUSED | self.packed_modules_mapping)
        if isinstance(layer, FusedMoE):
            return self._experts(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            self._refuse(found, "a quantized head cannot be served with SGLang yet")
            return None
        if not isinstance(layer, LinearBase):
            self._refuse(found, f"{type(layer).__name__} cannot be served in W4A8")
            return None
        if prefix.rpartition(".")[2] in _OF_MLA:
            self._refuse(found, "MLA cannot be served with SGLang yet")
        if not found:
            self.summary.leave(prefix, "so in the checkpoint")
            return UnquantizedLinearMethod()
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear | ReplicatedLinear):
            self._refuse(found, f"{type(layer).__name__} cannot be served in W4A8")
        check_device()
        return LiquidLinearMethod(tuple(found), tuple(found.values()), self.summary)

    def _experts(self, prefix: str) -> QuantizeMethodBase | None:
        inside = [name for name in self.names.layers if name.startswith(f"{prefix}.")]
        self._refuse(inside, "experts of their own tensors in W4A8 cannot be served with SGLang")
        if found := self.experts.of(prefix, {}):
            check_device()
            ((name, sizes),) = found.items()
            return LiquidExpertsMethod(name, sizes, self.summary)
        block = _block(prefix)
        elsewhere = [name for name in self.experts.layers if block and _block(name) == block]
        self._refuse(elsewhere, f"SGLang, which calls it {prefix}, would not find its tensors")
        self.summary.leave(prefix, "so in the checkpoint")
        return None

    @staticmethod
    def _refuse(found, reason: str) -> None:
        if found:
            raise ValueError(
                f"{next(iter(found))}: {reason}: quantize with a pattern of skip that matches it, "
                "or serve the model with vLLM or transformers"
            )


def _block(name: str) -> str:
    """The number of the block that a layer is in, as text; empty without one."""
    return next((part for part in name.split(".") if part.isdigit()), "")


def check_device() -> None:
    """Raises a ValueError, with what to do, on a device whose kernel we do not have."""
    if torch.cuda.is_available():
        summary.check_gpu(
            "serve the float model instead; W4A8 of liquidgemm needs an H100, H200, H20, H800 or "
            "GH200"
        )
