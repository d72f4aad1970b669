"""Grouped GEMM against an exact integer reference, and against `gemm`."""

import gc

import pytest
import torch
from arena import SMALLEST, Arena
from grouped import GROUPED_PLANS, grouped_problem, routings, run_grouped, set_counts
from problems import DEVICE, assert_equal, random_weight
from test_overtaking import slow_copy  # noqa: F401

import liquidgemm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tile_tokens(name: str) -> int:
    return int(name.split("_")[0][1:])


def random_counts(experts: int, rows: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, experts, (rows,), generator=generator)
    return torch.bincount(expert, minlength=experts).tolist()


@pytest.mark.parametrize(("plan", "name"), GROUPED_PLANS, ids=lambda v: str(v))
def test_every_plan_is_exact(plan: int, name: str) -> None:
    """CHECKLIST 1: every compiled plan, all kinds of routings, ragged edges, few SMs."""
    sizes = [(64, 64), (264, 704), (200, 1088), (72, 6208)]
    for routing, counts in routings(tile_tokens(name)).items():
        for n, k in sizes:
            problem = grouped_problem(counts, n, k, seed=n + k)
            expected = problem.accumulator()
            for num_sms in (0, 8, 3):
                actual = run_grouped(problem, plan=plan, num_sms=num_sms)
                what = f"{name} num_sms={num_sms} {n=} {k=} {routing}"
                assert_equal(actual, expected, what)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("plan", "name"), GROUPED_PLANS, ids=lambda v: str(v))
def test_epilogue_is_the_documented_formula(
    plan: int, name: str, dtype: torch.dtype, bias: bool
) -> None:
    """CHECKLIST 1: scales, bias and rounding, each expert with its own."""
    tokens = tile_tokens(name)
    for n in (136, 137, 138):  # rows of y aligned to four elements, and not
        problem = grouped_problem([3, 0, tokens + 5, 1], n, 640)
        actual = run_grouped(problem, dtype, bias, plan)
        assert_equal(actual, problem.output(dtype, bias), f"{name} {n=}")


@pytest.mark.parametrize("experts", [1, 2, 31, 32, 33, 64, 65, 128, 257, 1000, 1024])
def test_numbers_of_experts(experts: int) -> None:
    """The lanes that resolve tiles have one expert, several, or none."""
    for rows in (1, experts, 5 * experts):
        problem = grouped_problem(random_counts(experts, rows, rows), 72, 64, seed=experts)
        expected = problem.accumulator()
        assert_equal(run_grouped(problem), expected, f"{experts=} {rows=}")
        for plan, name in GROUPED_PLANS[::3]:
            assert_equal(run_grouped(problem, plan=plan), expected, f"{experts=} {rows=} {name}")


@pytest.mark.parametrize("rows", [1, 8, 64, 300, 2000])
def test_rows_are_those_of_gemm(rows: int) -> None:
    """Bits of a row depend on the row and its expert alone: `gemm` of one expert, of one row."""
    problem = grouped_problem(random_counts(12, rows, rows), 328, 1216)
    actual = run_grouped(problem, torch.bfloat16, bias=True)
    begin = 0
    for expert, count in enumerate(problem.counts):
        end = begin + count
        for first, last in ((begin, end), (end - 1, end)):
            if count == 0:
                continue
            alone = liquidgemm.gemm(
                problem.x[first:last],
                problem.x_scale[first:last],
                problem.weight[expert],
                problem.weight_scale[expert],
                problem.bias[expert],
            )
            assert_equal(actual[first:last], alone, f"{rows=} {expert=} rows {first} to {last}")
        begin = end


@pytest.mark.parametrize(("plan", "name"), GROUPED_PLANS, ids=lambda v: str(v))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_but_the_experts_rows_is_written(dtype: torch.dtype, plan: int, name: str) -> None:
    """CHECKLIST 6: not around the output, and none of its rows that have no expert."""
    arena = Arena(4 * SMALLEST)
    tokens = tile_tokens(name)
    for residue in (0, 8, 61):
        for counts in ([2, 0, tokens + 3, 1], [0, 0, 0, 0], [0, 5, 0, 0]):
            rows = sum(counts) + tokens + 3
            n = -(-SMALLEST // (rows * dtype.itemsize * 64)) * 64 + residue
            problem = grouped_problem(counts, n, 192, beyond=tokens + 3)
            what = f"{name} {n=} {counts} {dtype}"
            with arena.allocating():
                y = run_grouped(problem, dtype, True, plan, poisoned=False)
            arena.check(y[: problem.written], what=what)
            assert_equal(y[: problem.written], problem.output(dtype, True), what)
            del y


@pytest.mark.parametrize(("plan", "name"), GROUPED_PLANS, ids=lambda v: str(v))
def test_offsets_that_are_garbage_touch_nothing_else(plan: int, name: str) -> None:
    """Whatever the offsets hold, the kernel ends, and writes nothing outside of y."""
    arena = Arena(4 * SMALLEST)
    problem = grouped_problem([9] * 40, 3008, 192)
    generator = torch.Generator(DEVICE).manual_seed(plan)
    garbage = [
        torch.full((41,), 2**31 - 1),
        torch.full((41,), -(2**31)),
        torch.tensor([0, 2**31 - 1] * 20 + [0]),
        torch.arange(41).flip(0) * 9,
        torch.randint(-(2**31), 2**31, (41,), generator=generator, device=DEVICE),
        torch.randint(-400, 800, (41,), generator=generator, device=DEVICE),
    ]
    for i, offsets in enumerate(garbage):
        problem.offsets.copy_(offsets)
        with arena.allocating():
            y = run_grouped(problem, torch.bfloat16, True, plan, poisoned=False)
        arena.check(y, what=f"{name} offsets {i}")
        del y
    set_counts(problem, problem.counts)
    assert_equal(run_grouped(problem, plan=plan), problem.accumulator(), f"{name} afterwards")


@pytest.mark.parametrize(("plan", "name"), GROUPED_PLANS, ids=lambda v: str(v))
def test_a_graph_is_replayed_with_other_routings(plan: int, name: str) -> None:
    """CHECKLIST 12: counts are data of the device; nothing of them is captured."""
    tokens = tile_tokens(name)
    rows = 3 * tokens + 40
    problem = grouped_problem([rows, 0, 0, 0, 0, 0], 328, 320)
    run_grouped(problem, plan=plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run_grouped(problem, plan=plan, poisoned=False)
        again = run_grouped(problem, plan=plan, poisoned=False)
    routings = [
        [0, 0, 0, 0, 0, rows],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [tokens, tokens, tokens, 0, 0, 0],
        [0, 7, tokens + 1, 0, 2 * tokens - 1, 0],
        [rows - 5, 1, 1, 1, 1, 1],
    ]
    for counts in routings * 2:
        set_counts(problem, counts)
        for out in (y, again):
            out.fill_(-(2**30))
        graph.replay()
        for out in (y, again):
            assert_equal(out[: problem.written], problem.accumulator(), f"{name} {counts}")
            assert (out[problem.written :] == -(2**30)).all(), f"{name} {counts}: rows beyond"


@pytest.mark.parametrize(("plan", "name"), GROUPED_PLANS, ids=lambda v: str(v))
def test_back_to_back(plan: int, name: str) -> None:
    """Launches that overlap, with routings that a kernel between them changes."""
    tokens = tile_tokens(name)
    problem = grouped_problem([tokens, 3, 0, tokens + 7, 1, 20], 520, 832)
    routings = [problem.counts, [0, 0, problem.written, 0, 0, 0], [1, 0, 1, 0, 0, 1]]
    offsets, expected = [], []
    for counts in routings:
        set_counts(problem, counts)
        offsets.append(problem.offsets.clone())
        expected.append(problem.accumulator())
    for i in range(60):
        problem.offsets.copy_(offsets[i % 3])
        first = run_grouped(problem, plan=plan, poisoned=i % 2 == 0)
        second = run_grouped(problem, plan=plan, poisoned=False)
        for y in (first, second):
            rows = sum(routings[i % 3])
            assert_equal(y[:rows], expected[i % 3], f"{name} launch {i}")


@pytest.mark.parametrize(("plan", "name"), GROUPED_PLANS, ids=lambda v: str(v))
@pytest.mark.parametrize("late", ["x", "x_scale", "offsets"])
def test_waits_for_the_kernel_before(slow_copy, late: str, plan: int, name: str) -> None:  # noqa: F811
    """CHECKLIST 13: each operand that a kernel before it may have written."""
    problem = grouped_problem([3, 0, 12, 1], 520, 832)
    expected = problem.output(torch.float32)
    fresh = getattr(problem, late)
    stale = torch.zeros_like(fresh)
    setattr(problem, late, stale)
    for i in range(3):
        stale.zero_()
        torch.cuda.synchronize()
        slow_copy(fresh, stale)
        y = run_grouped(problem, torch.float32, plan=plan, poisoned=False)
        assert_equal(y, expected, f"{name} late {late} run {i}")


def test_operands_may_be_views() -> None:
    """CHECKLIST 3: rows with gaps, K that is no multiple of 16, offsets out of a larger tensor."""
    for k in (64, 72, 129, 1000):
        problem = grouped_problem([3, 0, 12, 1], 136, k)
        expected = problem.output(torch.bfloat16, bias=True)
        wide = torch.zeros(16, k + 48, dtype=torch.int8, device=DEVICE)
        wide[:, 16 : 16 + k] = problem.x
        problem.x = wide[:, 16 : 16 + k]
        offsets = torch.zeros(2, 6, dtype=torch.int32, device=DEVICE)
        offsets[1, 1:] = problem.offsets
        problem.offsets = offsets[1, 1:]
        problem.bias = torch.stack([problem.bias, problem.bias], -1)[..., 0]
        assert_equal(run_grouped(problem, torch.bfloat16, True), expected, f"{k=}")


def test_no_rows() -> None:
    """CHECKLIST 2: an empty batch is an empty result."""
    problem = grouped_problem([0, 0], 136, 64)
    assert run_grouped(problem, torch.bfloat16, poisoned=False).shape == (0, 136)


def test_weights_past_four_gigabytes() -> None:
    """CHECKLIST 8: byte offsets of experts that do not fit 32 bits."""
    gc.collect()
    torch.cuda.empty_cache()
    n, k, experts = 12288, 12288, 56
    generator = torch.Generator(DEVICE).manual_seed(1)
    *logical, _ = random_weight(n, k, generator)
    one = liquidgemm.pack_weight(*logical)
    weight = torch.zeros(experts, *one.shape, dtype=torch.uint8, device=DEVICE)
    assert weight.nbytes > 2**32
    weight[-1] = weight[29] = one
    scale = torch.rand(experts, n, generator=generator, device=DEVICE)
    x = torch.randint(-127, 128, (20, k), generator=generator, device=DEVICE).to(torch.int8)
    x_scale = torch.ones(20, device=DEVICE)
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=DEVICE)
    offsets[30:] = 9  # nine rows of expert 29, eleven of the last
    offsets[-1] = 20
    y = liquidgemm.ops.grouped_gemm(x, x_scale, weight, scale, offsets)
    for rows, expert in ((slice(0, 9), 29), (slice(9, 20), -1)):
        expected = liquidgemm.gemm(x[rows], x_scale[rows], one, scale[expert])
        assert_equal(y[rows], expected, f"{expert=}")


def test_too_many_experts_are_refused() -> None:
    """CHECKLIST 10: by name, before anything is launched."""
    problem = grouped_problem([1, 1], 64, 64)
    weight = problem.weight[:1].expand(1025, -1, -1, -1)
    scale = problem.weight_scale[:1].expand(1025, -1)
    offsets = torch.zeros(1026, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match="1024 experts"):
        torch.ops.liquidgemm.grouped_gemm(problem.x, problem.x_scale, weight, scale, offsets)
