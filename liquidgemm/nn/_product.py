"""What a layer does with its input: a Tensor, or tokens that are quantized already."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..formats.liquidquant import GROUP
from ..ops import QuantizedTokens
from ._packing import bits_of


def product(
    x: Tensor | QuantizedTokens,
    columns: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Of an x of K features and a packed weight, which may have residual columns.

    Weights of 6 and 8 bits hold all of them in K columns: the residual ones are those of a
    checkpoint.

    Raises:
        RuntimeError: as `liquidgemm.linear` or `liquidgemm.gemm`, and for tokens of no float dtype.
    """
    if bits_of(packed) != 4:
        columns = None
    if isinstance(x, QuantizedTokens):
        if x.dtype not in ops.FLOATS:
            raise RuntimeError(
                "x.dtype: expected float32, bfloat16 or float16, which the tokens had before they "
                f"were quantized, got {x.dtype}"
            )
        x8 = x.x8 if columns is None else _with_columns(x.x8, columns)
        return ops.gemm(x8, x.scale, packed, scale, bias, x.dtype, follows_producer=columns is None)
    if columns is not None:
        # Before they are rounded: the scale of a token does not change by it, nor do the bits, and
        # gradients find their way.
        x = _with_columns(x, columns)
    return ops.linear(x, packed, scale, bias)


def _with_columns(x: Tensor, columns: Tensor) -> Tensor:
    missing = -x.shape[-1] % GROUP
    whole = F.pad(x, (0, missing)) if missing else x  # torch copies also where nothing is missing
    return torch.cat((whole, x.index_select(-1, columns)), dim=-1)
