"""The setting `exact_tensor_parallel`: layers split by inputs give the bits of one GPU.

    vllm serve DIR --tensor-parallel-size 2 \\
        --additional-config '{"liquidgemm": {"exact_tensor_parallel": true}}'
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import Library
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tp_group

from ...formats.liquidquant import MAX_IN_FEATURES
from ..serving import exact
from ..serving.tensors import EngineLayer
from .settings import setting

_KEY = "exact_tensor_parallel"


def asked() -> bool:
    """Whether the user has asked for it.

    Raises:
        ValueError: a setting of ours that is not known, or something that it cannot go with.
    """
    config = get_current_vllm_config_or_none()
    value = setting(_KEY)
    if value and config is not None:
        _check(config)
    return value


def _check(config: VllmConfig) -> None:
    if config.lora_config is not None:
        raise ValueError(
            f"{_KEY}: expected no LoRA, whose parts are added in floats, got --enable-lora"
        )


def refuse(name: str, what: str, remedy: str) -> None:
    """Raises a ValueError for layers that cannot be exact."""
    raise ValueError(f"{name}: expected no {what} with {_KEY}: {remedy}")


def take_over(layer: EngineLayer, name: str) -> None:
    """From now on the layer's output is that of all GPUs, and vLLM has none to add.

    Raises:
        ValueError: a layer whose parts vLLM adds elsewhere, or one with too many columns.
    """
    if not layer.reduce_results:
        refuse(name, "layer whose parts the model adds itself", "use it without")
    if layer.input_size > MAX_IN_FEATURES:
        refuse(name, f"layer of more than {MAX_IN_FEATURES} inputs", "use it without")
    layer.reduce_results = False


def row_parallel(layer: EngineLayer, x: Tensor) -> Tensor:
    # vLLM gives the bias to the first GPU alone.
    bias = None if layer.skip_bias_add else layer.bias
    given = x, layer.qweight, layer.scale, bias, layer.columns, *layer.liquid_pad
    return torch.ops.liquidgemm_vllm.exact_row_parallel(*given)


def _reduced(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    """Over the GPUs of tensor parallelism, by what CUDA graphs can hold."""
    group = get_tp_group()
    nccl = getattr(group.device_communicator, "pynccl_comm", None)
    if nccl is not None and not nccl.disabled:  # vLLM's own kernels add floats alone
        return nccl.all_reduce(tensor, op=op)
    dist.all_reduce(tensor, op=op, group=group.device_group)
    return tensor


def _exact_row_parallel(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    lead: int,
    zeros: int,
) -> Tensor:
    return exact.row_parallel(
        x, weight, weight_scale, bias, gather, (lead, zeros),
        largest=lambda own: _reduced(own, dist.ReduceOp.MAX),
        total=lambda own: _reduced(own, dist.ReduceOp.SUM),
    )  # fmt: skip


def _fake(x, weight, weight_scale, bias, gather, lead, zeros) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


# One op, so that no compiler fuses what is rounded within.
_LIB = Library("liquidgemm_vllm", "DEF")
_LIB.define(
    "exact_row_parallel(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "Tensor? gather, int lead, int zeros) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.impl("exact_row_parallel", _exact_row_parallel, "CompositeExplicitAutograd")
torch.library.register_fake("liquidgemm_vllm::exact_row_parallel", _fake, lib=_LIB)
