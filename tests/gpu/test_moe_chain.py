"""The layer of experts and its parts, against the CPU's ops to the bit."""

import pytest
import torch
from grouped import GROUPED_PLANS, grouped_problem, run_grouped
from problems import DEVICE, assert_equal, hard_rows, poison
from test_overtaking import slow_copy  # noqa: F401

import liquidgemm

ops = torch.ops.liquidgemm
GATED = ("silu_mul", "gelu_tanh_mul", "swiglu_clamped")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_ids(tokens: int, top_k: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts of each token."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator, device=DEVICE)
    return scores.topk(min(top_k, experts)).indices


def expected_schedule(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, ...]:
    """By torch's stable sort."""
    flat = ids.flatten().long()
    local = (flat >= 0) & (flat < experts)
    key = torch.where(local, flat, experts)
    order = key.argsort(stable=True)
    rows = int(local.sum())
    slot_of_row = torch.where(torch.arange(len(flat), device=DEVICE) < rows, order, -1)
    row_of_slot = torch.full_like(flat, -1)
    row_of_slot[order[:rows]] = torch.arange(rows, device=DEVICE)
    counts = torch.bincount(key, minlength=experts + 1)[:experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return offsets.int(), row_of_slot.int(), slot_of_row.int()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("experts", [1, 8, 33, 128, 500, 1024, 3000, 16384])
def test_schedule_is_a_stable_sort(experts: int, dtype: torch.dtype) -> None:
    """CHECKLIST 30: any number of slots, one CTA's warps full or not, with ids of elsewhere."""
    generator = torch.Generator(DEVICE).manual_seed(experts)
    for tokens, top_k in [(1, 1), (1, 8), (3, 2), (4, 8), (33, 1), (128, 8), (511, 3), (5000, 7)]:
        for low, high in [(0, experts), (-2, experts + 3), (0, 1), (experts, experts + 1)]:
            ids = torch.randint(low, high, (tokens, top_k), generator=generator, device=DEVICE)
            poison((tokens * top_k,), torch.int32)
            found = ops.moe_schedule(ids.to(dtype), experts)
            for name, one, expected in zip(
                ("offsets", "row_of_slot", "slot_of_row"),
                found,
                expected_schedule(ids, experts),
                strict=True,
            ):
                assert_equal(one, expected, f"{name}: {tokens=} {top_k=} {experts=} ids {low}..")


def test_schedule_of_ids_that_do_not_fit_32_bits() -> None:
    ids = torch.tensor([[0, 2**32, -(2**32), 2**63 - 1, 1]], device=DEVICE)
    offsets, row_of_slot, _ = ops.moe_schedule(ids, 2)
    assert offsets.tolist() == [0, 1, 2]
    assert row_of_slot.tolist() == [0, -1, -1, -1, 1]


def test_schedule_of_no_tokens() -> None:
    """CHECKLIST 2: an empty batch has no rows."""
    ids = torch.zeros(0, 4, dtype=torch.int64, device=DEVICE)
    offsets, row_of_slot, slot_of_row = ops.moe_schedule(ids, 5)
    assert offsets.tolist() == [0] * 6
    assert row_of_slot.shape == slot_of_row.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [8, 63, 64, 1000, 2048, 5000, 20480])
def test_quantized_rows_are_those_of_quantize_activation(k: int, dtype: torch.dtype) -> None:
    """Hard rows too, in a random order, some of them none."""
    x = hard_rows(k, dtype).to(DEVICE)
    tokens, top_k = x.shape[0], 3
    x8, scale = liquidgemm.quantize_activation(x)
    slots = torch.randperm(tokens * top_k, device=DEVICE).int()
    slots[::5] = -1
    slots[7] = tokens * top_k + 4  # of a token that x does not have
    found8, found_scale = ops.quantize_activation_rows(x, slots, top_k)
    rows = ((slots >= 0) & (slots < tokens * top_k)).nonzero().flatten()
    token = (slots[rows] // top_k).long()
    assert_equal(found8[rows], x8[token], f"x8 {k=} {dtype}")
    assert_equal(found_scale[rows], scale[token], f"scale {k=} {dtype}")


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_is_the_sum_in_the_order_of_slots(dtype: torch.dtype, weights: torch.dtype) -> None:
    """Every product and sum rounded to fp32, as on the CPU."""
    generator = torch.Generator().manual_seed(3)
    for tokens, top_k, n in [(1, 1, 8), (3, 8, 72), (2, 2, 131), (40, 10, 2048), (5, 3, 7168)]:
        rows = tokens * top_k
        y = torch.randn(rows, n, generator=generator).to(dtype)
        row_of_slot = torch.randperm(rows, generator=generator).int()
        row_of_slot[1::4] = -1
        w = torch.rand(tokens, top_k, generator=generator).to(weights)
        residual = torch.randn(tokens, n, generator=generator).to(dtype)
        for added in (None, residual):
            arguments = (y, row_of_slot, w, added)
            expected = ops.moe_combine(*arguments)
            poison((tokens, n), dtype)
            on_gpu = [None if t is None else t.to(DEVICE) for t in arguments]
            found = ops.moe_combine(*on_gpu)
            what = f"{tokens=} {top_k=} {n=} {dtype} weights {weights}"
            assert_equal(found.cpu(), expected, what)


@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("plan", "name"), GROUPED_PLANS, ids=lambda v: str(v))
def test_activation_in_the_product_is_the_one_behind_it(
    plan: int, name: str, dtype: torch.dtype, activation: str
) -> None:
    """CHECKLIST 31: every plan, to the bit; scales from tiny to where activations saturate."""
    tokens = int(name.split("_")[0][1:])
    for n in (16, 144, 320):
        problem = grouped_problem([3, 0, tokens + 5, 1, 17], n, 320)
        problem.weight_scale = torch.logspace(-9, -3, n, device=DEVICE).expand(5, n).contiguous()
        problem.x_scale.mul_(3)
        product = run_grouped(problem, dtype, bias=True, plan=plan)
        interleaved = product.view(-1, n // 16, 2, 8)
        gate, up = interleaved[:, :, 0].flatten(1), interleaved[:, :, 1].flatten(1)
        expected = ops.grouped_gemm(  # the CPU's way from the same sums
            problem.x.cpu(),
            problem.x_scale.cpu(),
            problem.weight.cpu(),
            problem.weight_scale.cpu(),
            problem.offsets.cpu(),
            problem.bias.cpu(),
            dtype,
            activation,
        )
        found = run_grouped(problem, dtype, bias=True, plan=plan, activation=activation)
        assert_equal(found.cpu(), expected, f"{name} {n=} {dtype} {activation}")
        assert found.shape == gate.shape == up.shape


class Layer:
    """Random experts, on the GPU; `call` of them on either device."""

    def __init__(self, experts: int, hidden: int, inner: int, dtype: torch.dtype, seed: int = 0):
        first = grouped_problem([0] * experts, 2 * inner, hidden, seed=seed)
        second = grouped_problem([0] * experts, hidden, inner, seed=seed + 1)
        self.experts, self.hidden, self.dtype = experts, hidden, dtype
        # Products of the size of 1.
        self.weights = [
            first.weight,
            first.weight_scale / (60 * hidden**0.5),
            second.weight,
            second.weight_scale / (60 * inner**0.5),
            first.bias,
            second.bias,
        ]

    def operands(self, tokens: int, top_k: int, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        x = torch.randn(tokens, self.hidden, generator=generator, device=DEVICE).to(self.dtype)
        ids = random_ids(tokens, top_k, self.experts, seed)
        weights = torch.rand(ids.shape, generator=generator, device=DEVICE)
        return [x, ids, weights]

    def call(self, x, ids, weights, activation: str = "silu_mul", device: str = DEVICE):
        tensors = [t.to(device) for t in (x, ids, weights, *self.weights)]
        return ops.moe(*tensors, activation)


def parts(layer: Layer, x, ids, weights, activation: str) -> torch.Tensor:
    """What `moe` is put together from."""
    w1, s1, w2, s2, b1, b2 = layer.weights
    offsets, row_of_slot, slot_of_row = ops.moe_schedule(ids, layer.experts)
    x8, x_scale = ops.quantize_activation_rows(x, slot_of_row, ids.shape[1])
    h = ops.grouped_gemm(x8, x_scale, w1, s1, offsets, b1, x.dtype, activation)
    h8, h_scale = ops.quantize_activation(h)
    y = ops.grouped_gemm(h8, h_scale, w2, s2, offsets, b2, x.dtype)
    return ops.moe_combine(y, row_of_slot, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", GATED)
def test_moe_equals_its_parts_and_the_cpu(activation: str, dtype: torch.dtype) -> None:
    """CHECKLIST 30, 31: from one token to many, ids of elsewhere, all tokens to one expert."""
    layer = Layer(16, 320, 200, dtype)
    for tokens, top_k in [(1, 1), (1, 4), (7, 2), (64, 4), (300, 8), (2000, 4)]:
        x, ids, weights = layer.operands(tokens, top_k, tokens)
        elsewhere = torch.where(ids % 3 == 0, ids + 16, ids)
        for name, some in (
            ("random", ids),
            ("sentinels", elsewhere),
            ("none", torch.full_like(ids, 16)),
            ("one expert", torch.full_like(ids, 5)),
        ):
            what = f"{tokens=} {top_k=} {name} {activation} {dtype}"
            found = layer.call(x, some, weights, activation)
            assert_equal(found, parts(layer, x, some, weights, activation), what)
            if tokens <= 64:
                expected = layer.call(x, some, weights, activation, device="cpu")
                assert_equal(found.cpu(), expected, f"{what}, CPU")


def test_bits_of_a_token_depend_on_that_token_alone() -> None:
    """CHECKLIST 9: alone, among others, in another order."""
    layer = Layer(32, 512, 384, torch.bfloat16)
    x, ids, weights = layer.operands(700, 4)
    together = layer.call(x, ids, weights)
    order = torch.randperm(700, device=DEVICE)
    assert_equal(layer.call(x[order], ids[order], weights[order]), together[order], "shuffled")
    for size in (1, 3, 30):
        some = order[:size]
        assert_equal(layer.call(x[some], ids[some], weights[some]), together[some], f"{size}")


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_a_graph_is_replayed_with_another_routing(tokens: int) -> None:
    """CHECKLIST 12."""
    layer = Layer(16, 320, 192, torch.bfloat16)
    x, ids, weights = layer.operands(tokens, 4)
    layer.call(x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.call(x, ids, weights)
    for seed in range(8):
        fresh = layer.operands(tokens, 4, seed)
        if seed == 5:
            fresh[1] += 14  # most of them elsewhere
        expected = parts(layer, *fresh, "silu_mul")
        for to, source in zip((x, ids, weights), fresh, strict=True):
            to.copy_(source)
        out.fill_(float("nan"))
        graph.replay()
        assert_equal(out, expected, f"{tokens=} {seed=}")


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_layers_back_to_back(tokens: int) -> None:
    """CHECKLIST 13: kernels overlap, within a layer and across two; routings change each time."""
    layers = [Layer(24, 256, 192, torch.bfloat16, seed) for seed in (0, 7)]
    cases = []
    for seed in range(6):
        x, ids, weights = layers[0].operands(tokens, 4, seed)
        middle = parts(layers[0], x, ids, weights, "silu_mul")
        cases.append((x, ids, weights, parts(layers[1], middle, ids.flip(0), weights, "silu_mul")))
    torch.cuda.synchronize()
    found = []
    for i in range(120):
        x, ids, weights, _ = cases[i % 6]
        found.append(layers[1].call(layers[0].call(x, ids, weights), ids.flip(0), weights))
    for i, out in enumerate(found):
        assert_equal(out, cases[i % 6][3], f"{tokens=} run {i}")


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("late", ["x", "topk_ids", "topk_weights"])
def test_moe_waits_for_the_kernel_before(slow_copy, late: str, tokens: int) -> None:  # noqa: F811
    """CHECKLIST 13: what the router writes, and the layer before."""
    layer = Layer(16, 320, 192, torch.bfloat16)
    operands = layer.operands(tokens, 4)
    expected = parts(layer, *operands, "silu_mul")
    at = ("x", "topk_ids", "topk_weights").index(late)
    fresh = operands[at]
    stale = operands[at] = torch.zeros_like(fresh)
    other = layer.operands(tokens, 4, seed=9)
    for i in range(5):
        layer.call(*other)  # leaves another schedule where this layer's will be
        stale.zero_()
        torch.cuda.synchronize()
        slow_copy(fresh, stale)
        assert_equal(layer.call(*operands), expected, f"{late} {tokens=} run {i}")


def test_no_tokens() -> None:
    """CHECKLIST 2."""
    layer = Layer(4, 64, 64, torch.bfloat16)
    x, ids, weights = layer.operands(1, 2)
    assert layer.call(x[:0], ids[:0], weights[:0]).shape == (0, 64)
