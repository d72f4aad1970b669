"""The layer of experts for very few tokens, whose products are by slots: three launches."""

import pytest
import torch
from problems import DEVICE, assert_equal, poison, testing
from test_moe_chain import GATED, Layer, parts
from test_overtaking import slow_copy  # noqa: F401

from liquidgemm.ops.plans import moe_plan, slot_plan_names

SLOT_PLANS = list(enumerate(slot_plan_names()))
SIZES = [(1, 1), (1, 4), (1, 8), (2, 4), (3, 2), (4, 2), (8, 1)]  # tokens, top_k


def routings(ids: torch.Tensor, experts: int) -> dict[str, torch.Tensor]:
    """Some of them, or all, are of no expert here, or of the same."""
    return {
        "random": ids,
        "int32": ids.int(),
        "elsewhere": torch.where(ids % 3 == 0, ids + experts, ids),
        "negative": ids - experts // 2,
        "beyond 32 bits": ids + (ids % 2 << 33),
        "none": torch.full_like(ids, experts),
        "one expert": torch.full_like(ids, 5),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize(("plan", "name"), SLOT_PLANS, ids=lambda v: str(v))
def test_every_plan_equals_the_parts(
    plan: int, name: str, activation: str, dtype: torch.dtype
) -> None:
    """CHECKLIST 30, 31: every plan of either product; N and K that are no multiples of a block."""
    layer = Layer(16, 1096, 1064, dtype)
    for tokens, top_k in SIZES:
        x, ids, weights = layer.operands(tokens, top_k, tokens)
        for what, some in routings(ids, 16).items():
            expected = parts(layer, x, some.long(), weights, activation)
            poison(tuple(x.shape), dtype)
            found = testing.moe_by_slots(x, some, weights, *layer.weights, activation, plan, plan)
            assert_equal(found, expected, f"{name} {tokens=} {top_k=} {what} {activation} {dtype}")


def test_the_layer_takes_them() -> None:
    """What the library says of a layer is what it chooses: to the bit all ways are equal."""
    assert moe_plan(1, 8, 128, 2048, 768).startswith("3 launches")
    assert moe_plan(1, 8, 128, 2048, 768, dtype=torch.float32).startswith("6 launches")
    assert moe_plan(2, 8, 128, 2048, 768).startswith("6 launches")
    assert moe_plan(2, 2, 8, 4096, 14336).startswith("6 launches")


@pytest.mark.parametrize("tokens", [1, 3, 64, 500])
def test_experts_of_other_gpus_change_no_bit(tokens: int) -> None:
    """Most slots are of experts elsewhere, and the layer is told of it, or not."""
    layer = Layer(16, 512, 384, torch.bfloat16)
    x, ids, weights = layer.operands(tokens, 8)
    ids = torch.where(torch.arange(ids.numel(), device=DEVICE).view_as(ids) % 8 == 3, ids, 99)
    expected = parts(layer, x, ids, weights, "silu_mul")
    for total in (0, 16, 128, 2**31):
        poison(tuple(x.shape), x.dtype)
        found = torch.ops.liquidgemm.moe(x, ids, weights, *layer.weights, "silu_mul", total)
        assert_equal(found, expected, f"{tokens=} {total=}")


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 8), (2, 4)])
def test_a_graph_is_replayed_with_another_routing(tokens: int, top_k: int) -> None:
    """CHECKLIST 12."""
    layer = Layer(16, 512, 384, torch.bfloat16)
    x, ids, weights = layer.operands(tokens, top_k)
    layer.call(x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.call(x, ids, weights)
    for seed in range(8):
        fresh = layer.operands(tokens, top_k, seed)
        if seed == 5:
            fresh[1] += 14  # most of them elsewhere
        expected = parts(layer, *fresh, "silu_mul")
        for to, source in zip((x, ids, weights), fresh, strict=True):
            to.copy_(source)
        out.fill_(float("nan"))
        graph.replay()
        assert_equal(out, expected, f"{tokens=} {seed=}")


@pytest.mark.parametrize("late", ["x", "topk_ids", "topk_weights"])
def test_it_waits_for_the_kernel_before(slow_copy, late: str) -> None:  # noqa: F811
    """CHECKLIST 13: what the router writes, and the layer before."""
    layer = Layer(16, 512, 384, torch.bfloat16)
    operands = layer.operands(1, 8)
    expected = parts(layer, *operands, "silu_mul")
    at = ("x", "topk_ids", "topk_weights").index(late)
    fresh = operands[at]
    stale = operands[at] = torch.zeros_like(fresh)
    for i in range(5):
        stale.zero_()
        torch.cuda.synchronize()
        slow_copy(fresh, stale)
        assert_equal(layer.call(*operands), expected, f"{late} run {i}")


def test_layers_back_to_back() -> None:
    """CHECKLIST 13: kernels of two layers overlap, and routings change each time."""
    layers = [Layer(24, 256, 192, torch.bfloat16, seed) for seed in (0, 7)]
    cases = []
    for seed in range(6):
        x, ids, weights = layers[0].operands(1, 8, seed)
        middle = parts(layers[0], x, ids, weights, "silu_mul")
        other = ids.flip(1).contiguous()
        cases.append((x, ids, other, weights, parts(layers[1], middle, other, weights, "silu_mul")))
    torch.cuda.synchronize()
    found = []
    for i in range(120):
        x, ids, other, weights, _ = cases[i % 6]
        found.append(layers[1].call(layers[0].call(x, ids, weights), other, weights))
    for i, out in enumerate(found):
        assert_equal(out, cases[i % 6][4], f"run {i}")
    assert found[0].device.type == DEVICE
