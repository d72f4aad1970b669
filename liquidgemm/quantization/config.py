"""How a model is to be quantized."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .._files import parse_json
from ..formats.liquidquant import FINE_GROUP, GROUP
from ..weights.quantize import GROUP_SIZES

METHODS = ("search", "rtn", "hessian", "gptq")
CALIBRATED = ("hessian", "gptq")
GATES = ("raise", "warn", "off")
HEADS = ("float", "int8")
BITS = (4, 6, 8)
_ORDERED = ("augment", "bits")  # may be mappings whose order counts


@dataclass(frozen=True)
class LiquidConfig:
    """How `quantize_` treats a model.

    A pattern, below, is shell-style and has to match the dotted name of a layer or the end of it:
    "lm_head" matches "lm_head" and "model.lm_head", "layers.0.*" everything in the first of any
    layers.

    Attributes:
        method: how codes and grids are chosen.

            - "search": least squared error of the weights; needs no data.
            - "rtn": the paper's rounding; needs no data.
            - "hessian": the search, each column weighted by the mean square of its input.
            - "gptq": on the grids of "hessian", the error of each column is made up for by the
              columns after it (arXiv 2210.17323), then the row scales are fitted anew.
        group_size: 32, 64, 128 or -1, as in `quantize_weight`. 32 are 4.5 bits per weight; layers
            of 6 bits and experts have groups of 64 then, as no kernel has finer ones for them.
        skip: patterns of layers to leave alone, in their float dtype.
        keep: patterns of layers that get the precision of an INT8 weight: 8 bits, without groups.
        bits: 4, 6 or 8 per pattern (the first that matches counts; 4 if none): codes of 4 or 6
            bits, or an INT8 weight, as ``keep``, which goes first. Layers of 6 and 8 bits have no
            residual columns. Experts have 4 bits alone: where a pattern gives them others, or
            ``keep`` matches them, they stay in floats, as the report says.
        budget: bits per weight, scales and all, that the quantized layers have on average at most,
            those that ``keep`` matches with 8 and experts with 4 among them. Which layers get 4, 6
            and 8 is chosen by how much the output of the model changes if one of them has 4,
            measured on a part of the calibration data; `quantize_` records it as ``bits``. None
            leaves it to ``bits``.
        augment: columns per layer, a multiple of 64, that are stored a second time with what
            rounding has left of them, those with the most error at the output; or such a number
            per pattern (the first that matches counts). Each costs 1 / K of the layer's time.
        share_columns: whether layers that calibration sees to have the same input (q, k and v; gate
            and up) repeat the same columns, where they have as many: only then are they one product
            without more columns.
        smooth: move the outliers of activations into the weights, folding the factors into the
            norm or linear layer before (arXiv 2211.10438, 2405.04532). True finds the pairs of each
            block, by known names or by structure, and tries them on copies; the report names layers
            without one. A mapping names them, within a block, and no others are taken:
            ``{"norm1": ["attn.q", "attn.k", "attn.v"]}``.
        rotate: rotate the residual stream by a random Hadamard matrix, folded into the weights
            around it (arXiv 2404.00456); for models of the Llama family.
        rotate_heads: likewise between v_proj and o_proj, head by head.
        damping: multiple of the mean of diag(H) that "gptq" adds to diag(H).
        shrinkage: fraction, 0 to 1, by which "gptq" shrinks H towards diag(H), and "hessian" and
            the grids of "gptq" shrink diag(H) towards its mean.
        tune: steps in which codes, row scales and norm gains of each block are fitted to what the
            float model gives (learned rounding, arXiv 2309.05516); 0 for none. Codes of more
            than 4 bits and of experts stay as they are, and so do all steps and offsets.
        distill: steps in which row scales and norm gains of the whole model, after all else, are
            fitted to what comes out of the float model; 0 for none. That takes a copy of the model
            in float32 on the device, and its activations. A resumed run repeats it.
        seed: of the random rotation and of the order of batches in tuning and distillation.
        head: what becomes of the output embeddings (the lm_head) of a language model. "float"
            leaves them to skip and keep. "int8" gives them the precision of an INT8 weight, whether
            or not "lm_head" is skipped; where they are tied to the input embeddings, those keep
            their table of floats, and the head gets a weight of its own.
        gate: what to do if on held-out text the calibrated model is worse than one quantized
            without data, or a tuned or distilled one worse than before that: "raise", "warn" or
            "off".

    Raises:
        ValueError: at construction, for any other value.
    """

    method: str = "search"
    group_size: int = GROUP
    skip: tuple[str, ...] = ("lm_head",)
    keep: tuple[str, ...] = ()
    augment: int | Mapping[str, int] = 0
    smooth: bool | Mapping[str, tuple[str, ...]] = False
    rotate: bool = False
    rotate_heads: bool = False
    damping: float = 0.02
    shrinkage: float = 0.1
    tune: int = 0
    seed: int = 0
    gate: str = "raise"
    head: str = "float"
    share_columns: bool = False
    bits: Mapping[str, int] = field(default_factory=dict)
    budget: float | None = None
    distill: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {self.method!r}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: expected one of {GROUP_SIZES}, got {self.group_size!r}")
        for name in ("skip", "keep"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        self._check_bits()
        counts = self.augment.values() if isinstance(self.augment, Mapping) else [self.augment]
        if not all(type(count) is int and count >= 0 and count % GROUP == 0 for count in counts):
            raise ValueError(
                f"augment: expected a multiple of {GROUP}, or one per pattern, got {self.augment!r}"
            )
        if isinstance(self.augment, Mapping):
            object.__setattr__(self, "augment", dict(self.augment))
        if isinstance(self.smooth, Mapping):
            pairs = {
                source: _patterns(f"smooth[{source!r}]", names)
                for source, names in self.smooth.items()
            }
            object.__setattr__(self, "smooth", pairs)
        elif type(self.smooth) is not bool:
            raise ValueError(
                f"smooth: expected True, False or names of linear layers by the name of what "
                f"comes before them, got {self.smooth!r}"
            )
        for name in ("share_columns", "rotate", "rotate_heads"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if not (type(self.damping) in (int, float) and 0 <= self.damping < float("inf")):
            raise ValueError(f"damping: expected a finite number >= 0, got {self.damping!r}")
        if not (type(self.shrinkage) in (int, float) and 0 <= self.shrinkage <= 1):
            raise ValueError(f"shrinkage: expected a number from 0 to 1, got {self.shrinkage!r}")
        for name in ("tune", "distill"):
            if type(got := getattr(self, name)) is not int or got < 0:
                raise ValueError(f"{name}: expected an integer >= 0, got {got!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        if self.gate not in GATES:
            raise ValueError(f"gate: expected one of {GATES}, got {self.gate!r}")
        if self.head not in HEADS:
            raise ValueError(f"head: expected one of {HEADS}, got {self.head!r}")

    def _check_bits(self) -> None:
        known = isinstance(self.bits, Mapping) and all(
            isinstance(pattern, str) and type(bits) is int and bits in BITS
            for pattern, bits in self.bits.items()
        )
        if not known:
            raise ValueError(f"bits: expected one of {BITS} per pattern, got {self.bits!r}")
        object.__setattr__(self, "bits", dict(self.bits))
        if self.budget is None:
            return
        number = type(self.budget) in (int, float) and 0 < self.budget < float("inf")
        if not number:
            raise ValueError(
                f"budget: expected a finite number of bits per weight > 0, got {self.budget!r}"
            )
        if self.bits:
            raise ValueError(
                f"bits: expected none with a budget, which chooses them, got {self.bits!r}"
            )
        if self.augment:
            raise ValueError(
                f"augment: expected 0 with a budget, which counts no residual columns, got "
                f"{self.augment!r}"
            )

    @property
    def needs_calibration(self) -> bool:
        learned = self.tune > 0 or self.distill > 0
        chosen = self.budget is not None
        return self.method in CALIBRATED or bool(self.smooth) or learned or chosen

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them.

        Patterns of which the first that matches counts are a list of pairs: what writes JSON may
        sort the keys of an object.
        """
        values = asdict(self)
        for name in _ORDERED:
            if isinstance(values[name], dict) and values[name]:
                values[name] = [list(pair) for pair in values[name].items()]
        return values

    def group_of(self, bits: int) -> int:
        """The group size of a layer of so many bits."""
        return GROUP if bits != 4 and self.group_size == FINE_GROUP else self.group_size

    def for_experts(self) -> LiquidConfig:
        """The same without what experts have no form of: residual columns, groups of 32."""
        group_size = GROUP if self.group_size == FINE_GROUP else self.group_size
        return replace(self, augment=0, group_size=group_size)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LiquidConfig:
        """Inverse of `to_json`.

        Raises:
            ValueError: not JSON, not an object, a field twice, or a field or value that this
                version does not know.
        """
        return cls._from_dict(parse_json(text))

    @classmethod
    def _from_dict(cls, values: object) -> LiquidConfig:
        if not isinstance(values, dict):
            raise ValueError(f"LiquidConfig: expected a JSON object, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"LiquidConfig: expected fields among {known}, got {unknown}")
        values = dict(values)
        for name in _ORDERED:
            if isinstance(values.get(name), list):
                values[name] = _by_pattern(name, values[name])
        return cls(**values)


def _by_pattern(name: str, pairs: list) -> dict[str, Any]:
    """``[[pattern, value], ...]`` as a mapping."""
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f"{name}: expected pairs of a pattern and a value, got {pair!r}")
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"{name}: expected each pattern once, got {pairs!r}")
    return result


def _patterns(name: str, patterns: object) -> tuple[str, ...]:
    if isinstance(patterns, Sequence) and not isinstance(patterns, str):
        found = tuple(patterns)
        if all(isinstance(pattern, str) for pattern in found):
            return found
    raise ValueError(f"{name}: expected a sequence of patterns, got {patterns!r}")
