"""LiquidExperts: in the place of float experts, sliced, saved and moved."""

import copy
import pickle

import pytest
import reference
import torch
from torch import nn

from liquidgemm import LiquidExperts, moe, quantize_weight
from liquidgemm.nn.float_experts import Layout, layout_of

transformers = pytest.importorskip("transformers")

E, H = 4, 72


def float_experts(kind, inner=44, **fields):
    """Experts of transformers of the smallest size, with random weights and biases."""
    torch.manual_seed(0)
    if kind == "Dbrx":
        options = {"hidden_size": H, "ffn_hidden_size": inner, "moe_num_experts": E}
        config = transformers.DbrxConfig(d_model=H, ffn_config=options).ffn_config
    else:
        sizes = {"hidden_size": H, "intermediate_size": inner, "num_local_experts": E}
        name = {"Llama4Text": "Llama4TextConfig"}.get(kind, f"{kind}Config")
        config = getattr(transformers, name)(**sizes, **fields)
        config._experts_implementation = "eager"
    module = kind.removesuffix("Text")
    library = {"GptOss": "gpt_oss"}.get(module, module.lower())
    library = f"transformers.models.{library}.modeling_{library}"
    experts = getattr(__import__(library, fromlist=["x"]), f"{kind}Experts")(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts.eval()


@pytest.fixture(scope="module")
def routing():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, H, generator=generator)
    ids = torch.rand(9, E, generator=generator).argsort(1)[:, :2]
    return x, ids, torch.rand(9, 2, generator=generator)


def run(experts, x, ids, weights):
    """DBRX takes a batch."""
    return experts(x[None] if hasattr(experts, "mlp") else x, ids, weights).view(x.shape)


def distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


KINDS = {"Mixtral": "silu_mul", "GptOss": "swiglu_clamped", "Dbrx": "silu_mul"}


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_float_experts_do(kind, routing):
    """Up to rounding: of weights and activations against the float module, of activations alone
    against that of the quantized weights."""
    experts = float_experts(kind)
    layer = LiquidExperts.from_experts(experts)
    assert layer.activation == KINDS[kind]
    y = layer(*routing)
    assert distance(y, run(experts, *routing)) < 0.2
    back = layer.to_float()
    assert type(back) is type(experts)
    assert {k: p.shape for k, p in back.named_parameters()} == {
        k: p.shape for k, p in experts.named_parameters()
    }
    assert distance(y, run(back, *routing)) < 0.02


def test_llama4_takes_sorted_tokens():
    experts = float_experts("Llama4Text")
    layer = LiquidExperts.from_experts(experts)
    x = torch.randn(E * 5, H)
    x[::3] = 0
    y = layer(x)
    assert distance(y, experts(x)) < 0.2
    assert distance(y, layer.to_float()(x)) < 0.02
    assert (y[::3] == 0).all()


def test_lists_of_linear(routing):
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3 = nn.Linear(H, 40), nn.Linear(H, 40)
            self.w2 = nn.Linear(40, H)

    torch.manual_seed(0)
    experts = nn.ModuleList(Expert() for _ in range(E))
    layer = LiquidExperts.from_experts(experts)
    x, ids, weights = routing
    expected = torch.zeros_like(x)
    for t in range(len(x)):
        for j, e in enumerate(ids[t].tolist()):
            one = experts[e]
            h = nn.functional.silu(one.w1(x[t])) * one.w3(x[t])
            expected[t] += weights[t, j] * one.w2(h).detach()
    assert distance(layer(*routing), expected) < 0.2
    with pytest.raises(TypeError, match="expected linear layers w1, w3, w2 in expert 0"):
        LiquidExperts.from_experts([nn.Linear(2, 2)] * 2)
    with pytest.raises(ValueError, match="took a float module's place"):
        layer.to_float()


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_state_dict_is_logical(kind, routing):
    """With a leading axis of experts; what is loaded gives the same bits."""
    experts = float_experts(kind)
    layer = LiquidExperts.from_experts(experts)
    state = layer.state_dict()
    assert state["gate_up.qweight"].shape == (E, 88, 64)
    assert state["gate_up.qscale"].shape == state["gate_up.qoffset"].shape == (E, 88, 2)
    assert state["gate_up.scale"].shape == (E, 88)
    assert state["down.qweight"].shape == (E, H, 32)
    first = experts.gate_up_proj[1].T if kind == "GptOss" else experts.gate_up_proj[1]
    if kind == "GptOss":
        assert torch.equal(state["gate_up.bias"][2, :44], experts.gate_up_proj_bias[2, ::2])
        first = torch.cat((first[0::2], first[1::2]))
    alone = quantize_weight(first)
    for name in ("qweight", "qscale", "qoffset", "scale"):
        reference.assert_same(state[f"gate_up.{name}"][1], getattr(alone, name))
        reference.assert_same(getattr(layer.expert(1)[0], name), getattr(alone, name))
    y = layer(*routing)
    sizes = (E, H, 44, layer.activation, kind == "GptOss")
    other = LiquidExperts(*sizes)
    assert (other(*routing) == 0).all()
    other.load_state_dict(state)
    reference.assert_same(other(*routing), y)
    on_meta = LiquidExperts(*sizes, device="meta")
    with pytest.raises(RuntimeError, match="is on the meta device; load with assign=True"):
        on_meta.load_state_dict(state)
    on_meta.load_state_dict(state, assign=True)
    reference.assert_same(on_meta(*routing), y)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        reference.assert_same(same(*routing), y)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gate_up.scale", torch.zeros(E, 80), r"gate_up.scale: expected shape \[4, 88, ...\]"),
        ("down.qscale", torch.full((E, 72, 1), 255), "down.expert 0: qscale, qoffset: expected"),
        ("gate_up.qweight", torch.zeros(E, 88, 60), "gate_up.expert 0: qweight: expected shape"),
        ("down.scale", torch.full((E, 72), -1.0), "down.expert 0: scale: expected finite values"),
    ],
)
def test_a_wrong_state_changes_nothing(key, value, message, routing):
    layer = LiquidExperts.from_experts(float_experts("Mixtral"))
    y, state = layer(*routing), layer.state_dict()
    stack = layer.get_submodule(key.partition(".")[0])
    before = stack.packed.clone()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state | {key: value.to(state[key].dtype)})
    reference.assert_same(stack.packed, before)
    del state[key]
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        layer.load_state_dict(state)
    reference.assert_same(layer(*routing), y)


def test_casts_leave_scales(routing):
    layer = LiquidExperts.from_experts(float_experts("GptOss"))
    scales = layer.gate_up.row_scale.clone()
    layer.bfloat16()
    assert layer.gate_up.row_bias.dtype == layer.down.dtype == torch.bfloat16
    reference.assert_same(layer.gate_up.row_scale, scales)
    x, ids, weights = routing
    assert layer(x.bfloat16(), ids, weights).dtype == torch.bfloat16
    assert layer.to_float().down_proj.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_slices_add_up(kind, routing):
    """Of experts: each token's slots as in the whole. Of channels: whole groups."""
    layer = LiquidExperts.from_experts(float_experts(kind, 192))
    x, ids, weights = routing
    y = layer(*routing)
    parts = [layer.narrow_experts(0, 1), layer.narrow_experts(1, 3)]
    assert parts[1].first_expert == 1
    assert parts[1].total_experts == layer.total_experts == 4
    assert distance(sum(part(*routing) for part in parts), y) < 1e-6
    local = torch.where(ids == 0, 99, ids)
    assert torch.equal(parts[1](*routing), layer(x, local, weights))
    nested = layer.narrow_experts(1, 3).narrow_experts(1, 1)
    assert nested.total_experts == nested.narrow(0, 64).total_experts == 4
    assert torch.equal(nested(*routing), layer(x, torch.where(ids == 2, 2, -1), weights))
    parts = [layer.narrow(0, 64), layer.narrow(64, 128)]
    # Each part has its own scale per token for the inner activations.
    assert distance(sum(part(*routing) for part in parts), y) < 0.02
    for start, length in ((0, 100), (32, 64), (128, 128), (0, 0)):
        with pytest.raises(ValueError, match="expected a"):
            layer.narrow(start, length)
    with pytest.raises(ValueError, match="experts: expected a non-empty slice of 0 to 4"):
        layer.narrow_experts(2, 3)


def test_it_is_the_op(routing):
    """And gradients reach the tokens."""
    layer = LiquidExperts.from_experts(float_experts("Mixtral", 40))
    x, ids, weights = routing
    first, second = layer.gate_up, layer.down
    y = moe(x, ids, weights, first.packed, first.row_scale, second.packed, second.row_scale)
    reference.assert_same(layer(*routing), y)
    reference.assert_same(layer(x.view(3, 3, H), ids, weights), y.view(3, 3, H))
    trained = x.clone().requires_grad_()
    layer(trained, ids, weights).sum().backward()
    assert trained.grad.isfinite().all()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    reference.assert_same(compiled(*routing), y)


def test_what_is_left_in_floats():
    """Each with its reason; what is no experts at all gives none."""
    mixtral = float_experts("Mixtral", hidden_act="relu")
    assert "activation is none of silu_mul" in layout_of(mixtral)
    assert layout_of(float_experts("Mixtral", hidden_act="gelu_pytorch_tanh")).activation == (
        "gelu_tanh_mul"
    )
    assert "activation is none of" in layout_of(float_experts("GptOss", swiglu_limit=5.0))
    gateless = float_experts("Mixtral")
    gateless.has_gate = False
    assert "without a gate" in layout_of(gateless)
    gateless.has_gate, gateless.has_post_expert_norm = True, True
    assert "with a norm behind them" in layout_of(gateless)
    assert layout_of(nn.Linear(2, 2)) is None
    assert isinstance(layout_of(float_experts("Mixtral")), Layout)
    with pytest.raises(TypeError, match="experts: expected experts, got a Linear"):
        LiquidExperts.from_experts(nn.Linear(2, 2))
    gateless.has_gate = False
    with pytest.raises(TypeError, match="without a gate"):
        LiquidExperts.from_experts(gateless)


def test_errors():
    layer = LiquidExperts(2, 64, 32)
    with pytest.raises(RuntimeError, match=r"hidden_states: expected 64 features .* got"):
        layer(torch.ones(3, 65), torch.zeros(3, 1).long(), torch.ones(3, 1))
    with pytest.raises(TypeError, match="expected top_k_index and top_k_weights, got None"):
        layer(torch.ones(3, 64))
    with pytest.raises(ValueError, match="activation: expected one of"):
        LiquidExperts(2, 64, 32, "relu")
    with pytest.raises(ValueError, match="num_experts: expected at least 1, got 0"):
        LiquidExperts(0, 64, 32)
    with pytest.raises(ValueError, match="dtype: expected float32"):
        LiquidExperts(2, 64, 32, dtype=torch.float64)
    weights = [quantize_weight(torch.randn(n, 64)) for n in (128, 128)]
    down = [quantize_weight(torch.randn(64, k)) for k in (64, 64)]
    LiquidExperts.from_quantized(weights, down)
    with pytest.raises(ValueError, match="weight: expected 128 x 64 as of the other experts"):
        LiquidExperts.from_quantized([weights[0], quantize_weight(torch.randn(64, 64))], down)
    with pytest.raises(ValueError, match="gate_up, down: expected gated"):
        LiquidExperts.from_quantized(weights, down[:1])
