"""Quantize, save and load whole models: plain ``nn.Module``s and those of ``transformers``.

A checkpoint is a folder with

- ``liquidgemm.safetensors``: the state_dict, quantized layers in the logical layout;
- ``liquidgemm.json``: format version, layer sizes and the hash of the file above;
- for ``transformers`` models also ``config.json`` and ``generation_config.json``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from tqdm.auto import tqdm

from .format import GROUP, MAX_IN_FEATURES, Q_MAX
from .linear import LiquidLinear
from .ops import FLOATS
from .quantize import GROUP_SIZES, METHODS, QuantizedWeight, check_finite

FORMAT_VERSION = 1
MANIFEST_FILE = "liquidgemm.json"
WEIGHTS_FILE = "liquidgemm.safetensors"

_LOGICAL = ("qweight", "qscale", "qoffset", "scale")


@dataclass(frozen=True)
class LiquidConfig:
    """How `quantize_` treats a model.

    Attributes:
        method: "search" or "rtn", as in `quantize_weight`.
        group_size: 64, 128 or -1, as in `quantize_weight`.
        skip: shell-style patterns of layers to leave alone. A pattern has to match the dotted
            name of a layer or the end of it: "lm_head" matches "lm_head" and "model.lm_head",
            "layers.0.*" everything in the first of any layers.

    Raises:
        ValueError: at construction, for any other value.
    """

    method: str = "search"
    group_size: int = GROUP
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {self.method!r}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: expected one of {GROUP_SIZES}, got {self.group_size!r}")
        patterns = self.skip
        if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
            raise ValueError(f"skip: expected a sequence of patterns, got {patterns!r}")
        object.__setattr__(self, "skip", tuple(patterns))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LiquidConfig:
        """Inverse of `to_json`.

        Raises:
            ValueError: not JSON, not an object, or a field or value that this version does not
                know.
        """
        return cls._from_dict(json.loads(text))

    @classmethod
    def _from_dict(cls, values: object) -> LiquidConfig:
        if not isinstance(values, dict):
            raise ValueError(f"LiquidConfig: expected a JSON object, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"LiquidConfig: expected fields among {known}, got {unknown}")
        return cls(**values)


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_` did.

    Attributes:
        quantized: names of the layers that are now `LiquidLinear`.
        skipped: name and reason of every other module that holds a matrix.
        bytes_before, bytes_after: size of the weights of the quantized layers.
        coarse_rows: per layer that has any, the number of rows in which at least half of the
            groups span less than 15 steps of the INT8 grid, so that not even s = 1 gives them 4
            bits. Mostly it is one huge weight that leaves the others so little of the range.
    """

    quantized: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int
    coarse_rows: dict[str, int]

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} linear layers quantized, {self.bytes_before / 1e6:.1f} MB to "
            f"{self.bytes_after / 1e6:.1f} MB"
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"skipped {', '.join(names[:3])}{more}: {reason}")
        if self.coarse_rows:
            rows = sum(self.coarse_rows.values())
            lines.append(f"{rows} rows in {len(self.coarse_rows)} layers have outliers")
        return "\n".join(lines)


@torch.no_grad()
def quantize_(
    model: nn.Module,
    config: LiquidConfig | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Replace the linear layers of a model by `LiquidLinear`, in place, on their own devices.

    All weights are checked before the first layer is replaced. A layer used in several places
    stays one layer.

    Args:
        model: any module that contains ``nn.Linear`` layers.
        config: method, group size and skip patterns; the defaults if None.
        filter_fn: called with the name and module of each ``nn.Linear`` that is about to be
            quantized; it is left alone where this returns False.
        progress: show a progress bar.

    Raises:
        ValueError: the model itself is an ``nn.Linear``, or a weight is NaN, infinite or on the
            meta device; the message names the layer.
    """
    config = config or LiquidConfig()
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a module that contains nn.Linear layers, got an nn.Linear, which "
            "cannot be replaced in place: use LiquidLinear.from_linear(model)"
        )
    paths = _paths_of_modules(model)
    quantized, skipped = _sort_out(model, paths, config, filter_fn)
    for name in quantized:
        weight = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(f"{name}: expected a weight with data, got one on the meta device")
        try:
            check_finite(weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    bytes_before = bytes_after = 0
    coarse_rows = {}
    # By name, so that each float weight is freed as soon as it is replaced.
    for name in tqdm(quantized, desc="quantizing", unit="layer", disable=not progress):
        linear = model.get_submodule(name)
        layer = LiquidLinear.from_linear(linear, config.group_size, config.method)
        bytes_before += linear.weight.nbytes
        bytes_after += layer.packed.nbytes + layer.scale.nbytes
        if coarse := _count_coarse_rows(linear.weight, layer.scale):
            coarse_rows[name] = coarse
        for path in paths[linear]:
            _replace(model, path, layer)
    model.liquid_config = config
    return QuantizationReport(tuple(quantized), skipped, bytes_before, bytes_after, coarse_rows)


def _paths_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module: a module may be used in several places."""
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    return paths


def _sort_out(
    model: nn.Module,
    paths: dict[nn.Module, list[str]],
    config: LiquidConfig,
    filter_fn: Callable[[str, nn.Module], bool] | None,
) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to quantize, and name and reason for the matrices to leave alone."""
    users = Counter(p for module in paths for p in module._parameters.values() if p is not None)
    quantized, skipped = [], {}
    for module, names in paths.items():
        weight = getattr(module, "weight", None)
        if isinstance(module, LiquidLinear):
            skipped[names[0]] = "already quantized"
        elif isinstance(weight, Tensor) and weight.dim() >= 2:
            reason = _reason_to_skip(module, names, users, config, filter_fn)
            if reason is None:
                quantized.append(names[0])
            else:
                skipped[names[0]] = reason
    return quantized, skipped


def _reason_to_skip(
    module: nn.Module,
    names: list[str],
    users: Counter,
    config: LiquidConfig,
    filter_fn: Callable[[str, nn.Module], bool] | None,
) -> str | None:
    # Not isinstance: a subclass may use its weight in ways of its own.
    if type(module) is not nn.Linear:
        return f"not nn.Linear but {type(module).__name__}"
    for pattern in config.skip:
        if any(fnmatchcase("." + name, "*." + pattern) for name in names):
            return f"matches the pattern {pattern!r}"
    if users[module.weight] > 1:
        return "its weight is tied to another module's"
    if module.weight.dtype not in FLOATS:
        return f"its dtype is {module.weight.dtype}"
    if not (module.weight.numel() > 0 and module.in_features <= MAX_IN_FEATURES):
        return f"its shape is {list(module.weight.shape)}"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "it has hooks, which would be lost"
    if filter_fn is not None and not filter_fn(names[0], module):
        return "rejected by filter_fn"
    return None


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _count_coarse_rows(weight: Tensor, scale: Tensor) -> int:
    groups = weight[:, : weight.shape[1] // GROUP * GROUP].unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    spread = high.float() - low.float()
    coarse = (spread > 0) & (spread < Q_MAX * scale.unsqueeze(1))
    return int((coarse.float().mean(1) >= 0.5).sum())


def save_quantized(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write a quantized model to a folder, from which `load_quantized` restores it to the bit.

    The folder is created if needed. Each file is complete or absent: it is written under another
    name first. An interruption between files leaves a folder that `load_quantized` refuses.

    Raises:
        ValueError: the model has no quantized layer, or holds data that cannot be saved.
        OSError: writing fails.
    """
    layers = {
        name: {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LiquidLinear)
    }
    if not layers or isinstance(model, LiquidLinear):
        raise ValueError("model: expected a module that contains quantized layers, got none")
    tensors, aliases = _storable(model.state_dict())
    config = getattr(model, "liquid_config", None)
    manifest = {
        "format": "liquidgemm",
        "format_version": FORMAT_VERSION,
        "config": asdict(config) if isinstance(config, LiquidConfig) else None,
        "transformers_class": type(model).__name__ if _is_from_transformers(model) else None,
        "layers": layers,
        "aliases": aliases,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as folder:
        staging = Path(folder)
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        manifest["sha256"] = _sha256(staging / WEIGHTS_FILE)
        if _is_from_transformers(model):
            _write_transformers_config(model, staging)
        (staging / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        # The manifest comes last: until then the folder holds no checkpoint, or the old manifest
        # with a hash that no longer fits.
        for file in sorted(staging.iterdir(), key=lambda file: file.name == MANIFEST_FILE):
            os.replace(file, directory / file.name)


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
    """Restore a model that `save_quantized` wrote.

    Everything is checked before the model is touched: an error leaves it as it was.

    Args:
        directory: the folder.
        model: for a model that is not from ``transformers``, an instance with the same
            architecture, quantized or not, on any device (meta included). It is filled in place:
            its linear layers are replaced and all other tensors overwritten, keeping its dtypes.
            If None, the ``transformers`` model is rebuilt from config.json, on the CPU and in
            eval mode.

    Returns:
        the model.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: the checkpoint is truncated, damaged, not liquidgemm's or of a newer version,
            does not fit the model, or needs the model argument; the message says which.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory / MANIFEST_FILE)
    config = manifest["config"]
    config = None if config is None else LiquidConfig._from_dict(config)
    state = _read_weights(directory / WEIGHTS_FILE, manifest)
    rebuilt = model is None
    if rebuilt:
        model = _build_transformers_model(directory, manifest["transformers_class"])
    _check_fit(model, manifest["layers"], state, directory)

    paths = _paths_of_modules(model)
    for name in manifest["layers"]:
        old = model.get_submodule(name)
        if not isinstance(old, LiquidLinear):
            bias = old.bias is not None
            weight = old.weight
            layer = LiquidLinear(
                old.in_features, old.out_features, bias, weight.device, weight.dtype
            )
            layer.train(old.training)
            for path in paths[old]:
                _replace(model, path, layer)
    on_meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.load_state_dict(state, strict=True, assign=on_meta)
    if config is not None:
        model.liquid_config = config
    if rebuilt:
        model.tie_weights()
        model.eval()
    return model


def _read_manifest(path: Path) -> dict:
    """The manifest, known to be complete and of a version that this code reads."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file: expected a folder from save_quantized")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: truncated or damaged ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "liquidgemm":
        raise ValueError(f"{path}: expected a liquidgemm checkpoint, got another kind of file")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version < 1:
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
    return manifest


def _read_weights(path: Path, manifest: dict) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, though {MANIFEST_FILE} lies beside")
    if (found := _sha256(path)) != manifest["sha256"]:
        raise ValueError(
            f"{path}: truncated, damaged or not the file that {MANIFEST_FILE} was saved with: "
            f"expected sha256 {manifest['sha256']}, got {found}"
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file ({error})") from None
    for key, original in manifest["aliases"].items():
        if original not in state:
            raise ValueError(f"{original}: missing in {path}, though {key} is the same tensor")
        state[key] = state[original]
    return state


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_fit(
    model: nn.Module, layers: dict[str, dict], state: dict[str, Tensor], directory: Path
) -> None:
    """Raises a ValueError unless the state can be loaded into the model as a whole."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for name, sizes in layers.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Linear | LiquidLinear):
            kind = type(layer).__name__ if layer is not None else "nothing"
            raise ValueError(f"{name}: expected a linear layer in the model, got {kind}")
        got = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }
        if got != sizes:
            raise ValueError(f"{name}: expected {sizes} as in {directory}, got {got}")
        expected.pop(f"{name}.weight", None)
        tensors = {key: state.get(f"{name}.{key}") for key in _LOGICAL}
        if missing := [key for key, tensor in tensors.items() if tensor is None]:
            raise ValueError(f"{name}: {', '.join(missing)} missing in {directory}")
        try:
            weight = QuantizedWeight(**tensors, in_features=sizes["in_features"])
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
        if weight.out_features != sizes["out_features"]:
            raise ValueError(
                f"{name}.scale: expected {sizes['out_features']} rows, got {weight.out_features}"
            )
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


# transformers is optional: only models that come from it make this module import it.


def _is_from_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _write_transformers_config(model: nn.Module, directory: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # How the float model had been stored says nothing about this one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(directory / "generation_config.json")


def _build_transformers_model(directory: Path, class_name: str | None) -> nn.Module:
    """A model whose parameters are on the meta device but whose computed buffers are real."""
    if class_name is None:
        raise ValueError(f"{directory}: not a transformers model: pass an instance as model=")
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{directory}: needs the transformers package") from None
    model_class = getattr(transformers, class_name, None)
    if not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        raise ValueError(
            f"{directory}: transformers {transformers.__version__} has no model {class_name}: "
            "pass an instance as model="
        )

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None):
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    config = model_class.config_class.from_pretrained(directory)
    with register_module_parameter_registration_hook(to_meta):
        model = model_class(config)
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model
