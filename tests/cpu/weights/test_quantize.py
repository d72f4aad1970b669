"""Number format, packer and quantizer on the CPU."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import liquidgemm
from liquidgemm import dequantize_weight, pack_weight, quantize_weight, unpack_weight
from liquidgemm.formats.liquidquant import decode, pack_nibbles, unpack_nibbles
from liquidgemm.weights.quantize import QuantizedWeight

METHODS = ["search", "rtn"]


def weight_like_a_model(n, k, seed=0):
    """Gaussian rows of different sizes with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    weight[torch.rand(n, k, generator=generator) < 1 / 500] *= 5
    return weight


def squared_error(weight, quantized, importance=1.0):
    return ((dequantize_weight(quantized).double() - weight.double()) ** 2 * importance).sum(1)


# The format.


def test_nibble_order():
    q = torch.arange(64).remainder(16).to(torch.uint8).reshape(1, 64)
    packed = pack_nibbles(q)
    assert packed[0, :3].tolist() == [0x10, 0x32, 0x54]
    reference.assert_same(unpack_nibbles(packed), q)


def every_feasible_group():
    """All (s, a) with s 0..17 as rows of one group that holds 0..15 as far as a byte goes."""
    pairs = [(s, a) for s in range(18) for a in range(256)]
    s, a = torch.tensor(pairs).unsqueeze(-1).unbind(1)
    q = torch.arange(64).remainder(16).expand(len(pairs), 64)
    q = torch.where(q * s + a <= 255, q, 0)
    return pack_nibbles(q.to(torch.uint8)), s.to(torch.uint8), a.to(torch.uint8)


def test_decode_every_combination():
    """CHECKLIST 4: every feasible (s, a, q), by the Python decoder and through `gemm`."""
    logical = every_feasible_group()
    expected = reference.decode(*logical)
    reference.assert_same(decode(*logical).long(), expected)
    # One-hot activations: the output is the decoded weight.
    x = torch.eye(64, dtype=torch.int8)
    scale = torch.ones(len(expected))
    got = liquidgemm.gemm(x, torch.ones(64), pack_weight(*logical), scale, out_dtype=torch.int32)
    reference.assert_same(got.T.long(), expected)


@pytest.mark.parametrize("s", range(18))
def test_packer_refuses_exactly_the_infeasible(s):
    """CHECKLIST 4: one q at a time, at the limit and one past it."""
    for q in range(16):
        for a in {min(255, max(0, 255 - q * s)), min(255, 256 - q * s)}:
            qweight = torch.zeros(1, 32, dtype=torch.uint8)
            qweight[0, 17] = q << 4
            tensors = qweight, torch.tensor([[s]]).byte(), torch.tensor([[a]]).byte()
            if q * s + a <= 255:
                reference.assert_same(unpack_weight(pack_weight(*tensors), 1)[0], qweight)
                QuantizedWeight(*tensors, torch.ones(1), 64)
            else:
                with pytest.raises(RuntimeError, match="255"):
                    pack_weight(*tensors)
                with pytest.raises(ValueError, match=r"255.*row 0, group 0"):
                    QuantizedWeight(*tensors, torch.ones(1), 64)


@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 2**31))
def test_pack_unpack_are_inverse(n, groups, seed):
    logical = reference.random_logical(n, 64 * groups, seed)
    packed = pack_weight(*logical)
    assert packed.shape == (-(-n // 64), groups, 2176)
    for got, expected in zip(unpack_weight(packed, n), logical, strict=True):
        reference.assert_same(got, expected, n=n, groups=groups)
    reference.assert_same(pack_weight(*unpack_weight(packed, n)), packed, n=n, groups=groups)


def test_pack_any_layout():
    """CHECKLIST 7: transposed, strided and offset inputs."""
    logical = reference.random_logical(70, 192)
    expected = pack_weight(*logical)
    transposed = [t.T.contiguous().T for t in logical]
    reference.assert_same(pack_weight(*transposed), expected)
    offset = [torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) for t in logical]
    reference.assert_same(pack_weight(*offset), expected)
    strided = [t.repeat_interleave(2, 1)[:, ::2] for t in logical]
    reference.assert_same(pack_weight(*strided), expected)
    wide = expected.repeat_interleave(2, 2)[:, :, ::2]
    for got, want in zip(unpack_weight(wide, 70), logical, strict=True):
        reference.assert_same(got, want)


# The quantizer.


def test_round_to_nearest_is_the_papers():
    weight = weight_like_a_model(40, 320)
    weight[0, :64] = torch.arange(64) * (22 / 63)  # a range of 22 is where q has to be clipped
    weight[0, 64] = 119.0
    quantized = quantize_weight(weight, method="rtn")
    w8, sigma = reference.round_to_nearest(weight)
    reference.assert_same(quantized.scale, sigma)
    reference.assert_same(decode(*unpack_logical(quantized)).long(), w8)


def unpack_logical(quantized):
    return quantized.qweight, quantized.qscale, quantized.qoffset


@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("k", [64, 576, 1376, 130, 1])
def test_search_beats_round_to_nearest_in_every_row(k, group_size):
    weight = weight_like_a_model(33, k)
    found = squared_error(weight, quantize_weight(weight, group_size))
    rounded = squared_error(weight, quantize_weight(weight, group_size, "rtn"))
    rounding = 1e-12 * weight.double().square().sum(1)
    worse = (found > rounded * (1 + 1e-6) + rounding).nonzero().flatten().tolist()
    assert not worse, f"rows {worse}: {found[worse]} > {rounded[worse]}"


def test_search_on_gaussian_weights():
    """A quarter less squared error than round-to-nearest, and no worse than it was tuned to."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    energy = weight.double().square().sum()
    found = squared_error(weight, quantize_weight(weight)).sum() / energy
    rounded = squared_error(weight, quantize_weight(weight, method="rtn")).sum() / energy
    assert found < 0.0072, found
    assert found < 0.85 * rounded, (found, rounded)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("group_size", "k"), [(128, 576), (128, 128), (-1, 576), (-1, 70)])
def test_large_groups_repeat_their_parameters(method, group_size, k):
    quantized = quantize_weight(weight_like_a_model(5, k), group_size, method)
    span = 2 if group_size == 128 else quantized.qscale.shape[1]
    for parameter in (quantized.qscale, quantized.qoffset):
        for start in range(0, parameter.shape[1], span):
            group = parameter[:, start : start + span]
            reference.assert_same(group, group[:, :1].expand_as(group), start=start)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("k", [1, 63, 65, 100, 576])
def test_padding_has_no_influence(method, group_size, k):
    """A row means the same alone, with its padding explicit, and among other rows."""
    weight = weight_like_a_model(3, k)
    quantized = quantize_weight(weight, group_size, method)
    assert quantized.in_features == k
    width = -(-k // 64) * 64
    assert quantized.qweight.shape == (3, width // 2)
    assert (unpack_nibbles(quantized.qweight)[:, k:] == 0).all()
    # Values that the group contains anyway do not move its minimum or maximum.
    if method == "rtn" and group_size == 64:
        last = weight[:, (k - 1) // 64 * 64 :]
        filled = torch.cat((weight, last[:, :1].expand(-1, width - k)), 1)
        whole = quantize_weight(filled, group_size, method)
        reference.assert_same(dequantize_weight(whole)[:, :k], dequantize_weight(quantized))


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_independent_of_each_other_and_of_threads(method):
    weight = weight_like_a_model(700, 576)
    whole = quantize_weight(weight, method=method)
    pieces = [quantize_weight(part, method=method) for part in weight.split([1, 300, 399])]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = quantize_weight(weight, method=method)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    for name in ("qweight", "qscale", "qoffset", "scale"):
        expected = getattr(whole, name)
        reference.assert_same(torch.cat([getattr(p, name) for p in pieces]), expected, name=name)
        reference.assert_same(getattr(single, name), expected, name=name)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_constant(method):
    weight = weight_like_a_model(6, 192)
    weight[0] = 0
    weight[1, 64:128] = 0
    weight[2] = 0.25
    weight[3] = -0.25
    weight[4, :64] = weight[4].max()
    quantized = quantize_weight(weight, method=method)
    got = dequantize_weight(quantized)
    assert quantized.scale[0] == 0
    reference.assert_same(got[0], weight[0])
    reference.assert_same(got[1, 64:128], weight[1, 64:128])
    # Constant groups are exact up to the step of the INT8 grid.
    for row, columns in ((2, slice(None)), (3, slice(None)), (4, slice(0, 64))):
        error = (got[row, columns] - weight[row, columns]).abs().max()
        assert error <= quantized.scale[row] / 2, (row, error, quantized.scale[row])
    pack_weight(*unpack_logical(quantized))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "value", [1e-45, 1e-44, 1e-38, 3e-8, 1.0, 65504.0, 3e38], ids=lambda v: f"{v:g}"
)
def test_extreme_magnitudes(method, value):
    weight = torch.linspace(-value, value, 128, dtype=torch.float64).float().expand(2, 128)
    quantized = quantize_weight(weight, method=method)
    got = dequantize_weight(quantized)
    assert got.isfinite().all()
    # sigma is a multiple of the smallest denormal, which is all that is lost below 1e-38.
    bound = value * (16 / 119) + 128 * 1.5e-45
    assert ((got - weight).abs() <= bound).all(), (got - weight).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_widened_exactly(dtype):
    weight = weight_like_a_model(9, 200).to(dtype)
    got, expected = quantize_weight(weight), quantize_weight(weight.float())
    for name in ("qweight", "qscale", "qoffset", "scale"):
        reference.assert_same(getattr(got, name), getattr(expected, name), name=name)
    assert dequantize_weight(got, dtype).dtype == dtype


def test_any_layout_and_gradients():
    """CHECKLIST 7: transposed, strided, expanded, requires_grad and inference tensors."""
    weight = weight_like_a_model(20, 128)
    expected = quantize_weight(weight).qweight
    wide = weight.repeat_interleave(2, 1)[:, ::2]
    for variant in (weight.T.contiguous().T, wide, weight.clone().requires_grad_()):
        reference.assert_same(quantize_weight(variant).qweight, expected)
    same = weight[:1].expand(20, -1)
    reference.assert_same(quantize_weight(same).qweight, quantize_weight(same.clone()).qweight)
    with torch.inference_mode():
        inference = weight.clone()
        reference.assert_same(quantize_weight(inference).qweight, expected)
    reference.assert_same(quantize_weight(inference).qweight, expected)


def test_importance():
    weight = weight_like_a_model(16, 320)
    importance = torch.rand(320).pow(4)
    plain = quantize_weight(weight)
    weighted = quantize_weight(weight, importance=importance)
    gain = squared_error(weight, weighted, importance).sum()
    assert gain < 0.95 * squared_error(weight, plain, importance).sum()
    # Equal weights are no weights, whatever their size; zeros are no error.
    for size in (1.0, 1e-30, 1e30):
        equal = quantize_weight(weight, importance=torch.full((320,), size))
        reference.assert_same(equal.qweight, plain.qweight, size=size)
    quantize_weight(weight, importance=torch.zeros(320))


@given(
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from([64, 128, -1]),
    st.sampled_from(METHODS),
    st.integers(0, 2**31),
)
def test_error_is_bounded_by_the_step(n, k, group_size, method, seed):
    """CHECKLIST 17: whatever the shape, the result is feasible and no weight is far off."""
    weight = weight_like_a_model(n, k, seed)
    quantized = quantize_weight(weight, group_size, method)  # validates feasibility
    step = quantized.qscale.max(1).values * quantized.scale
    clipped = weight.abs().amax(1) * (1 - 0.75)
    error = (dequantize_weight(quantized) - weight).abs().amax(1)
    assert (error <= 3 * step + clipped).all(), (error, step)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_non_finite_weights_are_refused(method, bad):
    weight = weight_like_a_model(300, 64)
    weight[217, 5] = bad
    with pytest.raises(ValueError, match=r"weight: expected finite.*row 217"):
        quantize_weight(weight, method=method)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.zeros(2, 3, dtype=torch.int8)}, TypeError, "weight: .*int8"),
        ({"weight": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "weight: .*float64"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: .*\[3\]"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight: .*\[0, 3\]"),
        ({"weight": torch.zeros(3, 0)}, ValueError, r"weight: .*\[3, 0\]"),
        ({"weight": torch.zeros(1, 132105)}, ValueError, "132104.*132105"),
        ({"group_size": 48}, ValueError, "group_size: .*48"),
        ({"group_size": 32.0}, ValueError, r"group_size: expected one of .*, got 32\.0"),
        ({"group_size": 32, "bits": 6}, ValueError, "group_size: .*with 6 bits, got 32"),
        ({"method": "gptq"}, ValueError, "method: .*'gptq'"),
        ({"importance": torch.ones(4)}, ValueError, r"importance: expected shape \[3\].*\[4\]"),
        ({"importance": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "importance: .*column 1"),
        ({"importance": torch.ones(3), "method": "rtn"}, ValueError, "importance: .*'rtn'"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    """CHECKLIST 7: the message names the argument, what was expected and what came."""
    with pytest.raises(error, match=message):
        quantize_weight(**{"weight": torch.zeros(2, 3), **arguments})


# QuantizedWeight.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": torch.zeros(3, 64, dtype=torch.int8)}, "qweight: expected dtype"),
        ({"qweight": torch.zeros(3, 32, dtype=torch.uint8)}, r"qweight: .*\[3, 64\].*\[3, 32\]"),
        ({"qscale": torch.ones(3, 1, dtype=torch.uint8)}, r"qscale: .*\[3, 2\].*\[3, 1\]"),
        ({"qoffset": torch.zeros(2, 2, dtype=torch.uint8)}, r"qoffset: .*\[3, 2\].*\[2, 2\]"),
        ({"scale": torch.ones(3, dtype=torch.float64)}, "scale: .*float32.*float64"),
        ({"scale": torch.tensor(1.0)}, r"scale: expected shape \[N\]"),
        ({"scale": torch.tensor([1.0, float("nan"), 1.0])}, "scale: .*nan in row 1"),
        ({"scale": torch.tensor([1.0, 1.0, float("inf")])}, "scale: .*inf in row 2"),
        ({"scale": torch.tensor([-1.0, 1.0, 1.0])}, r"scale: .*-1.0 in row 0"),
        ({"qscale": torch.ones(3, 2, dtype=torch.uint8, device="meta")}, "qscale: .*cpu.*meta"),
        ({"in_features": 0}, "in_features: .*0"),
        ({"in_features": 132105}, "in_features: .*132105"),
    ],
)
def test_quantized_weight_is_validated(changes, message):
    """CHECKLIST 7 and 19."""
    fields = {
        "qweight": torch.zeros(3, 64, dtype=torch.uint8),
        "qscale": torch.ones(3, 2, dtype=torch.uint8),
        "qoffset": torch.zeros(3, 2, dtype=torch.uint8),
        "scale": torch.ones(3),
        "in_features": 100,
    }
    QuantizedWeight(**fields)
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**(fields | changes))


def test_tensor_parallel_slices_concatenate_to_the_whole():
    """CHECKLIST 19: rows put side by side, and columns summed as integers, give the whole."""
    quantized = quantize_weight(weight_like_a_model(130, 1376))
    x = torch.randint(-127, 128, (5, 1376)).to(torch.int8)
    ones = torch.ones(5)

    def integers(part, x=x):
        packed = pack_weight(*unpack_logical(part))
        return liquidgemm.gemm(x, ones, packed, part.scale, out_dtype=torch.int32)

    whole = integers(quantized)
    rows = [quantized.narrow_rows(start, 65) for start in (0, 65)]
    reference.assert_same(torch.cat([integers(part) for part in rows], 1), whole)
    bounds = [(0, 640), (640, 1376)]
    columns = [quantized.narrow_columns(a, b - a) for a, b in bounds]
    parts = [integers(c, x[:, a:b]) for c, (a, b) in zip(columns, bounds, strict=True)]
    reference.assert_same(sum(parts), whole)
    joined = torch.cat([dequantize_weight(part) for part in columns], 1)
    reference.assert_same(joined, dequantize_weight(quantized))


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, 0), (0, 201), (200, 1)])
def test_slices_out_of_range(start, length):
    quantized = quantize_weight(weight_like_a_model(200, 200))
    with pytest.raises(ValueError, match=f"rows: .*{start}"):
        quantized.narrow_rows(start, length)
    with pytest.raises(ValueError, match=f"columns: .*{start}"):
        quantized.narrow_columns(start, length)


@pytest.mark.parametrize(("start", "length"), [(32, 64), (0, 100), (64, 130)])
def test_columns_are_sliced_by_groups(start, length):
    quantized = quantize_weight(weight_like_a_model(2, 200))
    with pytest.raises(ValueError, match="whole groups of 64"):
        quantized.narrow_columns(start, length)
