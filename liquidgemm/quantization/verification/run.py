"""Run a model once, look on, and leave it as it was found."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..calibration.trees import map_tensors

# Hooks of modules among them, which some models register as they first run.
_CONTAINERS = (dict, OrderedDict, list)


class RunError(Exception):
    """What a model raised, and the module in which it did."""

    def __init__(self, name: str, kind: str, error: Exception) -> None:
        self.name, self.kind, self.error = name, kind, error
        text = (str(error).strip() or "no message").splitlines()[0]
        super().__init__(f"{name or 'model'} ({kind}): {type(error).__name__}: {text}")


class _Watch(TorchDispatchMode):
    """Keeps a copy of each tensor that is about to be written; tells which weights are used."""

    supports_higher_order_operators = True

    def __init__(self, tensors: list[Tensor], used: Callable[[int], None]) -> None:
        super().__init__()
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._used = used
        self._by_storage: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if (key := _storage(tensor)) is not None:
                self._by_storage.setdefault(key, []).append(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        writes = isinstance(func, OpOverload) and func._schema.is_mutable
        for value in tree_iter((args, kwargs)):
            key = _storage(value) if isinstance(value, Tensor) else None
            for tensor in () if key is None else self._by_storage.get(key, ()):
                # A file that is mapped into memory is one storage with many weights in it.
                first = value.data_ptr() - tensor.data_ptr()
                if not 0 <= first < max(1, tensor.nbytes):
                    continue
                self._used(id(tensor))
                if writes and id(tensor) not in self.copies:
                    with torch.utils._python_dispatch._disable_current_modes():
                        self.copies[id(tensor)] = (tensor, tensor.detach().clone())
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # a subclass without memory of its own
        return None


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """In eval mode, with everything put back afterwards but the contents of tensors.

    That is training modes, random numbers, and whatever modules keep in attributes: flags, caches.
    """
    modules = list(model.modules())
    kept = [(module, _attributes(module)) for module in modules]
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        with torch.random.fork_rng(cuda), torch.no_grad():
            for module in modules:
                module.training = False
            yield
    finally:
        for module, attributes in kept:
            _restore(module, attributes)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attributes, and for lists and dicts what is in them."""
    return {
        key: (value, value.copy() if type(value) in _CONTAINERS else None)
        for key, value in vars(module).items()
    }


def _restore(module: nn.Module, attributes: Mapping[str, tuple[Any, Any]]) -> None:
    state = vars(module)
    for key in state.keys() - attributes.keys():
        del state[key]
    for key, (value, content) in attributes.items():
        state[key] = value
        if isinstance(content, dict):
            value.clear()
            value.update(content)
        elif content is not None:
            value[:] = content


class Observer:
    """What happens in a run.

    Attributes:
        readers: by name of a layer, the class of the module that used its weight from outside.

    Args:
        model: what is run.
        layers: linear layers whose weights are watched, by name.
        seen: called after each module has run, with its name, it, its first input and its output.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module] | None = None,
        seen: Callable[[str, nn.Module, Tensor | None, Any], None] | None = None,
    ) -> None:
        self.readers: dict[str, str] = {}
        self._model, self._seen = model, seen
        self._names = {module: name for name, module in model.named_modules()}
        self._owner = {id(m.weight): (name, m) for name, m in (layers or {}).items()}
        self._stack: list[nn.Module] = []

    def run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's output.

        Raises:
            RunError: the model has raised something.
        """
        try:
            return self._run(args, kwargs)
        except Exception as error:
            where = self._stack[-1] if self._stack else self._model
            raise RunError(self._names[where], type(where).__name__, error) from error

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._stack.clear()
        model = self._model
        args, kwargs = map_tensors((args, kwargs), torch.clone)  # the model may write to them
        watch = _Watch([*model.parameters(), *model.buffers()], self._used)
        # Of all modules: hooks of its own would turn a model from its fast paths.
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, with_kwargs=True),
        ]
        try:
            with untouched(model), watch, warnings.catch_warnings():
                # With hooks of all modules, one that was compiled is seen twice.
                warnings.filterwarnings("ignore", r"Using `torch\.compile")
                return model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
                # torch forgets this one, and torch.compile takes it for a hook that is still there.
                _global_forward_hooks_with_kwargs.pop(handle.id, None)
            with torch.no_grad():
                for tensor, copy in watch.copies.values():
                    tensor.copy_(copy)

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if module in self._names:
            self._stack.append(module)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if module not in self._names or module not in self._stack:
            return
        # Modules in which something was raised that the model has caught are still there.
        while self._stack.pop() is not module:
            pass
        if self._seen is not None:
            inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self._seen(self._names[module], module, next(inputs, None), output)

    def _used(self, tensor: int) -> None:
        name, layer = self._owner.get(tensor, (None, None))
        top = self._stack[-1] if self._stack else self._model
        # torch's own encoder layers turn to code that calls the layer where it has no weight.
        if (
            name is None
            or layer is None
            or top is layer
            or type(top).__module__.startswith("torch.nn.")
        ):
            return
        # An embedding that a head is tied to: its table stays.
        if any(parameter is layer.weight for parameter in top._parameters.values()):
            return
        self.readers.setdefault(name, type(top).__name__)
