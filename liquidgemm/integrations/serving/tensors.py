"""The tensors of a checkpoint of ours, as an engine holds them while it loads a layer.

Engines slice and stack them by rows themselves; what is of columns is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats.liquidquant import padded
from ...weights.weight import Form
from .layout import Packed, Slice, pack

CODES = ("qweight", "qscale", "qoffset")
"""The tensors of a checkpoint that hold codes, steps and offsets."""

MISSING = 255
"""Fills these tensors before anything is loaded: as step and offset it is not feasible, and no
weight has it for all codes."""


def _per_byte(name: str, form: Form) -> int:
    """How many columns one byte of such a tensor covers."""
    return 2 if name == "qweight" else form.group_size


def shape_of(rows: int, name: str, part: Slice, forms: Sequence[Form]) -> tuple[int, int]:
    """Of a tensor of codes, as wide as that of the layer with the most residual columns."""
    return rows, max(part.width(form.augment) // _per_byte(name, form) for form in forms)


def empty(rows: int, name: str, part: Slice, forms: Sequence[Form]) -> Tensor:
    return torch.full(shape_of(rows, name, part, forms), MISSING, dtype=torch.uint8)


def checked(loaded: Tensor, name: str, part: Slice, forms: Sequence[Form]) -> Tensor:
    """Raises a ValueError for what is no tensor of codes of one of the layers."""
    total = padded(part.total)
    widths = sorted({(total + form.augment) // _per_byte(name, form) for form in forms})
    if loaded.dtype != torch.uint8 or loaded.dim() != 2 or loaded.shape[1] not in widths:
        expected = " or ".join(map(str, widths))
        raise ValueError(
            f"{name}: expected uint8 with rows of {expected}, got {loaded.dtype} of "
            f"shape {list(loaded.shape)}"
        )
    return loaded


EngineParameter: TypeAlias = Any
"""A parameter of an engine's, or its class: mypy does not see them, as engines are optional."""

EngineLayer: TypeAlias = Any
"""A layer of an engine's: which attributes it has depends on its class and on the version."""

if TYPE_CHECKING:
    Mixin: TypeAlias = Any  # what its methods call is that of the class beside it
else:
    Mixin = object


class LoadsCodes(Mixin):
    """Put before an engine's parameter of a weight: a tensor of codes, as its loaders call it.

    Rows are those of a weight, columns have residual ones behind them.

    Args:
        data: uint8, of `shape_of`: rows are as wide as those of the layer that has the most.
        name: which of the codes.
        part: the columns of this GPU.
        forms: of each layer.
    """

    def __new__(cls, data: Tensor, *args, **kwargs):
        return super().__new__(cls, data)

    def __init__(
        self,
        data: Tensor,
        name: str,
        part: Slice,
        forms: Sequence[Form],
        weight_loader: Callable[..., None],
    ) -> None:
        self._name, self._part, self._forms = name, part, tuple(set(forms))
        super().__init__(data=data, output_dim=0, input_dim=1, weight_loader=weight_loader)

    def _checked(self, loaded: Tensor) -> Tensor:
        return checked(loaded, self._name, self._part, self._forms)

    def _as_wide(self, loaded: Tensor) -> Tensor:
        loaded = self._checked(loaded)
        return F.pad(loaded, (0, self.data.shape[1] - loaded.shape[1]))

    def load_column_parallel_weight(self, loaded_weight: Tensor, *args, **kwargs) -> None:
        super().load_column_parallel_weight(self._as_wide(loaded_weight), *args, **kwargs)

    def load_merged_column_weight(self, loaded_weight: Tensor, *args, **kwargs) -> None:
        super().load_merged_column_weight(self._as_wide(loaded_weight), *args, **kwargs)

    def load_qkv_weight(self, loaded_weight: Tensor, *args, **kwargs) -> None:
        super().load_qkv_weight(self._as_wide(loaded_weight), *args, **kwargs)

    def load_row_parallel_weight(self, loaded_weight: Tensor, *args, **kwargs) -> None:
        (form,) = self._forms
        self._assert_and_load(self._part.of_codes(self._checked(loaded_weight), form.augment))


def empty_columns(forms: Sequence[Form]) -> Tensor:
    """For one layer, or one list on disk for all, int32 ``[R]``; else one row for each."""
    augments = [form.augment for form in forms]
    shape = (augments[0],) if len(augments) == 1 else (len(augments), max(augments))
    return torch.full(shape, -1, dtype=torch.int32)


def empty_scale(rows: int) -> Tensor:
    """float32 whatever the default dtype is, to which a scale would be rounded as it is loaded."""
    return torch.full((rows,), torch.nan, dtype=torch.float32)


@dataclass(frozen=True)
class Parameters:
    """An engine's classes of parameters for the tensors of a layer.

    Attributes:
        codes: `LoadsCodes` before the class of weights.
        scale: of a value for each row.
        columns, columns_of_each: of `empty_columns` for one layer, and for those that are fused.
    """

    codes: EngineParameter
    scale: EngineParameter
    columns: EngineParameter
    columns_of_each: EngineParameter

    def register(
        self,
        layer: EngineLayer,
        rows: int,
        part: Slice,
        forms: Sequence[Form],
        weight_loader: Callable[..., None],
        make: Callable[[int, str, Slice, Sequence[Form]], Tensor] = empty,
    ) -> None:
        """Give a layer a parameter for each of its tensors, the codes of which ``make`` makes."""
        for name in CODES:
            codes = self.codes(make(rows, name, part, forms), name, part, forms, weight_loader)
            layer.register_parameter(name, codes)
        data = empty_scale(rows)
        scale = self.scale(data=data, output_dim=0, weight_loader=weight_loader)
        layer.register_parameter("scale", scale)
        if any(form.augment for form in forms):
            kind = self.columns if len(forms) == 1 else self.columns_of_each
            columns = kind(data=empty_columns(forms), weight_loader=weight_loader)
            layer.register_parameter("columns", columns)


def one_or_each(
    names: Sequence[str], forms: Sequence[Form], rows: Sequence[int]
) -> tuple[Form, ...]:
    """The forms: one for all, or one for each of the fused layers.

    Raises:
        ValueError: layers that are not one by one those that the engine computes at once, or that
            have other groups.
    """
    groups = sorted({form.group_size for form in forms})
    if len(groups) > 1:
        raise ValueError(
            f"{names[0]}: expected the same groups in layers that are fused, got groups of "
            f"{' and '.join(map(str, groups))} in {', '.join(names)}"
        )
    augments = tuple(form.augment for form in forms)
    if not any(augments) or len(forms) == 1:
        return tuple(forms[:1])
    if len(forms) != len(rows):
        raise ValueError(
            f"{names[0]}: expected no residual columns in layers that are fused otherwise than one "
            f"by one, got {augments} of {', '.join(names)}"
        )
    return tuple(forms)


def pack_loaded(
    names: Sequence[str],
    codes: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    columns: Tensor | None,
    rows: Sequence[int],
    forms: Sequence[Form],
    part: Slice,
) -> Packed:
    """Pack what was loaded.

    Args:
        names: of the layers, for errors.
        codes, scale, columns: as `empty`, `empty_scale` and `empty_columns` made them, and loaded.
        rows: of each layer that the engine computes at once.
        forms: by `one_or_each`.

    Raises:
        ValueError: tensors that were not loaded, or that are damaged.
    """
    try:
        for own in codes[0].split(list(rows)):
            if len(own) and (own == MISSING).all():
                raise ValueError("qweight: expected codes, got none")
        lists = [torch.empty(0, dtype=torch.int32)] * len(forms)
        if columns is not None:
            held = [columns] if columns.dim() == 1 else columns
            lists = [part.of_columns(o[: f.augment]) for o, f in zip(held, forms, strict=True)]
        each = rows if len(forms) > 1 else [sum(rows)]
        return pack(codes, scale, each, lists, part)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{', '.join(names)}: {error} (a tensor that the checkpoint lacks looks so)"
        ) from None
