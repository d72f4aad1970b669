"""Layers of experts in vLLM with our weights.

vLLM's router chooses, its runner adds shared experts and sums over GPUs; what is between is
`liquidgemm.ops.moe`. Only what vLLM 0.26 to 0.32 have in common is used of its interface.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from ...formats.liquidquant import GROUP
from ...nn.experts import LiquidExperts
from ...quantization.config import LiquidConfig
from ...quantization.layer import quantize_layer
from ..serving import experts as serving
from ..serving.tensors import EngineLayer
from . import exact
from .online import DONE
from .summary import Summary

_ACTIVATIONS = {
    "silu": "silu_mul",
    "gelu_tanh": "gelu_tanh_mul",
    "swigluoai": "swiglu_clamped",
    "swigluoai_uninterleave": "swiglu_clamped",
}


class ExpertsMethod(FusedMoEMethodBase):
    """Computes with packed experts, which subclasses bring about.

    A layer then has what `serving.experts` says.
    """

    def __init__(self, moe: FusedMoEConfig, name: str, summary: Summary) -> None:
        super().__init__(moe)
        self.name, self.summary = name, summary
        summary.expect((name,))

    def get_fused_moe_quant_config(self, layer: EngineLayer) -> None:
        return None

    def check(self, layer: EngineLayer, inner: int) -> str:
        """The activation by our name.

        Raises:
            ValueError: what our experts cannot compute, or not with so many GPUs.
        """
        activation = _ACTIVATIONS.get(layer.activation.value)
        if activation is None:
            raise ValueError(
                f"{self.name}: expected an activation of {', '.join(_ACTIVATIONS)}, got "
                f"{layer.activation.value}"
            )
        if layer.apply_router_weight_on_input:
            raise ValueError(
                f"{self.name}: expected weights of the router on the output of experts, got them on"
                " the input: serve the model with transformers"
            )
        if self.moe.moe_parallel_config.use_all2all_kernels:
            raise ValueError(
                f"{self.name}: expected expert parallelism without an exchange of tokens, got data "
                "and expert parallelism at once: use --tensor-parallel-size with "
                "--enable-expert-parallel"
            )
        if (self.moe.tp_size > 1 or self.moe.ep_size > 1) and exact.asked():
            exact.refuse(self.name, "experts over several GPUs", "their sums are added in floats")
        if self.moe.tp_size > 1 and inner % GROUP:
            raise ValueError(
                f"{self.name}: expected a multiple of {GROUP} inner channels for each of "
                f"{self.moe.tp_size} GPUs, got {inner}: use --enable-expert-parallel"
            )
        return activation

    def set_experts(self, layer: EngineLayer, experts: LiquidExperts) -> None:
        """Exchange what was loaded for what is computed with."""
        for name in ("w13_weight", "w2_weight"):
            if name in layer._parameters:
                delattr(layer, name)
        for name, tensor in serving.held(experts):
            if tensor is None:
                setattr(layer, name, None)
            else:
                replace_parameter(layer, name, tensor)
        layer.liquid_activation = experts.activation
        layer.liquid_total_experts = self.moe.num_experts
        self.summary.done((self.name,), layer.gate_up_packed.device)

    def apply(
        self,
        layer: EngineLayer,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: nn.Module | None = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        ids = topk_ids
        if layer.expert_map is not None:  # -1 for experts of other GPUs
            ids = torch.where(ids < 0, -1, layer.expert_map[ids.clamp(min=0).long()])
        return serving.compute(layer, x, ids.to(torch.int32), topk_weights)


class LiquidExpertsMethod(ExpertsMethod):
    """Experts that a checkpoint of ours has quantized."""

    def __init__(
        self, moe: FusedMoEConfig, name: str, sizes: Mapping[str, Any], summary: Summary
    ) -> None:
        super().__init__(moe, name, summary)
        self.sizes = dict(sizes)
        self.state: dict[str, Tensor] = {}

    def create_weights(
        self,
        layer: EngineLayer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        activation = self.check(layer, intermediate_size_per_partition)
        own = {
            "num_experts": self.moe.num_experts,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size_per_partition * self.moe.tp_size,
            "activation": activation,
        }
        serving.check_sizes(self.name, own, self.sizes)
        config = get_current_vllm_config_or_none()
        if config is not None and config.load_config.load_format == "dummy":
            raise ValueError("load_format: expected one that reads codes of experts, got 'dummy'")
        self.device, self.dtype = torch.get_default_device(), params_dtype
        # In the place of vLLM's own: the names of our tensors are not those of single experts.
        layer.load_weights = lambda weights: self._load(layer, weights)

    def _load(self, layer: EngineLayer, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        names = LiquidExperts(**self.sizes, device="meta").state_dict().keys()
        for name, tensor in weights:
            if hasattr(layer, "gate_up_packed"):
                raise RuntimeError(
                    f"{self.name}.{name}: experts are packed already, and cannot be loaded again"
                )
            if name not in names:
                raise ValueError(f"{self.name}.{name}: expected one of {', '.join(names)}")
            own = tensor.detach()
            if layer.expert_map is not None:
                own = own[_own(layer.expert_map).to(own.device)]
            self.state[name] = own.to(self.device, copy=True)  # the loader may reuse its memory
            yield name

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        if hasattr(layer, "gate_up_packed"):
            return
        sizes = self.sizes | {"num_experts": layer.local_num_experts}
        experts = LiquidExperts(**sizes, device="meta", dtype=self.dtype)
        for stack in serving.STACKS:
            own = {
                name.removeprefix(f"{stack}."): tensor
                for name, tensor in self.state.items()
                if name.startswith(f"{stack}.")
            }
            serving.load_stack(self.name, experts, stack, own)
        self.state.clear()
        if self.moe.tp_size > 1:
            inner = self.sizes["intermediate_size"] // self.moe.tp_size
            experts = experts.narrow(self.moe.tp_rank * inner, inner)
        self.set_experts(layer, experts)


class OnlineLiquidExpertsMethod(ExpertsMethod):
    """Experts of a float checkpoint, quantized without data as soon as all of a layer are loaded.

    Under tensor parallelism each GPU quantizes its own inner channels.
    """

    uses_meta_device = True

    def __init__(
        self, moe: FusedMoEConfig, name: str, config: LiquidConfig, summary: Summary
    ) -> None:
        super().__init__(moe, name, summary)
        self.config = replace(config.for_experts(), keep=())

    def create_weights(
        self,
        layer: EngineLayer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.activation = self.check(layer, intermediate_size_per_partition)
        if self.moe.has_bias:
            raise ValueError(
                f"{self.name}: expected experts without biases to quantize while loading, got some "
                "with them: run `liquidgemm quantize` and serve its output"
            )
        inner, self.dtype = intermediate_size_per_partition, params_dtype
        shapes = {"w13_weight": (2 * inner, hidden_size), "w2_weight": (hidden_size, inner)}
        for name, shape in shapes.items():
            data = torch.empty((num_experts, *shape), dtype=params_dtype, device="meta")
            weight = nn.Parameter(data, requires_grad=False)
            set_weight_attrs(weight, extra_weight_attrs)
            layer.register_parameter(name, weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        if getattr(layer, DONE, False):
            return
        try:
            gate_up, down = (
                [quantize_layer(one, self.config, self.name)[0] for one in weight.data]
                for weight in (layer.w13_weight, layer.w2_weight)
            )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        self.set_experts(
            layer,
            LiquidExperts.from_quantized(gate_up, down, self.activation, dtype=self.dtype),
        )
        setattr(layer, DONE, True)


def _own(expert_map: Tensor) -> Tensor:
    """The ids of the experts of this GPU, in the order in which it holds them."""
    ids = (expert_map >= 0).nonzero().flatten()
    return ids[expert_map[ids].argsort()]
