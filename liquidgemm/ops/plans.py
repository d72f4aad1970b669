"""Which kernel runs a product, and why: the choice that the library makes before every launch.

A *plan* says which tile a CTA computes and how CTAs share the work. It is chosen by a pure function
of the sizes, the number of SMs and the memory's bandwidth, which can be asked without a GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import cast

import torch

from . import _library

_library.load_libraries()

H100_SMS = 132
H100_MEMORY_TBPS = 3.35

_OPS = ("gemm", "gemm_behind_producer", "linear")
# By bits of a code, and columns of a group.
_FORMATS = {
    (4, 64): "liquidquant",
    (4, 32): "liquidquant_g32",
    (6, 64): "liquidquant6",
    (8, 64): "int8",
}


@dataclass(frozen=True)
class Candidate:
    """A plan beside the others.

    Attributes:
        plan: its name: tokens, 64-channel panels and k groups of a tile, blocks per pipeline stage,
            and how CTAs share tiles: ``t64_p1_k3_s2_split2``.
        us: estimated time, or None if a rule excludes the plan before it is estimated. Softly the
            larger of memory_us and sm_us, plus fixed_us and behind_quantizer_us.
        memory_us: time to stream the weights.
        sm_us: time that the busiest SM works.
        fixed_us: launch, and SMs that the last round keeps from the next launch.
        behind_quantizer_us: what the plan costs more right after a quantizer.
        why_not: why it is not the selected plan; empty for that one.
    """

    plan: str
    us: float | None
    memory_us: float | None
    sm_us: float | None
    fixed_us: float | None
    behind_quantizer_us: float | None
    why_not: str


@dataclass(frozen=True)
class PlanExplanation:
    """What a launch does, and how its plan was chosen. ``print`` shows it as text.

    Attributes:
        m, n, k: tokens, output channels and input channels.
        op: "gemm", "gemm_behind_producer" or "linear".
        num_sms, memory_tbps: of the GPU.
        plan: name of the selected plan.
        launches: 1, or 2 if a quantizer runs before.
        why_launches: why.
        tile_tokens, m_tiles, n_tiles: height of a tile, and tiles (pairs of them, with pairs).
        workers, cluster: CTAs, or clusters of so many CTAs, that run at a time.
        whole_rounds, split_tiles: tiles per worker, and tiles that two CTAs share in a last round.
        eighths_ahead: eighths of the pipeline filled with weights before the activations arrive.
        stages_ahead: stages of each k group dequantized before the activations arrive.
        candidates: all plans, the selected one first, then by time; excluded ones last.
    """

    m: int
    n: int
    k: int
    op: str
    num_sms: int
    memory_tbps: float
    plan: str
    launches: int
    why_launches: str
    tile_tokens: int
    m_tiles: int
    n_tiles: int
    workers: int
    cluster: int
    whole_rounds: int
    split_tiles: int
    eighths_ahead: int
    stages_ahead: int
    candidates: tuple[Candidate, ...]

    @property
    def selected(self) -> Candidate:
        return self.candidates[0]

    def summary(self) -> str:
        """One line."""
        best = self.selected
        us, memory, sm, fixed, behind = cast(  # it has been estimated, as it was selected
            tuple[float, ...],
            (best.us, best.memory_us, best.sm_us, best.fixed_us, best.behind_quantizer_us),
        )
        bound = "memory" if memory >= sm else "the SMs"
        launches = ("", ", one launch", ", two launches")[self.launches * (self.op == "linear")]
        return (
            f"{self.op} M={self.m} N={self.n} K={self.k} on {self.num_sms} SMs, "
            f"{self.memory_tbps:.2f} TB/s: plan {self.plan}{launches}; "
            f"estimated {us:.1f} us: memory {memory:.1f}, SMs {sm:.1f}, "
            f"fixed {fixed + behind:.1f}; bound by {bound}"
        )

    def __str__(self) -> str:
        split = f", then {self.split_tiles} shared along K" if self.split_tiles else ""
        lines = [
            self.summary(),
            f"  {self.why_launches}",
            f"  {self.m_tiles} x {self.n_tiles} tiles of {self.tile_tokens} tokens over "
            f"{self.workers} clusters of {self.cluster}: {self.whole_rounds} each{split}",
            f"  weights ahead of the activations: {self.eighths_ahead}/8 of the pipeline, "
            f"{self.stages_ahead} stages dequantized",
        ]
        scored = [c for c in self.candidates if c.us is not None]
        width = max(len(c.plan) for c in scored)
        for c in scored:
            why = c.why_not or "selected: the least time"
            lines.append(f"{c.us:9.2f} us  {c.plan:{width}}  {why}")
        excluded: dict[str, list[str]] = {}
        for c in self.candidates[len(scored) :]:
            excluded.setdefault(c.why_not, []).append(c.plan)
        lines += [f"  excluded, {why}: {', '.join(plans)}" for why, plans in excluded.items()]
        return "\n".join(lines)


def plan_names() -> list[str]:
    """The names of all compiled plans."""
    return list(torch.ops.liquidgemm_plan.names())


def compiled_plans(bits: int = 4, group_size: int = 64) -> list[tuple[int, str]]:
    """Index and name, in `plan_names`, of the plans for weights of so many bits in such groups."""
    names = plan_names()
    plans = torch.ops.liquidgemm_plan.plausible(0, _FORMATS[bits, group_size])
    return [(plan, names[plan]) for plan in plans]


def grouped_plan_names() -> list[str]:
    """The names of all compiled plans of `grouped_gemm`."""
    return list(torch.ops.liquidgemm_plan.grouped_names())


def grouped_plan(
    rows: int,
    experts: int,
    n: int,
    k: int,
    *,
    num_sms: int = H100_SMS,
    memory_tbps: float = H100_MEMORY_TBPS,
) -> str:
    """Say in one line which plan runs a `grouped_gemm` on a GPU.

    Needs no GPU. The plan is that of rows which are given to experts at random: how they are
    distributed, the device alone knows. So does the estimated time.

    Args:
        rows: of all experts.
        experts: E; each is ``[n, k]``.
        n: output channels.
        k: input channels.
        num_sms: of the GPU.
        memory_tbps: peak of its memory, in 1e12 bytes per second.

    Raises:
        RuntimeError: a size below 1 or from 2^31 on, or no positive bandwidth.
    """
    return torch.ops.liquidgemm_plan.grouped(rows, experts, n, k, num_sms, memory_tbps)


def slot_plan_names() -> list[str]:
    """The names of all compiled plans of products by slots, which `moe` of very few tokens has."""
    return list(torch.ops.liquidgemm_plan.slot_names())


def moe_plan(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inner: int,
    *,
    total_experts: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    num_sms: int = H100_SMS,
    memory_tbps: float = H100_MEMORY_TBPS,
) -> str:
    """Say in one line how many launches `moe` has on a GPU, and which plans run its products.

    Needs no GPU. For very few tokens of 16 bits there are three launches instead of six.

    Args:
        tokens: of x, which is aligned to 16 bytes.
        top_k: experts of a token.
        experts: E.
        hidden: H.
        inner: I; an expert's matrices are ``[2 I, H]`` and ``[H, I]``.
        total_experts: of the layer, where E of them are on this GPU; None: E.
        dtype: of x.
        num_sms: of the GPU.
        memory_tbps: peak of its memory, in 1e12 bytes per second.

    Raises:
        RuntimeError: a size below 1 or from 2^31 on, or no positive bandwidth.
    """
    total = experts if total_experts is None else total_experts
    of_16_bits = dtype.itemsize == 2
    return torch.ops.liquidgemm_plan.moe(
        tokens, top_k, experts, total, hidden, inner, of_16_bits, num_sms, memory_tbps
    )


def explain_plan(
    m: int,
    n: int,
    k: int,
    *,
    op: str = "gemm",
    bits: int = 4,
    group_size: int = 64,
    num_sms: int = H100_SMS,
    memory_tbps: float = H100_MEMORY_TBPS,
) -> PlanExplanation:
    """Say which plan runs a product on a GPU, and why none of the others does.

    Needs no GPU. Times are estimates for weights that are not in a cache, in a chain of launches.

    Args:
        m: tokens.
        n: output channels.
        k: input channels.
        op: "gemm" for int8 activations, "gemm_behind_producer" for those that the kernel right
            before writes, "linear" for 16-bit ones that are quantized first.
        bits: of a weight: 4, 6, or 8 (INT8).
        group_size: columns of a weight that share a step: 64, or 32 with 4 bits.
        num_sms: of the GPU; 132 on an H100 or H200 SXM.
        memory_tbps: peak of its memory, in 1e12 bytes per second: 3.35 on an H100 SXM, 4.8 on an
            H200.

    Raises:
        ValueError: an unknown op, other bits or groups, a size below 1 or from 2^31 on, or no
            positive bandwidth.
    """
    if op not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(_OPS)}, got {op!r}")
    if bits not in {known for known, _ in _FORMATS}:
        raise ValueError(f"bits: expected 4, 6 or 8, got {bits!r}")
    if (bits, group_size) not in _FORMATS:
        groups = " or ".join(str(group) for known, group in _FORMATS if known == bits)
        raise ValueError(f"group_size: expected {groups} with {bits} bits, got {group_size!r}")
    for name, value in (("m", m), ("n", n), ("k", k), ("num_sms", num_sms)):
        if not 1 <= value < 2**31:
            raise ValueError(f"{name}: expected 1 to 2^31 - 1, got {value}")
    if not memory_tbps > 0:
        raise ValueError(f"memory_tbps: expected a positive number, got {memory_tbps}")
    found = json.loads(
        torch.ops.liquidgemm_plan.explain(
            m, n, k, op, _FORMATS[bits, group_size], num_sms, memory_tbps
        )
    )
    unknown = dict.fromkeys(Candidate.__annotations__)
    candidates = tuple(Candidate(**{**unknown, **c}) for c in found.pop("candidates"))
    return PlanExplanation(m, n, k, op, num_sms, memory_tbps, **found, candidates=candidates)
