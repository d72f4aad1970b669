"""Derivatives of ops in every mode of torch: backward, forward, and below torch.func's transforms.

``torch.library.register_autograd`` knows the backward pass alone: in forward mode an op that is
registered with it is a constant, without an error. Here an op has a class of rules, which also
answers in forward mode, be it by an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library


class Rules(_SingleLevelFunction):
    """Of one op: ``op``, its overload, and ``setup_context``, ``backward`` and ``jvp``.

    As in a `torch.autograd.Function`, but that the first input is a set of dispatch keys. This
    class is applied below the transforms of torch.func, which have unwrapped the tensors.
    """

    op: torch._ops.OpOverload
    apply: ClassVar[Callable[..., Any]]  # torch's metaclass gives it

    @classmethod
    def forward(cls, keys, *args):
        # Calling a rule turns gradients off, for the transforms further out as well.
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return cls.compute(keys, *args)

    @classmethod
    def compute(cls, keys, *args):
        return cls.op.redispatch(keys & torch._C._after_autograd_keyset, *args)


def may_be_differentiated(x: Tensor, *args) -> bool:
    """Whether a derivative of a call with these may be asked for, in whatever mode of torch.

    In the last three cases a tangent may be there, which only torch's C++ side can tell.
    """
    return (
        (torch.is_grad_enabled() and torch._C._any_requires_grad(x, *args))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or type(x) is not Tensor
    )


def register(op: str, rules: type[Rules], lib: Library) -> None:
    """Have the op ``liquidgemm::op`` differentiated by the rules."""

    rules.op = getattr(torch.ops.liquidgemm, op).default
    defaults = tuple(argument.default_value for argument in rules.op._schema.arguments)

    def dispatch(keys, x: Tensor, *args):
        if may_be_differentiated(x, *args):
            args += defaults[1 + len(args) :]  # the dispatcher leaves them out
            with enable_single_level_autograd_function():
                return rules.apply(keys, x, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return rules.compute(keys, x, *args)

    lib.impl(op, dispatch, "Autograd", with_keyset=True)


def not_differentiable(op: str) -> type[Rules]:
    """Rules of an op without derivatives: an error where one is wanted."""
    message = f"liquidgemm.{op} is not differentiable; liquidgemm.linear is, with respect to x"

    class NotDifferentiable(Rules):
        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(message)

        @staticmethod
        def jvp(ctx, *tangents):
            raise RuntimeError(message)

    return NotDifferentiable
