"""W4A8 matrix multiplication for NVIDIA Hopper: 4-bit weights, 8-bit activations, exact sums.

Importing registers ``torch.ops.liquidgemm``. It needs no GPU: every op also runs on the CPU, with
the same bits as the kernel.
"""

from importlib.metadata import PackageNotFoundError, version

from .checkpoints.checkpoint import load_quantized, save_quantized
from .fusion import FusionReport, fuse_
from .importers import ImportReport, import_checkpoint
from .integrations import register_integrations
from .kv import KVCache
from .nn.experts import LiquidExperts
from .nn.fused_layer import unfuse_
from .nn.linear import LiquidLinear
from .nn.merged import MergedLinear
from .ops import (
    QuantizedTokens,
    gemm,
    glu_quantize,
    grouped_gemm,
    linear,
    moe,
    moe_combine,
    moe_schedule,
    pack_int8_weight,
    pack_weight,
    quantize_activation,
    quantize_activation_rows,
    rms_norm_quantize,
    unpack_int8_weight,
    unpack_weight,
)
from .ops._cpu import cpu_kernel, cpu_kernels, set_cpu_kernel
from .ops.plans import explain_plan
from .quantization.choice import choose_recipe
from .quantization.choice_report import Choice, NoRecipeError
from .quantization.config import LiquidConfig
from .quantization.dequantize import dequantize_
from .quantization.model import quantize_
from .weights.quantize import quantize_weight
from .weights.weight import QuantizedWeight, dequantize_weight

try:
    __version__ = version("liquidgemm")
except PackageNotFoundError:  # run from a source checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Choice",
    "FusionReport",
    "ImportReport",
    "KVCache",
    "LiquidCache",
    "LiquidConfig",
    "LiquidExperts",
    "LiquidGemmConfig",
    "LiquidLinear",
    "MergedLinear",
    "NoRecipeError",
    "QuantizedTokens",
    "QuantizedWeight",
    "__version__",
    "choose_recipe",
    "cpu_kernel",
    "cpu_kernels",
    "dequantize_",
    "dequantize_weight",
    "explain_plan",
    "fuse_",
    "gemm",
    "glu_quantize",
    "grouped_gemm",
    "import_checkpoint",
    "linear",
    "load_quantized",
    "moe",
    "moe_combine",
    "moe_schedule",
    "pack_int8_weight",
    "pack_weight",
    "quantize_",
    "quantize_activation",
    "quantize_activation_rows",
    "quantize_weight",
    "rms_norm_quantize",
    "save_quantized",
    "set_cpu_kernel",
    "unfuse_",
    "unpack_int8_weight",
    "unpack_weight",
]

register_integrations()


def __getattr__(name: str):
    # Made of classes of transformers, which is optional.
    if name == "LiquidGemmConfig":
        from .integrations.transformers import LiquidGemmConfig

        return LiquidGemmConfig
    if name == "LiquidCache":
        from .integrations.transformers_cache import LiquidCache

        return LiquidCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
