"""LiquidLinear: arithmetic, state, casts, copies, gradients."""

import copy
import io
import pickle

import pytest
import reference
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import liquidgemm
from liquidgemm import LiquidLinear, dequantize_weight, quantize_weight

LOGICAL = ["qweight", "qscale", "qoffset", "scale"]


def make(in_features=200, out_features=72, bias=True, seed=0):
    torch.manual_seed(seed)
    return LiquidLinear.from_linear(nn.Linear(in_features, out_features, bias))


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        reference.assert_same(actual[key], value, key=key)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_linear(bias, dtype):
    linear = nn.Linear(200, 72, bias, dtype=dtype)
    layer = LiquidLinear.from_linear(linear, group_size=128, method="rtn")
    weight = quantize_weight(linear.weight, 128, "rtn")
    reference.assert_same(layer.dequantize(), dequantize_weight(weight))
    assert layer.dequantize(dtype).dtype == dtype
    x = torch.randn(3, 5, 200, dtype=dtype)
    y = layer(x)
    packed = liquidgemm.pack_weight(weight.qweight, weight.qscale, weight.qoffset)
    reference.assert_same(y, liquidgemm.linear(x, packed, weight.scale, linear.bias).detach())
    # Close to the float layer: 4-bit round-to-nearest over 128 is off by 10 %, INT8 by 1 %.
    exact = nn.functional.linear(x.double(), linear.weight.double())
    error = y.double() - exact - (linear.bias.double() if bias else 0)
    assert error.norm() < 0.15 * exact.norm()


def test_repr_and_buffers():
    layer = make()
    assert repr(layer) == "LiquidLinear(in_features=200, out_features=72, bias=True)"
    assert [name for name, _ in layer.named_buffers()] == ["packed", "scale", "bias"]
    assert not list(layer.parameters())
    assert layer.packed.nbytes == 2 * 4 * 2176  # 4.25 bits per weight of the padded matrix


def test_a_new_layer_is_zero():
    layer = LiquidLinear(100, 70)
    reference.assert_same(layer.dequantize(), torch.zeros(70, 100))
    reference.assert_same(layer(torch.randn(2, 100)), torch.zeros(2, 70))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 4), "in_features: .*0"), ((132105, 4), "in_features: .*132105"), ((4, 0), "out_featur")],
)
def test_sizes_are_checked(sizes, message):
    """CHECKLIST 7."""
    with pytest.raises(ValueError, match=message):
        LiquidLinear(*sizes)


@pytest.mark.parametrize(
    "bias", [torch.zeros(71), torch.zeros(72, dtype=torch.float64), torch.zeros(1, 72)]
)
def test_bias_is_checked(bias):
    """CHECKLIST 7."""
    with pytest.raises(ValueError, match="bias: expected float32, bfloat16 or float16 of shape"):
        LiquidLinear.from_quantized(quantize_weight(torch.randn(72, 64)), bias)


WIDTHS = [(64, (1, 63, 65)), (100, (65, 99, 101, 128)), (128, (64, 127, 129, 192))]
WIDTHS = [(k, wrong) for k, widths in WIDTHS for wrong in widths]


def augmented(in_features):
    torch.manual_seed(0)
    linear = nn.Linear(in_features, 40)
    linear.weight.data[:, 64:] = 0  # so that the residual columns are the first 64
    model = nn.Sequential(linear)
    liquidgemm.quantize_(model, liquidgemm.LiquidConfig(augment=64), progress=False)
    assert model[0].columns is not None
    return model[0]


@pytest.mark.parametrize("kind", [make, augmented])
@pytest.mark.parametrize(("k", "wrong"), WIDTHS)
def test_any_other_number_of_features_is_refused(k, wrong, kind):
    """CHECKLIST 24: eager, with gradients, on meta and fake tensors, exported and compiled."""
    layer = kind(k)
    message = rf"x: expected K = {k} features in the last dimension, got shape \[2, {wrong}\]"
    x = torch.randn(2, wrong)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    torch._dynamo.reset()
    attempts = {
        "eager": lambda: layer(x),
        "gradients": lambda: layer(x.clone().requires_grad_()),
        "meta": lambda: copy.deepcopy(layer).to("meta")(x.to("meta")),
        "fake": lambda: layer(fake.from_tensor(x)),
        "export": lambda: torch.export.export(layer, (x,), strict=False),
        "compile": lambda: torch.compile(layer, backend="eager")(x),
        "compile in one graph": lambda: torch.compile(layer, backend="eager", fullgraph=True)(x),
    }
    for attempt in attempts.values():
        with pytest.raises(RuntimeError, match=message):
            attempt()


def test_dimensions_without_features_are_refused():
    """CHECKLIST 24: x of no dimension; no tokens are fine."""
    with pytest.raises(RuntimeError, match=r"x: expected K = 200 .*got shape \[\]"):
        make()(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"x: expected K = 200 .*got shape \[3, 0\]"):
        make()(torch.empty(3, 0))
    assert make()(torch.empty(0, 200)).shape == (0, 72)


def test_a_graph_refuses_another_number_of_features():
    """CHECKLIST 24: compiled and exported for K, then given more or less."""
    layer = make(100)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, dynamic=True)
    for m in (2, 3, 65):
        compiled(torch.randn(m, 100))
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(4, 100),), dynamic_shapes=({0: tokens},))
    for wrong in (65, 99, 101, 128):
        with pytest.raises(RuntimeError, match="x: expected K = 100 features"):
            compiled(torch.randn(2, wrong))
        with pytest.raises((RuntimeError, AssertionError), match="100"):
            program.module()(torch.randn(2, wrong))
    assert counter.frame_count == 1


def test_training_mode_is_kept():
    assert LiquidLinear.from_linear(nn.Linear(4, 4)).training
    assert not LiquidLinear.from_linear(nn.Linear(4, 4).eval()).training


# State.


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip(bias):
    """CHECKLIST 19: the logical layout, the same bits."""
    layer = make(bias=bias)
    state = layer.state_dict()
    assert sorted(state) == sorted(LOGICAL + ["bias"] * bias)
    weight = layer.quantized_weight()
    for name in LOGICAL:
        reference.assert_same(state[name], getattr(weight, name), name=name)
    other = LiquidLinear(200, 72, bias)
    packed = other.packed
    other.load_state_dict(state)
    assert other.packed is packed, "loading copies into the buffers there are"
    assert_same_state(other.state_dict(), state)
    x = torch.randn(3, 200)
    reference.assert_same(other(x), layer(x))


def test_state_dict_of_a_nested_layer():
    model = nn.Sequential(nn.LayerNorm(200), make())
    state = model.state_dict()
    assert {key for key in state if key.startswith("1.")} == {f"1.{k}" for k in [*LOGICAL, "bias"]}
    other = nn.Sequential(nn.LayerNorm(200), LiquidLinear(200, 72))
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), state)


def test_torch_save_of_a_state_dict(tmp_path):
    layer = make()
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = LiquidLinear(200, 72)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_state(other.state_dict(), layer.state_dict())


def test_state_dict_written_by_version_1():
    """CHECKLIST 19: numbers typed here, so that no change of code can change both sides."""
    q = [(7 * column) % 16 for column in range(64)]
    state = {
        "qweight": torch.tensor([[q[2 * j] | q[2 * j + 1] << 4 for j in range(32)]]).byte(),
        "qscale": torch.tensor([[9]]).byte(),
        "qoffset": torch.tensor([[60]]).byte(),
        "scale": torch.tensor([0.5]),
        "bias": torch.tensor([-3.0]),
    }
    layer = LiquidLinear(64, 1)
    layer.load_state_dict(state)
    expected = torch.tensor([[0.5 * (9 * value + 60 - 128) for value in q]])
    reference.assert_same(layer.dequantize(), expected)
    assert layer(torch.zeros(1, 64)).item() == -3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": torch.zeros(72, 128, dtype=torch.int8)}, "qweight: expected dtype"),
        ({"qweight": torch.zeros(72, 96, dtype=torch.uint8)}, r"qweight: .*\[72, 128\].*72, 96"),
        ({"qscale": torch.ones(72, 3, dtype=torch.uint8)}, r"qscale: .*\[72, 4\].*\[72, 3\]"),
        ({"qscale": torch.full((72, 4), 255, dtype=torch.uint8)}, "expected q .* <= 255"),
        ({"scale": torch.ones(72).half()}, "scale: expected dtype torch.float32"),
        ({"scale": torch.full((72,), torch.nan)}, "scale: expected finite .*row 0"),
        ({"scale": torch.full((72,), torch.inf)}, "scale: expected finite .*row 0"),
        ({"bias": torch.zeros(71)}, r"bias: expected .*\[72\].*\[71\]"),
        ({"bias": torch.zeros(72).double()}, "bias: expected .*float64"),
        ({"scale": None}, "Missing key.*scale"),
        ({"bias": None}, "Missing key.*bias"),
        ({"weight": torch.zeros(72, 200)}, "Unexpected key.*weight"),
    ],
)
def test_a_bad_state_is_refused(changes, message):
    """CHECKLIST 7, 19: nothing is overwritten by a state that is wrong in one tensor."""
    model = nn.Sequential(make(seed=1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {**make(seed=2).state_dict(), **changes}
    state = {f"0.{key}": value for key, value in state.items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    if "Missing" not in message and "Unexpected" not in message:
        assert_same_state(model.state_dict(), before)


def test_state_of_other_sizes_is_refused():
    for sizes in ((200, 71), (136, 72), (264, 72)):
        with pytest.raises(RuntimeError, match="expected shape"):
            make(*sizes).load_state_dict(make().state_dict())


def test_state_of_a_newer_version_is_refused():
    """CHECKLIST 19."""
    state = make().state_dict()
    state._metadata[""]["version"] = 2
    with pytest.raises(RuntimeError, match="newer liquidgemm"):
        make().load_state_dict(state)


def test_meta_device():
    """Construction without memory, and loading by assignment."""
    layer = LiquidLinear(200, 72, device="meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    assert layer(torch.empty(3, 200, device="meta")).shape == (3, 72)
    assert layer.state_dict()["qweight"].shape == (72, 128)
    state = make().state_dict()
    with pytest.raises(RuntimeError, match="meta device; load with assign=True"):
        layer.load_state_dict(state)
    layer.load_state_dict(state, assign=True)
    assert_same_state(layer.state_dict(), state)
    # Real memory, then a plain load, as other loaders do it.
    layer = LiquidLinear(200, 72, device="meta").to_empty(device="cpu")
    layer.load_state_dict(state)
    assert_same_state(layer.state_dict(), state)


# Moves, casts and copies.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_the_weight_alone(dtype):
    """The scale stays float32 to the bit; the bias follows."""
    layer = make()
    layer.scale[0] = 1.2345678e-6  # neither a float16 nor a bfloat16
    weight, scale = layer.dequantize(), layer.scale.clone()
    model = nn.Sequential(layer).to(dtype)
    assert layer.scale.dtype == torch.float32
    reference.assert_same(layer.scale, scale)
    reference.assert_same(layer.dequantize(), weight)
    assert layer.bias.dtype == dtype
    model.float()
    reference.assert_same(layer.scale, scale)
    layer.to("meta", dtype)
    assert layer.scale.is_meta
    assert layer.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_model(dtype):
    layer = make().to(dtype)
    assert layer(torch.randn(2, 200).to(dtype)).dtype == dtype


def test_copies_are_independent():
    """deepcopy, pickle and torch.save."""
    layer = make()
    x = torch.randn(3, 200)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        reference.assert_same(other(x), expected)
        other.packed.zero_()
        other.scale.fill_(9)
    reference.assert_same(layer(x), expected)


def test_a_slice_does_not_share_memory_with_the_whole():
    whole = quantize_weight(torch.randn(128, 64))
    layer = LiquidLinear.from_quantized(whole.narrow_rows(0, 64))
    before = whole.scale.clone()
    layer.load_state_dict(LiquidLinear(64, 64, bias=False).state_dict())
    reference.assert_same(whole.scale, before)


# Training on top.


def test_gradients_flow_through_to_an_adapter():
    """A LoRA adapter beside and a layer before the quantized one both learn."""
    torch.manual_seed(0)
    before, frozen = nn.Linear(64, 200), make()
    down, up = nn.Linear(200, 4, bias=False), nn.Linear(4, 72, bias=False)
    parameters = [*before.parameters(), *down.parameters(), *up.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    x, target = torch.randn(32, 64), torch.randn(32, 72)
    losses = []
    for _ in range(60):
        hidden = before(x)
        loss = (frozen(hidden) + up(down(hidden)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert frozen.packed.grad is None


def test_gradient_is_that_of_the_dequantized_layer():
    layer = make()
    dense = nn.Linear(200, 72)
    dense.weight.data, dense.bias.data = layer.dequantize(), layer.bias.clone()
    x = torch.randn(5, 200)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(5, 72)
    layer(a).backward(grad)
    dense(b).backward(grad)
    assert torch.dist(a.grad, b.grad) <= 1e-6 * b.grad.norm()


def test_tensor_parallel_layers():
    """CHECKLIST 19: column-parallel outputs put side by side are the whole layer's, to the bit."""
    linear = nn.Linear(576, 136)
    whole = quantize_weight(linear.weight)
    x = torch.randn(3, 576)
    parts = [
        LiquidLinear.from_quantized(whole.narrow_rows(start, 68), linear.bias[start : start + 68])
        for start in (0, 68)
    ]
    expected = LiquidLinear.from_quantized(whole, linear.bias)(x)
    reference.assert_same(torch.cat([part(x) for part in parts], 1), expected)


def test_row_parallel_sums():
    """CHECKLIST 19: INT32 sums of slices along K add up to those of the whole, to the bit."""
    whole = quantize_weight(torch.randn(136, 200))
    x = torch.randint(-127, 128, (3, 200)).to(torch.int8)

    def sums(weight, x):
        packed = liquidgemm.pack_weight(weight.qweight, weight.qscale, weight.qoffset)
        return liquidgemm.gemm(x, torch.ones(3), packed, weight.scale, out_dtype=torch.int32)

    parts = [
        sums(whole.narrow_columns(start, length), x[:, start : start + length])
        for start, length in ((0, 128), (128, 72))
    ]
    reference.assert_same(parts[0] + parts[1], sums(whole, x))


def test_compiled_module():
    """CHECKLIST 18: a module in one graph, whatever the number of tokens."""
    model = nn.Sequential(make(), nn.GELU(), make(72, 64)).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (2, 3, 65):
            x = torch.randn(m, 200)
            reference.assert_same(compiled(x), model(x), m=m)
    assert counter.frame_count == 1
