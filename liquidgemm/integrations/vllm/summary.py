"""What vLLM's log says once all layers are loaded, and which devices are refused."""

from __future__ import annotations

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ..serving import summary
from . import fusion
from .producers import Producers

logger = init_logger("vllm.liquidgemm")


class Summary(summary.Summary):
    exact = 0  # layers with the bits of one GPU on several

    def __init__(self) -> None:
        super().__init__()
        self.producers = Producers()

    def complete(self, device: torch.device) -> None:
        self.producers.switch_on()
        super().complete(device)

    def say(self, line: str) -> None:
        logger.info("%s", line)

    def more(self) -> str:
        exact = f"; {self.exact} with the bits of one GPU on several" if self.exact else ""
        silu = fusion.state()
        if silu != "yes":
            silu = self.producers.state("act_fn")
        norm = self.producers.state("input_layernorm", "post_attention_layernorm")
        return f"{exact}; fused with the quantization after it: SiLU {silu}, RMSNorm {norm}"


def check_device() -> None:
    """Raises a ValueError, with what to do, on a device whose kernel we do not have."""
    if current_platform.is_cpu():
        return
    remedy = (
        "serve the float model instead, or on this machine one that vLLM quantizes itself "
        "(--quantization fp8); W4A8 of liquidgemm needs an H100, H200, H20, H800 or GH200"
    )
    if not current_platform.is_cuda():
        raise ValueError(
            f"device: expected a Hopper GPU or a CPU, got {current_platform.device_type}: {remedy}"
        )
    summary.check_gpu(remedy)
