"""``from_pretrained`` and ``save_pretrained`` of transformers, as quantization method "liquidgemm".

A folder has ``model.safetensors``, or shards of it, with quantized layers in the logical layout,
and in ``config.json`` a ``quantization_config``::

    {"quant_method": "liquidgemm", "format_version": 1, "config": {...}, "layers": {"name": 0}}

with the fields of the `LiquidConfig` (null where another tool chose the codes) and the quantized
layers with their numbers of residual columns. Where there are experts, format_version is 2, and
"experts" has by the name of each layer of them the arguments of its `LiquidExperts`. Where layers
have groups of 32, it is 3, and "group_sizes" has 32 by the name of each of them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MethodType

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints._pretrained import check_one_checkpoint, finishing_save_pretrained
from ..formats.liquidquant import FINE_GROUP, GROUP
from ..nn._modules import as_linear, paths_of_modules, replace_module
from ..nn.experts import LiquidExperts
from ..nn.float_experts import Layout, layout_of
from ..nn.linear import LiquidLinear
from ..quantization.config import LiquidConfig
from ..quantization.dequantize import dequantize_
from ..quantization.model import quantize_
from ..weights.weight import Form
from .transformers_loading import (
    UnpackedExperts,
    UnpackedLayer,
    UnpackedStack,
    state_of_experts,
    tensors_of,
)

METHOD = "liquidgemm"
FORMAT_VERSION = 3


@register_quantization_config(METHOD)
class LiquidGemmConfig(QuantizationConfigMixin):
    """``quantization_config=`` of ``from_pretrained``: quantize a float model as it is loaded.

    The float model has to fit where ``device_map`` puts it.

    Args:
        config: how to quantize; or its fields as keywords: ``LiquidGemmConfig(group_size=128)``.
        layers: of a checkpoint: its quantized layers, and how many residual columns each has.
        experts: of a checkpoint: its layers of experts, and the arguments of each.
        group_sizes: of a checkpoint: which of its layers have groups of 32, as 32 by name.
        verify: as in `liquidgemm.quantize_`; a checkpoint does not record it.

    Raises:
        ValueError: a wrong field, or a checkpoint of a newer version.
    """

    def __init__(
        self,
        config: LiquidConfig | Mapping | None = None,
        layers: Mapping[str, int] | None = None,
        quant_method: str = METHOD,
        format_version: int = FORMAT_VERSION,
        verify: bool = True,
        experts: Mapping[str, Mapping] | None = None,
        group_sizes: Mapping[str, int] | None = None,
        **fields,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method: expected {METHOD!r}, got {quant_method!r}")
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version: expected {FORMAT_VERSION} or older, got {format_version!r}: it "
                "was saved by a newer liquidgemm"
            )
        if config is not None and fields:
            raise ValueError(f"config: expected it or its fields, got it and {sorted(fields)}")
        if layers is not None and fields:
            raise ValueError(f"layers: expected no fields beside them, got {sorted(fields)}")
        if isinstance(config, Mapping):
            config = LiquidConfig._from_dict(dict(config))
        elif config is None and layers is None:
            config = LiquidConfig._from_dict(fields)
        elif config is not None and not isinstance(config, LiquidConfig):
            raise ValueError(f"config: expected a LiquidConfig, got {type(config).__name__}")
        if layers is not None and not (
            isinstance(layers, Mapping)
            and all(type(n) is int and n >= 0 and n % GROUP == 0 for n in layers.values())
        ):
            raise ValueError(
                f"layers: expected a multiple of {GROUP} for the name of each layer, got {layers!r}"
            )
        fine = {} if group_sizes is None else group_sizes
        if not isinstance(fine, Mapping) or any(
            type(size) is not int or size != FINE_GROUP or name not in (layers or {})
            for name, size in fine.items()
        ):
            raise ValueError(
                f"group_sizes: expected {FINE_GROUP} by the name of a layer, got {group_sizes!r}"
            )
        if experts is not None and not (
            isinstance(experts, Mapping) and all(isinstance(v, Mapping) for v in experts.values())
        ):
            raise ValueError(f"experts: expected arguments by name of a layer, got {experts!r}")
        self.experts = {name: dict(sizes) for name, sizes in (experts or {}).items()}
        for name, sizes in self.experts.items():
            try:
                LiquidExperts(**sizes, device="meta")
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"experts: {name}: {error}") from None
        self.quant_method = METHOD
        self.config, self.verify = config, verify
        self.layers = None if layers is None else dict(layers)
        self.group_sizes = dict(fine)

    def forms(self) -> dict[str, Form]:
        """How each layer of a checkpoint is stored."""
        return {
            name: Form(augment, self.group_sizes.get(name, GROUP))
            for name, augment in (self.layers or {}).items()
        }

    def to_dict(self) -> dict:
        return {
            "quant_method": METHOD,
            "format_version": 3 if self.group_sizes else 2 if self.experts else 1,
            "config": None if self.config is None else self.config.to_dict(),
            "layers": self.layers,
            **({"experts": self.experts} if self.experts else {}),
            **({"group_sizes": self.group_sizes} if self.group_sizes else {}),
        }


@register_quantizer(METHOD)
class LiquidGemmQuantizer(HfQuantizer):
    """Loads quantized layers where the checkpoint has them, else quantizes once all is loaded."""

    quantization_config: LiquidGemmConfig

    def validate_environment(self, *args, **kwargs) -> None:
        config = self.quantization_config.config
        if self.pre_quantized:
            if self.quantization_config.layers is None:
                raise ValueError("quantization_config: expected the quantized layers, got none")
        elif config is None:
            raise ValueError(
                "quantization_config: expected how to quantize a float model, got the layers of a "
                "quantized one"
            )
        elif config.needs_calibration:
            raise ValueError(
                f"quantization_config: expected a method that needs no calibration, got "
                f"{config}: load the float model and call "
                "liquidgemm.quantize_ with the text to calibrate on"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        old = int(transformers.__version__.partition(".")[0]) < 5
        if old and self.pre_quantized and dtype not in (None, torch.float32):
            raise ValueError(
                f"dtype: expected float32 with transformers {transformers.__version__}, got "
                f"{dtype}: it would round the scales of the weights as well. Load in float32 and "
                f"call .to({dtype}), which leaves the scales alone, or use transformers 5"
            )
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: transformers.PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        device_map: Mapping | None = None,
        **kwargs,
    ) -> None:
        if not self.pre_quantized:
            return
        self._check_files(checkpoint_files or [])
        # Without any data: to see whether every tensor finds its place.
        self._on_meta = {str(device) for device in (device_map or {}).values()} == {"meta"}
        paths = paths_of_modules(model)
        for name, form in self._layers_of(model).items():
            linear = model.get_submodule(name)
            layer = UnpackedLayer(linear, form)
            for path in paths[linear]:
                replace_module(model, path, layer)
        for name, sizes in self._experts_of(model).items():
            module = model.get_submodule(name)
            for path in paths[module]:
                replace_module(model, path, UnpackedExperts(module, sizes))

    def _process_model_after_weight_loading(
        self, model: transformers.PreTrainedModel, **kwargs
    ) -> None:
        config = self.quantization_config.config
        if not self.pre_quantized:
            hooked = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
            if hooked:
                raise ValueError(
                    f"device_map: expected one device, got several, between which accelerate moves "
                    f"the activations of {hooked[-1]}: quantize on one device, save, and load that "
                    "with the device_map"
                )
            verify = self.quantization_config.verify
            verification = quantize_(model, config, progress=False, verify=verify).verification
            if (
                verify and verification.reason
            ):  # that nothing is said of faults does not mean that all is well
                warnings.warn(str(verification), stacklevel=2)
            return
        for layer, names in paths_of_modules(model).items():
            if isinstance(layer, UnpackedLayer | UnpackedExperts):
                packed = layer.without_data() if self._on_meta else layer.pack(names[0])
                for name in names:
                    replace_module(model, name, packed)
        if config is not None:
            model.liquid_config = config
        model.save_pretrained = MethodType(save_pretrained, model)

    def _layers_of(self, model: transformers.PreTrainedModel) -> dict[str, Form]:
        """The layers by their names in this model, which may be a part or the whole of the one
        that was saved: a base model for one with a head, or the other way round."""
        modules = dict(model.named_modules(remove_duplicate=False))
        prefix = f"{model.base_model_prefix}."
        found: dict[str, Form] = {}
        for saved, form in self._forms.items():
            names = (saved, saved.removeprefix(prefix), prefix + saved)
            name = next((name for name in names if name in modules), None)
            if name is None and model.base_model is model and not saved.startswith(prefix):
                continue  # of the head, which a base model does not have
            if name is None or as_linear(modules[name]) is None:
                kind = "nothing" if name is None else type(modules[name]).__name__
                raise ValueError(f"{saved}: expected a linear layer in the model, got {kind}")
            found[name] = form
        return found

    def _experts_of(self, model: transformers.PreTrainedModel) -> dict[str, dict]:
        """As `_layers_of`, for experts."""
        modules = dict(model.named_modules(remove_duplicate=False))
        prefix = f"{model.base_model_prefix}."
        found = {}
        for saved, sizes in self.quantization_config.experts.items():
            names = (saved, saved.removeprefix(prefix), prefix + saved)
            name = next((name for name in names if name in modules), None)
            layout = None if name is None else layout_of(modules[name])
            if name is None or not isinstance(layout, Layout):
                kind = "nothing" if name is None else layout or type(modules[name]).__name__
                raise ValueError(f"{saved}: expected experts in the model, got {kind}")
            if layout.sizes != sizes:
                raise ValueError(f"{saved}: expected {sizes} in the model, got {layout.sizes}")
            found[name] = sizes
        return found

    @property
    def _forms(self) -> dict[str, Form]:
        return self.quantization_config.forms()

    def _check_files(self, files: list[str]) -> None:
        """Raises a ValueError if a layer is not complete: transformers would make it up."""
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            return
        check_one_checkpoint(Path(files[0]).parent, [Path(file).name for file in files])
        keys = set()
        for file in files:
            with safe_open(file, framework="pt") as handle:
                keys.update(handle.keys())
        expected = [
            f"{name}.{tensor}"
            for name, form in self._forms.items()
            for tensor in tensors_of(form.augment)
        ]
        for name, sizes in self.quantization_config.experts.items():
            expected += [f"{name}.{tensor}" for tensor in state_of_experts(sizes)]
        # transformers may rename keys as it loads, but it drops none.
        kinds = [Counter(key.rpartition(".")[2] for key in names) for names in (expected, keys)]
        short = [kind for kind, count in kinds[0].items() if kinds[1][kind] < count]
        for name in expected:
            if name not in keys and name.rpartition(".")[2] in short:
                raise ValueError(f"{name}: missing in {', '.join(map(str, files))}")

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list:
        """As `_check_files`, in transformers 4, which asks this instead of naming the files."""
        for key in missing_keys:
            if isinstance(
                model.get_submodule(key.rpartition(".")[0]), UnpackedLayer | UnpackedStack
            ):
                raise ValueError(f"{key}: missing in the checkpoint")
        return missing_keys

    def get_state_dict_and_metadata(self, model: nn.Module, *args) -> tuple[None, dict]:
        """Asked by save_pretrained before it writes the config, which names the layers of now."""
        self.quantization_config.layers = _quantized_layers(model)
        self.quantization_config.group_sizes = _fine_groups(model)
        self.quantization_config.experts = _quantized_experts(model)
        if not (self.quantization_config.layers or self.quantization_config.experts):
            detach(model)
        return None, {}

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """What ``model.dequantize()`` calls."""
        return dequantize_(model, dtype)

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: transformers.PreTrainedModel, config: LiquidConfig | None) -> None:
    """Tell transformers of layers that were quantized in place, for save_pretrained and others."""
    layers, experts = _quantized_layers(model), _quantized_experts(model)
    if layers or experts:
        model.liquid_config = config
        model.hf_quantizer = LiquidGemmQuantizer(
            LiquidGemmConfig(config, layers, experts=experts, group_sizes=_fine_groups(model)),
            pre_quantized=True,
        )
        model.config.quantization_config = model.hf_quantizer.quantization_config
        model.save_pretrained = MethodType(save_pretrained, model)


def _quantized_layers(model: nn.Module) -> dict[str, int]:
    return {
        name: 0 if layer.columns is None else len(layer.columns)
        for name, layer in model.named_modules()
        if isinstance(layer, LiquidLinear)
    }


def _fine_groups(model: nn.Module) -> dict[str, int]:
    return {
        name: layer.group_size
        for name, layer in model.named_modules()
        if isinstance(layer, LiquidLinear) and layer.group_size != GROUP
    }


def _quantized_experts(model: nn.Module) -> dict[str, dict]:
    return {
        name: layer.sizes
        for name, layer in model.named_modules()
        if isinstance(layer, LiquidExperts)
    }


def save_pretrained(model: transformers.PreTrainedModel, save_directory, *args, **kwargs):
    """That of the model's class; then its files, and no older ones, are what the folder holds."""
    with finishing_save_pretrained(Path(save_directory)):
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)


def detach(model: transformers.PreTrainedModel) -> None:
    """Take back what `attach` and loading have told transformers."""
    if not isinstance(getattr(model, "hf_quantizer", None), LiquidGemmQuantizer):
        return
    for name in ("hf_quantizer", "quantization_method", "save_pretrained"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.is_quantized = False
