"""Activation quantization and `linear` on the GPU against the CPU, which the CPU tests verify."""

import pytest
import torch
from problems import DEVICE, assert_equal, hard_rows, random_problem

import liquidgemm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 8, 64, 65, 576, 1000, 4096, 8192, 14336, 28672, 65536])
def test_equals_the_cpu(k: int, dtype: torch.dtype) -> None:
    """CHECKLIST 8: every bit, whatever the row."""
    x = hard_rows(k, dtype)
    for rows in (x, x.repeat(4, 1), x.repeat(64, 1)):  # different numbers of rows, and of CTAs each
        x8, scale = liquidgemm.quantize_activation(rows.to(DEVICE))
        expected_x8, expected_scale = liquidgemm.quantize_activation(rows)
        assert_equal(scale.cpu(), expected_scale, f"scale {k=} {dtype}")
        assert_equal(x8.cpu(), expected_x8, f"x8 {k=} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_divides_as_ieee(dtype: torch.dtype) -> None:
    """CHECKLIST 8: random bit patterns, so scales of every size and quotients next to ties."""
    generator = torch.Generator().manual_seed(0)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    x = torch.randint(info.min, info.max, (20_000, 64), generator=generator).to(integer).view(dtype)
    x = torch.where(x.isfinite(), x, 1)
    near = torch.randn(20_000, 64, generator=generator)  # rows whose values are of one size
    near *= 2.0 ** torch.randint(-140, 120, (20_000, 1), generator=generator)
    near[:, 0] = near[:, 1:].abs().amax(1) * torch.rand(20_000, generator=generator)
    for rows in (x, near.to(dtype)):
        x8, scale = liquidgemm.quantize_activation(rows.to(DEVICE))
        expected_x8, expected_scale = liquidgemm.quantize_activation(rows)
        assert_equal(scale.cpu(), expected_scale, f"scale {dtype}")
        assert_equal(x8.cpu(), expected_x8, f"x8 {dtype}")


def test_no_rows() -> None:
    """CHECKLIST 8."""
    x8, scale = liquidgemm.quantize_activation(torch.empty(0, 64, device=DEVICE))
    assert (x8.shape, scale.shape) == ((0, 64), (0,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 72, 576), (17, 640, 1000), (200, 136, 4096), (7, 20000, 2100), (31, 4104, 4096)],
)
def test_linear_is_quantize_and_gemm(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    problem = random_problem(m, n, k)
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    x8, scale = liquidgemm.quantize_activation(x)
    for bias in (None, problem.bias, problem.bias.to(dtype)):
        expected = liquidgemm.gemm(x8, scale, problem.weight, problem.weight_scale, bias, dtype)
        actual = liquidgemm.linear(x, problem.weight, problem.weight_scale, bias)
        assert_equal(actual, expected, f"{m=} {n=} {k=} {dtype}")
        on_cpu = liquidgemm.linear(
            x.cpu(),
            problem.weight.cpu(),
            problem.weight_scale.cpu(),
            None if bias is None else bias.cpu(),
        )
        assert_equal(actual.cpu(), on_cpu, f"CPU {m=} {n=} {k=} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_linear(dtype: torch.dtype) -> None:
    """CHECKLIST 7: layouts, leading dimensions, stride 0, inference tensors and gradients."""
    problem = random_problem(24, 136, 200)
    weight = (problem.weight, problem.weight_scale, problem.bias)
    x = torch.randn(24, 200, device=DEVICE).to(dtype)
    expected = liquidgemm.linear(x, *weight)
    flat = torch.zeros(24 * 200 + 1, dtype=dtype, device=DEVICE)
    flat[1:] = x.flatten()
    with torch.inference_mode():
        inference = x.clone()
    views = {
        "transposed": x.T.contiguous().T,
        "every other row": x.repeat_interleave(2, 0)[::2],
        "strided": x.repeat_interleave(3, 1)[:, ::3],
        "odd offset": flat[1:].view(24, 200),
        "inference": inference,
        "requires_grad": x.clone().requires_grad_(),
    }
    for name, view in views.items():
        assert_equal(liquidgemm.linear(view, *weight).detach(), expected, name)
        x8, scale = liquidgemm.quantize_activation(view.detach())
        assert_equal(x8, liquidgemm.quantize_activation(x)[0], name)
        assert_equal(scale, liquidgemm.quantize_activation(x)[1], name)
    batched = liquidgemm.linear(x.view(2, 3, 4, 200).transpose(0, 2), *weight)
    assert_equal(batched, expected.view(2, 3, 4, 136).transpose(0, 2), "leading dimensions")
    assert_equal(liquidgemm.linear(x[3], *weight), expected[3], "one token")
    same = liquidgemm.linear(x[:1].expand(5, 200), *weight)
    assert_equal(same, expected[:1].expand(5, 136), "stride 0")


def test_gradient() -> None:
    """CHECKLIST 7: that of the dequantized weight, as on the CPU."""
    problem = random_problem(9, 72, 200)
    on_gpu = torch.randn(9, 200, device=DEVICE).requires_grad_()
    on_cpu = on_gpu.detach().cpu().requires_grad_()
    grad = torch.randn(9, 72)
    liquidgemm.linear(on_gpu, problem.weight, problem.weight_scale).backward(grad.to(DEVICE))
    liquidgemm.linear(on_cpu, problem.weight.cpu(), problem.weight_scale.cpu()).backward(grad)
    exact = grad.double() @ (problem.w8.double() * problem.weight_scale.double()[:, None]).cpu()
    error = (on_gpu.grad.cpu().double() - exact).norm()
    allowed = (on_cpu.grad.double() - exact).norm()
    assert error <= 2 * allowed + 1e-6 * exact.norm(), (error, allowed)


def test_nan_stays_in_its_row() -> None:
    """CHECKLIST 8: a row with a NaN spoils its own outputs only."""
    problem = random_problem(4, 64, 128)
    x = torch.randn(4, 128, device=DEVICE)
    clean = liquidgemm.linear(x, problem.weight, problem.weight_scale)
    x[2, 5] = float("nan")
    y = liquidgemm.linear(x, problem.weight, problem.weight_scale)
    assert y[2].isnan().all()
    for i in (0, 1, 3):
        assert_equal(y[i], clean[i], f"row {i}")


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_packing_on_gpu_and_cpu_agree(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    qweight = torch.randint(0, 256, (n, 160), generator=generator).to(torch.uint8)
    qscale = torch.randint(0, 8, (n, 5), generator=generator).to(torch.uint8)
    qoffset = torch.randint(0, 120, (n, 5), generator=generator).to(torch.uint8)
    on_cpu = liquidgemm.pack_weight(qweight, qscale, qoffset)
    on_gpu = liquidgemm.pack_weight(*(t.to(DEVICE) for t in (qweight, qscale, qoffset)))
    assert_equal(on_gpu.cpu(), on_cpu, "packed")
    for back, original in zip(
        liquidgemm.unpack_weight(on_gpu, n), (qweight, qscale, qoffset), strict=True
    ):
        assert_equal(back.cpu(), original, "unpacked")
