"""What a float forward shows of a model: which units it calls, and where their outputs go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .effects import Attributes, Left, attributes_of, is_mutation, left_in, watch
from .trees import map_tensors, tensors, without_caches
from .units import Unit, dissolve

FOREVER = 1 << 60


@dataclass
class Leaf:
    """One tensor that a call gives.

    Attributes:
        dtype, device: of the tensor.
        last: index of the last call that is given this tensor as an argument, the call's own index
            if none is, `FOREVER` if it is used between calls or returned.
        written: whether the model or a later call writes to it.
    """

    dtype: torch.dtype
    device: torch.device
    last: int
    written: bool = False


@dataclass
class Recorded:
    """One call of a unit.

    Attributes:
        unit: its name.
        leaves: tensors that it gives and leaves in its arguments, in the order of `trees.tensors`.
        writes: whether it leaves anything in its arguments.
        attributes: those in which it leaves a tensor that is used outside, by path and name, with
            the dtype and device of that tensor.
        template: what it gives, with empty tensors.
        needs: the latest call before it whose output is used between the call before this one and
            this one, or is an argument of this one other than the hidden state; -1 if there is
            none.
        chained: what the call before gives is one tensor, of the shape of its own hidden state,
            and this call's hidden state.
    """

    unit: str
    leaves: list[Leaf] = field(default_factory=list)
    writes: bool = False
    attributes: dict[tuple[str, str], tuple[torch.dtype, torch.device]] = field(
        default_factory=dict
    )
    template: Any = None
    needs: int = -1
    chained: bool = False


@dataclass
class Recording:
    """A forward.

    Attributes:
        calls: of units, in their order.
        layers: names of the layers to quantize that were called, in a unit or as one.
        batch: what the model was given.
        output: what it gave, with tensors on the meta device.
    """

    calls: list[Recorded]
    layers: set[str]
    batch: Tensor | Mapping[str, Any]
    output: Any

    @property
    def repeats(self) -> bool:
        """Whether a unit is called more than once."""
        return len({call.unit for call in self.calls}) < len(self.calls)


def model_inputs(batch: Tensor | Mapping[str, Any], model: nn.Module) -> tuple[tuple, dict]:
    """Arguments of the model for a batch."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    no_cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    if isinstance(batch, Tensor):
        return (batch.to(device, copy=True),), no_cache  # the model may write to it
    return (), map_tensors(dict(batch), lambda t: t.to(device, copy=True)) | no_cache


def hidden_slot(args: tuple, kwargs: Mapping[str, Any]) -> int | str | None:
    """Where among a block's arguments its hidden state is: the first one, as a rule."""
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    return next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)


def hidden_state(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    slot = hidden_slot(args, kwargs)
    if slot is None:
        return next(tensors((args, dict(kwargs))), None)
    return kwargs[slot] if isinstance(slot, str) else args[slot]


@contextmanager
def forwards_replaced(
    model: nn.Module, names: list[str], make: Callable[[str, Callable], Callable]
) -> Iterator[None]:
    """Within, the named modules run ``make(name, their forward)``."""
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            own = vars(module).get("forward")
            module.forward = make(name, module.forward)
            stack.callback(_restore, module, own)
        yield


def _restore(module: nn.Module, own: Callable | None) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own


class _Recorder(TorchDispatchMode):
    """Sees what operations take outside the units."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Recorded] = []
        self.depth = 0
        # By id: a weak reference, and where the tensor was given.
        self._owners: dict[int, tuple[weakref.ref, list[tuple[int, int]]]] = {}
        # By id: a tensor in an attribute of a unit, which call has left it there, and where.
        self._attributes: dict[int, tuple[Tensor, int, tuple[str, str]]] = {}
        self._used = -1  # the latest call of which something was used since the last call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.depth == 0:
            writes = is_mutation(func)
            for tensor in tensors((args, kwargs or {})):
                for call, leaf in self.owners(tensor):
                    found = self.calls[call].leaves[leaf]
                    found.last = FOREVER
                    found.written |= writes
                    self._used = max(self._used, call)
                self._used = max(self._used, self._read(tensor))
        return func(*args, **(kwargs or {}))

    def _read(self, tensor: Tensor) -> int:
        """The call whose attribute a tensor was left in, and takes note of it; -1 if none was."""
        found = self._attributes.get(id(tensor))
        if found is None:
            return -1
        _, call, where = found
        self.calls[call].attributes[where] = tensor.dtype, tensor.device
        return call

    def owners(self, tensor: Tensor) -> list[tuple[int, int]]:
        reference, owners = self._owners.get(id(tensor), (None, []))
        return owners if reference is not None and reference() is tensor else []

    def enter(self, unit: str, args: tuple, kwargs: dict) -> tuple[int, Tensor | None]:
        """The call's index and hidden state."""
        index = len(self.calls)
        call = Recorded(unit, needs=self._used)
        self._used = -1
        self.calls.append(call)
        hidden = hidden_state(args, kwargs)
        given = [t for t in tensors((args, kwargs)) if self.owners(t)]
        for tensor in given:
            for source, leaf in self.owners(tensor):
                found = self.calls[source].leaves[leaf]
                found.last = max(found.last, index)
        chained = [t for t in given if t is hidden]
        others = [source for t in given if t is not hidden for source, _ in self.owners(t)]
        others += [self._read(t) for t in tensors((args, kwargs))]
        call.needs = max([call.needs, *others])
        if hidden is not None and len(chained) == 1 and hidden_slot(args, kwargs) is not None:
            sources = [source for source, _ in self.owners(hidden)]
            call.chained = sources == [index - 1] and self.calls[index - 1].template is not None
        return index, hidden

    def leave(self, index: int, hidden: Tensor | None, out: Any, left: Left) -> None:
        call = self.calls[index]
        call.writes = bool(left)
        for written in tensors(left):
            for source, leaf in self.owners(written):
                self.calls[source].leaves[leaf].written = True
        found = list(tensors((out, left)))
        call.leaves = [Leaf(t.dtype, t.device, index) for t in found]
        for leaf, tensor in enumerate(found):
            owners = [*self.owners(tensor), (index, leaf)]
            self._owners[id(tensor)] = weakref.ref(tensor), owners
        if len(found) == 1 and hidden is not None:
            (one,) = found
            if (one.shape, one.dtype, one.device) == (hidden.shape, hidden.dtype, hidden.device):
                call.template = map_tensors(out, lambda t: t.new_empty(0))

    def leave_attributes(self, index: int, before: Attributes, after: Attributes) -> None:
        for where, tensor in after.items():
            if before.get(where) is not tensor:
                self._attributes[id(tensor)] = tensor, index, where

    def keep_alive(self) -> None:
        """What is still referred to after the forward may be used."""
        for reference, owners in self._owners.values():
            if reference() is not None:
                for call, leaf in owners:
                    self.calls[call].leaves[leaf].last = FOREVER


@torch.no_grad()
def record(
    model: nn.Module,
    units: list[Unit],
    batch: Tensor | Mapping[str, Any],
    observe: Callable[[Unit, tuple, dict], None] | None = None,
    settled: Collection[str] = (),
) -> tuple[Recording, list[Unit]]:
    """Run the float model once.

    Args:
        observe: called with each unit and the arguments of its first call.
        settled: names of units that stay as they are, since another batch calls them.

    Returns:
        the recording, and the units, of which those that are never called while parts of them
        are have been replaced by these parts.
    """
    while True:
        recording, strays = _record(model, units, batch, observe)
        called = {call.unit for call in recording.calls} | set(settled)
        hollow = {
            unit.name
            for unit in units
            if unit.name not in called and any(layer in strays for layer in unit.layers)
        }
        if not hollow:
            return recording, units
        units = [
            part
            for unit in units
            for part in (dissolve(model, unit) if unit.name in hollow else [unit])
        ]


def _record(
    model: nn.Module,
    units: list[Unit],
    batch: Tensor | Mapping[str, Any],
    observe: Callable[[Unit, tuple, dict], None] | None,
) -> tuple[Recording, set[str]]:
    recorder = _Recorder()
    reached: set[str] = set()
    strays: set[str] = set()
    by_name = {unit.name: unit for unit in units}
    modules = {name: model.get_submodule(name) for name in by_name}
    seen: set[str] = set()

    def make(name: str, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            if recorder.depth:  # a unit within a unit: one module in two places
                return forward(*args, **kwargs)
            index, hidden = recorder.enter(name, args, kwargs)
            watched, before = watch(args, without_caches(kwargs)), attributes_of(modules[name])
            recorder.depth += 1
            try:
                if observe is not None and name not in seen:
                    seen.add(name)
                    observe(by_name[name], args, kwargs)
                out = forward(*args, **kwargs)
                recorder.leave(index, hidden, out, left_in(watched))
                recorder.leave_attributes(index, before, attributes_of(modules[name]))
            finally:
                recorder.depth -= 1
            return out

        return run

    def reach(name: str):
        def hook(module, args):
            reached.add(name)
            if recorder.depth == 0 and name not in by_name:
                strays.add(name)

        return hook

    args, kwargs = model_inputs(batch, model)
    with ExitStack() as stack:
        for name in (n for unit in units for n in unit.layers):
            handle = model.get_submodule(name).register_forward_pre_hook(reach(name))
            stack.callback(handle.remove)
        stack.enter_context(forwards_replaced(model, list(by_name), make))
        stack.enter_context(recorder)
        output = model(*args, **kwargs)
    recorder.keep_alive()
    output = map_tensors(output, lambda t: t.to("meta"))
    return Recording(recorder.calls, reached, batch, output), strays


def order_units(units: list[Unit], recordings: list[Recording]) -> list[Unit]:
    """Units in the order of their first calls, those that are never called at the end.

    Raises:
        ValueError: two batches call two units in opposite orders.
    """
    by_name = {unit.name: unit for unit in units}
    graph: TopologicalSorter = TopologicalSorter()
    for recording in recordings:
        firsts = list(dict.fromkeys(call.unit for call in recording.calls))
        for before, after in pairwise(firsts):
            graph.add(after, before)
        for name in firsts[:1]:
            graph.add(name)
    try:
        names = list(graph.static_order())
    except CycleError as error:
        first, second = error.args[1][:2]
        raise ValueError(
            f"calibration: expected batches that call {first} and {second} in one order, got both "
            "orders: calibrate on batches of one kind"
        ) from None
    return [by_name[name] for name in names] + [u for u in units if u.name not in names]
