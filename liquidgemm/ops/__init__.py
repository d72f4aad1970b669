"""The ops of ``torch.ops.liquidgemm``: one module each, with schema, shape function, derivatives.

CUDA implementations come from ``_C_cuda.so``, those of the CPU from ``_C_host.so``, which calls
`_reference` and `_reference_experts` if it is told to (`_cpu`). All give the same bits.

Every op takes inputs of any layout, stride and storage offset, checks them before it computes, and
raises a RuntimeError that names the argument, what was expected and what came.
"""

from ._checks import FLOATS
from ._gemm import OUT_DTYPES, gemm
from ._glu import glu_quantize
from ._grouped import ACTIVATIONS, GATED, INTERLEAVE, grouped_gemm
from ._linear import linear
from ._moe import moe, moe_combine, moe_schedule, quantize_activation_rows
from ._pack import pack_int8_weight, pack_weight, unpack_int8_weight, unpack_weight
from ._quantize import quantize_activation
from ._rms_norm import rms_norm_quantize
from ._tokens import QuantizedTokens

__all__ = [
    "ACTIVATIONS",
    "FLOATS",
    "GATED",
    "INTERLEAVE",
    "OUT_DTYPES",
    "QuantizedTokens",
    "gemm",
    "glu_quantize",
    "grouped_gemm",
    "linear",
    "moe",
    "moe_combine",
    "moe_schedule",
    "pack_int8_weight",
    "pack_weight",
    "quantize_activation",
    "quantize_activation_rows",
    "rms_norm_quantize",
    "unpack_int8_weight",
    "unpack_weight",
]
