"""How an op gets into ``torch.ops.liquidgemm``: schema, shape function, derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.library import Library, register_fake

from . import _autograd, _library

LIB = Library("liquidgemm", "DEF")
_cuda_library_problem = _library.load_libraries()


def define(
    schema: str,
    fake: Callable[..., object],
    rules: type[_autograd.Rules] | None = None,
    cuda: Callable[..., object] | None = None,
) -> torch._ops.OpOverload:
    """Define an op.

    Its implementations come from the compiled libraries. Where that for CUDA is not loaded, the op
    says so when it is called on a CUDA tensor.

    Args:
        schema: as torch writes it, without the namespace.
        fake: the shape function, which checks all arguments: what torch.compile, torch.export and
            meta tensors see.
        rules: its derivatives; None for an op whose outputs are integers alone.
        cuda: its implementation for CUDA, of an op that the compiled libraries do not have.

    Returns:
        the op.
    """
    name = schema.partition("(")[0]
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    register_fake(f"liquidgemm::{name}", fake, lib=LIB)
    if cuda is not None:
        LIB.impl(name, cuda, "CUDA")
    elif _cuda_library_problem is not None:
        LIB.impl(name, _without_cuda_library(name), "CUDA")
    if rules is not None:
        _autograd.register(name, rules, LIB)
    return getattr(torch.ops.liquidgemm, name).default


def require_cuda_library(op: str) -> None:
    """Raises a RuntimeError that says why the CUDA library is not loaded, if it is not."""
    if _cuda_library_problem is not None:
        raise RuntimeError(
            f"liquidgemm.{op}: the CUDA implementation is not loaded: {_cuda_library_problem}"
        )


def _without_cuda_library(op: str):
    def raise_readable(*args, **kwargs):
        require_cuda_library(op)

    return raise_readable
