"""What a quantized layer shows in place of a float weight: its shape, dtype and device."""

from __future__ import annotations

import torch


class WeightStandIn:
    """``LiquidLinear.weight``: the metadata of a float weight without its values.

    Models and libraries read ``layer.weight.dtype``, ``.device`` and ``.shape``; this answers. It
    is no Tensor, since a copy of the weight would swallow what is written to it: whatever
    computes with it, writes to it or asks for more raises an error that says what to do instead.

    Attributes:
        shape: ``[N, K]``, without padding and residual columns.
        dtype: of the float weight that was quantized, as casts of the layer have changed it since.
        device: where the layer is.

    Raises:
        TypeError: in an operator or a torch function, or as an attribute is set.
        AttributeError: for every other attribute of a Tensor, so that ``hasattr`` gives False.
    """

    is_leaf = True
    is_sparse = is_quantized = requires_grad = False
    layout = torch.strided
    grad = grad_fn = None
    # transformers asks this before it draws random values for a weight that it has not loaded.
    _is_hf_initialized = True

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        # One by one: torch 2.11 cannot compile an update of the dict.
        self.__dict__["shape"] = torch.Size(shape)
        self.__dict__["dtype"] = dtype
        self.__dict__["device"] = device

    def __repr__(self) -> str:
        return (
            f"WeightStandIn(shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}')"
        )

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    nelement = numel

    def __len__(self) -> int:
        return self.shape[0]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        return False

    def get_device(self) -> int:
        return -1 if self.device.index is None else self.device.index

    def requires_grad_(self, requires_grad: bool = True) -> WeightStandIn:
        self.requires_grad = requires_grad
        return self

    def __setattr__(self, name: str, value: object) -> None:
        # Freezing what is frozen anyway is no error.
        if name != "requires_grad" or value:
            raise TypeError(no_float_weight(f"{name} = ..."))

    def __getattr__(self, name: str):
        raise AttributeError(no_float_weight(name))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise TypeError(no_float_weight(getattr(func, "__name__", str(func))))


def no_float_weight(what: str) -> str:
    """The message of the error for what needs the values of a float weight."""
    return (
        f"{what}: weight of a LiquidLinear holds no float values: use layer.dequantize(), or leave "
        "the layer out by skip="
    )


def _refuse(name: str):
    def operator(self, *args):
        raise TypeError(no_float_weight(name))

    operator.__name__ = name
    return operator


_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
)
_OTHERS = ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "getitem", "setitem", "iter")
for _name in (*_OTHERS, "contains", "float", "int", "array"):
    setattr(WeightStandIn, f"__{_name}__", _refuse(f"__{_name}__"))
for _name in (f"__{prefix}{name}__" for name in _ARITHMETIC for prefix in ("", "r", "i")):
    setattr(WeightStandIn, _name, _refuse(_name))
