"""What the ops of experts refuse, and in which words."""

import pytest
import torch

OPS = torch.ops.liquidgemm
ZERO = torch.zeros
BYTES = {"dtype": torch.uint8}
ARGUMENTS = {
    "grouped_gemm": {
        "x": ZERO(6, 100, dtype=torch.int8),
        "x_scale": torch.ones(6),
        "weight": ZERO(3, 2, 2, 2176, **BYTES),
        "weight_scale": torch.ones(3, 80),
        "offsets": torch.tensor([0, 1, 3, 6], dtype=torch.int32),
    },
    "moe_schedule": {"topk_ids": ZERO(2, 2).long(), "num_experts": 3},
    "quantize_activation_rows": {
        "x": ZERO(2, 100),
        "slot_of_row": ZERO(4).int(),
        "top_k": 2,
    },
    "moe_combine": {
        "y": ZERO(6, 100),
        "row_of_slot": ZERO(4).int(),
        "topk_weights": ZERO(2, 2),
        "residual": ZERO(2, 100),
    },
    "moe": {
        "x": ZERO(2, 100),
        "topk_ids": ZERO(2, 2).long(),
        "topk_weights": ZERO(2, 2),
        "w1": ZERO(3, 2, 2, 2176, **BYTES),
        "w1_scale": torch.ones(3, 80),
        "w2": ZERO(3, 2, 1, 2176, **BYTES),
        "w2_scale": torch.ones(3, 100),
    },
}
FAULTS = [
    ("grouped_gemm", {"x": ZERO(6, 100)}, "x: expected dtype int8, got float32"),
    ("grouped_gemm", {"x": ZERO(100).char()}, r"x: expected shape .*got \[100\]"),
    ("grouped_gemm", {"x_scale": torch.ones(5)}, r"x_scale: expected shape \[6\], got \[5\]"),
    ("grouped_gemm", {"weight": ZERO(3, 2, 2, 2176)}, "weight: expected dtype uint8"),
    ("grouped_gemm", {"weight": ZERO(2, 2, 2, 2176, **BYTES)}, r"weight: .*\[3, 2, 2, 2176\] for"),
    ("grouped_gemm", {"weight_scale": torch.ones(80)}, r"weight_scale: .*\[E, N\], got \[80\]"),
    ("grouped_gemm", {"weight_scale": torch.ones(3, 80).half()}, "weight_scale: expected dtype"),
    ("grouped_gemm", {"offsets": ZERO(4).long()}, "offsets: expected dtype int32, got int64"),
    ("grouped_gemm", {"offsets": ZERO(3).int()}, r"offsets: expected shape \[4\] for E = 3"),
    ("grouped_gemm", {"bias": ZERO(80)}, r"bias: expected shape \[3, 80\], got \[80\]"),
    ("grouped_gemm", {"out_dtype": torch.int8}, "out_dtype: expected .* got int8"),
    ("grouped_gemm", {"out_dtype": torch.int32, "bias": ZERO(3, 80)}, "bias: expected None"),
    ("grouped_gemm", {"activation": "relu"}, "activation: expected none or .* got 'relu'"),
    ("grouped_gemm", {"out_dtype": torch.int32, "activation": "silu_mul"}, "activation: expected"),
    (
        "grouped_gemm",
        {"weight_scale": torch.ones(3, 72), "activation": "silu_mul"},
        "weight_scale: expected N a multiple of 16 with activation silu_mul, got N = 72",
    ),
    ("moe_schedule", {"topk_ids": ZERO(2, 2)}, "topk_ids: expected dtype int32 or int64"),
    ("moe_schedule", {"topk_ids": ZERO(4).int()}, r"topk_ids: expected shape .*got \[4\]"),
    ("moe_schedule", {"num_experts": 0}, "num_experts: expected at least 1, got 0"),
    ("quantize_activation_rows", {"x": ZERO(100)}, r"x: expected shape .*got \[100\]"),
    ("quantize_activation_rows", {"slot_of_row": ZERO(4)}, "slot_of_row: expected dtype int32"),
    ("quantize_activation_rows", {"top_k": 0}, "top_k: expected at least 1, got 0"),
    ("moe_combine", {"y": ZERO(6, 100).int()}, "y: expected dtype .* got int32"),
    ("moe_combine", {"row_of_slot": ZERO(5).int()}, r"row_of_slot: expected shape \[4\]"),
    ("moe_combine", {"topk_weights": ZERO(4)}, r"topk_weights: expected shape .*got \[4\]"),
    ("moe_combine", {"residual": ZERO(2, 99)}, r"residual: expected shape \[2, 100\]"),
    ("moe_combine", {"residual": ZERO(2, 100).half()}, "residual: expected dtype float32"),
    ("moe", {"x": ZERO(2, 200)}, r"w1: expected shape \[3, 2, 4, 2176\]"),
    ("moe", {"topk_ids": ZERO(3, 2).int()}, r"topk_ids: expected 2 tokens, got \[3, 2\]"),
    ("moe", {"topk_weights": ZERO(2, 3)}, r"topk_weights: expected shape \[2, 2\]"),
    ("moe", {"w1_scale": torch.ones(3, 72)}, "w1_scale: expected N a multiple of 16"),
    ("moe", {"w2_scale": torch.ones(4, 100)}, r"w2_scale: expected shape \[3, 100\] for E = 3"),
    ("moe", {"w2": ZERO(3, 2, 2, 2176, **BYTES)}, r"w2: expected shape \[3, 2, 1, 2176\]"),
    ("moe", {"b1": ZERO(3, 40)}, r"b1: expected shape \[3, 80\]"),
    ("moe", {"b2": ZERO(3, 100, device="meta")}, "b2: expected on"),
    ("moe", {"activation": "none"}, "activation: expected silu_mul or .* got 'none'"),
]


@pytest.mark.parametrize(("op", "changes", "message"), FAULTS)
def test_errors(op, changes, message):
    """CHECKLIST 7: named alike by the op and by its shape function."""
    function, arguments = getattr(OPS, op), ARGUMENTS[op]
    function(**arguments)
    with pytest.raises(RuntimeError, match=message):
        function(**(arguments | changes))
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with pytest.raises(RuntimeError, match=message), mode:
        function(**(arguments | changes))
