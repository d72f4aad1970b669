"""Registration with transformers, PEFT and torchao, when and only when they are imported.

Importing liquidgemm imports none of them. What registers is a module of this package, which runs
right after the module of the other library that it needs, or at once if that has been imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# By the module after which each is imported.
_WAITING = {
    "transformers.quantizers.auto": "transformers",
    "transformers.modeling_utils": "transformers_cache",
    "peft.tuners.lora.layer": "peft",
    "torchao.quantization.quant_api": "torchao",
}


def _register(integration: str) -> None:
    try:
        importlib.import_module(f"{__name__}.{integration}")
    except Exception as error:  # the other library itself must stay importable
        warnings.warn(
            f"liquidgemm does not work with this version of {integration.partition('_')[0]}: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )


class _AfterImport(MetaPathFinder):
    """Finds nothing by itself, but calls `_register` after a module in _WAITING has run."""

    def find_spec(self, name: str, path, target: ModuleType | None = None) -> ModuleSpec | None:
        integration = _WAITING.pop(name, None)
        if integration is None:
            return None
        # Popped meanwhile, so that a finder that asks all finders, as this one, ends the circle.
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        try:
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            _WAITING[name] = integration
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if module.__name__ == name and _WAITING.pop(name, None) is not None:
                _register(integration)

        vars(spec.loader)["exec_module"] = run_and_register
        return spec


def register_integrations() -> None:
    """Called once, by liquidgemm, when all that an integration imports of it is there."""
    for name in [name for name in _WAITING if name in sys.modules]:
        _register(_WAITING.pop(name))
    sys.meta_path.insert(0, _AfterImport())
