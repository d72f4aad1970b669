"""Makes SGLang importable without a GPU: to be imported before it.

SGLang imports modules that only a GPU needs, or that its layers do not. Where they are absent, what
stands in for them does nothing.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
import torch._dynamo
import torch._inductor.compile_fx  # before anything stands in for Triton
import torch.distributed.tensor
import torch.utils.flop_counter  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed: make test-serve", allow_module_level=True)

ABSENT = ("IPython", "orjson", "torchvision", "triton")


class _Nothing(types.ModuleType):
    """A module, decorator, class or value of which nothing comes."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "backend":  # of Triton's target, which is the name of a device
            return "cpu"
        found = _Nothing(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found

    def __call__(self, *args, **kwargs):
        decorates = len(args) == 1 and isinstance(args[0], types.FunctionType | type)
        return args[0] if decorates else self

    def __mro_entries__(self, bases):
        return ()

    def __getitem__(self, key):
        return self

    def __or__(self, other):
        return self

    __ror__ = __or__


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Nothing(spec.name)

    def exec_module(self, module):
        module.__path__ = []


sys.meta_path.append(_Finder())  # the last: only for what is not there
# A release of SGLang brings models that a later one of transformers has as well.
_register = CONFIG_MAPPING.register
CONFIG_MAPPING.register = lambda key, value, exist_ok=False: _register(key, value, exist_ok=True)
