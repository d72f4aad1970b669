"""Our settings in vLLM's additional config.

vllm serve DIR --additional-config '{"liquidgemm": {"fused_producers": false}}'
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm.config import get_current_vllm_config_or_none

_DEFAULTS = {"exact_tensor_parallel": False, "fused_producers": True}


def setting(name: str) -> bool:
    """One of the settings, under vLLM's current config.

    Raises:
        ValueError: a setting of ours that is not known, or of another type.
    """
    config = get_current_vllm_config_or_none()
    given = None if config is None else config.additional_config
    settings = given.get("liquidgemm", {}) if isinstance(given, Mapping) else {}
    if not isinstance(settings, Mapping) or settings.keys() - _DEFAULTS.keys():
        raise ValueError(
            f"additional_config: expected liquidgemm to be {{{', '.join(_DEFAULTS)}}} or some of "
            f"them, got {settings}"
        )
    for key, value in settings.items():
        if not isinstance(value, bool):
            raise ValueError(f"{key}: expected true or false, got {value!r}")
    return settings.get(name, _DEFAULTS[name])
