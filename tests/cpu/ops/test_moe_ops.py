"""The ops of experts on the CPU: every instruction set equals the reference to the bit."""

import pytest
import reference
import torch
import torch.nn.functional as F

import liquidgemm
from liquidgemm.ops import (
    GATED,
    grouped_gemm,
    moe,
    moe_combine,
    moe_schedule,
    pack_weight,
    quantize_activation,
    quantize_activation_rows,
)

OPS = torch.ops.liquidgemm
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = liquidgemm.cpu_kernels()


@pytest.fixture(params=KERNELS)
def kernel(request):
    liquidgemm.set_cpu_kernel(request.param)
    yield request.param
    liquidgemm.set_cpu_kernel()


class Stack:
    """Random weights of some experts, ``[E, N, K]``."""

    def __init__(self, experts, n, k, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.logical = [reference.random_logical(n, k, seed + e) for e in range(experts)]
        self.weight = torch.stack([pack_weight(*logical) for logical in self.logical])
        self.scale = torch.rand(experts, n, generator=generator) * 1e-3
        self.bias = torch.randn(experts, n, generator=generator)

    def w8(self, expert):
        return reference.decode(*self.logical[expert])


def gated(activation, gate, up):
    """In float64, from values of a dtype; exact but for the last rounding or two."""
    gate, up = gate.double(), up.double()
    if activation == "silu_mul":
        return F.silu(gate) * up
    if activation == "gelu_tanh_mul":
        # (1 + tanh(u)) / 2, without what float64 loses of small ones.
        return gate * torch.sigmoid((8 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)) * up
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


ROUTINGS = {
    "uniform": [0, 3, 6, 8, 11],
    "empty experts": [0, 0, 11, 11, 11],
    "one each": [0, 1, 2, 3, 4],
    "all in the last": [0, 0, 0, 0, 11],
    "none": [0, 0, 0, 0, 0],
    "past the end": [0, 5, 9, 20, 30],
    "before the start": [-4, 2, 2, 7, 11],
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (80, 200), (144, 65)])
def test_grouped_gemm_is_exact(kernel, routing, n, k):
    """The sums, every float type, biases and activations."""
    experts, rows = 4, 11
    stack = Stack(experts, n, k)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (rows, k), generator=generator).to(torch.int8)
    x_scale = torch.rand(rows, generator=generator) * 1e-2
    offsets = torch.tensor(ROUTINGS[routing], dtype=torch.int32)

    def product(**options):
        return grouped_gemm(x, x_scale, stack.weight, stack.scale, offsets, **options)

    sums = product(out_dtype=torch.int32)
    outputs = {
        (dtype, activation, bias): product(
            out_dtype=dtype, activation=activation, bias=stack.bias.to(dtype) if bias else None
        )
        for dtype in FLOATS
        for activation in ("none", *GATED)
        for bias in (False, True)
    }
    for e in range(experts):
        start, stop = offsets[e : e + 2].clamp(0, rows).tolist()
        if stop <= start:
            continue
        acc = reference.product(x[start:stop], stack.w8(e))
        reference.assert_same(sums[start:stop], acc.int(), routing=routing, expert=e)
        for (dtype, activation, has_bias), got in outputs.items():
            bias = stack.bias[e].to(dtype) if has_bias else None
            y = reference.epilogue(acc, x_scale[start:stop], stack.scale[e], bias, dtype)
            context = {"dtype": dtype, "activation": activation, "routing": routing, "expert": e}
            if activation == "none":
                reference.assert_same(got[start:stop], y, **context)
                continue
            gate, up = y.unflatten(1, (-1, 2, 8)).unbind(2)
            exact = gated(activation, gate, up).flatten(1)
            # Three roundings of a dtype, and those of float32 before them.
            bound = 4 * torch.finfo(dtype).eps * exact.abs() + 1e-6
            assert ((got[start:stop].double() - exact).abs() <= bound).all(), context


@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_have_the_same_bits_in_every_set(activation, dtype):
    """Of all 16-bit gates, infinities and NaNs among them, and both ends of the clamps."""
    values = torch.arange(2**16).to(torch.uint16)
    gates = values.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    ups = torch.tensor([0.3, -9.0, 8.0, -1.0]).repeat(len(gates) // 4).to(dtype)
    stacked = torch.stack((gates.view(-1, 8), ups.view(-1, 8)), 1).view(64, -1)
    n = stacked.shape[1]
    # As the bias of a product that is zero.
    zero = pack_weight(
        torch.zeros(n, 32, dtype=torch.uint8),
        torch.ones(n, 1, dtype=torch.uint8),
        torch.full((n, 1), 128, dtype=torch.uint8),
    )
    weight = zero.expand(64, *zero.shape)
    x, ones = torch.zeros(64, 1, dtype=torch.int8), torch.ones(64)
    offsets = torch.arange(65, dtype=torch.int32)
    arguments = (x, ones, weight, torch.ones(64, n), offsets, stacked, dtype, activation)
    liquidgemm.set_cpu_kernel("reference")
    expected = grouped_gemm(*arguments)
    liquidgemm.set_cpu_kernel()
    reference.assert_same(grouped_gemm(*arguments), expected)
    exact = gated(activation, gates, ups).view(64, -1)
    finite = exact.isfinite() & (exact.abs() < torch.finfo(dtype).max / 2)
    g = gates.double()
    argument = {"silu_mul": 0 * g, "gelu_tanh_mul": 1.6 * (g + 0.0448 * g**3)}.get(
        activation, 1.7 * g
    )
    # What float32's rounding of the exponent's argument makes of it (activation.hpp).
    relative = 4 * torch.finfo(dtype).eps + argument.abs().view(64, -1) * 2**-22
    # Below -88.7 the sigmoid is 0.
    bound = relative * exact.abs() + max(4 * torch.finfo(dtype).tiny, 1e-35)
    error = (expected.double() - exact).abs()
    assert finite.float().mean() > 0.9
    assert (error[finite] <= bound[finite]).all()


def plain_schedule(ids, experts):
    """As a list of (expert, slot) that is sorted."""
    flat = ids.flatten().tolist()
    order = sorted((e, slot) for slot, e in enumerate(flat) if 0 <= e < experts)
    row_of_slot, slot_of_row = [-1] * len(flat), [-1] * len(flat)
    for row, (_, slot) in enumerate(order):
        row_of_slot[slot], slot_of_row[row] = row, slot
    offsets = [sum(e < i for e, _ in order) for i in range(experts + 1)]
    return [torch.tensor(t, dtype=torch.int32) for t in (offsets, row_of_slot, slot_of_row)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 3), (1, 1, 1), (37, 4, 5)])
def test_schedule(kernel, tokens, top_k, experts, dtype):
    """Stable; ids of experts that are elsewhere are dropped."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, experts + 3, (tokens, top_k), generator=generator).to(dtype)
    for got in (moe_schedule(ids, experts), moe_schedule(ids.T.contiguous().T, experts)):
        for part, expected in zip(got, plain_schedule(ids, experts), strict=True):
            reference.assert_same(part, expected)


def test_ids_past_32_bits():
    ids = torch.tensor([[2**32, 1, -(2**40), 2**62]])
    assert [t.tolist() for t in moe_schedule(ids, 2)] == [
        [0, 0, 1],
        [-1, 0, -1, -1],
        [1, -1, -1, -1],
    ]


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_activation_rows(kernel, dtype):
    x = torch.randn(5, 100).to(dtype)
    slots = torch.tensor([9, 0, 3, 4, 14, 8], dtype=torch.int32)
    x8, scale = quantize_activation_rows(x, slots, 3)
    expected = quantize_activation(x[slots.long() // 3])
    reference.assert_same(x8, expected[0])
    reference.assert_same(scale, expected[1])
    skipped = torch.tensor([-1, 6, 15, -3], dtype=torch.int32)  # token 5 of 5 is none
    x8, scale = quantize_activation_rows(x.T.contiguous().T, skipped, 3)
    reference.assert_same(x8[1], quantize_activation(x[2])[0])
    reference.assert_same(scale[1], quantize_activation(x[2])[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_combine_adds_in_the_order_of_slots(kernel, dtype, weight_dtype):
    """As float32 operations one by one; slots without a row are left out."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(9, 33, generator=generator).to(dtype)
    rows = torch.tensor([[8, 0, -1], [1, 2, 3], [-1, -1, -1], [9, 4, 1]], dtype=torch.int32)
    weights = torch.rand(4, 3, generator=generator).to(weight_dtype)
    residual = torch.randn(4, 33, generator=generator).to(dtype)
    for start in (None, residual):
        total = torch.zeros(4, 33) if start is None else start.float().clone()
        for token in range(4):
            for j in range(3):
                if 0 <= (row := int(rows[token, j])) < 9:
                    product = weights[token, j].float() * y[row].float()
                    total[token] = total[token] + product
        got = moe_combine(y, rows.flatten(), weights, start)
        reference.assert_same(got, total.to(dtype))


class Layer:
    """A small layer of experts and its tokens."""

    def __init__(self, tokens=7, hidden=72, inner=40, experts=5, top_k=3, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(3)
        self.first = Stack(experts, 2 * inner, hidden, 10)
        self.second = Stack(experts, hidden, inner, 20)
        self.x = torch.randn(tokens, hidden, generator=generator).to(dtype)
        self.ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
        self.weights = torch.rand(tokens, top_k, generator=generator)
        self.experts = (
            self.first.weight,
            self.first.scale,
            self.second.weight,
            self.second.scale,
            self.first.bias,
            self.second.bias,
        )

    def __call__(self, x=None, ids=None, weights=None, activation="silu_mul"):
        x = self.x if x is None else x
        ids = self.ids if ids is None else ids
        weights = self.weights if weights is None else weights
        return moe(x, ids, weights, *self.experts, activation)

    def in_parts(self, activation):
        w1, s1, w2, s2, b1, b2 = self.experts
        offsets, row_of_slot, slot_of_row = moe_schedule(self.ids, len(s1))
        x8, x_scale = quantize_activation_rows(self.x, slot_of_row, self.ids.shape[1])
        dtype = self.x.dtype
        h = grouped_gemm(x8, x_scale, w1, s1, offsets, b1, dtype, activation)
        h8, h_scale = quantize_activation(h)
        y = grouped_gemm(h8, h_scale, w2, s2, offsets, b2, dtype)
        return moe_combine(y, row_of_slot, self.weights)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", GATED)
def test_moe_is_its_parts(kernel, dtype, activation):
    layer = Layer(dtype=dtype)
    y = layer(activation=activation)
    reference.assert_same(y, layer.in_parts(activation))
    liquidgemm.set_cpu_kernel("reference")
    reference.assert_same(layer(activation=activation), y)


def test_a_token_does_not_depend_on_the_others(kernel):
    """Alone, in another order, among sentinels, with the experts spread over two ranks."""
    layer = Layer()
    y = layer()
    for t in range(len(y)):
        alone = layer(*(tensor[t : t + 1] for tensor in (layer.x, layer.ids, layer.weights)))
        reference.assert_same(alone, y[t : t + 1], token=t)
    order = torch.randperm(len(y))
    reference.assert_same(layer(layer.x[order], layer.ids[order], layer.weights[order]), y[order])
    assert (layer(ids=torch.full_like(layer.ids, 5)) == 0).all()
    assert (layer(ids=torch.full_like(layer.ids, -1)) == 0).all()
    assert layer(layer.x[:0], layer.ids[:0], layer.weights[:0]).shape == (0, 72)
    some = layer.ids.clone()
    some[2] = 77
    got = layer(ids=some)
    assert (got[2] == 0).all()
    reference.assert_same(got[3:], y[3:])


def test_experts_of_other_gpus_change_no_bit(kernel):
    layer = Layer()
    arguments = (layer.x, layer.ids, layer.weights, *layer.experts)
    reference.assert_same(moe(*arguments, total_experts=40), layer())
    for device in ("cpu", "meta"):
        on_device = [tensor.to(device) for tensor in arguments]
        with pytest.raises(RuntimeError, match="total_experts: expected 0 or at least the 5 exp"):
            moe(*on_device, total_experts=4)


def test_layouts_of_moe():
    layer = Layer()
    expected = layer()
    spread = layer.x.repeat_interleave(3, 1)[:, ::3]
    weights, ids = layer.weights.T.contiguous().T, layer.ids.T.contiguous().T.int()
    reference.assert_same(layer(spread, ids, weights), expected)


def test_opcheck():
    layer = Layer(dtype=torch.float32)
    w1, s1, _, _, b1, _ = layer.experts
    offsets, row_of_slot, slot_of_row = moe_schedule(layer.ids, 5)
    x8, x_scale = quantize_activation_rows(layer.x, slot_of_row, 3)
    y = torch.randn(21, 72)
    for op, arguments in (
        (OPS.moe_schedule, (layer.ids, 5)),
        (OPS.quantize_activation_rows, (layer.x, slot_of_row, 3)),
        (OPS.grouped_gemm, (x8, x_scale, w1, s1, offsets, b1, torch.float16, "silu_mul")),
        (OPS.grouped_gemm, (x8, x_scale, w1, s1, offsets)),
        (OPS.moe_combine, (y, row_of_slot, layer.weights)),
        (OPS.moe, (layer.x, layer.ids, layer.weights, *layer.experts, "gelu_tanh_mul")),
        (OPS.moe, (layer.x, layer.ids, layer.weights, *layer.experts, "silu_mul", 40)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("activation", GATED)
def test_derivatives_of_moe(activation):
    """Those of the float layer with the dequantized weights; nothing else has one."""
    layer = Layer(dtype=torch.float32)
    x, weights = (t.clone().requires_grad_() for t in (layer.x, layer.weights))
    grad = torch.randn(7, 72)
    layer(x, weights=weights, activation=activation).backward(grad)
    x2, weights2 = (t.double().requires_grad_() for t in (layer.x, layer.weights))
    total = torch.zeros(7, 72, dtype=torch.float64)
    for t in range(7):
        for j, e in enumerate(layer.ids[t].tolist()):
            first, second = layer.first, layer.second
            w1 = first.w8(e)[:, :72] * first.scale[e].double().unsqueeze(1)
            w2 = second.w8(e)[:, :40] * second.scale[e].double().unsqueeze(1)
            inner = w1 @ x2[t] + first.bias[e].double()
            h = gated(activation, *inner.unflatten(0, (-1, 2, 8)).unbind(1)).flatten()
            total[t] += weights2[t, j] * (w2 @ h + second.bias[e].double())
    total.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), x2.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights.grad.double(), weights2.grad, rtol=1e-3, atol=1e-4)
    layer.experts[1].requires_grad_()
    with pytest.raises(RuntimeError, match="with respect to x and topk_weights alone"):
        layer(x).sum().backward()
    with pytest.raises(RuntimeError, match="no derivative in forward mode"):
        torch.func.jvp(lambda v: layer(v), (layer.x,), (grad,))


def test_compiled_without_graph_breaks():
    layer = Layer()
    compiled = torch.compile(lambda x: layer(x), fullgraph=True, backend="aot_eager")
    reference.assert_same(compiled(layer.x), layer())
