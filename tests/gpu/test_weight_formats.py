"""Weights of 6 and 8 bits, and in groups of 32, on a GPU: every plan that is compiled for them, and
what packs them."""

import pytest
import torch
from problems import DEVICE, assert_equal, random_problem, random_weight, run

import liquidgemm
from liquidgemm.ops.plans import compiled_plans, plan_names

FORMATS = ((4, 32), (6, 64), (8, 64))  # bits and columns of a group
PLANS = [(*of, plan, name) for of in FORMATS for plan, name in compiled_plans(*of)]
EVERY_PLAN = pytest.mark.parametrize(("bits", "group", "plan", "name"), PLANS, ids=lambda v: str(v))
EVERY_FORMAT = pytest.mark.parametrize(("bits", "group"), FORMATS, ids=lambda v: str(v))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tokens_of(name: str) -> int:
    return int(name.split("_")[0][1:])


def constant_weight(value: int, n: int, blocks: int, bits: int, group: int) -> torch.Tensor:
    """Packed; codes are the largest that mean it."""
    if bits == 8:
        shape = n, blocks * 64
        return liquidgemm.pack_int8_weight(torch.full(shape, value, device=DEVICE).to(torch.int8))
    code = 255 if value > 0 else 0
    largest = 2**bits - 1
    step = 255 // largest
    qweight = torch.full((n, blocks * 8 * bits), code, dtype=torch.uint8, device=DEVICE)
    qscale = torch.full((n, blocks * 64 // group), step, dtype=torch.uint8, device=DEVICE)
    qoffset = torch.full_like(qscale, value + 128 - step * largest if value > 0 else value + 128)
    return liquidgemm.pack_weight(qweight, qscale, qoffset)


@EVERY_PLAN
def test_every_plan_is_exact(bits: int, group: int, plan: int, name: str) -> None:
    """CHECKLIST 1: whole tiles and ragged edges, few SMs, more stages than any ring has."""
    tokens = tokens_of(name)
    for m, n, k in (
        (1, 64, 64),
        (tokens, 256, 512),
        (tokens + 1, 264, 2880),
        (3, 8, 576),
        (2 * tokens + 5, 4864, 896),
        (3, 72, 12352),
        (5, 200, 1001),
    ):
        problem = random_problem(m, n, k, m + n + k, bits=bits, group=group)
        expected = problem.accumulator()
        for num_sms in (0, 8, 3):
            actual = run(problem, plan=plan, num_sms=num_sms)
            assert_equal(actual, expected, f"{name} num_sms={num_sms} {m=} {n=} {k=}")


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_PLAN
def test_epilogue_is_the_documented_formula(
    bits: int, group: int, plan: int, name: str, dtype: torch.dtype
) -> None:
    """CHECKLIST 1: scales, bias and rounding, bit for bit."""
    for n in (136, 137):
        problem = random_problem(tokens_of(name) + 3, n, 640, bits=bits, group=group)
        for bias in (False, True):
            actual = run(problem, dtype, bias, plan)
            assert_equal(actual, problem.output(dtype, bias), f"{name} {n=} {bias=}")


@EVERY_PLAN
def test_every_weight(bits: int, group: int, plan: int, name: str) -> None:
    """CHECKLIST 4: tokens that are unit vectors give the weights themselves, at their places."""
    problem = random_problem(1, 192, 128, bits=bits, group=group)
    w8, packed = problem.w8, problem.weight
    assert {-128, 127} <= set(w8.unique().tolist())
    unit = torch.eye(128, dtype=torch.int8, device=DEVICE)
    ones = torch.ones(192, device=DEVICE)
    y = torch.ops.liquidgemm_testing.gemm_with_plan(
        unit, ones[:128], packed, ones, None, torch.int32, plan, 0
    )
    assert_equal(y.T, w8.int(), name)


@EVERY_FORMAT
def test_the_chosen_plan_at_every_m(bits: int, group: int) -> None:
    """CHECKLIST 2."""
    largest = random_problem(1030, 136, 576, bits=bits, group=group)
    expected = largest.accumulator()
    for m in (*range(131), 255, 256, 257, 511, 513, 1030):
        y = liquidgemm.gemm(
            largest.x[:m],
            largest.x_scale[:m],
            largest.weight,
            largest.weight_scale,
            out_dtype=torch.int32,
        )
        assert_equal(y, expected[:m], f"m={m}")


@EVERY_FORMAT
@pytest.mark.parametrize("m", [1, 16, 100, 300])
def test_the_largest_sums(m: int, bits: int, group: int) -> None:
    """CHECKLIST 3: at the largest K, which is no multiple of 64, at both ends."""
    k, n = 132_104, 128
    for x_value, w_value in ((127, 127), (-127, 127), (127, -128), (-127, -128)):
        packed = constant_weight(w_value, n, 2065, bits, group)
        x = torch.full((m, k), x_value, dtype=torch.int8, device=DEVICE)
        ones = torch.ones(max(m, n), device=DEVICE)
        y = liquidgemm.gemm(x, ones[:m], packed, ones[:n], out_dtype=torch.int32)
        expected = torch.full((m, n), x_value * w_value * k, dtype=torch.int32, device=DEVICE)
        assert_equal(y, expected, f"x={x_value} w={w_value} {m=}")


@pytest.mark.parametrize(("bits", "group"), [of for of in FORMATS if of[0] != 8])
def test_packing_of_codes_is_that_of_the_cpu(bits: int, group: int) -> None:
    """CHECKLIST 4; what is not feasible is refused."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for n, k in ((1, 64), (70, 192), (200, 1024)):
        *logical, _ = random_weight(n, k, generator, bits, group)
        on_cpu = [tensor.cpu() for tensor in logical]
        packed = liquidgemm.pack_weight(*logical)
        assert_equal(packed.cpu(), liquidgemm.pack_weight(*on_cpu), f"{n=} {k=}")
        for back, tensor in zip(liquidgemm.unpack_weight(packed, n), logical, strict=True):
            assert_equal(back, tensor, f"{n=} {k=}")
        step = 255 // (2**bits - 1)
        room = 255 - step * (2**bits - 1)
        logical[2][-1, -1], logical[1][-1, -1], logical[0][-1, -1] = room + 1, step, 255
        with pytest.raises(RuntimeError, match="infeasible"):
            liquidgemm.pack_weight(*logical)


def test_packing_of_int8_is_that_of_the_cpu() -> None:
    for n, k in ((1, 64), (70, 192), (200, 1024)):
        w8 = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        packed = liquidgemm.pack_int8_weight(w8.to(DEVICE))
        assert_equal(packed.cpu(), liquidgemm.pack_int8_weight(w8), f"{n=} {k=}")
        assert_equal(liquidgemm.unpack_int8_weight(packed, n).cpu(), w8, f"{n=} {k=}")


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_equals_the_cpu(dtype: torch.dtype, bits: int, group: int) -> None:
    """Two launches: no kernel for these weights quantizes."""
    for m in (1, 7, 40):
        problem = random_problem(m, 264, 2880, bits=bits, group=group)
        x = torch.randn(m, 2880, device=DEVICE).to(dtype)
        arguments = x, problem.weight, problem.weight_scale, problem.bias
        y = liquidgemm.linear(*arguments)
        expected = liquidgemm.linear(*(argument.cpu() for argument in arguments))
        assert_equal(y.cpu(), expected, f"{m=} {dtype}")


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_the_cpu(dtype: torch.dtype, bits: int, group: int) -> None:
    """CHECKLIST 4: whole and cut blocks."""
    for n, k in ((1, 1), (70, 200), (200, 1090)):
        problem = random_problem(1, n, k, bits=bits, group=group)
        scale = problem.weight_scale * 1e-3
        w = torch.ops.liquidgemm.dequantize_packed(problem.weight, scale, k, dtype)
        assert_equal(w, (problem.w8.float() * scale[:, None]).to(dtype), f"{n=} {k=}")


@EVERY_FORMAT
def test_plans_of_other_tiles_are_refused(bits: int, group: int) -> None:
    problem = random_problem(4, 64, 64, bits=bits, group=group)
    compiled = {plan for plan, _ in compiled_plans(bits, group)}
    other = next(plan for plan in range(len(plan_names())) if plan not in compiled)
    with pytest.raises(RuntimeError, match="gemm_with_plan"):
        run(problem, plan=other)


@EVERY_FORMAT
def test_a_replayed_graph_and_a_busy_gpu(bits: int, group: int) -> None:
    """CHECKLIST 10, 12: the same bits a hundred times, with poisoned outputs."""
    problems = [
        random_problem(m, 4096, 1024, seed=m, bits=bits, group=group) for m in (1, 16, 64, 300)
    ]
    expected = [problem.accumulator() for problem in problems]
    outputs = [torch.empty_like(y) for y in expected]
    for problem in problems:
        run(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for problem, output in zip(problems, outputs, strict=True):
            output.copy_(run(problem, poisoned=False))
    for _ in range(100):
        for output in outputs:
            output.fill_(-7)
        graph.replay()
        for output, y in zip(outputs, expected, strict=True):
            assert_equal(output, y, "replayed")


def test_a_layer_of_int8_weights() -> None:
    """`keep=` on a GPU: held in 8 bits, moved, graph and gradient, the bits of the CPU."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1000, 328))
    liquidgemm.quantize_(model, liquidgemm.LiquidConfig(keep=("*",)), progress=False)
    x = torch.randn(7, 1000)
    expected = model(x)
    on_gpu = model.to(DEVICE)
    assert on_gpu[0].packed.shape[-1] == 4096
    assert_equal(on_gpu(x.to(DEVICE)).cpu(), expected, "layer")
    given = x.to(DEVICE).requires_grad_()
    on_gpu(given).sum().backward()
    w = on_gpu[0].dequantize()
    assert_equal(given.grad, torch.ones(7, 328, device=DEVICE) @ w, "gradient")
    state = on_gpu.state_dict()
    again = liquidgemm.LiquidLinear(1000, 328, augment=1024, device=DEVICE)
    again.load_state_dict({name[2:]: tensor for name, tensor in state.items()})
    assert again.packed.shape[-1] == 4096
    assert_equal(again(x.to(DEVICE)).cpu(), expected, "loaded")
