"""Codes in 32-bit words, as most formats have them, and checks of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.liquidquant import ceil_div

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORDS = (torch.int32,)


def unpack_words(words: Tensor, dim: int, bits: int = 4) -> Tensor:
    """int32 with 32 / bits codes per word, the lowest first, to uint8, that much longer in dim."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts.view(-1, *[1] * (words.dim() - dim - 1))
    codes = (words.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(dim, dim + 1)


def expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: list[int]) -> None:
    """Raises a ValueError unless the tensor is of this shape and one of these dtypes."""
    if tensor.dtype not in dtypes or list(tensor.shape) != shape:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected {kinds} {shape}, "
            f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )


def expect_scales(
    name: str, tensor: Tensor, shape: list[int], dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """As `expect`, for numbers that are finite and not all zero, as where none were written."""
    expect(name, tensor, dtypes, shape)
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got a NaN or an infinity")
    if not tensor.any():
        raise ValueError(f"{name}: expected scales, got nothing but zeros")


def expect_matrix(name: str, tensor: Tensor) -> None:
    """Raises a ValueError unless there are rows and columns; `expect` has to follow."""
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise ValueError(f"{name}: expected a matrix, got shape {list(tensor.shape)}")


def span_of(name: str, k: int, groups: int, group_size: int | None) -> int:
    """Columns of a group, by the settings if they say so, else by the number of groups.

    Raises:
        ValueError: they do not divide k, or the settings say another number than the tensor.
    """
    if group_size is None:
        if k % groups:
            raise ValueError(f"{name}: expected groups that divide {k} columns, got {groups}")
        return k // groups
    span = k if group_size == -1 else min(group_size, k)
    if ceil_div(k, span) != groups:
        raise ValueError(
            f"{name}: expected {ceil_div(k, span)} groups for {k} columns and group_size = "
            f"{group_size}, got {groups}"
        )
    return span


def in_order(name: str, group_of_column: Tensor | None, k: int, span: int) -> None:
    """Raises a ValueError if k columns were put into groups in another order than their own."""
    if group_of_column is None:
        return
    expect(name, group_of_column, (torch.int32, torch.int64), [k])
    if (group_of_column == -1).all():  # not set
        return
    if not torch.equal(group_of_column.long(), torch.arange(k) // span):
        raise ValueError(
            f"{name}: expected groups of {span} neighbouring columns, got them out of order "
            "(desc_act, actorder): such groups have no place in the format; quantize the original "
            "model instead"
        )
