"""Save and load quantized models: plain ``nn.Module``s and those of ``transformers``.

A checkpoint is a folder with

- ``liquidgemm.safetensors``, for ``transformers`` models ``model.safetensors``: the state_dict,
  quantized layers in the logical layout;
- ``liquidgemm.json``: format version, layer sizes and the hash of the file above;
  version 2 if any layer has residual columns, which version 1 does not know, 3 if there are
  experts, and 4 if any layer has groups of 32;
- for ``transformers`` models also ``config.json`` and ``generation_config.json``, with which
  ``from_pretrained`` can load the folder as well. `load_quantized` reads what ``save_pretrained``
  writes, too, which has no ``liquidgemm.json``, or one of a checkpoint before it.
"""

from __future__ import annotations

import json
import os
from typing import Any, cast

from torch import Tensor, nn

from .._files import move_into, one_at_a_time, path_of, staging_folder, write_tensors
from ..nn._modules import (
    attach,
    is_from_transformers,
    paths_of_modules,
    replace_module,
)
from ..nn.experts import LiquidExperts, without_values
from ..nn.linear import LiquidLinear
from ..quantization.config import LiquidConfig
from . import _pretrained
from ._fit import check_fit, dtype_of, experts_of, layers_of, sizes_of
from ._manifest import WEIGHTS_FILE, read_manifest, read_weights, sha256_of, version_of
from ._pretrained import MANIFEST_FILE, TRANSFORMERS_WEIGHTS_FILE


def save_quantized(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write a quantized model to a folder, from which `load_quantized` restores it to the bit.

    The folder is created if needed. A checkpoint of ours that it holds is replaced, all else in it
    stays; of several processes that write at once, the last one counts. If writing fails or is
    interrupted, the folder is as it was; if the process is killed between the last renames,
    `load_quantized` refuses it.

    Raises:
        ValueError: the model has no quantized layer, or holds data that cannot be saved.
        FileExistsError: a file of the checkpoint's names is in the folder that is none of ours,
            such as the weights of the float model.
        OSError: writing fails.
    """
    layers, experts = layers_of(model), experts_of(model)
    if not (layers or experts) or isinstance(model, LiquidLinear | LiquidExperts):
        raise ValueError("model: expected a module that contains quantized layers, got none")
    tensors, aliases = _storable(model.state_dict())
    pretrained = is_from_transformers(model)
    weights_file = TRANSFORMERS_WEIGHTS_FILE if pretrained else WEIGHTS_FILE
    config = getattr(model, "liquid_config", None)
    manifest = {
        "format": "liquidgemm",
        "format_version": version_of(layers, experts),
        "config": config.to_dict() if isinstance(config, LiquidConfig) else None,
        "transformers_class": type(model).__name__ if pretrained else None,
        "layers": layers,
        **({"experts": experts} if experts else {}),
        "aliases": aliases,
        "weights": weights_file,
    }
    directory = path_of(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with staging_folder(directory) as staging:
        if pretrained:
            _pretrained.write_config(model, staging)
        names = [weights_file, MANIFEST_FILE, *(file.name for file in staging.iterdir())]
        _pretrained.check_replaceable(directory, names)
        write_tensors(tensors, staging / weights_file, metadata={"format": "pt"})
        manifest["sha256"] = sha256_of(staging / weights_file)
        (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        # The manifest comes last: until then the folder holds no checkpoint, or the old manifest
        # with a hash that no longer fits. Of two processes, one would leave its weights and the
        # other its manifest.
        with one_at_a_time(directory):
            shards = _pretrained.shards_of_ours(directory) if pretrained else []
            move_into(staging, directory, last=MANIFEST_FILE, remove=shards)


def _storable(state: dict[str, object]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distinct tensors on the CPU, and for keys that share one, the key it is stored under."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_key: dict[tuple, str] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise ValueError(f"{key}: expected a tensor with data, got {type(value).__name__}")
        memory = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        original = first_key.setdefault(memory, key)
        if original != key and value.numel() > 0:
            aliases[key] = original
            continue
        tensor = value.detach().cpu().contiguous()
        # safetensors refuses views into larger storage, which may overlap.
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[key] = tensor if whole else tensor.clone()
    return tensors, aliases


def load_quantized(directory: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Restore a model that `save_quantized` wrote, or ``save_pretrained`` of ``transformers``.

    Everything is checked before the model is touched: an error leaves it as it was.

    Args:
        directory: the folder. If both have written to it, the later checkpoint counts.
        model: for a model that is not from ``transformers``, an instance with the same
            architecture, quantized or not, on any device (meta included). It is filled in place:
            its linear layers are replaced and all other tensors overwritten, keeping its dtypes.
            If None, the ``transformers`` model is rebuilt from config.json, on the CPU and in
            eval mode.

    Returns:
        the model.

    Raises:
        FileNotFoundError: the folder holds no checkpoint, or a file of it is missing.
        ValueError: the checkpoint is truncated, damaged, not liquidgemm's or of a newer version,
            does not fit the model, or needs the model argument; the message says which.
    """
    directory = path_of(directory)
    manifest = None
    if (directory / MANIFEST_FILE).exists():
        manifest = read_manifest(directory / MANIFEST_FILE)
    if _pretrained.is_latest(directory, manifest, with_model=model is not None):
        loaded = _pretrained.load(directory, model)
        if model is None:
            return loaded
        layers, config = layers_of(loaded), getattr(loaded, "liquid_config", None)
        experts = experts_of(loaded)
        state = loaded.state_dict()
        del loaded
    elif manifest is None:
        raise FileNotFoundError(
            f"{directory / MANIFEST_FILE}: no such file: expected a folder from save_quantized"
        )
    else:
        layers, config = manifest["layers"], manifest["config"]
        experts = manifest.get("experts", {})
        config = None if config is None else LiquidConfig._from_dict(config)
        state = read_weights(directory / manifest.get("weights", WEIGHTS_FILE), manifest)
    rebuilt = model is None
    # Of any class, as transformers' have more than nn.Module says.
    target: Any = model
    if rebuilt:
        target = _pretrained.build(directory, cast(dict, manifest)["transformers_class"])
    check_fit(target, layers, experts, state, directory)

    paths = paths_of_modules(target)
    for name, sizes in layers.items():
        old = target.get_submodule(name)
        if sizes_of(old) != sizes or not isinstance(old, LiquidLinear):
            layer = LiquidLinear(**sizes, device=old.weight.device, dtype=dtype_of(old))
            layer.train(old.training)
            layer.replaces = getattr(old, "replaces", type(old))
            for path in paths[old]:
                replace_module(target, path, layer)
    for name in experts:
        old = target.get_submodule(name)
        if not isinstance(old, LiquidExperts):
            for path in paths[old]:
                replace_module(target, path, without_values(old))
    on_meta = any(t.is_meta for t in (*target.parameters(), *target.buffers()))
    target.load_state_dict(state, strict=True, assign=on_meta)
    if config is not None:
        target.liquid_config = config
    attach(target)
    if rebuilt:
        for name in layers:
            target.get_submodule(name)._dtype = target.dtype  # the skeleton was of the default one
        for name in experts:
            for stack in target.get_submodule(name).children():
                stack.dtype = target.dtype
        target.tie_weights()
        target.eval()
    return target
