"""CHECKLIST 27: derivatives of a quantized layer are those of the dequantized one, in every mode of
torch, or an error; what has no derivative says so instead of being a constant."""

import pytest
import torch
from reference import assert_same
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.utils.checkpoint import checkpoint

import liquidgemm
from liquidgemm import LiquidConfig, LiquidLinear

OPS = torch.ops.liquidgemm
K, N = 100, 40


def plain(bias=True):
    torch.manual_seed(0)
    return LiquidLinear.from_linear(nn.Linear(K, N, bias))


def augmented():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N))
    liquidgemm.quantize_(model, LiquidConfig(augment=64), progress=False)
    assert model[0].columns is not None
    return model[0]


LAYERS = {"plain": plain, "no bias": lambda: plain(False), "residual columns": augmented}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")


def sum_of_squares(layer):
    return lambda x: layer(x).square().sum()


def near(actual, expected, error=1e-5):
    assert actual.shape == expected.shape
    assert torch.dist(actual, expected) <= error * expected.norm()


def dual(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))


@pytest.mark.parametrize(
    "derive",
    [
        lambda f, x, t: jvp(f, (x,), (t,)),
        lambda f, x, t: dual(f, x, t),
        lambda f, x, t: (f(x), linearize(f, x)[1](t)),
        lambda f, x, t: torch.autograd.functional.jvp(f, x, t),
        lambda f, x, t: vmap(lambda x, t: jvp(f, (x,), (t,)))(x, t),
        lambda f, x, t: jvp(vmap(f), (x,), (t,)),
        lambda f, x, t: jvp(compiled(f), (x,), (t,)),
        lambda f, x, t: dual(compiled(f), x, t),
        lambda f, x, t: compiled(lambda x, t: jvp(f, (x,), (t,)))(x, t),
    ],
)
def test_forward_mode(derive, layer):
    """CHECKLIST 27: the tangent is that of the dequantized layer."""
    x, tangent = torch.randn(5, K), torch.randn(5, K)
    y, derivative = derive(layer, x, tangent)
    assert_same(y, layer(x))
    near(derivative, tangent @ layer.dequantize().T)


@pytest.mark.parametrize(
    "derive",
    [
        lambda f, x: vjp(f, x)[1](2 * f(x))[0],
        lambda f, x: grad(sum_of_squares(f))(x),
        lambda f, x: vmap(grad(sum_of_squares(f)))(x),
        lambda f, x: grad(sum_of_squares(vmap(f)))(x),
        lambda f, x: grad(sum_of_squares(compiled(f)))(x),
        lambda f, x: compiled(grad(sum_of_squares(f)))(x),
        lambda f, x: torch.autograd.functional.vjp(f, x, 2 * f(x))[1],
    ],
)
def test_reverse_mode(derive, layer):
    """CHECKLIST 27: likewise."""
    x = torch.randn(5, K)
    near(derive(layer, x), 2 * layer(x) @ layer.dequantize())


@pytest.mark.parametrize(
    "jacobian",
    [
        jacfwd,
        jacrev,
        *(
            lambda f, options=options: lambda x: torch.autograd.functional.jacobian(f, x, **options)
            for options in (
                {},
                {"vectorize": True},
                {"vectorize": True, "strategy": "forward-mode"},
            )
        ),
    ],
)
def test_jacobians(jacobian, layer):
    near(jacobian(layer)(torch.randn(K)), layer.dequantize())


@pytest.mark.parametrize(
    "second",
    [
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacfwd(f)),
        lambda f: lambda x: torch.autograd.functional.hessian(f, x),
    ],
)
def test_second_derivatives(second, layer):
    """CHECKLIST 27: in any nesting."""
    w = layer.dequantize()
    near(second(sum_of_squares(layer))(torch.randn(K)), 2 * w.T @ w)


def test_double_backward(layer):
    x = torch.randn(5, K, requires_grad=True)
    (first,) = torch.autograd.grad(sum_of_squares(layer)(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    w = layer.dequantize()
    near(second, 2 * torch.ones(5, K) @ w.T @ w)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, layer):
    x = torch.randn(5, K, requires_grad=True)
    y = checkpoint(lambda x: layer(x).square(), x, use_reentrant=use_reentrant)
    y.sum().backward()
    near(x.grad, 2 * layer(x).detach() @ layer.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_both_directions(dtype, layer):
    """To a rounding or two of the output, as residual columns are summed apart."""
    x, t = torch.randn(5, K, dtype=dtype), torch.randn(5, K, dtype=dtype)
    w = layer.dequantize(dtype)
    y, derivative = jvp(layer, (x,), (t,))
    assert y.dtype == derivative.dtype == dtype
    error = torch.finfo(dtype).eps
    near(derivative.float(), (t @ w.T).float(), error)
    near(vjp(layer, x)[1](y)[0].float(), (y @ w).float(), error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, layer):
    """Products are INT8 whatever autocast asks for; outputs and gradients have the dtype of x."""
    x = torch.randn(5, K, requires_grad=True)
    expected, expected_grad = layer(x), torch.autograd.grad(layer(x).sum(), x)[0]
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert_same(y.detach(), expected.detach())
    assert_same(torch.autograd.grad(y.sum(), x)[0], expected_grad)


def test_without_gradients(layer):
    x = torch.randn(5, K)
    expected = layer(x)
    with torch.no_grad():
        assert_same(layer(x), expected)
    with torch.inference_mode():
        assert_same(layer(x), expected)
        inside = x.clone()
    assert_same(layer(inside), expected)
    assert not layer(x).requires_grad


def test_with_respect_to_the_bias():
    layer, x = plain(), torch.randn(5, K)
    derivative = grad(lambda bias: functional_call(layer, {"bias": bias}, (x,)).sum())(layer.bias)
    assert_same(derivative, torch.full((N,), 5.0))
    tangent = torch.randn(N)
    _, derivative = jvp(
        lambda bias: functional_call(layer, {"bias": bias}, (x,)), (layer.bias,), (tangent,)
    )
    assert_same(derivative, tangent.expand(5, N))


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (0, 0)])
def test_vmap_over_tokens_and_biases(in_dims):
    layer = plain()
    xs = (
        torch.randn(3, 5, K).movedim(0, in_dims[0]) if in_dims[0] is not None else torch.randn(5, K)
    )
    biases = torch.randn(3, N) if in_dims[1] == 0 else torch.randn(N)

    def run(x, bias):
        return OPS.linear(x, layer.packed, layer.scale, bias)

    got = vmap(run, in_dims)(xs, biases)
    for i in range(3):
        x = xs if in_dims[0] is None else xs.select(in_dims[0], i)
        assert_same(got[i], run(x, biases if in_dims[1] is None else biases[i]))


def test_vmap_over_layers():
    """An ensemble: the weights have the batch."""
    layers = [LiquidLinear.from_linear(nn.Linear(K, N)) for _ in range(3)]
    state = {
        name: torch.stack([getattr(layer, name) for layer in layers])
        for name in ("packed", "scale", "bias")
    }
    x = torch.randn(5, K)
    got = vmap(lambda state: functional_call(layers[0], state, (x,)))(state)
    for layer, y in zip(layers, got, strict=True):
        assert_same(y, layer(x))


def differentiate(mode, function, x):
    if mode == "backward":
        function(x.clone().requires_grad_()).sum().backward()
    elif mode == "grad":
        grad(lambda x: function(x).sum())(x)
    elif mode == "jvp":
        jvp(function, (x,), (x,))
    else:
        dual(function, x, x)


@pytest.mark.parametrize("mode", ["backward", "grad", "jvp", "dual"])
def test_what_has_no_derivative_says_so(mode):
    """CHECKLIST 27: instead of being zero."""
    layer, x = plain(), torch.randn(5, K)
    x8, x_scale = OPS.quantize_activation(x)
    weight = layer.packed, layer.scale
    for function, at, message in (
        (lambda x: OPS.quantize_activation(x)[1], x, "quantize_activation is not differentiable"),
        (lambda s: OPS.gemm(x8, s, *weight), x_scale, "gemm is not differentiable"),
        (
            lambda scale: OPS.linear(x, layer.packed, scale),
            layer.scale,
            "linear is differentiable with respect to x and bias alone",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            differentiate(mode, function, at)
