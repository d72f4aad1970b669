"""Random grouped problems with exact references."""

from dataclasses import dataclass

import torch
from problems import DEVICE, poison, random_weight, testing

import liquidgemm
from liquidgemm.ops.plans import grouped_plan_names

GROUPED_PLANS = list(enumerate(grouped_plan_names()))


@dataclass
class GroupedProblem:
    """`x` int8 [R, K] sorted by expert, `w8` int8 [E, N, K], and what the op takes."""

    x: torch.Tensor
    x_scale: torch.Tensor
    w8: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor
    offsets: torch.Tensor
    counts: list[int]

    @property
    def written(self) -> int:
        """Rows that belong to an expert; those behind them are not written."""
        return sum(self.counts)

    def accumulator(self) -> torch.Tensor:
        """int32 [written, N]; exact, since float64 holds every partial sum."""
        rows = self.x[: self.written].double().split(self.counts)
        sums = [x @ w.double().T for x, w in zip(rows, self.w8, strict=True)]
        return torch.cat(sums).to(torch.int32)

    def expert_of_row(self) -> torch.Tensor:
        counts = torch.tensor(self.counts, device=DEVICE)
        return torch.repeat_interleave(torch.arange(len(counts), device=DEVICE), counts)

    def output(self, dtype: torch.dtype, bias: bool = False) -> torch.Tensor:
        """The documented epilogue, one fp32 rounding per operation."""
        expert = self.expert_of_row()
        y = self.accumulator().float() * self.x_scale[: self.written, None]
        y = y * self.weight_scale[expert]
        return (y + self.bias[expert].float() if bias else y).to(dtype)


def set_counts(problem: GroupedProblem, counts: list[int]) -> None:
    """Another routing of the same rows, in the same memory."""
    assert len(counts) == len(problem.counts)
    assert sum(counts) <= problem.x.shape[0]
    problem.counts = counts
    problem.offsets.copy_(torch.tensor([0, *counts]).cumsum(0))


def grouped_problem(
    counts: list[int], n: int, k: int, beyond: int = 0, seed: int = 0
) -> GroupedProblem:
    """`beyond`: rows behind those of the last expert."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    experts, rows = len(counts), sum(counts) + beyond
    logical = [random_weight(n, k, generator) for _ in range(experts)]
    x = torch.randint(-127, 128, (rows, k), generator=generator, device=DEVICE).to(torch.int8)
    problem = GroupedProblem(
        x=x,
        x_scale=torch.rand(rows, generator=generator, device=DEVICE) + 0.01,
        w8=torch.stack([w8 for *_, w8 in logical]),
        weight=torch.stack([liquidgemm.pack_weight(*tensors) for *tensors, _ in logical]),
        weight_scale=torch.rand(experts, n, generator=generator, device=DEVICE) + 0.01,
        bias=torch.randn(experts, n, generator=generator, device=DEVICE),
        offsets=torch.zeros(experts + 1, dtype=torch.int32, device=DEVICE),
        counts=counts,
    )
    set_counts(problem, counts)
    return problem


def run_grouped(
    problem: GroupedProblem,
    dtype: torch.dtype = torch.int32,
    bias: bool = False,
    plan: int | None = None,
    num_sms: int = 0,
    poisoned: bool = True,
    activation: str = "none",
) -> torch.Tensor:
    """The kernel's result, all of its rows; `plan` None takes the library's choice."""
    n = problem.w8.shape[1] // (1 if activation == "none" else 2)
    if poisoned:
        poison((problem.x.shape[0], n), dtype)
    arguments = (
        problem.x,
        problem.x_scale,
        problem.weight,
        problem.weight_scale,
        problem.offsets,
        problem.bias if bias else None,
        dtype,
        activation,
    )
    if plan is None:
        return torch.ops.liquidgemm.grouped_gemm(*arguments)
    return testing.grouped_gemm_with_plan(*arguments, plan, num_sms)


def routings(tokens: int) -> dict[str, list[int]]:
    """Rows per expert that try every way in which tiles of this height can end."""
    return {
        "one row": [1],
        "one expert of many": [0, 0, 0, 0, 0, 3, 0],
        "none": [0, 0, 0],
        "ones": [1] * 9,
        "first and last are empty": [0, 2, 0, 5, 0],
        "around a tile": [tokens - 1, tokens, tokens + 1, 1],
        "several tiles": [3, 2 * tokens + 3, 0, 8 * tokens + 9],
        "all in the last": [0, 0, 0, 0, 3 * tokens + 1],
        "all in the first": [3 * tokens + 2, 0, 0, 0],
        "many": [i * 7 % 5 for i in range(70)],
    }
