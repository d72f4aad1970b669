"""Errors of the ops: the argument, what was expected and what came."""

import pytest
import reference
import torch
from gemm_case import Case

from liquidgemm import gemm, linear, pack_weight, quantize_activation, unpack_weight

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.liquidgemm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 100)}, "x: expected dtype int8, got float32"),
        ({"x": torch.tensor(1).to(torch.int8)}, r"x: expected at least 1 dimension, got .*\[\]"),
        ({"x": torch.zeros(2, 0).to(torch.int8)}, r"x: expected at least 1 column, .*\[2, 0\]"),
        ({"x": torch.zeros(2, 129).to(torch.int8)}, r"weight: expected shape \[2, 3, 2176\]"),
        ({"x": torch.zeros(2, 64).to(torch.int8)}, r"weight: .*K = 64 of x, got \[2, 2, 2176\]"),
        ({"x_scale": torch.ones(2).double()}, "x_scale: expected dtype float32, got float64"),
        ({"x_scale": torch.ones(3)}, r"x_scale: expected shape \[2\], got \[3\]"),
        ({"x_scale": torch.ones(2, 1)}, r"x_scale: expected shape \[2\], got \[2, 1\]"),
        ({"x_scale": torch.ones(2, device="meta")}, "x_scale: expected on .* like x, got on"),
        ({"weight": torch.zeros(2, 2, 2176)}, "weight: expected dtype uint8, got float32"),
        ({"weight": torch.zeros(2, 2, 99).byte()}, r"weight: expected shape .*\[2, 2, 99\]"),
        ({"weight": torch.zeros(2, 2).byte()}, r"weight: expected shape .*got \[2, 2\]"),
        ({"weight": torch.zeros(2, 2, 2176, device="meta").byte()}, "weight: expected on"),
        ({"weight_scale": torch.ones(70).half()}, "weight_scale: expected dtype float32"),
        ({"weight_scale": torch.ones(70, 1)}, r"weight_scale: expected shape \[N\], got \[70, 1\]"),
        ({"weight_scale": torch.ones(0)}, r"weight_scale: expected shape \[N\], got \[0\]"),
        ({"weight_scale": torch.ones(129)}, r"weight: .*\[3, 2, 2176\] for N = 129 of weight_sc"),
        ({"weight_scale": torch.ones(70, device="meta")}, "weight_scale: expected on"),
        ({"bias": torch.ones(71)}, r"bias: expected shape \[70\], got \[71\]"),
        ({"bias": torch.ones(70).int()}, "bias: expected dtype float32 or bfloat16 or float16"),
        ({"bias": torch.ones(70, device="meta")}, "bias: expected on"),
        ({"out_dtype": torch.int8}, "out_dtype: expected bfloat16 or .* or int32, got int8"),
        ({"out_dtype": torch.int32, "bias": torch.ones(70)}, "bias: expected None .*int32"),
    ],
)
def test_errors_of_gemm(changes, message):
    """CHECKLIST 7: the message names the argument, what was expected and what came."""
    arguments = {
        "x": torch.zeros(2, 100, dtype=torch.int8),
        "x_scale": torch.ones(2),
        "weight": torch.zeros(2, 2, 2176, dtype=torch.uint8),
        "weight_scale": torch.ones(70),
    }
    gemm(**arguments)
    with pytest.raises(RuntimeError, match=message):
        gemm(**(arguments | changes))


@pytest.mark.parametrize("op", ["gemm", "linear"])
def test_k_is_limited_by_the_accumulator(op):
    """CHECKLIST 7: K past 132 104 could overflow 32 bits."""
    weight = torch.zeros(1, 2065, 2176, dtype=torch.uint8)
    for k in (132105, 132160):
        x = torch.zeros(1, k)
        arguments = (x,) if op == "linear" else (x.to(torch.int8), torch.ones(1))
        with pytest.raises(RuntimeError, match=f"x: expected K <= 132104 .*got K = {k}"):
            getattr(OPS, op)(*arguments, weight, torch.ones(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 100).double()}, "x: expected dtype .*float16, got float64"),
        ({"x": torch.zeros(2, 100).int()}, "x: expected dtype .*got int32"),
        ({"x": torch.zeros(2, 300)}, r"weight: expected shape \[2, 5, 2176\]"),
        ({"bias": torch.zeros(1)}, r"bias: expected shape \[70\], got \[1\]"),
    ],
)
def test_errors_of_linear(changes, message):
    """CHECKLIST 7."""
    arguments = {
        "x": torch.zeros(2, 100),
        "weight": torch.zeros(2, 2, 2176, dtype=torch.uint8),
        "weight_scale": torch.ones(70),
    }
    linear(**arguments)
    with pytest.raises(RuntimeError, match=message):
        linear(**(arguments | changes))


def test_ops_know_k_by_its_groups():
    """CHECKLIST 24: as documented: up to 63 columns less than the padded K, the first ones."""
    case = Case(3, 72, 128)
    for k in (65, 66, 127, 128):
        x = torch.randn(3, k)
        padded_x = torch.nn.functional.pad(x, (0, 128 - k))
        expected = linear(padded_x, case.weight, case.weight_scale)
        got = linear(x, case.weight, case.weight_scale)
        reference.assert_same(got, expected, k=k)
    for k in (1, 64, 129, 192):
        with pytest.raises(RuntimeError, match=f"weight: expected shape .*K = {k} of x"):
            linear(torch.randn(3, k), case.weight, case.weight_scale)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((), torch.float32, "x: expected at least 1 dimension"),
        ((4, 0), torch.float32, "x: expected at least 1 column"),
        ((4, 4), torch.float64, "x: expected dtype .*got float64"),
        ((4, 4), torch.int8, "x: expected dtype .*got int8"),
    ],
)
def test_errors_of_quantize_activation(shape, dtype, message):
    """CHECKLIST 7."""
    with pytest.raises(RuntimeError, match=message):
        quantize_activation(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(70, 64).int(), "qweight: expected dtype"),
        (0, torch.zeros(70).byte(), "qweight: expected"),
        (0, torch.zeros(70, 48).byte(), r"qweight: expected .*multiple of 64, got .*\[70, 48\]"),
        (0, torch.zeros(70, 0).byte(), r"qweight: expected .*got .*\[70, 0\]"),
        (0, torch.zeros(1, 66080 + 32).byte(), "qweight: expected K <= 132160 .*got K = 132224"),
        (1, torch.zeros(70, 2), "qscale: expected dtype"),
        (1, torch.zeros(70, 3).byte(), r"qscale: expected shape \[70, 2\], got \[70, 3\]"),
        (2, torch.zeros(70, 2).char(), "qoffset: expected dtype"),
        (2, torch.zeros(71, 2).byte(), r"qoffset: expected shape \[70, 2\], got \[71, 2\]"),
    ],
)
def test_errors_of_pack_weight(index, wrong, message, device):
    """CHECKLIST 7, by the compiled packer and by the shape function alike."""
    tensors = [torch.zeros(70, 64), torch.zeros(70, 2), torch.zeros(70, 2)]
    tensors = [t.byte().to(device) for t in tensors]
    pack_weight(*tensors)
    tensors[index] = wrong.to(device)
    with pytest.raises(RuntimeError, match=message):
        pack_weight(*tensors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("packed", "n", "message"),
    [
        (torch.zeros(2, 1, 2176), 70, "packed: expected dtype"),
        (torch.zeros(2, 2176).byte(), 70, "packed: expected"),
        (torch.zeros(2, 1, 2175).byte(), 70, r"packed: expected .*got .*\[2, 1, 2175\]"),
        (torch.zeros(1, 2066, 2176).byte(), 1, "packed: expected K <= 132160 .*got K = 132224"),
        (torch.zeros(2, 1, 2176).byte(), 64, "n: expected 65 to 128 .*got 64"),
        (torch.zeros(2, 1, 2176).byte(), 129, "n: expected 65 to 128 .*got 129"),
        (torch.zeros(2, 1, 2176).byte(), -1, "n: expected 65 to 128 .*got -1"),
    ],
)
def test_errors_of_unpack_weight(packed, n, message, device):
    """CHECKLIST 7, by the compiled packer and by the shape function alike."""
    with pytest.raises(RuntimeError, match=message):
        unpack_weight(packed.to(device), n)
