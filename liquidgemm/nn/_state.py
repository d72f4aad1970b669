"""What modules that load more than parameters and buffers have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def read_state(
    module: nn.Module,
    names: Sequence[str],
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> dict[str, Tensor] | None:
    """The tensors of these names for a ``_load_from_state_dict``, whose arguments it takes.

    Which are missing, and if strict which are unexpected, is added to the lists, as torch does it.

    Returns:
        those that there are; None, with a message, if a newer version of the module has saved them.
    """
    found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
    missing_keys += [prefix + name for name in names if name not in found]
    if strict:
        unexpected_keys += [
            key
            for key in state_dict
            if key.startswith(prefix) and key.removeprefix(prefix) not in names
        ]
    version = local_metadata.get("version", module._version)
    if version > module._version:
        error_msgs.append(
            f"{prefix}: expected state of version {module._version} or older, got {version}: "
            "it was saved by a newer liquidgemm"
        )
        return None
    return found
