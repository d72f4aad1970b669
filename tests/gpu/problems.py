"""Random problems with exact references for the GPU tests."""

from dataclasses import dataclass

import torch

import liquidgemm
from liquidgemm.formats.liquidquant import pack_codes
from liquidgemm.ops.plans import plan_names

DEVICE = "cuda"
testing = torch.ops.liquidgemm_testing


@dataclass
class Problem:
    """One GEMM: `x` int8 [M, K], `w8` int8 [N, K] in logical form, and what the ops take."""

    x: torch.Tensor
    x_scale: torch.Tensor
    w8: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.x.shape[0], self.w8.shape[0], self.x.shape[1]

    def accumulator(self) -> torch.Tensor:
        """int32 [M, N]; exact, since float64 holds every partial sum."""
        return (self.x.double() @ self.w8.double().T).to(torch.int32)

    def output(self, dtype: torch.dtype, bias: bool = False) -> torch.Tensor:
        """The documented epilogue, one fp32 rounding per operation."""
        y = self.accumulator().float() * self.x_scale[:, None] * self.weight_scale
        return (y + self.bias.float() if bias else y).to(dtype)


def random_weight(
    n: int, k: int, generator: torch.Generator, bits: int = 4, group: int = 64
) -> tuple[torch.Tensor, ...]:
    """Feasible logical tensors that reach both ends of the int8 range, and their int8 weights."""
    blocks = -(-k // 64)
    device = generator.device
    largest = 2**bits - 1

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    groups = blocks * 64 // group
    qscale = draw(1, 255 // largest + 1, n, groups)
    span = 255 - largest * qscale
    qoffset = (torch.rand(n, groups, generator=generator, device=device) * (span + 1)).long()
    codes = draw(0, largest + 1, n, blocks * 64)
    w8 = codes * qscale.repeat_interleave(group, 1) + qoffset.repeat_interleave(group, 1) - 128
    logical = [t.to(torch.uint8) for t in (pack_codes(codes, bits) & 255, qscale, qoffset)]
    return *logical, w8[:, :k].to(torch.int8)


def random_problem(
    m: int, n: int, k: int, seed: int = 0, bits: int = 4, group: int = 64
) -> Problem:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    if bits == 8:
        whole = -(-k // 64) * 64
        w8 = torch.randint(-128, 128, (n, whole), generator=generator, device=DEVICE)
        w8 = w8.to(torch.int8)
        weight, w8 = liquidgemm.pack_int8_weight(w8), w8[:, :k]
    else:
        *logical, w8 = random_weight(n, k, generator, bits, group)
        weight = liquidgemm.pack_weight(*logical)
    x = torch.randint(-127, 128, (m, k), generator=generator, device=DEVICE).to(torch.int8)
    return Problem(
        x=x,
        x_scale=torch.rand(m, generator=generator, device=DEVICE) + 0.01,
        w8=w8,
        weight=weight,
        weight_scale=torch.rand(n, generator=generator, device=DEVICE) + 0.01,
        bias=torch.randn(n, generator=generator, device=DEVICE),
    )


def hard_rows(k: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that break quantizers: zeros, denormals, ties, outliers, infinities and NaN."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(12, k, generator=generator)
    x[1] = 0
    x[2] *= torch.finfo(dtype).smallest_normal / 64
    x[3, k // 2] = 1e4 * x[3].abs().max()
    x[4, 0] = float("inf")
    x[5, k - 1] = float("nan")
    x[6] = torch.arange(k) % 255 - 127 + 0.5
    x[6, 0] = 127
    x[7] = 1e-45
    x[8] = -x[8].abs()
    x[9, k // 3] = float("-inf")
    x[10] = torch.finfo(dtype).max
    return x.to(dtype)


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leaves garbage in the block of memory that the next output of this size gets."""
    if dtype.is_floating_point:
        torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    else:
        torch.full(shape, -0x21524111, dtype=dtype, device=DEVICE)


def run(
    problem: Problem,
    dtype: torch.dtype = torch.int32,
    bias: bool = False,
    plan: int | None = None,
    num_sms: int = 0,
    poisoned: bool = True,
) -> torch.Tensor:
    """The kernel's result; `plan` None takes the heuristic's choice."""
    if poisoned:  # a launch of its own: it keeps two launches of the kernel apart
        m, n, _ = problem.sizes
        poison((m, n), dtype)
    arguments = (
        problem.x,
        problem.x_scale,
        problem.weight,
        problem.weight_scale,
        problem.bias if bias else None,
        dtype,
    )
    if plan is None:
        return torch.ops.liquidgemm.gemm(*arguments)
    return testing.gemm_with_plan(*arguments, plan, num_sms)


# Plans that can quantize their activations: the tiles of eight tokens.
QUANTIZING = [c for c in enumerate(plan_names()) if c[1].startswith("t8_")]


def linear_in_two(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """`linear` with the problem's weight and bias as a quantizer and a GEMM."""
    x8, scale = liquidgemm.quantize_activation(x)
    return liquidgemm.gemm(
        x8, scale, problem.weight, problem.weight_scale, problem.bias, out_dtype=x.dtype
    )


def linear_in_one(problem: Problem, x: torch.Tensor, plan: int, num_sms: int = 0) -> torch.Tensor:
    """The same as a GEMM that quantizes: one of `QUANTIZING`."""
    return testing.linear_with_plan(
        x, problem.weight, problem.weight_scale, problem.bias, plan, num_sms
    )


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of its size: unlike numbers, -0 and 0 differ, and NaN equals NaN."""
    if not t.is_floating_point():
        return t
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.view(integer)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal to the bit, except that a NaN is a NaN; says where and by how much if not."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype} != {expected.dtype}"
    wrong = (bits(actual) != bits(expected)) & ~(actual.isnan() & expected.isnan())
    if not wrong.any():
        return
    at = tuple(wrong.nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: "
        f"got {actual[at].item()}, expected {expected[at].item()}"
    )
