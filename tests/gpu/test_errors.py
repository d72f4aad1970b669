"""Misuse on the GPU: refused before anything is launched, in the same words as on the CPU.

The CPU tests check the words; here the two sides are compared message by message.
"""

import bad_arguments
import pytest
import torch
from hypothesis import given, settings
from problems import DEVICE

OPS = torch.ops.liquidgemm

GEMM = {
    "x": torch.zeros(2, 100, dtype=torch.int8),
    "x_scale": torch.ones(2),
    "weight": torch.zeros(2, 2, 2176, dtype=torch.uint8),
    "weight_scale": torch.ones(70),
    "bias": None,
    "out_dtype": None,
}
LINEAR = {
    "x": torch.zeros(2, 100),
    "weight": GEMM["weight"],
    "weight_scale": GEMM["weight_scale"],
    "bias": None,
}
QUANTIZE = {"x": torch.zeros(2, 100)}
PACK = {
    "qweight": torch.zeros(70, 64, dtype=torch.uint8),
    "qscale": torch.zeros(70, 2, dtype=torch.uint8),
    "qoffset": torch.zeros(70, 2, dtype=torch.uint8),
}
DEQUANTIZE = {
    "weight": GEMM["weight"],
    "weight_scale": GEMM["weight_scale"],
    "k": 100,
    "dtype": torch.bfloat16,
}
UNPACK = {"packed": torch.zeros(2, 1, 2176, dtype=torch.uint8), "n": 70}

CASES = [
    ("gemm", GEMM, {"x": torch.zeros(2, 100)}),
    ("gemm", GEMM, {"x": torch.tensor(1, dtype=torch.int8)}),
    ("gemm", GEMM, {"x": torch.zeros(2, 0, dtype=torch.int8)}),
    ("gemm", GEMM, {"x": torch.zeros(2, 129, dtype=torch.int8)}),
    ("gemm", GEMM, {"x": torch.zeros(2, 64, dtype=torch.int8)}),
    ("gemm", GEMM, {"x": torch.zeros(2, 132105, dtype=torch.int8)}),
    ("gemm", GEMM, {"x_scale": torch.ones(2, dtype=torch.float64)}),
    ("gemm", GEMM, {"x_scale": torch.ones(3)}),
    ("gemm", GEMM, {"x_scale": torch.ones(2, 1)}),
    ("gemm", GEMM, {"weight": torch.zeros(2, 2, 2176)}),
    ("gemm", GEMM, {"weight": torch.zeros(2, 2, 99, dtype=torch.uint8)}),
    ("gemm", GEMM, {"weight": torch.zeros(2, 2, dtype=torch.uint8)}),
    ("gemm", GEMM, {"weight_scale": torch.ones(70).half()}),
    ("gemm", GEMM, {"weight_scale": torch.ones(70, 1)}),
    ("gemm", GEMM, {"weight_scale": torch.ones(0)}),
    ("gemm", GEMM, {"weight_scale": torch.ones(129)}),
    ("gemm", GEMM, {"bias": torch.ones(71)}),
    ("gemm", GEMM, {"bias": torch.ones(70).int()}),
    ("gemm", GEMM, {"out_dtype": torch.int8}),
    ("gemm", GEMM, {"out_dtype": torch.complex64}),
    ("gemm", GEMM, {"out_dtype": torch.int32, "bias": torch.ones(70)}),
    ("linear", LINEAR, {"x": torch.zeros(2, 100).double()}),
    ("linear", LINEAR, {"x": torch.zeros(2, 100).long()}),
    ("linear", LINEAR, {"x": torch.tensor(1.0)}),
    ("linear", LINEAR, {"x": torch.zeros(2, 300)}),
    ("linear", LINEAR, {"x": torch.zeros(1, 132160)}),
    ("linear", LINEAR, {"bias": torch.ones(1)}),
    ("quantize_activation", QUANTIZE, {"x": torch.tensor(1.0)}),
    ("quantize_activation", QUANTIZE, {"x": torch.zeros(4, 0)}),
    ("quantize_activation", QUANTIZE, {"x": torch.zeros(4, 4, dtype=torch.bool)}),
    ("quantize_activation", QUANTIZE, {"x": torch.zeros(4, 4, dtype=torch.int16)}),
    ("pack_weight", PACK, {"qweight": torch.zeros(70, 64, dtype=torch.int32)}),
    ("pack_weight", PACK, {"qweight": torch.zeros(70, dtype=torch.uint8)}),
    ("pack_weight", PACK, {"qweight": torch.zeros(0, 64, dtype=torch.uint8)}),
    ("pack_weight", PACK, {"qweight": torch.zeros(70, 48, dtype=torch.uint8)}),
    ("pack_weight", PACK, {"qweight": torch.zeros(1, 66112, dtype=torch.uint8)}),
    ("pack_weight", PACK, {"qscale": torch.zeros(70, 3, dtype=torch.uint8)}),
    ("pack_weight", PACK, {"qoffset": torch.zeros(71, 2, dtype=torch.int8)}),
    ("pack_weight", PACK, {"qoffset": torch.zeros(71, 2, dtype=torch.uint8)}),
    (
        "pack_weight",  # infeasible: 15 * 17 + 1 = 256
        PACK,
        {
            "qweight": torch.full((70, 64), 0xFF, dtype=torch.uint8),
            "qscale": torch.full((70, 2), 17, dtype=torch.uint8),
            "qoffset": torch.ones(70, 2, dtype=torch.uint8),
        },
    ),
    ("dequantize_packed", DEQUANTIZE, {"weight": torch.zeros(2, 2, 2176)}),
    ("dequantize_packed", DEQUANTIZE, {"weight_scale": torch.ones(70, dtype=torch.float64)}),
    ("dequantize_packed", DEQUANTIZE, {"weight_scale": torch.ones(70, 1)}),
    ("dequantize_packed", DEQUANTIZE, {"weight_scale": torch.ones(129)}),
    ("dequantize_packed", DEQUANTIZE, {"k": 0}),
    ("dequantize_packed", DEQUANTIZE, {"k": 129}),
    ("dequantize_packed", DEQUANTIZE, {"k": 132105}),
    ("dequantize_packed", DEQUANTIZE, {"dtype": torch.float64}),
    ("unpack_weight", UNPACK, {"packed": torch.zeros(2, 1, 2176)}),
    ("unpack_weight", UNPACK, {"packed": torch.zeros(2, 1, 2175, dtype=torch.uint8)}),
    ("unpack_weight", UNPACK, {"packed": torch.zeros(1, 2066, 2176, dtype=torch.uint8), "n": 1}),
    ("unpack_weight", UNPACK, {"n": 64}),
    ("unpack_weight", UNPACK, {"n": -1}),
]


def to_gpu(arguments: dict) -> dict:
    return {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def refusal(op: str, arguments: dict) -> str:
    with pytest.raises(RuntimeError) as caught:
        getattr(OPS, op)(**arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("op", "arguments", "changes"), CASES, ids=[f"{op}-{'-'.join(c)}" for op, _, c in CASES]
)
def test_the_cpu_says_the_same(op: str, arguments: dict, changes: dict) -> None:
    """CHECKLIST 7: the argument, what was expected and what came, in the same words."""
    wrong = arguments | changes
    assert refusal(op, to_gpu(wrong)) == refusal(op, wrong)


@settings(max_examples=300, deadline=None)
@given(bad_arguments.calls())
def test_the_cpu_says_the_same_of_any_arguments(call: tuple[str, dict]) -> None:
    """CHECKLIST 7, 17: or has results of the same dtypes and shapes, where nothing is wrong."""
    assert bad_arguments.outcome(*call, DEVICE) == bad_arguments.outcome(*call, "cpu")


@pytest.mark.parametrize(
    ("op", "arguments", "reference"),
    [
        ("gemm", GEMM, "x"),
        ("linear", LINEAR, "x"),
        ("pack_weight", PACK, "qweight"),
        ("dequantize_packed", DEQUANTIZE, "weight"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_tensors_on_two_devices(op: str, arguments: dict, reference: str) -> None:
    """CHECKLIST 7: each argument in turn is on the CPU, all others are on the GPU."""
    arguments = dict(arguments)
    if "bias" in arguments:
        arguments["bias"] = torch.ones(70)
    on_gpu = to_gpu(arguments)
    getattr(OPS, op)(**on_gpu)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        got = refusal(op, on_gpu | {name: value})
        if name == reference:  # the first other argument is then the odd one
            assert f"expected on cpu like {reference}, got on cuda:0" in got, name
        else:
            assert got == f"{name}: expected on cuda:0 like {reference}, got on cpu"


def test_nothing_is_launched() -> None:
    """CHECKLIST 7: a refused call leaves the GPU in order."""
    for op, arguments, changes in CASES:
        refusal(op, to_gpu(arguments | changes))
    torch.cuda.synchronize()
    OPS.gemm(**to_gpu(GEMM))
    torch.cuda.synchronize()
