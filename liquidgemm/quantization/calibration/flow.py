"""A batch on its way through a model, unit by unit.

What surrounds the units is the model's own forward. It is run anew from its start whenever the
arguments of the next unit are wanted, with the units before answered from what they have given. In
a chain of blocks, each of which takes the hidden state of the one before and nothing else of it,
one such run finds the arguments of all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .blocks import Call, Stop, main_tensor, run_call
from .data import OtherWay, running
from .effects import Attributes, Left, leave_in
from .masks import Padding, is_encoder_decoder
from .record import Recording, forwards_replaced, hidden_state, model_inputs, record
from .trees import map_tensors, tensors, without_caches
from .units import Unit


class Flow:
    """One batch in one model: the float model, or one whose units are replaced by others.

    Args:
        model: stays as it is.
        units: those that are replaced.
        batch: arguments of the model.
        recording: of the float model, for this batch or one of its kind.
        where: what errors call the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[Unit],
        batch: Tensor | Mapping[str, Any],
        recording: Recording,
        where: str = "calibration",
    ) -> None:
        self._model, self._units, self.batch, self._where = model, units, batch, where
        self._calls = recording.calls
        self._names = [unit.name for unit in units]
        # By the calls so far, as the model sees it: what they give, and leave behind.
        self._given: list[tuple[Any, Left]] = []
        self._attributes: list[Attributes] = []
        self._first = 0  # index of the first call in _ahead
        self._ahead: list[Call] = []
        self._hidden: Tensor | None = None  # what the last call has given, in float32
        self._in_decoder = False  # what comes after a decoder's first block belongs to it
        self._padding = Padding(batch, is_encoder_decoder(model, batch))

    @property
    def next(self) -> str | None:
        """Name of the unit whose turn it is; None if no unit is called any more."""
        position = len(self._given)
        return self._calls[position].unit if position < len(self._calls) else None

    @property
    def at_last(self) -> bool:
        """Whether the call whose turn it is, is the last one."""
        return len(self._given) + 1 == len(self._calls)

    def times(self, unit: str) -> int:
        """How often a unit is called from now on."""
        return sum(call.unit == unit for call in self._calls[len(self._given) :])

    def call(self) -> Call:
        """The call whose turn it is."""
        index = len(self._given) - self._first
        if not 0 <= index < len(self._ahead):
            self._look_ahead()
            index = 0
        call = self._ahead[index]
        return call if index == 0 else call.with_hidden(cast(Tensor, self._hidden))

    def run(self, block: nn.Module) -> tuple[Any, Left, Attributes]:
        """The call whose turn it is, by what stands for the unit; for `push`."""
        return run_call(block, self.call(), self._calls[len(self._given)].attributes)

    def push(self, out: Any, left: Left, attributes: Attributes) -> None:
        """Go on with what the unit gives and leaves behind."""
        position = len(self._given)
        end = self._first + len(self._ahead)
        recorded = self._calls[position].leaves
        found = list(tensors((out, left)))
        self._hidden = main_tensor(out) if position + 1 < end else None
        known = iter(recorded if len(recorded) == len(found) else [None] * len(found))

        def as_seen(tensor: Tensor) -> Tensor:
            leaf = next(known)
            if leaf is None:
                return tensor
            if leaf.last < end:
                return _stand_in(tensor, leaf.dtype, leaf.device)
            return tensor.to(leaf.device, leaf.dtype)

        self._given.append(map_tensors((out, left), as_seen))
        kinds = self._calls[position].attributes

        def as_recorded(where: tuple[str, str], value: Tensor) -> Tensor:
            dtype, device = kinds[where]
            return value.to(device, dtype)

        self._attributes.append(
            {where: as_recorded(where, value) for where, value in attributes.items()}
        )

    def later_calls(self, unit: str) -> list[Call]:
        """Calls of a unit after its turn, with the float units in between."""
        found: list[Call] = []
        count = self.times(unit)

        def ask(index: int, name: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
            if name == unit:
                call = self._make(index, args, kwargs)
                found.append(call.cloned() if call.writes else call)
                if len(found) == count:
                    raise Stop
            return forward(*args, **kwargs)

        self._replay(ask)
        return found[1:]

    def finish(self) -> Any:
        """The model's output, after the last unit.

        Raises:
            ValueError: the forward calls further units.
        """

        def ask(index: int, name: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
            raise OtherWay(self._other(name))

        return self._replay(ask)

    def _look_ahead(self) -> None:
        """Find the arguments of the next call and of those that are chained to it."""
        start = end = len(self._given)
        while end + 1 < len(self._calls):
            following = self._calls[end + 1]
            if not following.chained or following.needs >= start:
                break
            end += 1
        ahead: list[Call] = []

        def ask(index: int, name: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
            if name != self._calls[index].unit:
                raise OtherWay(self._other(name))
            ahead.append(self._make(index, args, kwargs))
            if index == end:
                raise Stop
            hidden = hidden_state(args, kwargs)
            return map_tensors(self._calls[index].template, lambda _: hidden)

        self._replay(ask)
        if len(ahead) != end + 1 - start:
            raise OtherWay(self._other("no unit"))
        self._first, self._ahead = start, ahead
        for index, given in enumerate(self._given):
            if any(start <= leaf.last <= end for leaf in self._calls[index].leaves):
                self._given[index] = self._without_used(index, given, end + 1)

    def _without_used(self, index: int, given: Any, end: int) -> Any:
        """What a call has given, without the tensors that no call from ``end`` on is given."""
        leaves = self._calls[index].leaves
        if len(list(tensors(given))) != len(leaves):
            return given
        known = iter(leaves)

        def drop(tensor: Tensor) -> Tensor:
            return _stand_in(tensor) if next(known).last < end else tensor

        return map_tensors(given, drop)

    def _make(self, index: int, args: tuple, kwargs: dict) -> Call:
        name = self._calls[index].unit if index < len(self._calls) else ""
        writes = index < len(self._calls) and self._calls[index].writes
        args, kwargs = map_tensors((args, kwargs), lambda t: t)  # dicts and lists of its own
        kwargs = without_caches(kwargs)
        if self._padding.encoder_decoder and not self._in_decoder:
            parts = name.split(".")
            self._in_decoder = isinstance(kwargs.get("encoder_hidden_states"), Tensor) or any(
                "decoder" in part and "encoder" not in part for part in parts
            )
        errors = partial(running, self._model, self.batch, self._where)
        return Call(args, kwargs, name, self._padding, self._in_decoder, writes, errors)

    def _replay(self, ask: Callable[[int, str, Callable, tuple, dict], Any]) -> Any:
        """Run the model; calls of units that are not answered yet go to ``ask``."""
        index = -1
        inside = False

        def make(name: str, forward: Callable) -> Callable:
            def run(*args, **kwargs):
                nonlocal index, inside
                if inside:
                    return forward(*args, **kwargs)
                index += 1
                if index < len(self._given):
                    if name != self._calls[index].unit:
                        raise OtherWay(self._other(name))
                    return self._answer(index, args, kwargs)
                inside = True
                try:
                    return ask(index, name, forward, args, kwargs)
                finally:
                    inside = False

            return run

        args, kwargs = model_inputs(self.batch, self._model)
        with (
            forwards_replaced(self._model, self._names, make),
            self._restored_attributes(),
            suppress(Stop),
            running(self._model, self.batch, self._where),
        ):
            return self._model(*args, **kwargs)
        return None

    def _answer(self, index: int, args: tuple, kwargs: dict) -> Any:
        """What a call has given, with what it has left behind put where it was."""
        recorded = self._calls[index]
        given = self._given[index]
        if any(leaf.written for leaf in recorded.leaves):
            given = map_tensors(given, torch.clone)
        out, left = given
        if left:
            leave_in(left, args, without_caches(kwargs))
        unit = self._model.get_submodule(recorded.unit)
        for (path, name), value in self._attributes[index].items():
            vars(unit.get_submodule(path))[name] = value
        return out

    @contextmanager
    def _restored_attributes(self) -> Iterator[None]:
        """Within, units may be given attributes; they get back those that they had."""
        before = []
        for call in self._calls:
            for path, name in call.attributes:
                state = vars(self._model.get_submodule(call.unit).get_submodule(path))
                before.append((state, name, state.get(name)))
        try:
            yield
        finally:
            for state, name, value in before:
                state[name] = value

    def _other(self, name: str) -> str:
        return (
            "calibration, held_out: expected batches with the same keys to call the same parts of "
            f"the model in one order, got one that calls {name} where another calls {self.next}. "
            "The data may choose among entries of a list if a router, a linear layer with a row "
            "for each, is in the same module"
        )


def _stand_in(
    tensor: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Of the same shape, without memory."""
    empty = torch.zeros((), dtype=dtype or tensor.dtype, device=device or tensor.device)
    return empty.expand(tensor.shape)


class Lane:
    """Batches on their way through models of one kind.

    Args:
        flows: one for each batch.
        to_end: whether what the last unit gives is wanted.
    """

    def __init__(self, flows: list[Flow], to_end: bool = False) -> None:
        self.flows, self._to_end = flows, to_end
        self._kept: dict[str, nn.Module] = {}  # units that are called again

    def calls(self, unit: str) -> list[Call]:
        """Calls of the unit whose turn it is, one for each batch that calls it."""
        return [flow.call() for flow in self._turn(unit)]

    def later_calls(self, unit: str) -> list[Call]:
        """Calls after that, as they are with what follows in float."""
        again = [flow for flow in self._turn(unit) if flow.times(unit) > 1]
        return [call for flow in again for call in flow.later_calls(unit)]

    def advance(self, unit: str, block: nn.Module, changes: bool = False) -> list[Any]:
        """Run the unit, and those after it that have had their first turn; what the unit gives.

        Args:
            unit: its name.
            block: what stands for it.
            changes: whether the block is going to be changed after this.
        """
        if any(flow.times(unit) > 1 for flow in self._turn(unit)):
            self._kept[unit] = copy.deepcopy(block) if changes else block
        given = [self._push(flow, block) for flow in self._turn(unit)]
        while name := next((flow.next for flow in self.flows if flow.next in self._kept), None):
            for flow in self._turn(name):
                self._push(flow, self._kept[name])
        for name in list(self._kept):
            if not any(flow.times(name) for flow in self.flows):
                del self._kept[name]
        return given

    def _turn(self, unit: str) -> list[Flow]:
        return [flow for flow in self.flows if flow.next == unit]

    def _push(self, flow: Flow, block: nn.Module) -> Any:
        given = flow.run(block) if self._to_end or not flow.at_last else (None, {}, {})
        flow.push(*given)
        return given[0]


class Recordings:
    """Recordings of a float model, one for each kind of batch.

    Batches are of one kind that have the same keys, axes and dtypes, and, where a unit is called
    more than once, the same shapes: there may be one turn of a loop for each token.
    """

    def __init__(self, model: nn.Module, units: list[Unit]) -> None:
        self.model, self.units = model, units
        self.found: dict[tuple, Recording] = {}

    def of(
        self,
        batch: Tensor | Mapping[str, Any],
        observe: Callable[[Unit, tuple, dict], None] | None = None,
    ) -> Recording:
        kind = _kind(batch)
        if kind in self.found and self.found[kind].repeats:
            kind = _kind(batch, shapes=True)
        if kind not in self.found:
            settled = {call.unit for other in self.found.values() for call in other.calls}
            found, self.units = record(self.model, self.units, batch, observe, settled)
            self.found[kind] = found
            if found.repeats:
                self.found[_kind(batch, shapes=True)] = found
        return self.found[kind]

    def flows(self, batches: list[Tensor | Mapping[str, Any]], argument: str) -> list[Flow]:
        """One for each batch of the argument that errors are to name."""
        return [
            Flow(self.model, self.units, batch, self.of(batch), f"{argument}: batch {number}")
            for number, batch in enumerate(batches)
        ]


def _kind(batch: Tensor | Mapping[str, Any], shapes: bool = False) -> tuple:
    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value.dtype, value.shape if shapes else value.dim())
        return tuple(map(told, value)) if isinstance(value, tuple | list) else value

    items = batch.items() if isinstance(batch, Mapping) else [("", batch)]
    return tuple((key, told(value)) for key, value in sorted(items))
