"""Gates of 16 bits in the product: every one of them, by every plan."""

import pytest
import torch
from grouped import GROUPED_PLANS
from problems import DEVICE, assert_equal, poison, testing

ops = torch.ops.liquidgemm
GATED = ("silu_mul", "gelu_tanh_mul", "swiglu_clamped")
EVERY = 1 << 16


def values(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of 16 bits, infinities and NaNs among them."""
    return torch.arange(EVERY, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.fixture(scope="module")
def expected() -> dict:
    """By the CPU, whose operations before the first rounding to 16 bits are all exact ones."""
    return {}


@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("plan", "name"), GROUPED_PLANS, ids=lambda v: str(v))
def test_every_gate(
    expected: dict, plan: int, name: str, dtype: torch.dtype, activation: str
) -> None:
    """Tokens of zeros, so that gates and ups are the biases. CHECKLIST 31."""
    generator = torch.Generator().manual_seed(0)
    every = values(dtype).float()
    for what, up in (
        ("one", torch.ones(EVERY)),
        ("normal", torch.randn(EVERY, generator=generator).to(dtype).float()),
        ("every", every[torch.randperm(EVERY, generator=generator)]),
    ):
        n = 2 * EVERY
        bias = torch.stack((every.view(-1, 8), up.view(-1, 8)), 1).reshape(1, n)
        operands = (
            torch.zeros(3, 64, dtype=torch.int8),
            torch.ones(3),
            torch.zeros(1, n // 64, 1, 2176, dtype=torch.uint8),
            torch.ones(1, n),
            torch.tensor([0, 3], dtype=torch.int32),
            bias,
            dtype,
            activation,
        )
        key = (dtype, activation, what)
        if key not in expected:
            expected[key] = ops.grouped_gemm(*operands)
        poison((3, EVERY), dtype)
        on_gpu = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in operands]
        found = testing.grouped_gemm_with_plan(*on_gpu, plan, 0)
        assert_equal(found.cpu(), expected[key], f"{name} {dtype} {activation}, up {what}")
