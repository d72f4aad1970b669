"""What several commands have: options and what they stand for, and how they say what goes on."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from ..ops import _library

MODEL = Annotated[
    str,
    typer.Argument(
        help="A folder of save_quantized or transformers, a GGUF file, or a name on the hub."
    ),
]
DEVICE = Annotated[
    str | None, typer.Option(help="cpu, cuda, ...; the Hopper GPU if there is one, else the CPU.")
]


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def dtype_of(precision: Precision | None) -> torch.dtype | None:
    return None if precision is None else getattr(torch, precision.value)


def device_of(name: str | None, for_kernel: bool = False) -> torch.device:
    """The device to run on, known to be there.

    Raises:
        ValueError: it is no CPU or GPU, or torch cannot use it; for the kernel also if it is not
            Hopper.
    """
    status = _library.status()
    if name is None:
        if not status.cuda_available:
            return torch.device("cpu")
        return torch.device("cuda", _library.hopper_devices()[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch has no GPU here. {status.reason}")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name}: expected cuda:0 to cuda:{count - 1}")
    if for_kernel:
        hopper = _library.hopper_devices() if status.cuda_available else []
        if device.index is None and hopper:
            return torch.device("cuda", hopper[0])
        if (device.index or 0) not in hopper:
            raise ValueError(f"--device {name}: {status.reason}")
    return device


def options_given(context: typer.Context) -> set[str]:
    """Names of the parameters that the user has given."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name != "DEFAULT"}


def doing(step: str) -> Status:
    """Shows on a terminal what takes a while and has no bar of its own, until it is done.

    On the standard error: the output may be read by a program.
    """
    return Console(stderr=True).status(f"{escape(step)} ...")
