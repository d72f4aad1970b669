"""Layers of one input as one product: the same bits, names and state as apart."""

import copy
import io
import pickle

import pytest
import torch
from reference import assert_same
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

from liquidgemm import LiquidLinear, MergedLinear
from liquidgemm.quantization.calibration.gptq import int8_weight

X = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
SIZES = {"q": 128, "k": 64, "v": 40}


class Block(nn.Module):
    """Three layers and, registered after them, all in one."""

    def __init__(self, bias=True, keep=False, device=None):
        super().__init__()
        torch.manual_seed(1)
        for name, n in SIZES.items():
            linear = nn.Linear(100, n, bias=bias)
            if device is not None:
                layer = LiquidLinear(100, n, bias=bias, device=device)
            elif keep:
                layer = LiquidLinear.from_quantized(int8_weight(linear.weight.data), linear.bias)
            else:
                layer = LiquidLinear.from_linear(linear)
            setattr(self, name, layer)
        self.qkv = MergedLinear((self.q, self.k, self.v))

    def forward(self, x):
        return self.qkv(x)

    def apart(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def assert_merged(block, expected):
    """One product, of memory that is there once."""
    assert block.qkv.is_merged
    memory = {getattr(block, name).packed.untyped_storage().data_ptr() for name in SIZES}
    assert memory == {block.qkv._weight[0].untyped_storage().data_ptr()}
    assert block.qkv.parts == (block.q, block.k, block.v)
    for x in (X, X[0], X[:0], X.expand(2, 3, 100).bfloat16()):
        assert_same(block(x), block.apart(x))
    assert_same(block(X), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keep", [False, True], ids=["4 bits", "8 bits"])
def test_one_product_has_the_bits_of_three(bias, keep):
    block = Block(bias, keep)
    expected = torch.cat([copy.deepcopy(getattr(block, name))(X) for name in SIZES], dim=-1)
    assert_merged(block, expected)
    assert [list(part.shape) for part in block(X).split(block.qkv.sizes, -1)] == [
        [3, n] for n in SIZES.values()
    ]


def test_state_dict_and_names_are_those_of_the_layers():
    block = Block()
    plain = nn.ModuleDict({name: copy.deepcopy(getattr(block, name)) for name in SIZES})
    assert list(block.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in block.named_buffers()] == [n for n, _ in plain.named_buffers()]
    for key, value in plain.state_dict().items():
        assert_same(block.state_dict()[key], value, key=key)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda block: pickle.loads(pickle.dumps(block)),
        lambda block: block.to(torch.bfloat16).float(),
        lambda block: block.train(),
        lambda block: block.share_memory(),
    ],
    ids=["deepcopy", "pickle", "to", "train", "share_memory"],
)
def test_stays_merged(copied):
    block = Block(bias=False)
    expected = block(X)
    assert_merged(copied(block), expected)


def test_stays_merged_through_torch_save():
    block, file = Block(), io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    assert_merged(torch.load(file, weights_only=False), block(X))


@pytest.mark.parametrize("assign", [False, True])
def test_state_is_loaded_into_merged_layers(assign):
    block, other = Block(), Block()
    for part in other.qkv.parts:
        part.scale.mul_(2)
        part.bias.add_(1)
    assert_merged(other, other.apart(X))
    block.load_state_dict(other.state_dict(), assign=assign)
    assert_merged(block, other(X))


def test_loaded_columns_that_differ_are_not_merged():
    block = nn.ModuleDict({name: layer(n=n, augment=64) for name, n in SIZES.items()})
    block["qkv"] = MergedLinear((block["q"], block["k"], block["v"]))
    assert block["qkv"].is_merged
    state = {key: value.clone() for key, value in block.state_dict().items()}
    for name in SIZES:
        state[f"{name}.qscale"].fill_(1)
        state[f"{name}.qweight"].random_(generator=torch.Generator().manual_seed(0))
        state[f"{name}.scale"].fill_(0.1)
    other = {**state, "k.columns": state["k.columns"] + 1}
    for loaded, merged in ((other, False), (state, True), (other, False)):
        block.load_state_dict(loaded)
        assert block["qkv"].is_merged is merged
        assert_same(block["qkv"](X), torch.cat([block[name](X) for name in SIZES], dim=-1))
    # Of one layer alone as well.
    block.load_state_dict(state)
    k = {key: value for key, value in other.items() if key.startswith("k.")}
    block["k"].load_state_dict({key.removeprefix("k."): value for key, value in k.items()})
    assert not block["qkv"].is_merged
    assert_same(block["qkv"](X), torch.cat([block[name](X) for name in SIZES], dim=-1))


def test_from_the_meta_device():
    block = Block(device="meta")
    assert not block.qkv.is_merged
    assert block(X.to("meta")).shape == (3, 232)
    expected = Block()
    block.load_state_dict(expected.state_dict(), assign=True)
    assert_merged(block, expected(X))


def test_a_layer_that_was_changed_by_itself_counts_until_all_are_merged_again():
    block, other = Block(), Block(bias=False)
    with torch.no_grad():
        block.k.scale = block.k.scale * 2
    assert not block.qkv.is_merged
    expected = block.apart(X)
    assert_same(block(X), expected)
    assert_merged(block.eval(), expected)
    # So does what is assigned for the time of a call.
    state = {name: value for name, value in other.state_dict().items() if "k." in name}
    state = {name: value.roll(1, 0) for name, value in state.items()}
    before = other(X)
    assert_same(functional_call(other, state, (X,))[:, 128:192], before[:, 128:192].roll(1, 1))
    assert_merged(other, before)


def test_unmerge_gives_each_its_own_memory():
    block = Block()
    expected = block(X)
    block.qkv.unmerge()
    assert not block.qkv.is_merged
    assert_same(block(X), expected)
    assert len({part.packed.untyped_storage().data_ptr() for part in block.qkv.parts}) == 3
    block.qkv.merge()
    assert_merged(block, expected)


def test_compiles_to_one_product_and_notices_a_change():
    block = Block()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    assert_same(compiled(X), block(X))
    assert counter.op_count == 1
    block.v.bias = torch.zeros(40)
    assert_same(compiled(X), block.apart(X))
    assert counter.frame_count == 2


@pytest.mark.parametrize("shape", [(3, 100), (100,), (2, 3, 100)])
def test_compiles_with_dynamic_sizes(shape):
    """By itself, where the weights of all belong to no module that torch.compile knows."""
    merged = Block().qkv
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend="eager", dynamic=True, fullgraph=True)
    for rows in (1, 2, 3):
        x = X[:1].expand(rows, 100)[0] if len(shape) == 1 else X[:1].expand(rows, *shape[1:])
        assert_same(compiled(x), merged(x))


def test_derivatives_are_those_of_the_layers():
    block = Block()
    grads = []
    for function in (block, block.apart):
        x = X.clone().requires_grad_()
        function(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def layer(k=100, n=64, bias=True, augment=0):
    made = LiquidLinear(k, n, bias=bias, augment=augment)
    if augment:
        made.columns.copy_(torch.arange(augment))
    return made


def other_columns():
    made = layer(augment=64)
    made.columns.add_(1)
    return made


def head():
    made = layer()
    made.out_dtype = torch.float32
    return made


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: [layer()], "expected at least two layers, got 1"),
        (lambda: [layer()] * 2, "a layer is there twice"),
        (lambda: [layer(), nn.Linear(100, 64)], "expected LiquidLinears, got a Linear"),
        (lambda: [layer(), layer(k=64)], "in_features are 100 and 64"),
        (lambda: [layer(), layer(bias=False)], "their biases are None and torch.float32"),
        (lambda: [layer(), layer().half()], "their biases are torch.float16 and torch.float32"),
        (lambda: [layer(), layer(augment=64)], "their residual columns differ"),
        (lambda: [layer(augment=64), other_columns()], "their residual columns differ"),
        (lambda: [layer(), head()], "one has an out_dtype, torch.float32"),
        (lambda: [layer(n=40), layer()], "out_features are 40, no multiple of 64"),
    ],
)
def test_what_cannot_be_merged_is_refused(parts, message):
    with pytest.raises(ValueError, match=f"parts: {message}"):
        MergedLinear(parts())


def test_other_than_k_features_are_refused():
    with pytest.raises(RuntimeError, match="x: expected K = 100 features"):
        Block()(X[:, :99])
