"""Makes SGLang importable without a GPU: to be imported before it.

SGLang imports modules whose wheels are for GPUs alone, or that only sounds and images need. Where
they are absent, what stands in for them can be imported, and raises if it is to compute.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

ABSENT = ("sgl_kernel", "soundfile", "torchvision")


class _Absent(types.ModuleType):
    """A module, class or function of which only the name is there."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Absent(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{self.__name__}: expected not to be called by a test, as it is absent")

    def __mro_entries__(self, bases):
        return ()

    def __or__(self, other):  # in annotations
        return self

    __ror__ = __or__


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ABSENT or _is_asked_for():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        if spec.name == "torchvision":
            from transformers.utils import is_torchvision_available

            is_torchvision_available()  # it is not, which is remembered
            _let_models_be_registered_twice()
        return _Absent(spec.name)

    def exec_module(self, module):
        module.__path__ = []


def _let_models_be_registered_twice() -> None:
    """A release of SGLang brings models that a later one of transformers has as well."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    register = CONFIG_MAPPING.register
    CONFIG_MAPPING.register = lambda key, value, exist_ok=False: register(key, value, exist_ok=True)


def _is_asked_for() -> bool:
    """Whether what looks for a module only wants to know if it is there."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not importlib.util.find_spec.__code__:
        frame = frame.f_back
    return frame is not None


sys.meta_path.append(_Finder())  # the last: only for what is not there
