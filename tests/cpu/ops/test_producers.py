"""Norm and gated activation, quantized: against numpy, in every CPU kernel, and in layers."""

import numpy as np
import pytest
import reference
import torch
from test_ops import FLOATS

import liquidgemm
from liquidgemm import (
    QuantizedTokens,
    glu_quantize,
    rms_norm_quantize,
)

KERNELS = liquidgemm.cpu_kernels()
ACTIVATIONS = ("silu_mul", "gelu_tanh_mul", "swiglu_clamped")
MODES = (("llama", 0.0), ("gemma", 0.0), ("gemma", 1.0))
# Less than a vector, a group of 256, the chains' 8192, and more than each.
SIZES = (1, 7, 8, 64, 255, 257, 1000, 8192, 8200, 17000)


@pytest.fixture(autouse=True)
def restore():
    yield
    liquidgemm.set_cpu_kernel()


@pytest.fixture(params=KERNELS)
def kernel(request):
    liquidgemm.set_cpu_kernel(request.param)
    return request.param


def rows(k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of every size, and those with a rule of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, k, generator=generator)
    x[1] *= 1e-4
    x[2] *= 1e3
    x[3] = 0
    x[4, k // 2] = 300 * x[4].abs().max()
    x[5, k - 1] = torch.nan
    x[6, 0] = torch.inf
    x[7] *= torch.finfo(dtype).smallest_normal
    return x.to(dtype)


# In numpy, whose float32 operations are IEEE.


def halves(values: np.ndarray) -> np.ndarray:
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


@np.errstate(all="ignore")
def expected_norm(x, weight, eps, residual, mode, offset):
    """h and y as the docstring has them, with the order of csrc/liquidgemm/common/norm.hpp."""
    h = x if residual is None else x + residual  # torch rounds a sum of 16 bits once, as float32
    values = h.float().numpy()
    count, k = values.shape
    padded = np.zeros((count, -(-k // 8192) * 8192), np.float32)
    padded[:, :k] = values
    groups = halves(halves((padded * padded).reshape(count, -1, 32, 32, 8)))
    chains = np.zeros((count, 32), np.float32)
    for i in range(groups.shape[1]):
        chains += groups[:, i]
    factor = np.float32(1) / np.sqrt(halves(chains) / np.float32(k) + np.float32(eps))
    assert factor.dtype == np.float32
    scaled, w = values * factor[:, None], weight.float().numpy()
    if mode == "llama":
        y = torch.from_numpy(scaled).to(x.dtype).float().numpy() * w
    else:
        y = scaled * (np.float32(offset) + w)
    return h, torch.from_numpy(y).to(x.dtype)


def assert_tokens(tokens: QuantizedTokens, y: torch.Tensor, **context) -> None:
    x8, scale = reference.quantize_activation(y)
    assert tokens.dtype == y.dtype
    assert tokens.shape == y.shape
    reference.assert_same(tokens.x8, x8, what="x8", **context)
    reference.assert_same(tokens.scale, scale, what="scale", **context)


@pytest.mark.parametrize("dtype", FLOATS)
def test_norm_is_its_formula(kernel, dtype):
    """CHECKLIST 8, 29: to the bit, in every kernel, with weights of any type."""
    for k in SIZES:
        x, residual = rows(k, dtype), rows(k, dtype, seed=1).flip(0)
        weight = torch.randn(k, generator=torch.Generator().manual_seed(k))
        for (mode, offset), other in zip(MODES, FLOATS, strict=True):
            for w in (weight.to(dtype), weight.to(other)):
                for r in (None, residual):
                    context = {"k": k, "mode": mode, "offset": offset, "weight": w.dtype}
                    tokens, h, y = rms_norm_quantize(
                        x, w, 1e-6, r, mode=mode, offset=offset, return_y=True
                    )
                    expected_h, expected_y = expected_norm(x, w, 1e-6, r, mode, offset)
                    assert (h is None) == (r is None)
                    if h is not None:
                        reference.assert_same(h, expected_h, what="h", **context)
                    reference.assert_same(y, expected_y, what="y", **context)
                    assert_tokens(tokens, expected_y, **context)
                    again, _, none = rms_norm_quantize(x, w, 1e-6, r, mode=mode, offset=offset)
                    assert none is None
                    reference.assert_same(again.x8, tokens.x8, what="without y", **context)


def exact_glu(gate, up, activation):
    """In float64, with the documented roundings."""
    dtype, g = gate.dtype, gate.double()
    if activation == "silu_mul":
        act = g * g.sigmoid()
    elif activation == "gelu_tanh_mul":
        u = (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)
        act = g * (2 * u).sigmoid()  # as torch has it, but without its cancellation
    else:
        g = g.clamp(max=7)
        act = g * (1.702 * g).sigmoid()
        up = (up.float().clamp(-7, 7) + 1).to(dtype)
    return act.to(dtype).double() * up.double()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_is_near_its_formula(dtype, activation):
    """CHECKLIST 8: every gate of 16 bits; tests/cpp/test_activation.cpp has the functions."""
    gate = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).float()
    gate = gate[gate.isfinite() & (gate.abs() < 60)].to(dtype)
    up = torch.randn(len(gate), generator=torch.Generator().manual_seed(0)).to(dtype)
    _, y = glu_quantize(torch.cat((gate, up)), activation, return_y=True)
    exact = exact_glu(gate, up, activation)
    info = torch.finfo(dtype)
    # An activation that is rounded to the other side is off by one unit in its last place.
    error = (y.double() - exact).abs()
    slack = 2 * info.eps if dtype != torch.float32 else 200 * info.eps
    assert (error <= slack * exact.abs() + 2.0**-120 + 8 * info.smallest_normal * info.eps).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_in_every_kernel(dtype, activation):
    """CHECKLIST 8, 29: the reference's bits, and those of y quantized."""
    for k in SIZES:
        gate_up = torch.cat((rows(k, dtype) * 4, rows(k, dtype, seed=1)), dim=-1)
        liquidgemm.set_cpu_kernel("reference")
        _, expected = glu_quantize(gate_up, activation, return_y=True)
        for name in KERNELS:
            liquidgemm.set_cpu_kernel(name)
            tokens, y = glu_quantize(gate_up, activation, return_y=True)
            reference.assert_same(y, expected, what="y", k=k, kernel=name)
            assert_tokens(tokens, expected, k=k, kernel=name)
            again, none = glu_quantize(gate_up, activation)
            assert none is None
            reference.assert_same(again.x8, tokens.x8, what="without y", k=k, kernel=name)


def test_batch_invariance(kernel):
    """CHECKLIST 9: a row has the bits that it has alone."""
    x, residual, weight = (
        rows(1000, torch.bfloat16),
        rows(1000, torch.bfloat16, 1),
        torch.ones(1000),
    )
    for op in (
        lambda i: rms_norm_quantize(x[i], weight, 1e-6, residual[i])[0],
        lambda i: glu_quantize(x[i])[0],
    ):
        whole = op(slice(None))
        for i in range(len(x)):
            alone = op(i)
            reference.assert_same(alone.x8, whole.x8[i], row=i)
            reference.assert_same(alone.scale, whole.scale[i], row=i)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roundings_are_those_of_transformers(dtype):
    """As promised: equal to its layers in eager mode but for isolated last bits."""
    transformers = pytest.importorskip("transformers", reason="there is nothing to compare with")
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.5
    llama = transformers.models.llama.modeling_llama.LlamaRMSNorm(512, eps=1e-5).to(dtype)
    gemma = transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm(512, eps=1e-5).to(dtype)
    norms = {"llama": (llama, 0.0), "gemma": (gemma, 1.0)}
    with torch.no_grad():
        for mode, (norm, offset) in norms.items():
            norm.weight.copy_(weight)
            y = rms_norm_quantize(x, norm.weight, 1e-5, mode=mode, offset=offset, return_y=True)[2]
            assert_near(y, norm(x), dtype)
        gate, up = x.chunk(2, -1)
        _, y = glu_quantize(x, return_y=True)
        assert_near(y, torch.nn.functional.silu(gate) * up, dtype)
        _, y = glu_quantize(x, "gelu_tanh_mul", return_y=True)
        assert_near(y, torch.nn.functional.gelu(gate, approximate="tanh") * up, dtype)


def assert_near(y: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    assert (y != theirs).float().mean() < 1e-3
    assert ((y - theirs).abs() <= 2 * torch.finfo(dtype).eps * theirs.abs()).all()


def test_layouts():
    """CHECKLIST 7: any stride, storage offset and number of dimensions; no rows."""
    x = torch.randn(2, 3, 40).bfloat16()
    weight = torch.rand(80)[::2]
    flat = torch.zeros(241, dtype=torch.bfloat16)
    flat[1:] = x.flatten()
    views = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.repeat_interleave(2, -1)[..., ::2],
        flat[1:].view(2, 3, 40),
    )
    norm, h, _ = rms_norm_quantize(x, weight, 0.0, x)
    glu, _ = glu_quantize(x, "gelu_tanh_mul")
    for view in views:
        got, got_h, _ = rms_norm_quantize(view, weight, 0.0, view)
        reference.assert_same(got.x8, norm.x8)
        reference.assert_same(got.scale, norm.scale)
        reference.assert_same(got_h, h)
        assert got_h.is_contiguous()
        reference.assert_same(glu_quantize(view, "gelu_tanh_mul")[0].x8, glu.x8)
    one = rms_norm_quantize(x[1, 2], weight, 0.0, x[1, 2])[0]
    reference.assert_same(one.scale, norm.scale[1, 2])
    empty, _, y = rms_norm_quantize(x[:, :0], weight, 0.0, return_y=True)
    assert empty.x8.shape == y.shape == (2, 0, 40)
    assert glu_quantize(x[:0])[0].x8.shape == (0, 3, 20)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 8).double()}, "x: expected dtype .*got float64"),
        ({"x": torch.zeros(())}, "x: expected at least 1 dimension"),
        ({"x": torch.zeros(2, 0)}, "x: expected at least 1 column"),
        ({"weight": torch.ones(9)}, r"weight: expected shape \[8\] like .* x, got \[9\]"),
        ({"weight": torch.ones(1, 8)}, r"weight: expected shape \[8\] .*got \[1, 8\]"),
        ({"weight": torch.ones(8).int()}, "weight: expected dtype .*got int32"),
        ({"eps": -1.0}, "eps: expected a number >= 0, got -1"),
        ({"eps": float("nan")}, "eps: expected a number >= 0, got nan"),
        ({"residual": torch.zeros(8)}, r"residual: expected shape \[2, 8\] like x, got \[8\]"),
        ({"residual": torch.zeros(2, 8).half()}, "residual: expected dtype float32, got float16"),
        ({"mode": "rms"}, "mode: expected llama or gemma, got rms"),
        ({"offset": 1.0}, "offset: expected 0 in mode llama, got 1"),
    ],
)
def test_errors_of_the_norm(changes, message, device):
    """CHECKLIST 7, 28: in the same words, whoever finds it."""
    arguments = {"x": torch.zeros(2, 8), "weight": torch.ones(8), "eps": 1e-6} | changes
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        rms_norm_quantize(**arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("gate_up", "activation", "message"),
    [
        (torch.zeros(2, 8).int(), "silu_mul", "gate_up: expected dtype .*got int32"),
        (torch.zeros(()), "silu_mul", "gate_up: expected at least 1 dimension"),
        (torch.zeros(2, 0), "silu_mul", "gate_up: expected at least 2 columns"),
        (torch.zeros(2, 7), "silu_mul", r"gate_up: expected an even number .*\[2, 7\]"),
        (torch.zeros(2, 8), "silu", "activation: expected silu_mul or .*clamped, got silu"),
        (torch.zeros(2, 8), "none", "activation: expected silu_mul or .*clamped, got none"),
    ],
)
def test_errors_of_the_glu(gate_up, activation, message, device):
    """CHECKLIST 7, 28."""
    with pytest.raises(RuntimeError, match=message):
        glu_quantize(gate_up.to(device), activation)


def test_devices_must_agree():
    """CHECKLIST 7."""
    x, meta = torch.zeros(2, 8), torch.zeros(2, 8, device="meta")
    with pytest.raises(RuntimeError, match="weight: expected on"):
        rms_norm_quantize(x, meta[0], 1e-6)
    with pytest.raises(RuntimeError, match="residual: expected on"):
        rms_norm_quantize(x, x[0], 1e-6, meta)


def test_no_derivative():
    """CHECKLIST 27: asked for, it is an error, not a wrong number."""
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="rms_norm_quantize is not differentiable"):
        rms_norm_quantize(x, torch.ones(8), 1e-6, x)[1].sum().backward()
    with pytest.raises(RuntimeError, match="glu_quantize is not differentiable"):
        glu_quantize(x, return_y=True)[1].sum().backward()


def samples():
    x, weight = torch.randn(2, 3, 40), torch.rand(40)
    yield "rms_norm_quantize", (x, weight, 1e-6)
    yield (
        "rms_norm_quantize",
        (x.bfloat16().transpose(0, 1), weight, 1e-6, None, "gemma", 1.0, True),
    )
    yield "rms_norm_quantize", (x.half(), weight.half(), 1e-6, x.half(), "llama", 0.0, True)
    yield "glu_quantize", (x,)
    yield "glu_quantize", (x.bfloat16().transpose(0, 1), "swiglu_clamped", True)


@pytest.mark.parametrize(("op", "arguments"), [pytest.param(*s, id=s[0]) for s in samples()])
def test_opcheck(op, arguments):
    """CHECKLIST 18."""
    torch.library.opcheck(getattr(torch.ops.liquidgemm, op).default, arguments)
