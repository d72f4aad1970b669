"""The formats of keys and values: codes, scales, layouts."""

import math

import pytest
import torch
from kv_problems import rows

from liquidgemm.kv.format import FORMATS, bf16_not_below, dequantize, pack_codes, quantize, rotate

CODED = ["int8", "int4"]


@pytest.mark.parametrize("d", [64, 128, 256])
def test_rotate_is_the_hadamard_matrix(d: int) -> None:
    signs = torch.tensor([[(-1) ** (i & j).bit_count() for j in range(d)] for i in range(d)])
    assert torch.equal(rotate(torch.eye(d)), signs.float())
    x = torch.randint(-64, 64, (3, d)).float()
    assert torch.equal(rotate(rotate(x)) / d, x)


def test_scales_are_the_least_bfloat16_not_below() -> None:
    x = rows(4096, seed=0, dtype=torch.float32).abs()
    up = bf16_not_below(x)
    assert torch.equal(up.bfloat16().float(), up)
    assert (up >= x).all()
    before = (up.bfloat16().view(torch.int16) - 1).view(torch.bfloat16).float()
    assert (before < x).all()


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("values", [False, True])
def test_codes_are_the_nearest(name: str, values: bool) -> None:
    """Against the definition in float64, which decides all but ties as float32 does."""
    fmt = FORMATS[name]
    x = rows(64, 128, seed=1) * torch.logspace(-20, 20, 64).unsqueeze(-1).bfloat16()
    codes, params = quantize(x, fmt, values)
    y = rotate(x.float()) if fmt.rotates(values) else x.float()
    if name == "int8":
        scale, zero = params.double(), torch.zeros(64, dtype=torch.float64)
        least, most = -127, 127
    else:
        scale, zero = (params & -65536).view(torch.float32).double(), (params & 15).double()
        least, most = 0, 15
        assert torch.equal(zero, (-y.double().amin(-1) / scale).round())
    expected = ((y.double() / scale[:, None]).round() + zero[:, None]).clamp(least, most)
    assert torch.equal(codes.double(), expected)
    # The range of the codes is used, to within the rounding of the scale.
    used = codes.float().abs().amax(-1) if name == "int8" else codes.float().amax(-1)
    assert (used >= most - 1).all()


@pytest.mark.parametrize("name", CODED)
def test_special_rows(name: str) -> None:
    """CHECKLIST 8: zeros have scale 0; a NaN or an infinity gives a scale of NaN and codes 0."""
    x = torch.ones(4, 64)
    x[0] = 0
    x[1, 5], x[2, 63] = math.nan, -math.inf
    codes, params = quantize(x, FORMATS[name], True)
    assert not codes[:3].any()
    back = dequantize(codes, params, FORMATS[name], True)
    assert not back[0].any()
    assert back[1:3].isnan().all()
    assert torch.allclose(back[3], x[3], rtol=1e-2)


def test_denormals() -> None:
    """CHECKLIST 8"""
    x = torch.full((1, 64), 1e-40).bfloat16()
    codes, params = quantize(x, FORMATS["int8"], True)
    assert params.item() > 0
    assert codes.max() <= 127
    assert codes.min() >= 0


def test_fp8_saturates() -> None:
    codes, params = quantize(torch.tensor([1e9, -1e9, 1.0]), FORMATS["fp8"], False)
    assert params is None
    assert codes.float().tolist() == [448, -448, 1]


def test_a_byte_of_int4_holds_both_halves() -> None:
    codes = torch.arange(64, dtype=torch.uint8) % 16
    codes[40] = 7
    packed = pack_codes(codes, FORMATS["int4"])
    assert packed.shape == (32,)
    assert packed[8] == codes[8] | 7 << 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bfloat16", 512), ("float16", 512), ("fp8", 256), ("int8", 260), ("int4", 136)],
)
def test_bytes_per_token(name: str, expected: int) -> None:
    assert FORMATS[name].bytes_per_token(128) == expected
