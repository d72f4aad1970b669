"""Save and load quantized models: plain ``nn.Module``s and those of ``transformers``.

A checkpoint is a folder with

- ``liquidgemm.safetensors``, for ``transformers`` models ``model.safetensors``: the state_dict,
  quantized layers in the logical layout;
- ``liquidgemm.json``: format version, layer sizes and the hash of the file above;
  version 2 if any layer has residual columns, which version 1 does not know, and 3 if there are
  experts;
- for ``transformers`` models also ``config.json`` and ``generation_config.json``, with which
  ``from_pretrained`` can load the folder as well. `load_quantized` reads what ``save_pretrained``
  writes, too, which has no ``liquidgemm.json``, or one of a checkpoint before it.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .._files import move_into, one_at_a_time, parse_json, path_of, staging_folder, write_tensors
from ..nn._modules import (
    as_linear,
    attach,
    is_from_transformers,
    paths_of_modules,
    replace_module,
)
from ..nn.experts import LiquidExperts, without_values
from ..nn.float_experts import Layout, layout_of
from ..nn.linear import LiquidLinear
from ..nn.stack import STATE
from ..ops import FLOATS
from ..quantization.config import LiquidConfig
from ..weights.weight import QuantizedWeight
from . import _pretrained
from ._pretrained import MANIFEST_FILE, TRANSFORMERS_WEIGHTS_FILE

FORMAT_VERSION = 3
WEIGHTS_FILE = "liquidgemm.safetensors"

_LOGICAL = ("qweight", "qscale", "qoffset", "scale")


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
    layers, experts = _layers_of(model), _experts_of(model)
    if not (layers or experts) or isinstance(model, LiquidLinear | LiquidExperts):
        raise ValueError("model: expected a module that contains quantized layers, got none")
    tensors, aliases = _storable(model.state_dict())
    pretrained = is_from_transformers(model)
    weights_file = TRANSFORMERS_WEIGHTS_FILE if pretrained else WEIGHTS_FILE
    config = getattr(model, "liquid_config", None)
    manifest = {
        "format": "liquidgemm",
        "format_version": _version_of(layers, experts),
        "config": asdict(config) if isinstance(config, LiquidConfig) else None,
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
        manifest["sha256"] = _sha256(staging / weights_file)
        (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        # The manifest comes last: until then the folder holds no checkpoint, or the old manifest
        # with a hash that no longer fits. Of two processes, one would leave its weights and the
        # other its manifest.
        with one_at_a_time(directory):
            shards = _pretrained.shards_of_ours(directory) if pretrained else []
            move_into(staging, directory, last=MANIFEST_FILE, remove=shards)


def _version_of(layers: dict[str, dict], experts: dict[str, dict]) -> int:
    """The first that knows all that is there."""
    if experts:
        return 3
    return 2 if any("augment" in sizes for sizes in layers.values()) else 1


def _experts_of(model: nn.Module) -> dict[str, dict]:
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LiquidExperts):
            if module.first_expert:
                raise ValueError(f"{name}: expected all experts of the layer, got a part of them")
            found[name] = module.sizes
    return found


def _layers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: _sizes(layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LiquidLinear)
    }


def _sizes(layer: nn.Module) -> dict[str, Any]:
    """Arguments of the `LiquidLinear` that a linear layer, quantized or not, is or may become."""
    linear = layer if isinstance(layer, LiquidLinear) else cast(nn.Linear, as_linear(layer))
    sizes = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }
    if isinstance(linear, LiquidLinear) and linear.columns is not None:
        sizes["augment"] = len(linear.columns)
    return sizes


def _dtype_of(layer: Any) -> torch.dtype:
    """The one that a quantized layer in the place of a float one has."""
    return layer.weight.dtype if layer.bias is None else layer.bias.dtype


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
        manifest = _read_manifest(directory / MANIFEST_FILE)
    if _pretrained.is_latest(directory, manifest, with_model=model is not None):
        loaded = _pretrained.load(directory, model)
        if model is None:
            return loaded
        layers, config = _layers_of(loaded), getattr(loaded, "liquid_config", None)
        experts = _experts_of(loaded)
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
        state = _read_weights(directory / manifest.get("weights", WEIGHTS_FILE), manifest)
    rebuilt = model is None
    # Of any class, as transformers' have more than nn.Module says.
    target: Any = model
    if rebuilt:
        target = _pretrained.build(directory, cast(dict, manifest)["transformers_class"])
    _check_fit(target, layers, experts, state, directory)

    paths = paths_of_modules(target)
    for name, sizes in layers.items():
        old = target.get_submodule(name)
        if _sizes(old) != sizes or not isinstance(old, LiquidLinear):
            layer = LiquidLinear(**sizes, device=old.weight.device, dtype=_dtype_of(old))
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


def _read_manifest(path: Path) -> dict:
    """The manifest, known to be complete and of a version that this code reads."""
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated or damaged ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "liquidgemm":
        raise ValueError(f"{path}: expected a liquidgemm checkpoint, got another kind of file")
    version = manifest.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{path}: expected a format version, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format version {FORMAT_VERSION} or older, got {version}: it was "
            "saved by a newer liquidgemm"
        )
    kinds = {
        "config": dict | None,
        "transformers_class": str | None,
        "layers": dict,
        "aliases": dict,
        "sha256": str,
    }
    for key, kind in kinds.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise ValueError(f"{path}: damaged: {key} is {manifest.get(key, 'missing')!r}")
    for key, original in manifest["aliases"].items():
        if not isinstance(original, str):
            raise ValueError(f"{path}: damaged: {key} is said to be the same as {original!r}")
    if not isinstance(manifest.get("experts", {}), dict):
        raise ValueError(f"{path}: damaged: experts is {manifest['experts']!r}")
    if manifest.get("weights", WEIGHTS_FILE) not in (WEIGHTS_FILE, TRANSFORMERS_WEIGHTS_FILE):
        raise ValueError(f"{path}: damaged: weights is {manifest['weights']!r}")
    return manifest


def _read_weights(path: Path, manifest: dict) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, though {MANIFEST_FILE} lies beside")
    before = path.stat()
    if (found := _sha256(path)) != manifest["sha256"]:
        raise ValueError(
            f"{path}: truncated, damaged or not the file that {MANIFEST_FILE} was saved with: "
            f"expected sha256 {manifest['sha256']}, got {found} "
            f"(if save_pretrained wrote it since, remove {MANIFEST_FILE})"
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file ({error})") from None
    now = path.stat()
    if (now.st_ino, now.st_mtime_ns) != (before.st_ino, before.st_mtime_ns):
        raise ValueError(f"{path}: was replaced while it was read: load it again")
    shared = {}
    for key, original in manifest["aliases"].items():
        if original not in state:
            raise ValueError(f"{original}: missing in {path}, though {key} is the same tensor")
        if key in state:
            raise ValueError(f"{key}: in {path}, though it is the same tensor as {original}")
        shared[key] = state[original]
    return state | shared


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_fit(
    model: nn.Module,
    layers: dict[str, dict],
    experts: dict[str, dict],
    state: dict[str, Tensor],
    directory: Path,
) -> None:
    """Raises a ValueError unless the state can be loaded into the model as a whole."""
    own = model.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items()}
    for name, sizes in experts.items():
        _check_experts(model, name, sizes, state, directory)
        for key in [key for key in expected if key.startswith(f"{name}.")]:
            del expected[key]
        found = (key for key in state if key.startswith(f"{name}."))
        expected.update((key, tuple(state[key].shape)) for key in found)
    for name, sizes in layers.items():
        layer = None
        with suppress(AttributeError):
            layer = model.get_submodule(name)
        if layer is None or not (isinstance(layer, LiquidLinear) or as_linear(layer)):
            kind = type(layer).__name__ if layer is not None else "nothing"
            raise ValueError(f"{name}: expected a linear layer in the model, got {kind}")
        got, wanted, augment = _sizes(layer), sizes, 0
        if not isinstance(layer, LiquidLinear) and (dtype := _dtype_of(layer)) not in FLOATS:
            raise ValueError(
                f"{name}: expected a layer of float32, bfloat16 or float16 in the model, got one "
                f"of {dtype}"
            )
        if isinstance(sizes, dict):  # of residual columns a layer can get any number
            wanted = {key: value for key, value in sizes.items() if key != "augment"}
            augment = sizes.get("augment", 0)
            got.pop("augment", None)
        if got != wanted:
            raise ValueError(f"{name}: expected {wanted} as in {directory}, got {got}")
        for key in ("weight", "columns"):
            expected.pop(f"{name}.{key}", None)
        keys = (*_LOGICAL, "columns") if augment else _LOGICAL
        if missing := [key for key in keys if f"{name}.{key}" not in state]:
            raise ValueError(f"{name}: {', '.join(missing)} missing in {directory}")
        tensors: dict[str, Any] = {key: state[f"{name}.{key}"] for key in keys}
        try:
            weight = QuantizedWeight(**tensors, in_features=got["in_features"])
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
        if weight.out_features != got["out_features"]:
            raise ValueError(
                f"{name}.scale: expected {got['out_features']} rows, got {weight.out_features}"
            )
        if weight.augment != augment:
            raise ValueError(f"{name}.columns: expected {augment} columns, got {weight.augment}")
        expected.update((f"{name}.{key}", tuple(t.shape)) for key, t in tensors.items())
    for key in sorted(expected.keys() | state.keys()):
        if key not in state:
            raise ValueError(f"{key}: in the model, but missing in {directory}")
        if key not in expected:
            raise ValueError(f"{key}: in {directory}, but not in the model")
        if tuple(state[key].shape) != expected[key]:
            raise ValueError(
                f"{key}: expected shape {list(expected[key])} as in the model, "
                f"got {list(state[key].shape)}"
            )
        if key in own and not _loads_as(state[key].dtype, own[key].dtype):
            raise ValueError(
                f"{key}: expected dtype {own[key].dtype} as in the model, got {state[key].dtype}"
            )


def _check_experts(
    model: nn.Module, name: str, sizes: object, state: dict[str, Tensor], directory: Path
) -> None:
    """Raises a ValueError unless the model has such experts there, and the state all of theirs."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    layout = None if module is None else layout_of(module)
    if not isinstance(module, LiquidExperts) and not isinstance(layout, Layout):
        kind = layout or (type(module).__name__ if module is not None else "nothing")
        raise ValueError(f"{name}: expected experts in the model, got {kind}")
    got = (module if isinstance(module, LiquidExperts) else cast(Layout, layout)).sizes
    if got != sizes:
        raise ValueError(f"{name}: expected {sizes} as in {directory}, got {got}")
    like = LiquidExperts(**got, device="meta")
    for part, stack in (("gate_up", like.gate_up), ("down", like.down)):
        for key, tensor in stack.state_dict().items():
            full = f"{name}.{part}.{key}"
            if full not in state:
                raise ValueError(f"{full}: missing in {directory}")
            stored = state[full]
            if stored.shape != tensor.shape or not _loads_as(stored.dtype, tensor.dtype):
                raise ValueError(
                    f"{full}: expected {tensor.dtype} {list(tensor.shape)}, got {stored.dtype} "
                    f"{list(stored.shape)}"
                )
        for e in range(stack.num_experts):
            try:
                qweight, qscale, qoffset, scale = (
                    state[f"{name}.{part}.{key}"][e] for key in STATE
                )
                QuantizedWeight(qweight, qscale, qoffset, scale, stack.in_features)
            except ValueError as error:
                raise ValueError(f"{name}.{part}.{error}: expert {e}") from None
    known = {f"{name}.{key}" for key in like.state_dict()}
    if extra := sorted(k for k in state if k.startswith(f"{name}.") and k not in known):
        raise ValueError(f"{extra[0]}: in {directory}, but not in the model")


def _loads_as(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Floats are converted to the precision of the model; everything else has to be the same."""
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point)
