"""A grid, or a part of the GPU, of few SMs: everything finishes, with the same bits."""

import pytest
from fresh_process import run_python
from problems import assert_equal, random_problem, run

from liquidgemm.ops.plans import plan_names

PLANS = list(enumerate(plan_names()))


@pytest.mark.parametrize("num_sms", [1, 2, 8, 16, 66])
@pytest.mark.parametrize(("plan", "name"), PLANS, ids=lambda v: str(v))
def test_limited_grid(plan: int, name: str, num_sms: int) -> None:
    """CHECKLIST 9, 14: many tiles per CTA, for every plan."""
    problem = random_problem(100, 1928, 2880)
    expected = problem.accumulator()
    y = run(problem, plan=plan, num_sms=num_sms)
    assert_equal(y, expected, f"{name} num_sms={num_sms}")


GREEN_CONTEXT = """
import sys
import torch
from cuda.bindings import driver
import liquidgemm
from liquidgemm.ops.plans import plan_names

def check(result):
    error, *values = result
    assert error == driver.CUresult.CUDA_SUCCESS, error
    return values[0] if len(values) == 1 else values

cases = {name: t.to("cuda") for name, t in torch.load(sys.argv[1]).items()}
torch.cuda.synchronize()
device = check(driver.cuDeviceGet(0))
kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
whole = check(driver.cuDeviceGetDevResource(device, kind))
groups, _, _ = check(driver.cuDevSmResourceSplitByCount(1, whole, 0, int(sys.argv[2])))
descriptor = check(driver.cuDevResourceGenerateDesc([groups[0]], 1))
flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
context = check(driver.cuGreenCtxCreate(descriptor, device, flags))
blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
stream = torch.cuda.ExternalStream(int(check(driver.cuGreenCtxStreamCreate(context, blocking, 0))))

mark = torch.cuda._compile_kernel(
    'extern "C" __global__ void mark(int* used) {'
    ' int sm; asm volatile("mov.u32 %0, %smid;" : "=r"(sm)); used[sm] = 1; }', "mark")
used = torch.zeros(1024, dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
mark((20000, 1, 1), (32, 1, 1), [used], stream=stream)
stream.synchronize()
sms = groups[0].sm.smCount
assert int(used.sum()) == sms < whole.sm.smCount, (int(used.sum()), sms)

testing = torch.ops.liquidgemm_testing
x, x_scale, weight, scale = (cases[name] for name in ("x", "x_scale", "weight", "scale"))
with torch.cuda.stream(stream):
    for m in (1, 17, 100):
        for i in range(20):
            y = liquidgemm.gemm(x[:m], x_scale[:m], weight, scale, None, torch.int32)
        stream.synchronize()
        assert torch.equal(y, cases["y"][:m]), m
    for plan, name in enumerate(plan_names()):
        y = testing.gemm_with_plan(x, x_scale, weight, scale, None, torch.int32, plan, 0)
        stream.synchronize()
        assert torch.equal(y, cases["y"]), name
print("same on", sms)
"""


@pytest.mark.parametrize("num_sms", [8, 16, 66])
def test_green_context(num_sms: int, tmp_path) -> None:
    """CHECKLIST 14: a green context, while the device says that it has more; with a watchdog."""
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    import torch

    problem = random_problem(100, 1928, 2880)
    cases = {
        "x": problem.x,
        "x_scale": problem.x_scale,
        "weight": problem.weight,
        "scale": problem.weight_scale,
        "y": problem.accumulator(),
    }
    torch.save({name: t.cpu() for name, t in cases.items()}, tmp_path / "cases.pt")
    result = run_python(GREEN_CONTEXT, tmp_path / "cases.pt", num_sms, timeout=120)
    assert result.stdout.startswith("same on"), result.stdout + result.stderr
