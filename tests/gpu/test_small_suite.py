"""Every kernel on small problems: what `make sanitize` runs under compute-sanitizer."""

import pytest
import torch
from grouped import GROUPED_PLANS, grouped_problem, run_grouped
from problems import (
    DEVICE,
    QUANTIZING,
    assert_equal,
    linear_in_one,
    linear_in_two,
    random_problem,
    run,
    testing,
)

import liquidgemm
from liquidgemm.kv import KVCache
from liquidgemm.ops._dequantize import dequantize_packed
from liquidgemm.ops._pack import decoded
from liquidgemm.ops.plans import compiled_plans, plan_names, slot_plan_names


def test_gemm_small() -> None:
    """CHECKLIST 15: ragged edges, several tiles per CTA, one CTA and clusters along K."""
    problem = random_problem(33, 200, 1088)
    expected = problem.accumulator()
    for plan, name in enumerate(plan_names()):
        actual = run(problem, plan=plan, num_sms=4)
        assert_equal(actual, expected, name)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (6, 64), (8, 64)])
def test_weights_of_other_formats_small(bits: int, group: int) -> None:
    """CHECKLIST 15: the kernels of other formats, and what packs and expands them."""
    problem = random_problem(33, 200, 1088, bits=bits, group=group)
    expected = problem.accumulator()
    for plan, name in compiled_plans(bits, group):
        assert_equal(run(problem, plan=plan, num_sms=4), expected, name)
    w8 = decoded(problem.weight, 200)
    assert_equal(w8, problem.w8, "unpacked")
    w = dequantize_packed(problem.weight, problem.weight_scale, 1087, torch.bfloat16)
    expected = (problem.w8[:, :1087].float() * problem.weight_scale[:, None]).bfloat16()
    assert_equal(w, expected, "dequantized")


def test_epilogues_small() -> None:
    """CHECKLIST 15: every output type, with bias."""
    problem = random_problem(9, 70, 192)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert_equal(run(problem, dtype, bias=True), problem.output(dtype, bias=True), f"{dtype}")


def test_linear_small() -> None:
    """CHECKLIST 15: the GEMMs that quantize, rows that end within a stage."""
    for m, k in ((1, 64), (3, 584)):
        problem = random_problem(m, 200, k)
        x = torch.randn(m, k, device=DEVICE).bfloat16()
        expected = linear_in_two(problem, x)
        for plan, name in QUANTIZING:
            actual = linear_in_one(problem, x, plan, num_sms=4)
            assert_equal(actual, expected, f"{name} {m=} {k=}")


def test_quantize_and_pack_small() -> None:
    """CHECKLIST 15: the small kernels, vector and scalar paths."""
    for k in (64, 100, 8200):
        x = torch.randn(3, k, device=DEVICE)
        x8, scale = liquidgemm.quantize_activation(x)
        on_cpu = liquidgemm.quantize_activation(x.cpu())
        assert_equal(x8.cpu(), on_cpu[0], f"x8 {k=}")
        assert_equal(scale.cpu(), on_cpu[1], f"scale {k=}")
    problem = random_problem(1, 70, 192)
    logical = liquidgemm.unpack_weight(problem.weight, 70)
    assert_equal(liquidgemm.pack_weight(*logical), problem.weight, "packed again")
    for k in (192, 189):
        w = dequantize_packed(problem.weight, problem.weight_scale, k, torch.bfloat16)
        expected = (problem.w8[:, :k].float() * problem.weight_scale[:, None]).bfloat16()
        assert_equal(w, expected, f"dequantized {k=}")


def test_grouped_gemm_small() -> None:
    """CHECKLIST 15: experts without rows, with one, and with several tiles; activations too."""
    problem = grouped_problem([0, 3, 40, 1, 0], 200, 320)
    expected = problem.accumulator()
    for plan, name in GROUPED_PLANS:
        assert_equal(run_grouped(problem, plan=plan, num_sms=4), expected, name)
    problem = grouped_problem([0, 3, 40, 1, 0], 208, 320)
    arguments = (problem.x, problem.x_scale, problem.weight, problem.weight_scale)
    for dtype in (torch.bfloat16, torch.float32):
        expected = torch.ops.liquidgemm.grouped_gemm(
            *(t.cpu() for t in (*arguments, problem.offsets)), None, dtype, "silu_mul"
        )
        for plan, name in GROUPED_PLANS:
            actual = run_grouped(problem, dtype, plan=plan, num_sms=4, activation="silu_mul")
            assert_equal(actual.cpu(), expected, f"{name} {dtype}")


def test_moe_small() -> None:
    """CHECKLIST 15: the whole layer, with ids of elsewhere."""
    first, second = grouped_problem([0] * 5, 144, 136), grouped_problem([0] * 5, 136, 72)
    x = torch.randn(9, 136, device=DEVICE).bfloat16()
    ids = torch.randint(0, 6, (9, 3), device=DEVICE)
    weights = torch.rand(9, 3, device=DEVICE)
    tensors = [x, ids, weights, first.weight, first.weight_scale / 1000]
    tensors += [second.weight, second.weight_scale / 1000]
    expected = torch.ops.liquidgemm.moe(*(t.cpu() for t in tensors))
    assert_equal(torch.ops.liquidgemm.moe(*tensors).cpu(), expected, "moe")


def test_moe_by_slots_small() -> None:
    """CHECKLIST 15: the layer in three launches, by every plan.

    All ids are here: rows of others are never written, and the second product reads them, of which
    it stores nothing; initcheck would report that.
    """
    first, second = grouped_problem([0] * 5, 1040, 600), grouped_problem([0] * 5, 600, 520)
    x = torch.randn(2, 600, device=DEVICE).bfloat16()
    ids = torch.tensor([[4, 1, 3], [0, 4, 2]], device=DEVICE)
    weights = torch.rand(2, 3, device=DEVICE)
    tensors = [x, ids, weights, first.weight, first.weight_scale / 1000]
    tensors += [second.weight, second.weight_scale / 1000]
    expected = torch.ops.liquidgemm.moe(*(t.cpu() for t in tensors))
    for plan, name in enumerate(slot_plan_names()):
        arguments = (*tensors, None, None, "silu_mul", plan, plan)
        assert_equal(testing.moe_by_slots(*arguments).cpu(), expected, name)


def test_schedule_small() -> None:
    """CHECKLIST 15: by one CTA, and by clusters of them; with ids of elsewhere."""
    for tokens in (9, 600, 1500):
        ids = torch.randint(-1, 6, (tokens, 3))
        found = torch.ops.liquidgemm.moe_schedule(ids.to(DEVICE), 5)
        expected = torch.ops.liquidgemm.moe_schedule(ids, 5)
        for i, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_equal(actual.cpu(), wanted, f"{tokens=} output {i}")


def test_producers_small() -> None:
    """CHECKLIST 15: norm and gated activation, vector and scalar paths, rows beyond registers."""
    wide = torch.float32
    for k, dtype in ((64, torch.bfloat16), (100, torch.float16), (8200, wide), (40008, wide)):
        x, weight = torch.randn(3, 2 * k).to(dtype), torch.rand(k)
        half = x[:, :k].contiguous()
        arguments = (half, weight.to(dtype), 1e-6, half, "llama", 0.0, True)
        for op, values in (
            (torch.ops.liquidgemm.rms_norm_quantize, arguments),
            (torch.ops.liquidgemm.glu_quantize, (x, "silu_mul", True)),
        ):
            expected = op(*values)
            got = op(*(v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in values))
            for i, (actual, wanted) in enumerate(zip(got, expected, strict=True)):
                assert_equal(actual.cpu(), wanted, f"{op} {k=} output {i}")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_kv_attention_small(name: str) -> None:
    """CHECKLIST 15: writing, attention with codes copied by lines and in bulk, adding up."""
    device_lengths = torch.tensor([1, 33, 530, 64], dtype=torch.int32, device=DEVICE)
    caches = [KVCache.allocate(name, 4, 2, 1088, 128, device) for device in ("cpu", DEVICE)]
    k, v, q = (torch.randn(4, tokens, heads, 128) for tokens, heads in ((64, 2), (64, 2), (1, 8)))
    for cache in caches:
        cache.write_(k.to(cache.k.device), v.to(cache.k.device), device_lengths.to(cache.k.device))
    on_cpu, cache = caches
    for of, expected in zip(cache.tensors, on_cpu.tensors, strict=True):
        assert (of is None) == (expected is None)
        if of is not None:
            assert_equal(of.cpu().view(torch.uint8), expected.view(torch.uint8), "written")
    q = q.to(DEVICE)
    few = cache.attention(q, device_lengths)
    repeats = 36 if name == "int8" else 140  # of what is copied in bulk
    table = torch.arange(4, dtype=torch.int32, device=DEVICE).repeat(repeats)[:, None]
    many = cache.attention(
        q.repeat(repeats, 1, 1, 1), device_lengths.repeat(repeats), block_table=table
    )
    assert_equal(many, few.repeat(repeats, 1, 1, 1), "attention")
