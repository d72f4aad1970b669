"""Nibbles in 32-bit words, as most formats have them."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_words(words: Tensor, dim: int) -> Tensor:
    """int32 with eight nibbles per word, the lowest first, to uint8, eight times as long in dim."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.dim() - dim - 1))) & 0xF
    return nibbles.to(torch.uint8).flatten(dim, dim + 1)


def expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: list[int]) -> None:
    """Raises a ValueError unless the tensor is of this shape and one of these dtypes."""
    if tensor.dtype not in dtypes or list(tensor.shape) != shape:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected {kinds} {shape}, "
            f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORDS = (torch.int32,)


def expect_matrix(name: str, tensor: Tensor) -> None:
    """Raises a ValueError unless there are rows and columns; `expect` has to follow."""
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise ValueError(f"{name}: expected a matrix, got shape {list(tensor.shape)}")


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
