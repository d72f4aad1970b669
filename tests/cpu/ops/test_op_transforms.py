"""The ops under autograd, torch.library, torch.compile and torch.export."""

import pytest
import reference
import torch
from fresh_process import run_python
from gemm_case import Case
from torch._dynamo.testing import CompileCounterWithBackend

import liquidgemm
from liquidgemm import gemm, linear, pack_weight, quantize_activation, unpack_weight

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.liquidgemm


# Autograd.


@pytest.mark.parametrize("shape", [(200,), (5, 200), (2, 3, 200), (0, 200)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient(shape, dtype):
    """Straight through to x with the dequantized weight, and to the bias as a plain sum."""
    case = Case(1, 72, 200)
    x = torch.randn(shape).to(dtype).requires_grad_()
    bias = case.bias.clone().requires_grad_()
    y = linear(x, case.weight, case.weight_scale, bias)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    w8 = reference.decode(*case.logical)[:, :200]
    dequantized = w8.double() * case.weight_scale.double()[:, None]
    exact = grad.double() @ dequantized
    same_precision = (grad @ dequantized.to(dtype)).double()
    error, allowed = (x.grad.double() - exact).norm(), (same_precision - exact).norm()
    assert error <= 2 * allowed + 1e-6 * exact.norm(), (error, allowed)
    assert x.grad.dtype == dtype
    expected = grad.reshape(-1, 72).double().sum(0)
    assert (bias.grad - expected).norm() <= torch.finfo(dtype).eps * 8 * (1 + expected.norm())


def test_no_gradient_to_the_weight_scale():
    """An error: without one, torch.func.grad would take the missing gradient for zero."""
    case = Case(1, 72, 200)
    scale = case.weight_scale.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="linear is differentiable with respect to x and bias"):
        linear(torch.randn(3, 200), case.weight, scale).sum().backward()


def test_integer_ops_say_that_they_are_not_differentiable():
    case = Case(3, 72, 200)
    with pytest.raises(RuntimeError, match=r"gemm is not differentiable.*liquidgemm.linear"):
        case.gemm(x_scale=case.x_scale.clone().requires_grad_()).sum().backward()
    x = torch.randn(3, 200, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"quantize_activation is not differentiable"):
        quantize_activation(x)[1].sum().backward()


# torch.library, torch.compile, torch.export.


def op_samples():
    case = Case(5, 72, 200)
    weight = (case.weight, case.weight_scale)
    quantized = (case.x, case.x_scale, *weight)
    x = torch.randn(2, 3, 200)
    yield "quantize_activation", (x,)
    yield "quantize_activation", (x.bfloat16().transpose(0, 1),)
    yield "pack_weight", case.logical
    yield "unpack_weight", (case.weight, 72)
    yield "dequantize_packed", (*weight, 200, torch.bfloat16)
    yield "gemm", quantized
    yield "gemm", (*quantized, case.bias, torch.float16)
    yield "gemm", (*quantized, None, torch.int32, True)
    yield "linear", (x, *weight)
    yield "linear", (x.half().transpose(0, 1), *weight, case.bias.half())
    yield "linear", (x.clone().requires_grad_(), *weight, case.bias)
    yield "linear", (x[0, 0].clone().requires_grad_(), *weight)
    yield "linear", (x[:, :0], *weight)


@pytest.mark.parametrize(("op", "arguments"), [pytest.param(*s, id=s[0]) for s in op_samples()])
def test_opcheck(op, arguments):
    """CHECKLIST 18: schema, fake tensors (strides too), autograd registration, AOT dispatch."""
    torch.library.opcheck(getattr(OPS, op).default, arguments)


def test_every_public_op_is_checked():
    """Nothing else is in the shipped namespace; the others' samples are in tests of their own."""
    names = {
        schema.name.removeprefix("liquidgemm::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("liquidgemm::")
    }
    experts = {
        "grouped_gemm",
        "moe",
        "moe_combine",
        "moe_schedule",
        "quantize_activation_rows",
    }
    producers = {"glu_quantize", "rms_norm_quantize"}
    int8 = {"pack_int8_weight", "unpack_int8_weight"}
    caches = {"kv_attention", "kv_write_"}
    assert names == {op for op, _ in op_samples()} | experts | producers | caches | int8


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_once_for_any_number_of_tokens(backend):
    """CHECKLIST 18: fullgraph, dynamic M, no recompilation, same bits."""
    case = Case(1, 72, 200)

    def function(x):
        y = linear(x, case.weight, case.weight_scale, case.bias)
        x8, scale = quantize_activation(y)
        logical = unpack_weight(case.weight, 72)
        raw = gemm(x8[:, :64], scale, pack_weight(*logical)[:, :1], case.weight_scale)
        return torch.relu(y), raw

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        # 2 is also the number of panels, and sizes that agree in the first call are one symbol.
        for m in (3, 2, 17, 64, 257):
            x = torch.randn(m, 200)
            for got, expected in zip(compiled(x), function(x), strict=True):
                reference.assert_same(got, expected, m=m)
    assert counter.frame_count == 1


def test_compiled_backward():
    """CHECKLIST 18."""
    case = Case(1, 72, 200)

    def function(x):
        return linear(x, case.weight, case.weight_scale).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (2, 5):
        x = torch.randn(m, 200)
        plain, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
        function(plain).backward()
        compiled(traced).backward()
        reference.assert_same(traced.grad, plain.grad, m=m)


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


@pytest.mark.parametrize("aot_inductor", [False, True], ids=["export", "aot_inductor"])
def test_export_and_load_in_a_fresh_process(tmp_path, aot_inductor):
    """CHECKLIST 18: with a dynamic number of tokens."""
    layer = liquidgemm.LiquidLinear.from_linear(torch.nn.Linear(200, 72))
    model = torch.nn.Sequential(layer, torch.nn.ReLU()).eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(4, 200),), dynamic_shapes=({0: tokens},))
        if aot_inductor:
            file = str(tmp_path / "model.aoti.pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=file)
        else:
            file = str(tmp_path / "model.pt2")
            torch.export.save(program, file)
        inputs = [torch.randn(m, 200) for m in (2, 9, 100)]
        torch.save([(x, model(x)) for x in inputs], tmp_path / "data.pt")
    result = run_python(LOAD_EXPORTED, file, tmp_path / "data.pt")
    assert result.stdout.strip() == "same", result.stdout + result.stderr
