"""Sizes past 2^31 elements or bytes.

Rows and panels repeat with an odd period, so that an offset that wraps finds other data.
"""

import torch
from problems import DEVICE, assert_equal, random_problem, random_weight, testing

import liquidgemm
from liquidgemm.ops.plans import plan_names

FAR = 2**31


def rows(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Seven random rows, over and over."""
    generator = torch.Generator(DEVICE).manual_seed(columns)
    if dtype == torch.int8:
        base = torch.randint(-127, 128, (7, columns), generator=generator, device=DEVICE)
    else:
        base = torch.randn(7, columns, generator=generator, device=DEVICE)
    return base.to(dtype).repeat(-(-count // 7), 1)[:count]


def samples(count: int) -> torch.Tensor:
    """Row numbers: the first, the last, some in between and those around 2^31 bytes."""
    spread = torch.linspace(0, count - 1, 301, dtype=torch.float64).long()
    return spread.to(DEVICE)


def test_activations() -> None:
    """CHECKLIST 2, 5: M * K past 2^31, M = 65 537."""
    m, n, k = 65_537, 72, 32_832
    assert m * k > FAR
    x = rows(m, k, torch.int8)
    problem = random_problem(7, n, k)
    problem.x = x[:7]
    expected = problem.accumulator()
    scale = torch.ones(m, device=DEVICE)
    y = liquidgemm.gemm(x, scale, problem.weight, problem.weight_scale, None, torch.int32)
    assert_equal(y, expected.repeat(-(-m // 7), 1)[:m], "gemm")


def test_quantization() -> None:
    """CHECKLIST 5, 8: M * K past 2^31."""
    m, k = 65_537, 32_832
    x = rows(m, k, torch.bfloat16)
    expected_x8, expected_scale = liquidgemm.quantize_activation(x[:7])
    x8, scale = liquidgemm.quantize_activation(x)
    at = samples(m)
    assert_equal(scale[at], expected_scale[at % 7], "scale")
    assert_equal(x8[at], expected_x8[at % 7], "x8")


def test_weights() -> None:
    """CHECKLIST 5: N * K / 2 past 2^31 bytes; five panels, over and over; every plan."""
    panels, blocks = 1025, 1025
    assert panels * blocks * 2048 > FAR
    n, k = panels * 64, blocks * 64
    generator = torch.Generator(DEVICE).manual_seed(0)
    *logical, w8 = random_weight(5 * 64, k, generator)
    weight = liquidgemm.pack_weight(*logical).repeat(panels // 5, 1, 1)
    assert weight.shape[0] == panels
    x = rows(3, k, torch.int8)
    expected = (x.double() @ w8.double().T).to(torch.int32).repeat(1, panels // 5)
    ones = torch.ones(n, device=DEVICE)
    for plan, name in enumerate(plan_names()):
        y = testing.gemm_with_plan(x, ones[:3], weight, ones, None, torch.int32, plan, 0)
        assert_equal(y, expected, name)


def test_packing() -> None:
    """CHECKLIST 5: pack and unpack more than 2^31 bytes."""
    n, groups = 65_600, 1025
    assert n * groups * 32 > FAR
    bytes_ = rows(n, groups * 32, torch.int8).view(torch.uint8)
    qscale = rows(n, groups, torch.int8).view(torch.uint8) % 9
    qoffset = rows(n, groups, torch.int8).view(torch.uint8) % 121
    packed = liquidgemm.pack_weight(bytes_, qscale, qoffset)
    for back, original in zip(
        liquidgemm.unpack_weight(packed, n), (bytes_, qscale, qoffset), strict=True
    ):
        assert torch.equal(back, original)


def test_outputs() -> None:
    """CHECKLIST 2, 5: M * N past 2^31; every plan that is made for many tokens."""
    m, n, k = 65_537, 32_840, 64
    assert m * n > FAR
    base = random_problem(7, n, k)
    x, scale = base.x.repeat(9363, 1)[:m], base.x_scale.repeat(9363)[:m]
    expected = base.output(torch.bfloat16)
    at = samples(m)
    for plan, name in enumerate(plan_names()):
        if int(name.split("_")[0][1:]) < 64:
            continue
        y = testing.gemm_with_plan(
            x, scale, base.weight, base.weight_scale, None, torch.bfloat16, plan, 0
        )
        assert_equal(y[at], expected[at % 7], name)
        del y
    y = liquidgemm.gemm(x, scale, base.weight, base.weight_scale)
    assert_equal(y[at], expected[at % 7], "the heuristic's choice")
