"""RMSNorm and SiLU-and-multiply that quantize for layers of ours: which do, and what they give."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from engine import as_rank, config_of, down, gate_up, qkv
from slices import K, finish, load, tensors, tokens, weight
from torch import nn

from liquidgemm import ops

pytest.importorskip("vllm", reason="vLLM is not installed: make test-serve")

from vllm.config import CompilationMode, get_current_vllm_config
from vllm.model_executor import custom_op
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from liquidgemm.integrations.vllm import fusion, producers

WIDTH = 128  # of the inner channels
LAYERS = {"a.q_proj": 0, "a.k_proj": 0, "a.v_proj": 0, "a.gate_proj": 64, "a.up_proj": 64}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(custom_op, "op_registry_oot", {})


@contextmanager
def compiling(**changes):
    with as_rank(0, 1):
        config = get_current_vllm_config()
        config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        for name, value in changes.items():
            setattr(config, name, value)
        yield


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = gate_up(config, K, [WIDTH, WIDTH])
        self.act_fn = SiluAndMul()
        self.down_proj = down(config, WIDTH, 96)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class Block(nn.Module):
    """A decoder layer without attention, as vLLM's models have them."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = qkv(config, K, 16, 4, 2)
        self.input_layernorm = RMSNorm(K)
        self.post_attention_layernorm = RMSNorm(K)
        self.mlp = Mlp(config)

    def forward(self, x, residual):
        x, residual = self.input_layernorm(x, residual)
        y = self.self_attn.qkv_proj(x)[0]
        z = self.post_attention_layernorm(residual)
        return x, residual, y, self.mlp(z)


def block(layers=LAYERS) -> Block:
    config = config_of(layers)
    made = Block(config)
    norm = torch.Generator().manual_seed(4)
    for one in (made.input_layernorm, made.post_attention_layernorm):
        one.weight.data.copy_(torch.rand(K, generator=norm) + 0.5)
    weights = {
        "self_attn.qkv_proj": [weight(n, K, 0, i) for i, n in enumerate((64, 32, 32))],
        "mlp.gate_up_proj": [weight(WIDTH, K, 64, i) for i in (5, 6)],
        "mlp.down_proj": [weight(96, WIDTH, 0, 7)],
    }
    for name, parts in weights.items():
        layer = made.get_submodule(name)
        if "qweight" not in layer._parameters:
            continue
        shards = {3: "qkv", 2: (0, 1), 1: (None,)}[len(parts)]
        for part, shard in zip(parts, shards, strict=True):
            load(layer, tensors(part), *(() if shard is None else (shard,)))
        finish(layer)
    return made


def quantizing(made: Block) -> tuple[bool, bool, bool]:
    found = (made.input_layernorm, made.post_attention_layernorm, made.mlp.act_fn)
    return tuple(getattr(one, "quantizes", False) for one in found)


def expected(made: Block, x, residual):
    """What the ops give one after the other."""
    first, second = made.input_layernorm, made.post_attention_layernorm
    tokens_, h, _ = ops.rms_norm_quantize(x, first.weight, first.variance_epsilon, residual)
    y = product(tokens_, made.self_attn.qkv_proj)
    tokens_, _, _ = ops.rms_norm_quantize(h, second.weight, second.variance_epsilon)
    layer = made.mlp.gate_up_proj
    data = torch.cat((tokens_.x8, tokens_.x8.index_select(-1, layer.columns)), -1)
    z = ops.gemm(data, tokens_.scale, layer.qweight, layer.scale, None, x.dtype)
    return h, y, product(ops.glu_quantize(z)[0], made.mlp.down_proj)


def product(tokens_, layer):
    dtype = torch.bfloat16
    return ops.gemm(tokens_.x8, tokens_.scale, layer.qweight, layer.scale, None, dtype)


ALL = LAYERS | {"a.down_proj": 0}


@pytest.mark.parametrize("table", [True, False])
def test_layers_take_what_the_norm_before_them_has_quantized(table, monkeypatch):
    if not table:
        monkeypatch.setattr(fusion, "state", lambda: "no: not in this test")
    elif fusion.state() != "yes":
        pytest.skip(fusion.state())
    x, residual = tokens(K), tokens(K).flip(0)
    with compiling():
        made = block(ALL)
        made.mlp.gate_up_proj.quant_method.summary.producers.switch_on()
        assert quantizing(made) == (True, True, not table)
        eager = made(x, residual)
        graphs = []
        run = torch.compile(made, backend=lambda graph, _: graphs.append(graph) or graph)
        plain, h, y, z = run(x, residual)
    (graph,) = graphs
    ran = [str(node.target) for node in graph.graph.nodes]
    assert sum("rms_norm_quantize" in name for name in ran) == 2
    assert sum("glu_quantize" in name for name in ran) == (not table)
    wanted = expected(made, x, residual)
    assert torch.equal(h, wanted[0])
    assert torch.equal(y, wanted[1])
    if not table:
        assert torch.equal(z, wanted[2])
    # What else takes the output of a norm gets it as vLLM computes it.
    for one, other in zip((plain, h, y), eager[:3], strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize(
    ("in_floats", "on"),
    [
        ("q k v", (False, True, True)),
        ("gate up", (True, False, True)),
        ("down", (True, True, False)),
    ],
)
def test_producers_before_floats_do_not_quantize(in_floats, on, table, monkeypatch):
    """The line at start-up says yes of norms if those of one place do."""
    if not table:
        monkeypatch.setattr(fusion, "state", lambda: "no: not in this test")
    elif fusion.state() != "yes":
        pytest.skip(fusion.state())
    parts = {f"a.{part}_proj" for part in in_floats.split()}
    with compiling():
        made = block({name: augment for name, augment in ALL.items() if name not in parts})
        layers = (made.self_attn.qkv_proj, made.mlp.gate_up_proj)
        ours = next(layer for layer in layers if "qweight" in layer._parameters)
        summary = ours.quant_method.summary
        summary.producers.switch_on()
        assert quantizing(made) == (*on[:2], on[2] and not table)
        assert "RMSNorm yes" in summary.more()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_config": object()}, "adapters take floats"),
        ({"parallel_config": SimpleNamespace(tensor_parallel_size=2)}, "vLLM sums over GPUs"),
        ({"additional_config": {"liquidgemm": {"fused_producers": False}}}, "switched off"),
        ({"compilation_config": SimpleNamespace(mode=CompilationMode.NONE)}, "not compiled"),
    ],
)
def test_why_norms_do_not_quantize(changes, reason):
    with compiling(**changes):
        found = producers.Producers()
        found.find()
        assert reason in found.state("input_layernorm")
        assert custom_op.op_registry_oot == {}


def test_what_another_plug_in_has_replaced_stays(monkeypatch):
    class Other(RMSNorm):
        pass

    custom_op.op_registry_oot["RMSNorm"] = Other
    with compiling():
        found = producers.Producers()
        found.find()
        assert "has replaced RMSNorm already" in found.state("input_layernorm")
        monkeypatch.setitem(custom_op.op_registry_oot, "RMSNorm", producers.QuantizingRMSNorm)
        found = producers.Producers()
        found.find()
        assert found.state("act_fn") == "no: none is before a layer of ours"
        found.switch_on()


def test_batch_invariance_is_that_of_vllm(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with compiling():
        found = producers.Producers()
        found.find()
    assert "VLLM_BATCH_INVARIANT" in found.state("input_layernorm")


@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.VLLM_COMPILE])
def test_settings_are_looked_at_in_every_mode(mode):
    with compiling(additional_config={"liquidgemm": {"fused": True}}):
        get_current_vllm_config().compilation_config.mode = mode
        with pytest.raises(ValueError, match=r"liquidgemm to be \{exact_tensor_parallel, f"):
            down(config_of({"a.down_proj": 0}), K, 96)
