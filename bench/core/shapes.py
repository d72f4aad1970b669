"""The weights that are measured: the linear layers of well-known models, by name or as NxK."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A weight ``[n, k]`` (out_features, in_features) and where it occurs."""

    n: int
    k: int
    labels: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


# (layer, N, K) per model, unsharded; q, k and v fused into one product, gate and up into another.
MODELS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "llama3-8b": (
        ("qkv", 6144, 4096),
        ("o", 4096, 4096),
        ("gate_up", 28672, 4096),
        ("down", 4096, 14336),
    ),
    "llama2-7b": (
        ("qkv", 12288, 4096),
        ("o", 4096, 4096),
        ("gate_up", 22016, 4096),
        ("down", 4096, 11008),
    ),
    "llama2-13b": (
        ("qkv", 15360, 5120),
        ("o", 5120, 5120),
        ("gate_up", 27648, 5120),
        ("down", 5120, 13824),
    ),
    "llama2-70b": (
        ("qkv", 10240, 8192),
        ("o", 8192, 8192),
        ("gate_up", 57344, 8192),
        ("down", 8192, 28672),
    ),
    "mixtral": (  # 8x7B; one expert
        ("qkv", 6144, 4096),
        ("o", 4096, 4096),
        ("expert gate_up", 28672, 4096),
        ("expert down", 4096, 14336),
    ),
    "qwen2.5-7b": (
        ("qkv", 4608, 3584),
        ("o", 3584, 3584),
        ("gate_up", 37888, 3584),
        ("down", 3584, 18944),
    ),
    # The shapes of the project's goals: all of llama3-8b, and of llama2-70b without o.
    "targets": (
        ("", 4096, 4096),
        ("", 4096, 14336),
        ("", 6144, 4096),
        ("", 8192, 28672),
        ("", 10240, 8192),
        ("", 28672, 4096),
        ("", 57344, 8192),
    ),
}

TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192)


def parse_shapes(text: str) -> list[Shape]:
    """Shapes of a comma-separated list of model names and NxK, each once, in order.

    Raises:
        ValueError: an entry is neither; the message lists the names.
    """
    shapes: dict[tuple[int, int], Shape] = {}
    for entry in filter(None, (part.strip().lower() for part in text.split(","))):
        for label, n, k in _layers(entry):
            shape = shapes.setdefault((n, k), Shape(n, k))
            labels = (label,) if label and label not in shape.labels else ()
            shapes[n, k] = replace(shape, labels=shape.labels + labels)
    if not shapes:
        raise ValueError("no shapes given")
    return list(shapes.values())


def _layers(entry: str) -> list[tuple[str, int, int]]:
    if entry in MODELS:
        return [(f"{entry} {layer}" if layer else "", n, k) for layer, n, k in MODELS[entry]]
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", entry)
    if match is None:
        raise ValueError(f"{entry!r} is neither NxK nor one of {', '.join(MODELS)}")
    return [("", int(match[1]), int(match[2]))]


def parse_tokens(text: str) -> list[int]:
    """Batch sizes of a comma-separated list, each once, ascending.

    Raises:
        ValueError: an entry is not a positive integer, or there is none.
    """
    entries = [part.strip() for part in text.split(",") if part.strip()]
    for entry in entries:
        if not re.fullmatch(r"[1-9]\d*", entry):
            raise ValueError(f"{entry!r} is not a positive number of tokens")
    if not entries:
        raise ValueError("no numbers of tokens given")
    return sorted({int(entry) for entry in entries})


def argument(parse):
    """An argparse type whose ValueError becomes the message."""

    def convert(text: str):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert
