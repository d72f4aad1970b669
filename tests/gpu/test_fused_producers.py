"""Norm and gated activation, quantized, on the GPU against the CPU, which the CPU tests verify."""

from collections.abc import Callable

import pytest
import torch
from arena import SMALLEST, Arena
from problems import DEVICE, assert_equal, hard_rows, random_problem

import liquidgemm
from liquidgemm import QuantizedTokens, glu_quantize, rms_norm_quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODES = (("llama", 0.0), ("gemma", 0.0), ("gemma", 1.0))
ACTIVATIONS = ("silu_mul", "gelu_tanh_mul", "swiglu_clamped")
# Threads with one, two, four and eight vectors of a row, clusters, and rows that none can hold;
# less than a vector, odd sizes, and the largest.
SIZES = (1, 7, 8, 255, 257, 576, 1000, 4096, 8192, 8200, 14336, 28672, 40007, 132104)
ROWS = (1, 4, 64)  # times 12: different numbers of rows, and of CTAs each


def tensors(results) -> list[torch.Tensor]:
    """Those of a producer's results, one after the other."""
    flat = torch.utils._pytree.tree_leaves(results)
    return [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]


def assert_same(results, expected, what: str) -> None:
    pairs = zip(tensors(results), tensors(expected), strict=True)
    for i, (actual, wanted) in enumerate(pairs):
        assert_equal(actual.to(wanted.device), wanted, f"{what}, output {i}")


def poisoned(call: Callable, *arguments):
    """On memory that is full of garbage where the outputs are going to be."""
    for output in tensors(call(*arguments)):
        torch.full_like(output, 85 if output.dtype == torch.int8 else torch.nan)
    return call(*arguments)


def on_gpu(*arguments):
    return [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", SIZES)
def test_norm_equals_the_cpu(k: int, dtype: torch.dtype) -> None:
    """CHECKLIST 8: every bit, whatever the row, the weight's type, and with or without h and y."""
    hard = hard_rows(k, dtype)
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(k, generator=generator)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for repeats in ROWS:
        if k * repeats > 1 << 20:
            continue
        x = hard.repeat(repeats, 1)
        residual = torch.randn(x.shape, generator=generator).to(dtype)
        cases = [
            (weight.to(dtype), None, *MODES[0], False),
            (weight.to(dtype), residual, *MODES[0], True),
            (weight, residual, *MODES[0], False),
            (weight.to(dtype), residual, *MODES[2], False),
            (weight, None, *MODES[1], True),
            (weight.to(other), None, *MODES[2], False),
        ]
        for w, r, mode, offset, return_y in cases:
            arguments = (x, w, 1e-6, r, mode, offset, return_y)
            expected = torch.ops.liquidgemm.rms_norm_quantize(*arguments)
            got = poisoned(torch.ops.liquidgemm.rms_norm_quantize, *on_gpu(*arguments))
            assert_same(got, expected, f"{k=} {dtype} {repeats=} {w.dtype} {mode} {offset}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", SIZES)
def test_glu_equals_the_cpu(k: int, dtype: torch.dtype) -> None:
    """CHECKLIST 8: every bit, whatever the row, the activation, and with or without y."""
    generator = torch.Generator().manual_seed(k)
    gate, up = hard_rows(k, dtype), torch.randn(12, k, generator=generator).to(dtype)
    gate[0] *= 20
    for repeats in ROWS:
        if k * repeats > 1 << 20:
            continue
        gate_up = torch.cat((gate, up), dim=-1).repeat(repeats, 1)
        for activation, return_y in zip(ACTIVATIONS, (repeats == 1, True, False), strict=True):
            arguments = (gate_up, activation, return_y)
            expected = torch.ops.liquidgemm.glu_quantize(*arguments)
            got = poisoned(torch.ops.liquidgemm.glu_quantize, *on_gpu(*arguments))
            assert_same(got, expected, f"{k=} {dtype} {repeats=} {activation}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [16376, 16392, 28672, 33000, 132104])
def test_glu_of_many_long_rows(k: int, dtype: torch.dtype) -> None:
    """CHECKLIST 8, 9: where many rows share CTAs otherwise than few do."""
    generator = torch.Generator().manual_seed(k)
    gate_up = torch.cat((hard_rows(k, dtype), torch.randn(12, k, generator=generator).to(dtype)), 1)
    expected = torch.ops.liquidgemm.glu_quantize(gate_up, ACTIVATIONS[0], True)
    repeats = 2**19 // (12 * (k // 8)) + 1  # as many as divide_rows() calls many
    many = gate_up.to(DEVICE).repeat(repeats, 1)
    results = tensors(poisoned(torch.ops.liquidgemm.glu_quantize, many, ACTIVATIONS[0], True))
    for i in range(repeats):
        rows = slice(12 * i, 12 * (i + 1))
        assert_same([result[rows] for result in results], expected, f"{k=} {dtype} repeat {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gate_of_16_bits(activation: str, dtype: torch.dtype) -> None:
    """CHECKLIST 8: y of all of them, as on the CPU; with factors that are no powers of two."""
    gate = torch.arange(2**16).to(torch.int16).view(dtype)
    up = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate_up = torch.stack((gate.view(64, -1), up.view(64, -1)), dim=1).flatten(1)
    _, expected = glu_quantize(gate_up, activation, return_y=True)
    _, y = glu_quantize(gate_up.to(DEVICE), activation, return_y=True)
    assert_equal(y.cpu(), expected, f"{activation} {dtype}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_many_gates_of_32_bits(activation: str) -> None:
    """CHECKLIST 8: four million, of every exponent, with a factor of 1."""
    step = 1021  # a prime
    bits = torch.arange(0, 2**32, step, dtype=torch.int64)[: 64 * 65536]
    gate = bits.to(torch.int32).view(torch.float32).view(64, -1)
    up = torch.zeros_like(gate) if activation == "swiglu_clamped" else torch.ones_like(gate)
    gate_up = torch.cat((gate, up), dim=-1)
    _, expected = glu_quantize(gate_up, activation, return_y=True)
    _, y = glu_quantize(gate_up.to(DEVICE), activation, return_y=True)
    assert_equal(y.cpu(), expected, activation)


def test_sums_of_every_size() -> None:
    """CHECKLIST 8: the root and its divisions, for means from the smallest to the largest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 64, generator=generator)
    x *= 2.0 ** torch.randint(-75, 63, (20_000, 1), generator=generator)
    for eps in (0.0, 1e-45, 1e-6):
        arguments = (x, torch.ones(64), eps, None, "gemma", 0.0, True)
        expected = torch.ops.liquidgemm.rms_norm_quantize(*arguments)
        got = torch.ops.liquidgemm.rms_norm_quantize(*on_gpu(*arguments))
        assert_same(got, expected, f"{eps=}")


@pytest.mark.parametrize("m", [1, 16, 300, 5000])
def test_batch_invariance(m: int) -> None:
    """CHECKLIST 9: a row has the bits that it has alone, also where there are many of them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(m, 8192, generator=generator, device=DEVICE).bfloat16()
    weight = torch.rand(8192, generator=generator, device=DEVICE).bfloat16()
    norm, glu = rms_norm_quantize(x, weight, 1e-6, x, return_y=True), glu_quantize(x, return_y=True)
    for i in {0, m // 2, m - 1}:
        row = x[i : i + 1]
        for whole, alone in (
            (norm, rms_norm_quantize(row, weight, 1e-6, row, return_y=True)),
            (glu, glu_quantize(row, return_y=True)),
        ):
            parts = [part[i : i + 1] for part in tensors(whole)]
            assert_same(parts, tensors(alone), f"row {i} of {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    """CHECKLIST 7: any stride and storage offset, no alignment, no rows."""
    x, weight = torch.randn(24, 200, device=DEVICE).to(dtype), torch.rand(200, device=DEVICE)
    weight = weight.to(dtype)
    norm, glu = rms_norm_quantize(x, weight, 1e-6, x, return_y=True), glu_quantize(x, return_y=True)
    flat = torch.zeros(24 * 200 + 1, dtype=dtype, device=DEVICE)
    flat[1:] = x.flatten()
    odd_weight = torch.zeros(201, dtype=dtype, device=DEVICE)
    odd_weight[1:] = weight
    views = {
        "transposed": x.T.contiguous().T,
        "strided": x.repeat_interleave(3, 1)[:, ::3],
        "odd offset": flat[1:].view(24, 200),
    }
    for name, view in views.items():
        for w in (weight, odd_weight[1:], weight.repeat_interleave(2)[::2]):
            for h in (view, x):
                assert_same(rms_norm_quantize(view, w, 1e-6, h, return_y=True), norm, name)
        assert_same(glu_quantize(view, return_y=True), glu, name)
    batched = rms_norm_quantize(x.view(2, 12, 200).transpose(0, 1), weight, 1e-6, return_y=True)
    assert batched[2].shape == (12, 2, 200)
    assert rms_norm_quantize(x[:0], weight, 1e-6, x[:0])[0].x8.shape == (0, 200)
    assert glu_quantize(x[:0])[0].x8.shape == (0, 100)


@pytest.mark.parametrize("k", [5, 8, 67])
def test_around_the_outputs(k: int) -> None:
    """CHECKLIST 6: all outputs, vector and scalar paths."""
    m = SMALLEST // 4 + 3
    x = torch.randn(m, 2 * k, device=DEVICE).bfloat16()
    half, weight = x[:, :k].contiguous(), torch.rand(k, device=DEVICE).bfloat16()
    for name, call in {
        "norm": lambda: rms_norm_quantize(half, weight, 1e-6, half, return_y=True),
        "glu": lambda: glu_quantize(x, return_y=True),
    }.items():
        expected = [part.clone() for part in tensors(call())]
        arena = Arena(m * (5 * k + 4) + 4 * SMALLEST)
        with arena.allocating():
            got = tensors(call())
        arena.check(*got, what=f"{name} {k=}")
        assert_same(got, expected, name)
        del got


def test_a_chain_in_a_graph() -> None:
    """CHECKLIST 12, 13: back to back, each kernel behind the one before, with changed inputs."""
    first, second = random_problem(3, 2048, 1024), random_problem(3, 1024, 1024)
    weight = torch.rand(1024, device=DEVICE).bfloat16()

    def chain(x: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for _ in range(4):
            tokens, h, _ = rms_norm_quantize(x, weight, 1e-6, h)
            gate_up = liquidgemm.gemm(
                *tokens[:2], first.weight, first.weight_scale, None, x.dtype, True
            )
            tokens, _ = glu_quantize(gate_up)
            x = liquidgemm.gemm(
                *tokens[:2], second.weight, second.weight_scale, None, x.dtype, True
            )
            outputs += [h, x]
        return outputs

    for m in (1, 16, 64, 200):
        x, h = (torch.randn(m, 1024, device=DEVICE).bfloat16() * 0.02 for _ in range(2))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            chain(x, h)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = chain(x, h)
        for run in range(10):
            for tensor in (x, h):
                tensor.copy_(torch.randn(m, 1024, device=DEVICE) * 0.02)
            expected = unfused_chain(x, h, weight, first, second)
            for output in outputs:
                output.fill_(float("nan"))
            graph.replay()
            assert_same(outputs, expected, f"{m=} run {run}")


def unfused_chain(x, h, weight, first, second) -> list[torch.Tensor]:
    """The same, every kernel waiting for the host, from y and `linear`."""
    outputs = []
    for _ in range(4):
        _, h, y = rms_norm_quantize(x, weight, 1e-6, h, return_y=True)
        torch.cuda.synchronize()
        gate_up = liquidgemm.linear(y, first.weight, first.weight_scale)
        torch.cuda.synchronize()
        _, y = glu_quantize(gate_up, return_y=True)
        torch.cuda.synchronize()
        x = liquidgemm.linear(y, second.weight, second.weight_scale)
        torch.cuda.synchronize()
        outputs += [h, x]
    return outputs


def test_following_a_producer_changes_nothing() -> None:
    """CHECKLIST 9: another plan may run, with the same bits."""
    for m, n, k in ((1, 4096, 4096), (16, 4096, 4096), (32, 3584, 3584), (200, 640, 1000)):
        problem = random_problem(m, n, k)
        arguments = (problem.x, problem.x_scale, problem.weight, problem.weight_scale)
        plain = liquidgemm.gemm(*arguments)
        assert_equal(liquidgemm.gemm(*arguments, follows_producer=True), plain, f"{m=} {n=} {k=}")


@pytest.mark.parametrize("augment", [0, 64])
def test_a_layer_takes_tokens(augment: int) -> None:
    """As of x itself, with residual columns as well."""
    layer = liquidgemm.LiquidLinear(200, 136, dtype=torch.bfloat16, augment=augment)
    state = layer.state_dict()
    for name in ("qweight", "qscale"):
        state[name] = torch.randint(0, 9, state[name].shape, dtype=torch.uint8)
    state["scale"] = torch.rand(136)
    if augment:
        state["columns"] = torch.randint(0, 200, (augment,), dtype=torch.int32)
    layer.load_state_dict(state)
    layer = layer.to(DEVICE)
    for m in (1, 33):
        x = torch.randn(m, 200, device=DEVICE).bfloat16()
        tokens = QuantizedTokens(*liquidgemm.quantize_activation(x), x.dtype)
        assert_equal(layer(tokens), layer(x), f"{m=}")


def test_a_weight_of_another_type_is_not_read_early() -> None:
    """CHECKLIST 13: it is converted right before, by a kernel of torch."""
    x = torch.randn(1, 4096, device=DEVICE).bfloat16()
    for i in range(50):
        weight = torch.full((4096,), float(i + 1), device=DEVICE, dtype=torch.float16)
        wide = weight.float()
        torch.cuda.synchronize()
        _, _, y = rms_norm_quantize(x, weight, 1e-6, return_y=True)
        _, _, expected = rms_norm_quantize(x, wide, 1e-6, return_y=True)
        assert_equal(y, expected, f"run {i}")


def test_errors() -> None:
    """CHECKLIST 7: as on the CPU; and devices that differ."""
    x = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(RuntimeError, match="weight: expected on cuda"):
        rms_norm_quantize(x, torch.ones(8), 1e-6)
    with pytest.raises(RuntimeError, match="residual: expected on cuda"):
        rms_norm_quantize(x, x[0], 1e-6, x.cpu())
    with pytest.raises(RuntimeError, match="mode: expected llama or gemma, got x"):
        rms_norm_quantize(x, x[0], 1e-6, mode="x")
    with pytest.raises(RuntimeError, match="gate_up: expected an even number"):
        glu_quantize(x[:, :7])
    with pytest.raises(RuntimeError, match=r"x: expected K <= 132104"):
        rms_norm_quantize(torch.zeros(1, 132105, device=DEVICE), torch.ones(132105), 1e-6)
