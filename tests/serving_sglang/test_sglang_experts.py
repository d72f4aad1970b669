"""SGLang's layers of experts, as any GPU of several: what `LiquidExperts` gives, to the bit."""

import sglang_layers  # noqa: F401, I001 - the stand-ins, before SGLang

import inspect
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.moe import MoeRunnerConfig
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang_layers import config_of
from torch import nn

from liquidgemm import LiquidExperts
from liquidgemm.integrations.sglang import experts as plug_in
from liquidgemm.integrations.sglang.experts import LiquidExpertsMethod
from liquidgemm.integrations.sglang.config import Summary

EXPERTS, HIDDEN, INNER = 6, 64, 128


@pytest.fixture(scope="module", params=["silu_mul", "swiglu_clamped"])
def whole(request) -> LiquidExperts:
    """The second as gpt-oss's: with biases."""
    torch.manual_seed(0)
    floats = nn.ModuleList()
    bias = request.param == "swiglu_clamped"
    for _ in range(EXPERTS):
        expert = nn.Module()
        expert.gate_proj, expert.up_proj = (nn.Linear(HIDDEN, INNER, bias=bias) for _ in "gu")
        expert.down_proj = nn.Linear(INNER, HIDDEN, bias=bias)
        floats.append(expert)
    return LiquidExperts.from_experts(floats, request.param)


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    found = SimpleNamespace(enable_eplb=False, init_expert_location="trivial")
    monkeypatch.setattr(plug_in, "get_server_args", lambda: found)
    return found


def layer_of(whole: LiquidExperts, tp=(0, 1), ep=(0, 1), **changes) -> nn.Module:
    """As SGLang's own class makes it, on the GPU of that rank of so many."""
    clamped = whole.activation == "swiglu_clamped"
    layer = nn.Module()
    layer.num_experts = whole.num_experts
    layer.moe_tp_rank, layer.moe_tp_size = tp
    layer.moe_ep_rank, layer.moe_ep_size = ep
    layer.intermediate_size_per_partition = whole.intermediate_size // tp[1]
    layer.moe_runner_config = MoeRunnerConfig(
        activation="silu",
        gemm1_alpha=1.702 if clamped else None,
        gemm1_clamp_limit=7.0 if clamped else None,
    )
    for name, value in changes.items():
        assert hasattr(layer.moe_runner_config, name)
        setattr(layer.moe_runner_config, name, value)
    layer.quant_method = LiquidExpertsMethod("a.experts", whole.sizes, Summary())
    layer.quant_method.create_weights(
        layer=layer,
        num_experts=whole.num_experts // ep[1],
        hidden_size=whole.hidden_size,
        intermediate_size_per_partition=layer.intermediate_size_per_partition,
        params_dtype=torch.float32,
        weight_loader=None,
        with_bias=clamped,
        moe_intermediate_size=whole.intermediate_size,
    )
    layer.quant_method.create_moe_runner(layer, layer.moe_runner_config)
    return layer


def load(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """As a model's load_weights does it, by the names of all parameters."""
    places = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        places[name].weight_loader(places[name], tensor)
    for _ in range(2):  # SGLang may ask twice
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def output(layer: nn.Module, x, weights, ids) -> torch.Tensor:
    routing = StandardTopKOutput(weights, ids, torch.empty(0))
    return layer.quant_method.apply(layer, StandardDispatchOutput(x, None, routing)).hidden_states


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(9, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS)[:3] for _ in x]).int()
    return x, torch.rand(9, 3), ids


def test_a_layer_is_the_layer(whole):
    x, weights, ids = routing()
    layer = load(layer_of(whole), whole.state_dict())
    assert torch.equal(output(layer, x, weights, ids), whole(x, ids, weights))
    left = {name for name, _ in layer.named_parameters()}
    assert left >= {"gate_up_packed", "down_row_scale"}
    assert not any("." in name for name in left), "what was loaded is gone"


def test_inner_channels_are_sliced(whole):
    """CHECKLIST 34."""
    x, weights, ids = routing()
    for rank in (0, 1):
        layer = load(layer_of(whole, tp=(rank, 2)), whole.state_dict())
        own = whole.narrow(INNER // 2 * rank, INNER // 2)
        assert torch.equal(output(layer, x, weights, ids), own(x, ids, weights))


def test_experts_are_spread(whole):
    """The dispatcher gives a GPU its own ids, and -1 for experts of others."""
    x, weights, ids = routing()
    for rank in range(3):
        layer = load(layer_of(whole, ep=(rank, 3)), whole.state_dict())
        own = (ids >= 2 * rank) & (ids < 2 * rank + 2)
        local = torch.where(own, ids - 2 * rank, -1)
        elsewhere = whole(x, torch.where(own, ids, -1), weights)
        assert torch.equal(output(layer, x, weights, local), elsewhere)


def test_what_is_missing_or_wrong_is_named(whole):
    state = whole.state_dict()
    for missing in state:
        layer = layer_of(whole)
        with pytest.raises(ValueError, match=rf"a\.experts\.{missing}: expected it to be loaded"):
            load(layer, {name: tensor for name, tensor in state.items() if name != missing})
    with pytest.raises(ValueError, match=r"down\.scale: expected torch\.float32 of shape"):
        load(layer_of(whole), state | {"down.scale": state["down.scale"].bfloat16()})
    with pytest.raises(ValueError, match=r"gate_up\.qscale: .*got torch\.uint8 of \[3,"):
        load(layer_of(whole), state | {"gate_up.qscale": state["gate_up.qscale"][:3]})


def test_what_is_not_served_is_refused(whole, arguments):
    for changes, message in (
        ({"activation": "gelu"}, "expected SiLU with a gate"),
        ({"is_gated": False}, "expected SiLU with a gate"),
        ({"swiglu_limit": 3.0}, "expected SiLU with a gate"),
        ({"no_combine": True}, "got no_combine"),
        ({"apply_router_weight_on_input": True}, "got apply_router_weight_on_input"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_of(whole, **changes)
    with pytest.raises(ValueError, match="64 inner channels for each of 4 GPUs, got 32"):
        layer_of(whole, tp=(0, 4))
    arguments.enable_eplb = True
    with pytest.raises(ValueError, match="--enable-eplb"):
        layer_of(whole)


def test_sizes_and_names_are_those_of_the_model(whole):
    config = config_of({}, experts={"model.layers.3.mlp.experts": whole.sizes})
    layer = FusedMoE.__new__(FusedMoE)
    method = config.get_quant_method(layer, "model.layers.3.mlp.experts")
    assert isinstance(method, LiquidExpertsMethod)
    assert method.sizes == whole.sizes
    with pytest.raises(ValueError, match=r"calls it model\.layers\.3\.block_sparse_moe\.experts"):
        config.get_quant_method(layer, "model.layers.3.block_sparse_moe.experts")
    assert config.get_quant_method(layer, "model.layers.2.mlp.experts") is None
    assert "1 x experts (so in the checkpoint)" in config.summary.lines(torch.device("cpu"))[0]
    method.sizes["num_experts"] = 8
    layer = layer_of(whole)
    with pytest.raises(ValueError, match=r"expected \{'num_experts': 6\} of the model, got .*8\}"):
        method.create_weights(layer, 6, HIDDEN, INNER, torch.float32)


def test_sglang_asks_for_what_the_method_has():
    """Its class calls the method by these names; 0.5.16 and 0.5.23 were read."""
    source = inspect.getsource(FusedMoE.__init__)
    for name in ("num_experts=", "hidden_size=", "intermediate_size_per_partition=", "moe_tp_rank"):
        assert name in source
    assert "create_moe_runner(self, self.moe_runner_config)" in source
    fields = StandardDispatchOutput._fields, StandardTopKOutput._fields
    assert {"hidden_states", "topk_output"} <= set(fields[0])
    assert fields[1][:2] == ("topk_weights", "topk_ids")
