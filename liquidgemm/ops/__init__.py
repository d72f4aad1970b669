"""The ops of ``torch.ops.liquidgemm``: one module each, with schema, shape function, derivatives.

CUDA implementations come from ``_C_cuda.so``, those of the CPU from ``_C_host.so``, which calls
`_reference` if it is told to (`_cpu`). All give the same bits.

Every op takes inputs of any layout, stride and storage offset, checks them before it computes, and
raises a RuntimeError that names the argument, what was expected and what came.
"""

from ._checks import FLOATS
from ._gemm import OUT_DTYPES, gemm
from ._linear import linear
from ._pack import pack_weight, unpack_weight
from ._quantize import quantize_activation

__all__ = [
    "FLOATS",
    "OUT_DTYPES",
    "gemm",
    "linear",
    "pack_weight",
    "quantize_activation",
    "unpack_weight",
]
