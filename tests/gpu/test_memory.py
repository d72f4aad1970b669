"""Nothing grows, and the host never waits for the GPU."""

import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from problems import DEVICE, assert_equal, random_problem, testing

import liquidgemm
from liquidgemm.ops.plans import plan_names

CALLS = 100_000
HOST_GROWTH = 16 << 20  # of the whole process; a leak of 200 bytes per call would exceed it


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def device_bytes() -> tuple[int, int, int]:
    """Allocated and reserved by torch, and taken from the driver by this process and others."""
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free


def test_no_growth_over_many_calls() -> None:
    """CHECKLIST 21: 10^5 calls of `linear`, which is two kernels and all of the host's code."""
    problem = random_problem(3, 72, 200)
    x = torch.randn(3, 200, device=DEVICE)
    expected = liquidgemm.linear(x, problem.weight, problem.weight_scale, problem.bias)

    def call(times: int) -> None:
        for _ in range(times):
            y = liquidgemm.linear(x, problem.weight, problem.weight_scale, problem.bias)
        assert_equal(y, expected, "the last call")

    call(2000)
    gc.collect()
    device, host = device_bytes(), resident_bytes()
    call(CALLS)
    gc.collect()
    assert device_bytes() == device
    assert resident_bytes() - host < HOST_GROWTH


@pytest.fixture
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait(no_synchronization) -> None:
    """CHECKLIST 21: every call returns while a kernel before it still runs.

    That kernel takes seconds. torch's own check, which the fixture turns on, sees what goes through
    torch; that the kernel is still running afterwards covers the rest.
    """
    problem = random_problem(24, 136, 592)
    x = torch.randn(24, 592, device=DEVICE).bfloat16()
    shifted = torch.zeros(24 * 592 + 3, dtype=torch.int8, device=DEVICE)[3:].view(24, 592)
    shifted.copy_(problem.x)  # a layout that has to be copied first
    weight = (problem.weight, problem.weight_scale)

    def calls() -> list[torch.Tensor]:
        outputs = [
            liquidgemm.linear(x, *weight, problem.bias),
            liquidgemm.gemm(problem.x, problem.x_scale, *weight),
            liquidgemm.gemm(shifted, problem.x_scale, *weight),
            liquidgemm.linear(x.T.contiguous().T, *weight, problem.bias),
        ]
        outputs += liquidgemm.quantize_activation(x)
        for plan in range(len(plan_names())):
            outputs.append(
                testing.gemm_with_plan(problem.x, problem.x_scale, *weight, None, None, plan, 0)
            )
        return outputs

    expected = calls()  # kernels are loaded when they are first launched
    kept = calls()  # memory for two sets of outputs
    del kept
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    torch.cuda._sleep(4_000_000_000)
    outputs = calls()
    still_running = not torch.cuda.current_stream().query()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert still_running, "a call waited for the kernel before it"
    for i, (y, want) in enumerate(zip(outputs, expected, strict=True)):
        assert_equal(y, want, f"output {i}")
