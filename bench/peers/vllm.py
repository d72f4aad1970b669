"""vLLM's CUTLASS kernel for Hopper: FP8 activations and 4-bit weights in groups of 128."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Peer, Unsupported, Way, exact_product
from .native import FP8_MAX

GROUP = 128
LARGEST_SCALE = FP8_MAX / 8  # of a group: its product with a code of -8 is still an e4m3 number


class Vllm(Peer):
    """``cutlass_w4a8_mm``: signed codes times an FP8 scale per group, rounded to FP8 again, with
    FP32 scales per channel and per token."""

    name = "vllm"
    package = "vllm"
    module = "vllm"
    ways = (Way("gemm"),)
    tolerance = 0.02

    @classmethod
    def why_absent(cls) -> str | None:
        absent = super().why_absent()
        if absent:
            return absent
        try:
            from vllm import _custom_ops
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch
            return f"vllm cannot be imported: {error}"
        if not hasattr(_custom_ops, "cutlass_w4a8_mm"):
            return f"vllm {cls.version()} has no cutlass_w4a8_mm"
        return None

    def __init__(self, weight: Tensor) -> None:
        from vllm import _custom_ops as ops

        n, k = weight.shape
        if n % GROUP or k % GROUP:
            raise Unsupported(f"needs N and K to be multiples of {GROUP}")
        wanted = weight.float().view(n, -1, GROUP).abs().amax(2) / 7  # [N, groups]
        self.channel_scale = wanted.amax(1) / LARGEST_SCALE
        group_scale = (wanted / self.channel_scale.unsqueeze(1)).to(torch.float8_e4m3fn)
        packed, dequantized = [], []
        for rows, scale, channel in zip(
            weight.split(4096), group_scale.split(4096), self.channel_scale.split(4096), strict=True
        ):
            step = scale.float().repeat_interleave(GROUP, 1)
            codes = (rows.float() / (step * channel.unsqueeze(1))).round().clamp(-8, 7)
            dequantized.append((codes * step).to(torch.float8_e4m3fn))
            nibbles = codes.to(torch.int32) & 15
            packed.append(sum(nibbles[:, i::8] << (4 * i) for i in range(8)).to(torch.int32))
        self.dequantized = torch.cat([part.view(torch.uint8) for part in dequantized])
        columns = torch.cat(packed).t()  # [K / 8, N], k contiguous
        self.weight = ops.cutlass_encode_and_reorder_int4b(columns)
        self.group_scale = ops.cutlass_pack_scale_fp8(group_scale.t().contiguous())

    def new_copy(self) -> tuple[Tensor, Tensor]:
        return self.weight.clone(), self.group_scale.clone()

    def weight_bytes(self) -> int:
        return self.weight.nbytes + self.group_scale.nbytes

    def tokens(self, way: Way, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        scale = x.abs().amax(1, keepdim=True) / FP8_MAX
        return (x / scale).to(torch.float8_e4m3fn), scale.squeeze(1)

    def call(self, way: Way, tokens: tuple[Tensor, Tensor], weight: Any) -> Tensor:
        from vllm import _custom_ops as ops

        x, x_scale = tokens
        b_q, group_scale = weight
        return ops.cutlass_w4a8_mm(
            a=x,
            b_q=b_q,
            b_group_scales=group_scale,
            b_group_size=GROUP,
            b_channel_scales=self.channel_scale,
            a_token_scales=x_scale,
        )

    def expected(self, way: Way, tokens: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        x, x_scale = tokens
        x = x.view(torch.uint8)[rows].view(x.dtype)  # 8-bit floats cannot be indexed everywhere
        products = exact_product(x, self.dequantized.view(torch.float8_e4m3fn))
        return products * x_scale[rows].unsqueeze(1) * self.channel_scale
