"""torch.library and torch.compile on CUDA tensors; the CPU tests cover more cases."""

import subprocess

import pytest
import torch
from fresh_process import run_python
from problems import DEVICE, assert_equal, random_problem
from torch._dynamo.testing import CompileCounterWithBackend

import liquidgemm

OPS = torch.ops.liquidgemm


def op_samples() -> list[tuple[str, tuple]]:
    problem = random_problem(5, 72, 200)
    weight = (problem.weight, problem.weight_scale)
    x = torch.randn(2, 3, 200, device=DEVICE)
    logical = liquidgemm.unpack_weight(problem.weight, 72)
    return [
        ("quantize_activation", (x.bfloat16().transpose(0, 1),)),
        ("gemm", (problem.x, problem.x_scale, *weight)),
        ("gemm", (problem.x, problem.x_scale, *weight, problem.bias, torch.float16)),
        ("linear", (x.half(), *weight, problem.bias.half())),
        ("linear", (x.clone().requires_grad_(), *weight, problem.bias)),
        ("pack_weight", logical),
        ("unpack_weight", (problem.weight, 72)),
        ("dequantize_packed", (*weight, 200, torch.bfloat16)),
    ]


def test_opcheck() -> None:
    """CHECKLIST 18: schema, fake tensors, autograd registration, AOT dispatch."""
    for op, arguments in op_samples():
        torch.library.opcheck(getattr(OPS, op).default, arguments)


def test_compile_once_for_any_number_of_tokens() -> None:
    """CHECKLIST 18: inductor, dynamic M, one compilation, the same bits."""
    problem = random_problem(1, 520, 200)  # nine panels: no size that x has

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(liquidgemm.linear(x, problem.weight, problem.weight_scale, problem.bias))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for m in (3, 2, 17, 64, 257):
        x = torch.randn(m, 200, device=DEVICE)
        assert_equal(compiled(x), function(x), f"{m=}")
    assert counter.frame_count == 1


LOAD_EXPORTED = """
import sys, torch, liquidgemm
data = torch.load(sys.argv[2])
if sys.argv[1].endswith(".aoti.pt2"):
    run = torch._inductor.aoti_load_package(sys.argv[1])
else:
    run = torch.export.load(sys.argv[1]).module()
for x, y in data:
    assert torch.equal(run(x), y), x.shape
print("same")
"""

LOAD_PLAIN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
x = torch.ones(4, 8, device="cuda")
assert torch.equal(run(x), x + 1)
print("same")
"""


@pytest.fixture(scope="module")
def aot_inductor_works(tmp_path_factory) -> None:
    """Skips where a package without any of our ops does not survive a fresh process either.

    With torch 2.11.0+cu130 on an H100 that process dies in torch's own loader, or hangs in it.
    """

    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    file = str(tmp_path_factory.mktemp("aoti") / "plain.aoti.pt2")
    program = torch.export.export(Plain(), (torch.ones(4, 8, device=DEVICE),))
    torch._inductor.aoti_compile_and_package(program, package_path=file)
    try:
        result = run_python(LOAD_PLAIN, file, timeout=60)
        said = f"exit code {result.returncode}"
    except subprocess.TimeoutExpired:
        pytest.skip(f"torch {torch.__version__} hangs while it loads a package without our ops")
    if result.stdout.strip() != "same":
        pytest.skip(f"torch {torch.__version__} cannot load a package without our ops: {said}")


def test_export_and_load_in_a_fresh_process(tmp_path) -> None:
    """CHECKLIST 18: with a dynamic number of tokens."""
    exported_model_is_the_same(tmp_path, aot_inductor=False)


@pytest.mark.usefixtures("aot_inductor_works")
def test_aot_inductor_package_in_a_fresh_process(tmp_path) -> None:
    """CHECKLIST 18: likewise."""
    exported_model_is_the_same(tmp_path, aot_inductor=True)


def exported_model_is_the_same(tmp_path, aot_inductor: bool) -> None:
    layer = liquidgemm.LiquidLinear.from_linear(torch.nn.Linear(200, 72))
    model = torch.nn.Sequential(layer, torch.nn.ReLU()).eval().to(DEVICE)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        example = (torch.randn(4, 200, device=DEVICE),)
        program = torch.export.export(model, example, dynamic_shapes=({0: tokens},))
        file = str(tmp_path / ("model.aoti.pt2" if aot_inductor else "model.pt2"))
        if aot_inductor:
            torch._inductor.aoti_compile_and_package(program, package_path=file)
        else:
            torch.export.save(program, file)
        inputs = [torch.randn(m, 200, device=DEVICE) for m in (2, 9, 100)]
        torch.save([(x, model(x)) for x in inputs], tmp_path / "data.pt")
    result = run_python(LOAD_EXPORTED, file, tmp_path / "data.pt")
    said = f"exit code {result.returncode}: {result.stdout}{result.stderr}"
    assert result.stdout.strip() == "same", said
