"""vLLM's quantization config "liquidgemm": which method each layer gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ...ops import FLOATS
from ...quantization.config import LiquidConfig
from ...weights.weight import Form
from ..serving.foreign import ForeignLayer, foreign_layers
from ..serving.names import Names, parts_of
from ..serving.online import check_experts, check_online, left_in_floats, skipped
from ..serving.tensors import EngineLayer
from ..transformers import LiquidGemmConfig as Settings
from .experts import LiquidExpertsMethod, OnlineLiquidExpertsMethod
from .foreign import ForeignLiquidLinearMethod
from .linear import LiquidLinearMethod
from .online import OnlineLiquidLinearMethod
from .summary import Summary, check_device

# Kinds of models whose layers of experts are named otherwise in vLLM, and what is within them.
_OLD_NAMES = ("mixtral",)
_OLD_NAMED = ("experts", "gate")
# What vLLM itself adds to the settings of a checkpoint.
_OF_VLLM = ("total_num_heads", "total_num_kv_heads")


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
        self, settings: Settings | None = None, foreign: dict[str, object] | None = None
    ) -> None:
        super().__init__()
        self.settings = Settings() if settings is None and foreign is None else settings
        self.foreign = foreign
        layers = None if self.settings is None else self.settings.layers
        # What quantizes while loading; None where the checkpoint has codes, ours or others'.
        self.recipe = None if self.settings is None or layers is not None else self.settings.config
        if self.recipe is not None:
            check_online(self.recipe)
        self.names: Names[Form] = Names({} if self.settings is None else self.settings.forms())
        self.foreign_names: Names[ForeignLayer] = Names({})
        self.experts: Names[Mapping[str, Any]] = Names(
            {} if self.settings is None else self.settings.experts
        )
        self.tied = False
        self.renamed: dict[str, str] = {}
        self.summary = Summary()

    @classmethod
    def from_config(cls, config: dict) -> LiquidGemmConfig:
        if config.get("quant_method") == cls.METHOD:
            return cls(Settings(**config))
        return cls(foreign={key: v for key, v in config.items() if key not in _OF_VLLM})

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict, user_quant: str | None, hf_config: object = None
    ) -> str | None:
        """Another project's checkpoint is converted if, and only if, the user asks for it."""
        return cls.METHOD if user_quant == cls.METHOD else None

    def maybe_update_config(
        self, model_name: str, hf_config: object = None, revision: str | None = None
    ) -> None:
        text = getattr(hf_config, "text_config", None) or hf_config
        self.tied = bool(getattr(text, "tie_word_embeddings", False))
        if self.experts.layers and getattr(text, "model_type", None) in _OLD_NAMES:
            self._rename_experts()
        if self.foreign is not None and not self.foreign_names.layers:
            names = get_safetensors_params_metadata(model_name, revision=revision)
            self.foreign_names = Names(foreign_layers({"config.json": self.foreign}, names))

    def _rename_experts(self) -> None:
        """transformers 5 has another name for what vLLM calls block_sparse_moe."""
        if not hasattr(QuantizationConfig, "get_checkpoint_weight_mapper"):
            raise ValueError(
                "experts: expected a vLLM that lets a method rename tensors, as 0.32 does, for a "
                "model whose experts vLLM calls block_sparse_moe, got an older one"
            )
        self.renamed = {f".mlp.{name}.": f".block_sparse_moe.{name}." for name in _OLD_NAMED}
        end, new = ".mlp.experts", ".block_sparse_moe.experts"
        self.experts = Names(
            {
                name.removesuffix(end) + new if name.endswith(end) else name: sizes
                for name, sizes in self.experts.layers.items()
            }
        )

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

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.names = Names(hf_to_vllm_mapper.apply_dict(self.names.layers))
        self.foreign_names = Names(hf_to_vllm_mapper.apply_dict(self.foreign_names.layers))
        self.experts = Names(hf_to_vllm_mapper.apply_dict(self.experts.layers))

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        # That of vLLM drops what says that groups are out of order.
        return WeightsMapper(orig_to_new_substr=self.renamed)

    def get_quant_method(self, layer: EngineLayer, prefix: str) -> QuantizeMethodBase | None:
        self.summary.producers.find()
        method: QuantizeMethodBase | str
        if isinstance(layer, RoutedExperts):
            method = self._experts(layer, prefix)
        elif not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        elif self.recipe is not None:
            method = self._online(layer, prefix, self.recipe)
        else:
            method = self._loaded(prefix)
        if isinstance(method, QuantizeMethodBase):
            check_device()
            return method
        self.summary.leave(prefix, method)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _loaded(self, prefix: str) -> QuantizeMethodBase | str:
        """The method, or why there is none."""
        if foreign := self.foreign_names.of(prefix, self.packed_modules_mapping):
            return ForeignLiquidLinearMethod(foreign, self.summary)
        if found := self.names.of(prefix, self.packed_modules_mapping):
            return LiquidLinearMethod(tuple(found), tuple(found.values()), self.summary)
        return "so in the checkpoint"

    def _online(
        self, layer: EngineLayer, prefix: str, config: LiquidConfig
    ) -> QuantizeMethodBase | str:
        if isinstance(layer, ParallelLMHead) and config.head == "int8":
            if self.tied:
                raise ValueError(
                    "head: expected 'float' for one that is tied to the embeddings, as vLLM loads "
                    "no weight of its own for it, got 'int8': run `liquidgemm quantize --head int8`"
                    " and serve its output"
                )
            config = replace(config, keep=(*config.keep, prefix))
            return OnlineLiquidLinearMethod((prefix,), config, self.summary)
        if isinstance(layer, ParallelLMHead) and self.tied:
            return "tied to the embeddings"
        names = parts_of(prefix, self.packed_modules_mapping)
        if (reason := left_in_floats(config, prefix, names, *_shape(layer))) is not None:
            return reason
        return OnlineLiquidLinearMethod(tuple(names), config, self.summary)

    def _experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | str:
        """The method of experts, or why there is none.

        Raises:
            ValueError: the checkpoint has them in W4A8 in a way that is not served.
        """
        held = (*self.names.layers, *self.foreign_names.layers)
        if inside := [name for name in held if name.startswith(f"{prefix}.")]:
            raise ValueError(
                f"{inside[0]}: experts of their own tensors in W4A8 cannot be served with vLLM yet:"
                " serve the model with transformers, or quantize with a pattern of skip that "
                "matches the experts"
            )
        moe = layer.moe_config
        if found := self.experts.of(prefix, {}):
            ((name, sizes),) = found.items()
            return LiquidExpertsMethod(moe, name, sizes, self.summary)
        if self.recipe is None:
            return "so in the checkpoint"
        if (reason := skipped(self.recipe, prefix)) is not None:
            return reason
        check_experts(self.recipe, prefix)
        return OnlineLiquidExpertsMethod(moe, prefix, self.recipe, self.summary)


def _shape(layer: EngineLayer) -> tuple[int, int]:
    """Rows and columns of the whole weight; an embedding of vLLM 0.26 has other names for them."""
    if isinstance(layer, ParallelLMHead):
        return layer.num_embeddings, layer.embedding_dim
    return layer.output_size, layer.input_size
