"""Layers of experts in SGLang with our weights.

SGLang's router chooses, its dispatcher gives each GPU the ids of its own experts, and its models
add shared experts and sum over GPUs; what is between is `liquidgemm.ops.moe`. Only what SGLang
0.5.16 to 0.5.23 have in common is used of its interface.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.runtime_context import get_server_args
from torch import Tensor, nn

from ...formats.liquidquant import GROUP
from ...nn.experts import LiquidExperts
from ...quantization.config import LiquidConfig
from ...quantization.layer import quantize_layer
from ..serving import experts as serving
from ..serving.summary import Summary
from ..serving.tensors import EngineLayer


class _Stack(nn.Module):
    """The tensors of a stack by their names in the checkpoint, by which SGLang's models find them.

    Each is empty until it is loaded, then the part of this GPU.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor], part_of: Any) -> None:
        super().__init__()
        for key, meta in tensors.items():
            place: Any = nn.Parameter(torch.empty(0, dtype=meta.dtype), requires_grad=False)
            place.weight_loader = self._loader(name, key, meta, part_of)
            self.register_parameter(key, place)

    @staticmethod
    def _loader(name: str, key: str, meta: Tensor, part_of: Any):
        def load(place: nn.Parameter, loaded: Tensor) -> None:
            # A bias has the dtype of the checkpoint.
            wrong = key != "bias" and loaded.dtype != meta.dtype
            if wrong or loaded.shape != meta.shape:
                raise ValueError(
                    f"{name}.{key}: expected {meta.dtype} of shape {list(meta.shape)}, got "
                    f"{loaded.dtype} of {list(loaded.shape)}"
                )
            own = part_of(key, loaded)
            place.data = torch.empty(own.shape, dtype=own.dtype, device=place.device).copy_(own)

        return load


class ExpertsMethod(FusedMoEMethodBase):
    """Computes with packed experts, which subclasses bring about.

    Once loaded, a layer has what `serving.experts` says.
    """

    def __init__(self, name: str, summary: Summary) -> None:
        self.name, self.summary = name, summary
        summary.expect((name,))

    def create_moe_runner(self, layer: EngineLayer, moe_runner_config: Any) -> None:
        self.moe_runner_config = moe_runner_config

    def set_experts(self, layer: EngineLayer, experts: LiquidExperts) -> None:
        """Give a layer what it computes with."""
        for name, tensor in serving.held(experts):
            own = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, own)
        layer.liquid_activation = experts.activation
        layer.liquid_total_experts = layer.num_experts
        self.summary.done((self.name,), layer.gate_up_packed.device)

    def apply(self, layer: EngineLayer, dispatch_output: Any) -> Any:
        return StandardCombineInput(compute(layer, dispatch_output))


class LiquidExpertsMethod(ExpertsMethod):
    """Experts that a checkpoint of ours has quantized."""

    def __init__(self, name: str, sizes: Mapping[str, Any], summary: Summary) -> None:
        super().__init__(name, summary)
        self.sizes = dict(sizes)

    def create_weights(
        self,
        layer: EngineLayer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        inner = intermediate_size_per_partition
        own = {
            "num_experts": layer.num_experts,
            "hidden_size": hidden_size,
            "intermediate_size": inner * layer.moe_tp_size,
            "activation": activation_of(self.name, layer.moe_runner_config),
        }
        hint = " (--disable-shared-experts-fusion where the model has more experts)"
        serving.check_sizes(self.name, own, self.sizes, hint)
        check_experts(self.name, layer)
        self.dtype = params_dtype
        # Those of this GPU: some of the experts, and of each some inner channels.
        self.experts = slice(layer.moe_ep_rank * num_experts, (layer.moe_ep_rank + 1) * num_experts)
        self.first, self.rank = layer.moe_tp_rank * inner, layer.moe_tp_rank
        self.local = self.sizes | {"num_experts": num_experts, "intermediate_size": inner}
        whole = LiquidExperts(**self.sizes, device="meta", dtype=params_dtype)
        parts = {"gate_up": self._gate_up, "down": self._down}
        for stack, part_of in parts.items():
            tensors = getattr(whole, stack).state_dict()
            setattr(layer, stack, _Stack(f"{self.name}.{stack}", tensors, part_of))

    def _gate_up(self, key: str, tensor: Tensor) -> Tensor:
        """The rows of this GPU, of the gate and of up."""
        halves = tensor[self.experts].unflatten(1, (2, -1))
        return halves.narrow(2, self.first, self.local["intermediate_size"]).flatten(1, 2)

    def _down(self, key: str, tensor: Tensor) -> Tensor:
        """The columns of this GPU; a bias is added by the first."""
        own = tensor[self.experts]
        if key == "bias":
            return own * (self.rank == 0)
        inner = self.sizes["intermediate_size"]
        if key == "scale" or self.local["intermediate_size"] == inner:
            return own
        per_byte = inner // own.shape[2]
        return own.narrow(2, self.first // per_byte, self.local["intermediate_size"] // per_byte)

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        if "gate_up" not in layer._modules:  # packed already
            return
        experts = LiquidExperts(**self.local, device="meta", dtype=self.dtype)
        for stack in serving.STACKS:
            places = getattr(layer, stack).named_parameters()
            loaded = {key: place.data for key, place in places if place.numel()}
            serving.load_stack(self.name, experts, stack, loaded)
            delattr(layer, stack)
        self.set_experts(layer, experts)


class OnlineLiquidExpertsMethod(ExpertsMethod):
    """Experts of a float checkpoint, quantized without data as soon as all of a layer are loaded.

    A layer has no memory for them before the first comes. Each GPU quantizes its own inner
    channels.
    """

    def __init__(self, name: str, config: LiquidConfig, summary: Summary) -> None:
        super().__init__(name, summary)
        self.config = replace(config.for_experts(), keep=())
        self.lock = threading.Lock()  # some of SGLang's models load in several threads

    def create_weights(
        self,
        layer: EngineLayer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        with_bias: bool = False,
        **extra_weight_attrs: Any,
    ) -> None:
        self.activation = activation_of(self.name, layer.moe_runner_config)
        check_experts(self.name, layer)
        if with_bias:
            raise ValueError(
                f"{self.name}: expected experts without biases to quantize while loading, got some "
                "with them: run `liquidgemm quantize` and serve its output"
            )
        inner, self.dtype = intermediate_size_per_partition, params_dtype
        # Parts of all experts, as SGLang asks for those of other GPUs, too, and loads nothing.
        self.missing = {(e, part) for e in range(layer.num_experts) for part in ("w1", "w2", "w3")}
        shapes = {
            "w13_weight": (num_experts, 2 * inner, hidden_size),
            "w2_weight": (num_experts, hidden_size, inner),
        }
        for name, shape in shapes.items():
            place: Any = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            place.weight_loader = self._loader(layer, shape, extra_weight_attrs["weight_loader"])
            layer.register_parameter(name, place)

    def _loader(self, layer: EngineLayer, shape: tuple[int, ...], loader: Any):
        def load(
            place: nn.Parameter,
            loaded: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int | None = None,
        ) -> None:
            with self.lock:
                if "w13_weight" not in layer._parameters:
                    raise RuntimeError(
                        f"{self.name}: experts are packed, and cannot be loaded into: start the "
                        "server anew to change weights"
                    )
                if not place.numel():
                    place.data = torch.full(shape, torch.nan, dtype=self.dtype, device=place.device)
                which = () if expert_id is None else (expert_id,)  # () for all at once
                loader(place, loaded, weight_name, shard_id, *which)
                parts = ("w1", "w3") if shard_id == "w13" else (shard_id,)
                for one in which or range(layer.num_experts):
                    self.missing.difference_update((one, part) for part in parts)
                if not self.missing:
                    self._quantize(layer)

        return load

    def process_weights_after_loading(self, layer: EngineLayer) -> None:
        if "w13_weight" in layer._parameters:
            expert, part = min(self.missing)
            raise ValueError(
                f"{self.name}: expected all experts to be loaded, got nothing for {part} of "
                f"{expert} and {len(self.missing) - 1} others"
            )

    def _quantize(self, layer: EngineLayer) -> None:
        stacks = []
        for name in ("w13_weight", "w2_weight"):
            place = layer._parameters.pop(name)
            try:
                stacks.append([quantize_layer(w, self.config, self.name)[0] for w in place.data])
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
            place.data = torch.empty(0, dtype=self.dtype, device=place.device)  # SGLang holds it
        gate_up, down = stacks
        experts = LiquidExperts.from_quantized(gate_up, down, self.activation, dtype=self.dtype)
        self.set_experts(layer, experts)


def compute(layer: EngineLayer, dispatch_output: Any) -> Tensor:
    """What the experts of this GPU add to each token; ids of -1 add nothing."""
    routing, config = dispatch_output.topk_output, layer.moe_runner_config
    if not TopKOutputChecker.format_is_standard(routing):
        raise RuntimeError(
            f"topk_output: expected weights and ids of experts, got {type(routing).__name__}"
        )
    x, weights = dispatch_output.hidden_states, routing.topk_weights
    factor = config.routed_scaling_factor
    fused = getattr(layer, "should_fuse_routed_scaling_factor_in_topk", False)
    if x.is_cuda and factor is not None and not fused:  # elsewhere SGLang's models do it themselves
        weights = weights * factor
    return serving.compute(layer, x, routing.topk_ids.to(torch.int32), weights)


def activation_of(name: str, config: Any) -> str:
    """The activation of a layer by our name.

    Raises:
        ValueError: one that our experts do not have.
    """
    if config.activation == "silu" and config.is_gated:
        bounds = config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit
        if bounds == (None, None, None) and getattr(config, "gemm1_beta", None) is None:
            return "silu_mul"
        if bounds == (1.702, 7.0, None):
            return "swiglu_clamped"
    raise ValueError(
        f"{name}: expected SiLU with a gate, plain or clamped as gpt-oss's, got "
        f"{config.activation}, is_gated={config.is_gated}, gemm1_alpha={config.gemm1_alpha}, "
        f"gemm1_clamp_limit={config.gemm1_clamp_limit}, swiglu_limit={config.swiglu_limit}"
    )


def check_experts(name: str, layer: EngineLayer) -> None:
    """Raises a ValueError for what is asked of a layer of experts and not served."""
    config = layer.moe_runner_config
    for flag in ("apply_router_weight_on_input", "no_combine"):
        if getattr(config, flag):
            raise ValueError(
                f"{name}: expected experts whose outputs are weighted and summed by the layer, got "
                f"{flag}: serve the model with transformers"
            )
    runner, exchange = get_moe_runner_backend(), get_moe_a2a_backend()
    if not (runner.is_auto() or runner.is_triton()):
        raise ValueError(
            f"--moe-runner-backend: expected auto, as W4A8 has its own kernel, got {runner.value}"
        )
    if not exchange.is_none():
        raise ValueError(
            "--moe-a2a-backend: expected none, as experts in W4A8 do without an exchange of "
            f"tokens, got {exchange.value}"
        )
    arguments = get_server_args()
    if getattr(arguments, "enable_eplb", False) or (
        getattr(arguments, "init_expert_location", "trivial") != "trivial"
    ):
        raise ValueError(
            f"{name}: expected experts in their own places, got --enable-eplb or "
            "--init-expert-location, which move them"
        )
    inner = layer.intermediate_size_per_partition
    if layer.moe_tp_size > 1 and inner % GROUP:
        raise ValueError(
            f"{name}: expected a multiple of {GROUP} inner channels for each of "
            f"{layer.moe_tp_size} GPUs, got {inner}: use --ep-size"
        )
