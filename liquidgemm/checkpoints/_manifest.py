"""The manifest of a checkpoint, and its weights as the manifest says that they are."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .._files import parse_json
from ._pretrained import MANIFEST_FILE, TRANSFORMERS_WEIGHTS_FILE

FORMAT_VERSION = 4
WEIGHTS_FILE = "liquidgemm.safetensors"


def version_of(layers: dict[str, dict], experts: dict[str, dict]) -> int:
    """The first that knows all that is there."""
    if any("group_size" in sizes for sizes in layers.values()):
        return 4
    if experts:
        return 3
    return 2 if any("augment" in sizes for sizes in layers.values()) else 1


def read_manifest(path: Path) -> dict:
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


def read_weights(path: Path, manifest: dict) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, though {MANIFEST_FILE} lies beside")
    before = path.stat()
    if (found := sha256_of(path)) != manifest["sha256"]:
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


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
