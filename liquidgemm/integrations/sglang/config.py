"""SGLang's quantization config "liquidgemm": which method each layer gets, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from torch import nn

from ...importers.folder import Source
from ...ops import FLOATS
from ...quantization.config import LiquidConfig
from ...weights.weight import Form
from ..serving import summary
from ..serving.foreign import ForeignLayer, foreign_layers
from ..serving.names import Names, parts_of
from ..serving.online import check_experts, check_online, left_in_floats, skipped
from ..transformers import LiquidGemmConfig as Settings
from .experts import LiquidExpertsMethod, OnlineLiquidExpertsMethod
from .foreign import ForeignLiquidLinearMethod
from .linear import LiquidLinearMethod
from .online import OnlineLiquidLinearMethod

logger = logging.getLogger("sglang.srt.liquidgemm")

# Not all models of SGLang say of what their layers are made.
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# SGLang takes the float weight of these apart, or puts it together, itself.
_OF_MLA = ("kv_b_proj", "fused_qkv_a_proj_with_mqa")
# What SGLang itself adds to the settings of a checkpoint.
_OF_SGLANG = ("packed_modules_mapping", "hf_config")
_LINEAR = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
_REMEDY = "run `liquidgemm quantize` or `liquidgemm import`, and serve its output"


class Summary(summary.Summary):
    def say(self, line: str) -> None:
        logger.info("%s", line)


class LiquidGemmConfig(QuantizationConfig):
    """Which layers are ours, from the ``quantization_config`` of config.json.

    Three kinds of checkpoints are known: ours, whose ``layers`` are named; in floats, quantized
    while they are loaded by the fields of ``config`` (see `LiquidConfig`), or without any such
    settings by its defaults; and those of other projects, converted while they are loaded.

    Raises:
        ValueError: a setting that is not understood, or that needs data to quantize with.
    """

    METHOD = "liquidgemm"

    def __init__(
        self,
        settings: Settings | None = None,
        foreign: Mapping[str, ForeignLayer] | None = None,
        tied: bool | None = None,
    ) -> None:
        super().__init__()
        if settings is None:
            settings = Settings() if foreign is None else Settings(layers={})
        self.foreign: Names[ForeignLayer] = Names(foreign or {})
        # What quantizes while loading; None where the checkpoint has codes.
        self.recipe = settings.config if settings.layers is None else None
        if self.recipe is not None:
            check_online(self.recipe)
            if self.recipe.head == "int8" and tied is not False:
                raise ValueError(
                    "head: expected 'float' for one that is tied to the embeddings, or that may be "
                    "as this SGLang does not say, to quantize while loading, got 'int8': run "
                    "`liquidgemm quantize --head int8` and serve its output"
                )
        self.names: Names[Form] = Names(settings.forms())
        self.experts: Names[Mapping[str, Any]] = Names(settings.experts)
        self.summary = Summary()

    @classmethod
    def from_config(cls, config: dict) -> LiquidGemmConfig:
        own = {key: value for key, value in config.items() if key not in _OF_SGLANG}
        if own.get("quant_method") == cls.METHOD:
            found = cls(Settings(**own), tied=_tied(config.get("hf_config")))
        else:
            names = _tensors_of(config.get("hf_config"))
            found = cls(foreign=foreign_layers({"config.json": own}, names))
        found.update_packed_modules_mapping(config.get("packed_modules_mapping") or {})
        return found

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict, user_quant: str | None) -> str | None:
        """Another project's checkpoint is converted if, and only if, the user asks for it."""
        return cls.METHOD if user_quant == cls.METHOD else None

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
        self.foreign = Names(hf_to_sglang_mapper.apply_dict(dict(self.foreign.layers)))
        self.experts = Names(hf_to_sglang_mapper.apply_dict(dict(self.experts.layers)))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        method: QuantizeMethodBase | str | None
        if isinstance(layer, FusedMoE):
            method = self._experts(prefix)
        elif self.recipe is not None:
            method = self._online(layer, prefix, self.recipe)
        else:
            method = self._loaded(layer, prefix)
        if isinstance(method, QuantizeMethodBase):
            check_device()
            return method
        if method is not None:
            self.summary.leave(prefix, method)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def is_linear_unquantized(self, prefix: str) -> bool:
        """What some of SGLang's models ask before they make a layer."""
        if self.recipe is not None:
            return skipped(self.recipe, prefix) is not None
        fused = _FUSED | self.packed_modules_mapping
        return not (self.names.of(prefix, fused) or self.foreign.of(prefix, fused))

    def _loaded(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | str | None:
        """The method, or why there is none; None for what is no linear layer."""
        fused = _FUSED | self.packed_modules_mapping
        found, foreign = self.names.of(prefix, fused), self.foreign.of(prefix, fused)
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            self._refuse(found or foreign, "embeddings cannot be served in W4A8")
            return None
        if not isinstance(layer, (*_LINEAR, ParallelLMHead)):
            self._refuse(found or foreign, f"{type(layer).__name__} cannot be served in W4A8")
            return "so in the checkpoint" if isinstance(layer, LinearBase) else None
        if prefix.rpartition(".")[2] in _OF_MLA:
            self._refuse(found or foreign, "MLA cannot be served with SGLang yet")
        if foreign:
            return ForeignLiquidLinearMethod(foreign, self.summary)
        if not found:
            return "so in the checkpoint"
        return LiquidLinearMethod(tuple(found), tuple(found.values()), self.summary)

    def _online(
        self, layer: nn.Module, prefix: str, config: LiquidConfig
    ) -> QuantizeMethodBase | str | None:
        if isinstance(layer, ParallelLMHead):
            if config.head == "int8":
                config = replace(config, keep=(*config.keep, prefix))
            elif (reason := skipped(config, prefix)) is not None:
                return reason
            return OnlineLiquidLinearMethod((prefix,), config, self.summary)
        if not isinstance(layer, LinearBase):
            return None
        if prefix.rpartition(".")[2] in _OF_MLA or not isinstance(layer, _LINEAR):
            return "SGLang takes its float weight apart"
        names = parts_of(prefix, _FUSED | self.packed_modules_mapping)
        sizes = layer.output_size, layer.input_size
        if (reason := left_in_floats(config, prefix, names, *sizes)) is not None:
            return reason
        return OnlineLiquidLinearMethod(tuple(names), config, self.summary)

    def _experts(self, prefix: str) -> QuantizeMethodBase | str:
        if self.recipe is not None:
            if (reason := skipped(self.recipe, prefix)) is not None:
                return reason
            check_experts(self.recipe, prefix)
            return OnlineLiquidExpertsMethod(prefix, self.recipe, self.summary)
        held = (*self.names.layers, *self.foreign.layers)
        inside = [name for name in held if name.startswith(f"{prefix}.")]
        self._refuse(inside, "experts of their own tensors in W4A8 cannot be served with SGLang")
        if found := self.experts.of(prefix, {}):
            ((name, sizes),) = found.items()
            return LiquidExpertsMethod(name, sizes, self.summary)
        block = _block(prefix)
        elsewhere = [name for name in self.experts.layers if block and _block(name) == block]
        self._refuse(elsewhere, f"SGLang, which calls it {prefix}, would not find its tensors")
        return "so in the checkpoint"

    @staticmethod
    def _refuse(found, reason: str) -> None:
        if found:
            raise ValueError(
                f"{next(iter(found))}: {reason}: quantize with a pattern of skip that matches it, "
                "or serve the model with vLLM or transformers"
            )


def _tied(config: object) -> bool | None:
    """Whether a model's head is that of its embeddings; None where it is not known."""
    return getattr(getattr(config, "text_config", None) or config, "tie_word_embeddings", None)


def _tensors_of(config: object) -> list[str]:
    """The names of all tensors of the checkpoint that a model's config was read from.

    Raises:
        ValueError, FileNotFoundError: it is not known where that is, or it has none.
    """
    where = getattr(config, "_name_or_path", None)
    if not where:
        raise ValueError(
            "quant_method: expected 'liquidgemm', as this SGLang does not tell where the checkpoint"
            f" is, which 0.5.23 does, for one of another project to be converted: {_REMEDY}"
        )
    if not Path(where).is_dir():  # SGLang loads the same files afterwards
        where = snapshot_download(where, allow_patterns=["*.safetensors", "*.json"])
    return Source(Path(where)).names()


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
