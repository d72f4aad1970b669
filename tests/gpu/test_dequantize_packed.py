"""Packed weights to floats on the GPU, and the gradient that is made of them."""

import pytest
import torch
from arena import SMALLEST, Arena
from problems import DEVICE, assert_equal, poison, random_problem
from torch import nn

from liquidgemm import LiquidLinear
from liquidgemm.ops._dequantize import dequantize_packed

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (64, 64), (70, 200), (65, 63), (200, 1090), (129, 579), (512, 4096)]
)
def test_dequantize_has_the_bits_of_its_formula(n: int, k: int, dtype: torch.dtype) -> None:
    """CHECKLIST 4: whole and cut blocks, aligned and odd rows, special scales."""
    problem = random_problem(1, n, k, seed=n + k)
    scale = problem.weight_scale * 1e-3
    special = torch.tensor([0.0, 1e-42, 3e38, float("inf"), float("nan"), 600.0])
    scale[: len(special)] = special[:n].to(DEVICE)
    expected = (problem.w8.float() * scale[:, None]).to(dtype)
    poison((n, k), dtype)
    actual = dequantize_packed(problem.weight, scale, k, dtype)
    assert actual.isnan().equal(expected.isnan())
    assert_equal(actual.nan_to_num(1, 2, 3), expected.nan_to_num(1, 2, 3), f"{n=} {k=} {dtype}")
    on_cpu = dequantize_packed(problem.weight.cpu(), scale.cpu(), k, dtype)
    assert_equal(actual.nan_to_num(1, 2, 3).cpu(), on_cpu.nan_to_num(1, 2, 3), "CPU")


def test_a_weight_at_any_address() -> None:
    """CHECKLIST 7: a packed weight that does not begin at a multiple of 16 bytes."""
    problem = random_problem(1, 70, 200)
    storage = torch.empty(problem.weight.numel() + 5, dtype=torch.uint8, device=DEVICE)
    odd = storage[5:].view_as(problem.weight).copy_(problem.weight)
    expected = dequantize_packed(problem.weight, problem.weight_scale, 200)
    assert_equal(dequantize_packed(odd, problem.weight_scale, 200), expected, "odd address")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1024, 1021])
def test_around_the_output_of_dequantize(k: int, dtype: torch.dtype) -> None:
    """CHECKLIST 6: guards around an output of cut blocks."""
    n = SMALLEST // (k * dtype.itemsize) + 65
    problem = random_problem(1, n, k)
    expected = (problem.w8.float() * problem.weight_scale[:, None]).to(dtype)
    arena = Arena(n * k * dtype.itemsize + SMALLEST)
    with arena.allocating():
        w = dequantize_packed(problem.weight, problem.weight_scale, k, dtype)
    arena.check(w, what=f"{n=} {k=} {dtype}")
    assert_equal(w, expected, f"{n=} {k=} {dtype}")
    del w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_that_of_the_dequantized_weight(dtype: torch.dtype) -> None:
    """CHECKLIST 27: to the bit the product with `LiquidLinear.dequantize`, in a graph as well."""
    layer = LiquidLinear.from_linear(nn.Linear(1000, 328)).to(DEVICE)
    x = torch.randn(5, 7, 1000, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn(5, 7, 328, device=DEVICE, dtype=dtype)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(layer(x), x, grad)[0]

    expected = grad @ layer.dequantize().to(dtype)
    assert_equal(gradient(), expected, f"{dtype}")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradient()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = gradient()
        captured.fill_(float("nan"))
        graph.replay()
    stream.synchronize()
    assert_equal(captured, expected, f"{dtype} in a graph")
