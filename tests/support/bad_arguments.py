"""Arguments of the ops with one or two of them changed at random, mostly for the worse."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

U8, I8 = torch.uint8, torch.int8
GOOD = {
    "gemm": {
        "x": torch.zeros(2, 100, dtype=I8),
        "x_scale": torch.ones(2),
        "weight": torch.zeros(2, 2, 2176, dtype=U8),
        "weight_scale": torch.ones(70),
        "bias": torch.zeros(70),
        "out_dtype": torch.bfloat16,
    },
    "linear": {
        "x": torch.zeros(2, 100),
        "weight": torch.zeros(2, 2, 4096, dtype=U8),
        "weight_scale": torch.ones(70),
        "bias": torch.zeros(70),
    },
    "quantize_activation": {"x": torch.zeros(3, 2, 100)},
    "pack_weight": {
        "qweight": torch.zeros(70, 64, dtype=U8),
        "qscale": torch.zeros(70, 2, dtype=U8),
        "qoffset": torch.zeros(70, 2, dtype=U8),
    },
    "unpack_weight": {"packed": torch.zeros(2, 1, 2176, dtype=U8), "n": 70},
    "pack_int8_weight": {"qweight": torch.zeros(70, 128, dtype=I8)},
    "unpack_int8_weight": {"packed": torch.zeros(2, 1, 4096, dtype=U8), "n": 70},
    "dequantize_packed": {
        "weight": torch.zeros(2, 2, 2176, dtype=U8),
        "weight_scale": torch.ones(70),
        "k": 100,
        "dtype": torch.bfloat16,
    },
}
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
)
SIZES = (0, 1, 2, 63, 64, 65, 70, 71, 100, 128, 129, 2175, 2176, 4096)


@st.composite
def changed(draw: st.DrawFn, value: object) -> object:
    """Another value of the same kind; a tensor of another dtype or shape, all of it zeros."""
    if isinstance(value, torch.dtype):
        return draw(st.sampled_from(DTYPES))
    if isinstance(value, int):
        return draw(st.sampled_from((-1, *SIZES, 132105)))
    assert isinstance(value, torch.Tensor)
    if draw(st.booleans()):
        return value.to(draw(st.sampled_from(DTYPES)))
    shape = list(value.shape)
    place = draw(st.integers(0, len(shape)))
    what = draw(st.sampled_from(("resize", "drop", "insert")))
    if what == "insert":
        shape.insert(place, draw(st.sampled_from((0, 1, 2))))
    elif place < len(shape):
        shape[place : place + 1] = [] if what == "drop" else [draw(st.sampled_from(SIZES))]
    return torch.zeros(shape, dtype=value.dtype)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, object]]:
    """An op and its arguments."""
    op = draw(st.sampled_from(sorted(GOOD)))
    arguments = dict(GOOD[op])
    for name in draw(st.sets(st.sampled_from(sorted(arguments)), min_size=1, max_size=2)):
        arguments[name] = draw(changed(arguments[name]))
    return op, arguments


def outcome(op: str, arguments: dict[str, object], device: str) -> str | list:
    """What the op says, or the dtypes and shapes that it returns."""
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    try:
        results = getattr(torch.ops.liquidgemm, op)(**moved)
    except RuntimeError as error:
        return str(error)
    results = results if isinstance(results, tuple | list) else (results,)
    return [(result.dtype, tuple(result.shape)) for result in results]
