"""Which CPU kernels run: the fastest that the processor has, or those that were asked for."""

from __future__ import annotations

import os

import torch

from . import _library, _reference
from . import _reference_experts as _experts  # noqa: F401 (defines ops)
from . import _reference_producers as _producers  # noqa: F401 (defines ops)

REFERENCE = _reference.NAME
VARIABLE = "LIQUIDGEMM_CPU"


def cpu_kernels() -> tuple[str, ...]:
    """The CPU kernels that this processor and its operating system support, the fastest first.

    Of ``"amx"``, ``"avx512_vnni"``, ``"avx_vnni"``, ``"avx2"`` (x86), ``"neon_i8mm"``,
    ``"neon_dotprod"`` (Arm), ``"portable"`` (any) and ``"reference"`` (plain torch, slow). All give
    the same bits.
    """
    return (*torch.ops.liquidgemm_cpu.kernels(), REFERENCE)


def cpu_kernel() -> str:
    """The CPU kernels that the ops use now: one of `cpu_kernels`."""
    return torch.ops.liquidgemm_cpu.kernel()


def set_cpu_kernel(name: str | None = None) -> None:
    """Choose the CPU kernels of this process, all threads of it.

    The environment variable ``LIQUIDGEMM_CPU`` does so for a process that is about to start.

    Args:
        name: one of `cpu_kernels`; None for the fastest.

    Raises:
        ValueError: there are no such kernels, or this processor does not support them.
    """
    if name is not None and name not in cpu_kernels():
        raise ValueError(f"name: expected one of {', '.join(cpu_kernels())} here, got {name!r}")
    torch.ops.liquidgemm_cpu.set_kernel(name or "")


def is_fast() -> bool:
    """Whether the ops of the CPU are faster than a product in float32."""
    return cpu_kernel() not in ("portable", REFERENCE)


def _follow_environment() -> None:
    name = os.environ.get(VARIABLE)
    if not name:
        return
    try:
        set_cpu_kernel(name)
    except ValueError as error:
        raise ImportError(f"liquidgemm: {VARIABLE}: {error}") from None


_library.load_libraries()
_follow_environment()
