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

from liquidgemm import LiquidConfig, LiquidExperts
from liquidgemm.integrations.sglang import experts as plug_in
from liquidgemm.integrations.sglang.experts import LiquidExpertsMethod, OnlineLiquidExpertsMethod
from liquidgemm.integrations.sglang.config import Summary
from liquidgemm.quantization.layer import quantize_layer

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


def online(tp=(0, 1), ep=(0, 1), **config) -> nn.Module:
    """A layer of a float checkpoint, and a loader that takes what is of its GPU as SGLang's."""
    local, inner = EXPERTS // ep[1], INNER // tp[1]
    layer = nn.Module()
    layer.num_experts, layer.intermediate_size_per_partition = EXPERTS, inner
    (layer.moe_tp_rank, layer.moe_tp_size), (layer.moe_ep_rank, layer.moe_ep_size) = tp, ep
    layer.moe_runner_config = MoeRunnerConfig(activation="silu")

    def loader(param, loaded, weight_name, shard_id, expert_id):
        index = expert_id - ep[0] * local
        if not 0 <= index < local:
            return
        own = loaded.narrow(1 if shard_id == "w2" else 0, tp[0] * inner, inner)
        rows = {"w1": slice(0, inner), "w3": slice(inner, None), "w2": slice(None)}[shard_id]
        param.data[index, rows].copy_(own)

    method = OnlineLiquidExpertsMethod("a.experts", LiquidConfig(**config), Summary())
    layer.quant_method = method
    method.create_weights(
        layer=layer,
        num_experts=local,
        hidden_size=HIDDEN,
        intermediate_size_per_partition=inner,
        params_dtype=torch.float32,
        weight_loader=loader,
        with_bias=False,
    )
    method.create_moe_runner(layer, layer.moe_runner_config)
    return layer


def parts(last: int | None = None) -> list[tuple[str, int, torch.Tensor]]:
    """Of all experts, as on the disk; that of one after all others."""
    torch.manual_seed(2)
    shapes = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
    found = [
        (part, e, torch.randn(shape)) for e in range(EXPERTS) for part, shape in shapes.items()
    ]
    return sorted(found, key=lambda one: one[1] == last)


def load_parts(layer: nn.Module, given) -> None:
    places = {name: layer._parameters[name] for name in ("w13_weight", "w2_weight")}
    for part, expert, tensor in given:
        place = places["w2_weight" if part == "w2" else "w13_weight"]
        place.weight_loader(place, tensor, "a name", shard_id=part, expert_id=expert)


def test_float_experts_are_quantized_with_the_last_of_their_parts():
    """Each GPU those that it has, by their own columns and rows."""
    x, weights, ids = routing()
    held = {(part, e): tensor for part, e, tensor in parts()}
    config = LiquidConfig()
    for tp, ep in (((0, 1), (0, 1)), ((1, 2), (0, 1)), ((0, 1), (2, 3))):
        layer = online(tp, ep, augment=64, keep=["experts"])  # which experts do not have
        places = list(layer._parameters.values())
        *most, last = parts(last=1)
        load_parts(layer, most)
        with pytest.raises(ValueError, match="got nothing for w2 of 1 and 0 others"):
            layer.quant_method.process_weights_after_loading(layer)
        load_parts(layer, [last])
        assert not any(place.numel() for place in places)
        inner, local = INNER // tp[1], EXPERTS // ep[1]
        own = slice(tp[0] * inner, (tp[0] + 1) * inner)
        gate_up, down = [], []
        for e in range(ep[0] * local, (ep[0] + 1) * local):
            both = torch.cat((held["w1", e][own], held["w3", e][own]))
            gate_up.append(quantize_layer(both, config, "a")[0])
            down.append(quantize_layer(held["w2", e][:, own].contiguous(), config, "a")[0])
        wanted = LiquidExperts.from_quantized(gate_up, down, "silu_mul", dtype=torch.float32)
        local_ids = torch.where(ids // local == ep[0], ids % local, -1)
        assert torch.equal(output(layer, x, weights, local_ids), wanted(x, local_ids, weights))
        layer.quant_method.process_weights_after_loading(layer)
        with pytest.raises(RuntimeError, match="start the server anew"):
            places[0].weight_loader(places[0], last[2], "a name", "w1", 0)


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
