"""The formulas of calibration, each against an independent one or against what it must improve."""

import warnings
from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from liquidgemm import (
    LiquidConfig,
    LiquidLinear,
    QuantizedWeight,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)
from liquidgemm.quantization.calibration import moments as moments_module
from liquidgemm.quantization.calibration.gptq import add_residual, gptq, int8_weight, refit_scale
from liquidgemm.quantization.calibration.moments import Moments, inverse_factor, round_activation
from liquidgemm.quantization.calibration.plan import plan
from liquidgemm.quantization.calibration.rotate import random_hadamard
from liquidgemm.quantization.calibration.simulate import SimulatedLinear
from liquidgemm.quantization.layer import quantize_layer, quantize_layers, residual_columns


def problem(n=48, k=192, tokens=2048, seed=0):
    """A weight and correlated inputs with a few large features."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    x = torch.randn(tokens, k, generator=generator) @ mix
    x[:, ::37] *= 8
    return weight, round_activation(x)


def output_error(weight, quantized, x):
    difference = dequantize_weight(quantized).double() - weight.double()
    return (x.double() @ difference.T).square().mean().item()


def quantize(weight, x, method, **fields):
    moments = None if x is None else Moments.of([x])
    return quantize_layer(weight, LiquidConfig(method, **fields), "layer", moments)[0]


@pytest.mark.parametrize("k", [192, 160])
def test_each_method_beats_the_one_before(k):
    """On the output, for inputs it has seen and for others of the same kind."""
    weight, x = problem(k=k)
    seen, unseen = x[:1024], x[1024:]
    results = {
        method: quantize(weight, None if method in ("rtn", "search") else seen, method)
        for method in ("rtn", "search", "hessian", "gptq")
    }
    for inputs in (seen, unseen):
        errors = [output_error(weight, quantized, inputs) for quantized in results.values()]
        assert errors == sorted(errors, reverse=True)
        assert errors[3] < 0.8 * errors[2], errors


def test_gptq_is_the_textbook_recursion():
    """One column at a time, with the inverse of what is left of H computed anew for each."""
    weight, x = problem(n=6, k=70, tokens=500)
    base = quantize_weight(weight)
    hessian = Moments.of([x]).regularized(0.01, 0.0)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    actual = gptq(weight, base, inverse_factor(hessian[order][:, order]), order)

    h = hessian[order][:, order].double()
    w = weight[:, order].double()
    group = order // 64
    sigma = base.scale.double()
    codes = torch.empty(6, 70, dtype=torch.int64)
    for j in range(70):
        s = base.qscale[:, group[j]].double()
        z = base.qoffset[:, group[j]].double() - 128
        q = ((w[:, j] / sigma - z) / s).round().clamp(0, 15)
        codes[:, order[j]] = q.long()
        error = w[:, j] - sigma * (z + s * q)
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= error.unsqueeze(1) * inverse[0] / inverse[0, 0]
    columns = torch.arange(70) // 64
    expected = codes * base.qscale.long()[:, columns] + base.qoffset.long()[:, columns] - 128
    unit = dequantize_weight(replace(actual, scale=torch.ones(6))).long()
    # float32 against float64: a code at the border between two may fall either way.
    assert (unit != expected).float().mean() < 0.01


def test_sigma_after_the_refit_is_the_optimum():
    weight, x = problem(n=8)
    hessian = Moments.of([x]).hessian
    base = quantize_weight(weight, method="rtn")
    fitted = refit_scale(weight, base, hessian)

    def error(quantized):
        d = (dequantize_weight(quantized) - weight).double()
        return ((d @ hessian.double()) * d).sum(1)

    least = error(fitted)
    assert (least <= error(base)).all()
    for factor in (0.99, 1.01):
        assert (error(replace(fitted, scale=fitted.scale * factor)) > least).all()


def test_refit_leaves_a_row_of_zeros():
    weight, x = problem(n=3)
    weight[1] = 0
    quantized = quantize(weight, x, "gptq")
    assert quantized.scale[1] == 0
    assert not dequantize_weight(quantized)[1].any()


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 200),
    seed=st.integers(0, 9),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e8]),
    method=st.sampled_from(["hessian", "gptq"]),
    augment=st.sampled_from([0, 64, 128]),
    group_size=st.sampled_from([64, 128, -1]),
    kind=st.sampled_from(["normal", "dead", "constant", "rank 1", "zero"]),
)
def test_every_result_is_feasible(n, k, seed, scale, method, augment, group_size, kind):
    """QuantizedWeight refuses an infeasible group; any input must give a weight that it takes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * scale
    x = torch.randn(40, k, generator=generator)
    if kind == "dead":
        x[:, ::3] = 0
    elif kind == "constant":
        x[:] = 1
    elif kind == "rank 1":
        x = x[:, :1] * x[:1]
    elif kind == "zero":
        x[:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantize(weight, x, method, augment=augment, group_size=group_size)
    assert quantized.augment == min(augment, k // 64 * 64)
    assert dequantize_weight(quantized).isfinite().all()
    LiquidLinear.from_quantized(quantized)


def test_dead_columns_do_not_matter():
    weight, x = problem()
    x[:, [3, 100]] = 0
    changed = weight.clone()
    changed[:, [3, 100]] = 50.0  # as large as it is, no input ever meets it
    a, b = (quantize(w, x, "gptq") for w in (weight, changed))
    reference.assert_same(a.qweight, b.qweight)
    reference.assert_same(a.scale, b.scale)


def test_results_are_deterministic():
    weight, x = problem()
    a, b = (quantize(weight, x, "gptq", augment=64) for _ in range(2))
    for name in ("qweight", "qscale", "qoffset", "scale", "columns"):
        reference.assert_same(getattr(a, name), getattr(b, name))


# The Cholesky factor.


def test_factor_of_the_inverse():
    _, x = problem()
    h = Moments.of([x]).regularized(0.05, 0.1)
    u = inverse_factor(h).double()
    assert torch.allclose(u, u.triu())
    assert torch.allclose(u.T @ u @ h.double(), torch.eye(len(h)).double(), atol=1e-3)


def test_more_damping_mends_a_singular_hessian():
    h = torch.ones(64, 64)
    with pytest.warns(UserWarning, match="gate_proj: H was not positive definite"):
        assert inverse_factor(h, "gate_proj") is not None


def test_without_a_factor_gptq_becomes_hessian(monkeypatch):
    weight, x = problem()
    fails = lambda h, upper=False: (h, torch.tensor(1))  # noqa: E731
    monkeypatch.setattr(moments_module.torch.linalg, "cholesky_ex", fails)
    with pytest.warns(UserWarning, match='down: H has no Cholesky.*"hessian" instead of "gptq"'):
        quantized, method = quantize_layer(weight, LiquidConfig("gptq"), "down", Moments.of([x]))
    assert method == "hessian"
    expected = quantize(weight, x, "hessian")
    reference.assert_same(quantized.qweight, expected.qweight)


def test_with_few_tokens_gptq_becomes_hessian():
    """As for an expert that few tokens reach."""
    weight, x = problem(tokens=47)  # for 192 columns
    with pytest.warns(UserWarning, match="expert: 47 tokens are too few for 192 columns"):
        _, method = quantize_layer(weight, LiquidConfig("gptq"), "expert", Moments.of([x]))
    assert method == "hessian"


def test_moments():
    _, x = problem(tokens=100)
    whole, parts = Moments.of([x]), Moments.of([x[:30], x[30:30], x[30:]])
    assert parts.tokens == whole.tokens == 100
    expected = x.double().T @ x.double() / 100
    assert torch.allclose(parts.hessian.double(), expected, rtol=1e-4, atol=1e-4)
    assert Moments.of([]) is None
    assert Moments.of([x[:0]]) is None
    diagonal = whole.hessian.diagonal()
    assert torch.allclose(whole.importance(0.0), diagonal)
    assert torch.allclose(whole.importance(1.0), diagonal.mean().expand_as(diagonal))


# Residual columns and INT8 precision.


@pytest.mark.parametrize("k", [64, 100, 192])
def test_int8_weight_is_w8a8(k):
    """The layer computes what a plain INT8 product would, to the bit."""
    torch.manual_seed(0)
    weight, x = torch.randn(70, k), torch.randn(5, k)
    layer = LiquidLinear.from_quantized(int8_weight(weight))
    sigma = weight.abs().amax(1) / 127
    w8 = (weight / sigma.unsqueeze(1)).round().long()
    x8, alpha = quantize_activation(x)
    expected = reference.epilogue(reference.product(x8, w8), alpha, sigma, None, torch.float32)
    reference.assert_same(layer(x), expected)
    reference.assert_same(layer.dequantize(), w8.float() * sigma.unsqueeze(1))


@pytest.mark.parametrize("method", ["search", "hessian", "gptq"])
def test_residual_columns_approach_w8a8(method):
    """More columns, less error; with all of them it is of the size of that of INT8."""
    weight, x = problem()
    errors = []
    for augment in (0, 64, 128, 192):
        quantized = quantize(weight, None if method == "search" else x, method, augment=augment)
        errors.append(output_error(weight, quantized, x))
        assert quantized.augment == augment
    assert errors == sorted(errors, reverse=True)
    int8 = output_error(weight, int8_weight(weight), x)
    assert errors[-1] < 2 * int8


def test_residual_columns_are_those_that_matter():
    weight, x = problem()
    quantized = quantize(weight, x, "hessian", augment=64)
    base = quantize(weight, x, "hessian")
    error = (dequantize_weight(base) - weight).square().sum(0) * Moments.of([x]).importance(0.1)
    chosen = error.topk(64).indices.sort().values
    assert quantized.columns.tolist() == chosen.tolist()
    assert output_error(weight, quantized, x) < 0.6 * output_error(weight, base, x)


def test_gptq_makes_use_of_residual_columns():
    weight, x = problem()
    plain, better = (quantize(weight, x, "gptq", augment=r) for r in (0, 64))
    assert output_error(weight, better, x) < 0.6 * output_error(weight, plain, x)


def test_layer_with_residual_columns_decodes_and_multiplies_alike():
    weight, x = problem(k=160)
    base = quantize_weight(weight)
    quantized = add_residual(weight, base, torch.arange(5, 69, dtype=torch.int32))
    layer = LiquidLinear.from_quantized(quantized, torch.randn(48))
    expected = nn.functional.linear(
        round_activation(x[:9]).double(), dequantize_weight(quantized).double(), layer.bias.double()
    )
    assert torch.allclose(layer(x[:9]).double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.allclose(
        SimulatedLinear(quantized, layer.bias)(x[:9]).double(), expected, atol=1e-3
    )
    copy = LiquidLinear(160, 48, augment=64)
    copy.load_state_dict(layer.state_dict())
    reference.assert_same(copy(x[:9]), layer(x[:9]))
    assert "augment=64" in repr(copy)
    x = x[:3].clone().requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad[0], dequantize_weight(quantized).sum(0), atol=1e-3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (torch.zeros(64), "columns: expected int32"),
        (torch.zeros(63, dtype=torch.int32), "columns: expected int32 .* multiple of 64"),
        (torch.full((64,), 100, dtype=torch.int32), "columns: expected 0 to 99, got 100"),
        (torch.full((64,), -1, dtype=torch.int32), "columns: expected 0 to 99, got -1"),
    ],
)
def test_columns_are_checked(columns, message):
    """CHECKLIST 7."""
    good = int8_weight(torch.randn(3, 100))
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(good.qweight, good.qscale, good.qoffset, good.scale, 100, columns)


def test_a_weight_with_residual_columns_is_not_sliced_along_k():
    with pytest.raises(ValueError, match="without residual columns, got 128"):
        int8_weight(torch.randn(3, 128)).narrow_columns(0, 64)
    assert int8_weight(torch.randn(3, 128)).narrow_rows(1, 1).augment == 128


def test_augment_per_pattern():
    config = LiquidConfig(augment={"down_proj": 128, "layers.0.*": 64})
    assert residual_columns(config, "layers.0.mlp.down_proj", 1000) == 128
    assert residual_columns(config, "layers.0.mlp.up_proj", 1000) == 64
    assert residual_columns(config, "layers.1.mlp.up_proj", 1000) == 0
    assert residual_columns(LiquidConfig(augment=512), "x", 100) == 64


def test_plan():
    model = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(128, 8), "c": nn.Linear(96, 8)})
    config = LiquidConfig("gptq", augment={"b": 64}, keep=("c",))
    assert plan(model, ["a", "b", "c"], config) == {
        "a": "8 x 128, gptq, 4.25 bits per weight",
        "b": "8 x 128, gptq, 64 residual columns, 6.38 bits per weight",
        "c": "8 x 96, int8, 10.67 bits per weight",
    }
    config = LiquidConfig(group_size=32, augment={"b": 64}, keep=("c",), bits={"a": 6})
    assert plan(model, ["a", "b", "c"], config) == {
        "a": "8 x 128, search, 6.25 bits per weight",
        "b": "8 x 128, search, 64 residual columns, 6.75 bits per weight",
        "c": "8 x 96, int8, 10.67 bits per weight",
    }


# Rotation.


@pytest.mark.parametrize("size", [1, 2, 64, 96, 576, 896])
def test_random_hadamard_is_orthogonal(size):
    q = random_hadamard(size, seed=0)
    assert torch.allclose(q @ q.T, torch.eye(size).double(), atol=1e-12)
    reference.assert_same(q, random_hadamard(size, seed=0))
    if size > 2:
        assert not torch.equal(q, random_hadamard(size, seed=1))
    if size & (size - 1) == 0:  # a Hadamard matrix spreads an outlier evenly
        assert torch.allclose(q.abs(), torch.full_like(q, size**-0.5))


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_layers_of_one_input_can_share_residual_columns(method):
    """Those that have as many; each column then costs all of them the least together."""
    weights = {name: problem(seed=seed)[0] for seed, name in enumerate("qkvo")}
    moments = Moments.of([problem()[1]])
    fields = {"augment": {"o": 128, "*": 64}, "keep": ()}
    results = {
        share: dict(
            zip(
                weights,
                quantize_layers(
                    weights, LiquidConfig(method, share_columns=share, **fields), moments
                ),
                strict=True,
            )
        )
        for share in (False, True)
    }
    apart, shared = ({n: w.columns for n, (w, _) in r.items()} for r in results.values())
    assert torch.equal(shared["q"], shared["k"])
    assert torch.equal(shared["q"], shared["v"])
    assert not torch.equal(apart["q"], apart["k"])
    assert torch.equal(apart["o"], shared["o"])  # the only one of 128
    for name, (alone, _) in results[False].items():
        config = LiquidConfig(method, **fields)
        assert torch.equal(
            alone.qweight, quantize_layer(weights[name], config, name, moments)[0].qweight
        )
