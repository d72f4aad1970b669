"""CUDA graphs: capture, replay, and the graphs of torch.compile."""

import pytest
import torch
from fresh_process import run_python
from problems import DEVICE, assert_equal, random_problem, testing

import liquidgemm
from liquidgemm.ops.plans import plan_names

CAPTURE_FIRST = """
import sys
import torch
import liquidgemm
from liquidgemm.ops.plans import plan_names

cases = torch.load(sys.argv[1])
x, weight, scale = (cases[name].to("cuda") for name in ("x", "weight", "scale"))
x8, x_scale = cases["x8"].to("cuda"), cases["x_scale"].to("cuda")
testing = torch.ops.liquidgemm_testing

def capture(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function()
    y.fill_(float("nan"))
    graph.replay()
    return y.cpu()

# No kernel of ours has run: each is loaded and launched for the first time under capture.
for plan, name in enumerate(plan_names()):
    y = capture(lambda: testing.gemm_with_plan(
        x8, x_scale, weight, scale, None, torch.bfloat16, plan, 0))
    assert torch.equal(y, cases["y"]), name
assert torch.equal(capture(lambda: liquidgemm.gemm(x8, x_scale, weight, scale)), cases["y"])
assert torch.equal(capture(lambda: liquidgemm.linear(x, weight, scale)), cases["linear"])
print("same")
"""

CAPTURE_LINEAR_FIRST = """
import sys
import torch
import liquidgemm

cases = torch.load(sys.argv[1])
x, weight, scale = (cases[name].to("cuda") for name in ("x", "weight", "scale"))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = liquidgemm.linear(x, weight, scale)
y.fill_(float("nan"))
graph.replay()
assert torch.equal(y.cpu(), cases["linear"])
print("same")
"""


@pytest.mark.parametrize("code", [CAPTURE_FIRST, CAPTURE_LINEAR_FIRST], ids=["gemm", "linear"])
def test_capture_before_any_eager_call(code: str, tmp_path) -> None:
    """CHECKLIST 12: in a fresh process, with a weight packed on the CPU."""
    problem = random_problem(9, 200, 1088)
    weight, scale = problem.weight.cpu(), problem.weight_scale.cpu()
    x = torch.randn(9, 1088, generator=torch.Generator().manual_seed(0)).bfloat16()
    x8, x_scale = liquidgemm.quantize_activation(x)
    cases = {
        "x": x,
        "x8": x8,
        "x_scale": x_scale,
        "weight": weight,
        "scale": scale,
        "y": liquidgemm.gemm(x8, x_scale, weight, scale),
        "linear": liquidgemm.linear(x, weight, scale),
    }
    torch.save(cases, tmp_path / "cases.pt")
    result = run_python(code, tmp_path / "cases.pt")
    assert result.stdout.strip() == "same", result.stdout + result.stderr


@pytest.mark.parametrize("m", [1, 16, 100, 300])
def test_replay_with_changed_inputs(m: int) -> None:
    """CHECKLIST 9, 12: every plan; poisoned outputs; in a graph as out of it."""
    fresh = [random_problem(m, 1024, 1088, seed) for seed in range(3)]
    problem = fresh[0]
    x, x_scale = torch.zeros_like(problem.x), torch.zeros_like(problem.x_scale)
    names = plan_names()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [
            testing.gemm_with_plan(
                x, x_scale, problem.weight, problem.weight_scale, None, torch.bfloat16, c, 0
            )
            for c in range(len(names))
        ]
    for inputs in fresh:
        x.copy_(inputs.x)
        x_scale.copy_(inputs.x_scale)
        eager = liquidgemm.gemm(x, x_scale, problem.weight, problem.weight_scale)
        for y in outputs:
            y.fill_(float("nan"))
        graph.replay()
        for y, name in zip(outputs, names, strict=True):
            assert_equal(y, eager, f"{name} {m=}")


def test_a_graph_replayed_back_to_back() -> None:
    """CHECKLIST 12, 13: launches inside a graph overlap as well, and feed one another."""
    problem = random_problem(8, 1088, 1088)
    x = torch.randn(8, 1088, device=DEVICE).bfloat16()

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = liquidgemm.linear(x, problem.weight, problem.weight_scale)
            x = x / x.float().norm(dim=1, keepdim=True).bfloat16()
        return x

    expected = chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for i in range(50):
        y.fill_(float("nan"))
        graph.replay()
        assert_equal(y, expected, f"replay {i}")


@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_torch_compile(mode: str) -> None:
    """CHECKLIST 12, 18: the graphs that torch.compile captures; the same bits as without it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        liquidgemm.LiquidLinear.from_linear(torch.nn.Linear(200, 136)),
        torch.nn.ReLU(),
        liquidgemm.LiquidLinear.from_linear(torch.nn.Linear(136, 72, bias=False)),
    ).to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    with torch.inference_mode():
        for i in range(6):  # the third call is the first to be replayed
            x = torch.randn(5, 200, device=DEVICE)
            assert_equal(compiled(x).clone(), model(x), f"call {i}")
