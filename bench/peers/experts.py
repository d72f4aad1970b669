"""Grouped products beside ours: both of a layer, on rows that are sorted by expert.

Each peer starts from bf16 weights and quantizes them in its own way. Its activations are ready, in
the type that it multiplies.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import liquidgemm

from ..core.experts import BLOCK_BYTES, Routing
from .base import Unsupported

FP8_MAX = 448.0  # of e4m3


class ExpertsPeer:
    """Weights ``[E, N, K]`` of one product, and rows times them.

    Attributes:
        tolerance: of the relative error of one expert's rows; 0 means all bits.
    """

    name: ClassVar[str]
    module: ClassVar[str] = "torch"
    tolerance: ClassVar[float]

    @classmethod
    def why_absent(cls) -> str | None:
        if importlib.util.find_spec(cls.module) is None:
            return f"{cls.module} is not installed"
        return None

    def __init__(self, experts: int, n: int, k: int) -> None:
        raise NotImplementedError

    def new_copy(self) -> Any:
        raise NotImplementedError

    def rows(self, x: Tensor, routing: Routing) -> Any:
        """bf16 ``[R, K]`` as `call` takes them, with what else it needs to know of a routing."""
        raise NotImplementedError

    def call(self, weight: Any, rows: Any) -> Tensor:
        raise NotImplementedError

    def expected(self, rows: Any, expert: int, some: slice) -> Tensor:
        """The product of some rows of this expert."""
        raise NotImplementedError


def random_bf16(experts: int, n: int, k: int) -> Tensor:
    weight = torch.empty(experts, n, k, dtype=torch.bfloat16, device="cuda")
    return weight.normal_(generator=torch.Generator("cuda").manual_seed(n + k))


class LiquidExperts(ExpertsPeer):
    """`grouped_gemm`. Its weights are random bits in the packed layout; times do not depend on them
    beyond the power that they take."""

    name = "liquidgemm"
    tolerance = 0.0

    def __init__(self, experts: int, n: int, k: int) -> None:
        generator = torch.Generator("cuda").manual_seed(n + k)
        shape = (experts, -(-n // 64), -(-k // 64), BLOCK_BYTES)
        self.weight = torch.empty(shape, dtype=torch.uint8, device="cuda")
        for part in self.weight:
            part.random_(0, 256, generator=generator)
            part[..., 2048:].random_(1, 10, generator=generator)  # steps and offsets: feasible
        self.scale = torch.rand(experts, n, generator=generator, device="cuda") / k
        self.plan: int | None = None  # None: the library's choice

    def new_copy(self) -> Tensor:
        return self.weight.clone()

    def rows(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        return *liquidgemm.quantize_activation(x), routing.offsets

    def call(self, weight: Tensor, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x8, x_scale, offsets = rows
        if self.plan is None:
            return torch.ops.liquidgemm.grouped_gemm(x8, x_scale, weight, self.scale, offsets)
        return torch.ops.liquidgemm_testing.grouped_gemm_with_plan(
            *(x8, x_scale, weight, self.scale, offsets, None, None, "none", self.plan, 0)
        )

    def expected(self, rows: tuple[Tensor, Tensor, Tensor], expert: int, some: slice) -> Tensor:
        x8, x_scale, _ = rows
        return liquidgemm.gemm(x8[some], x_scale[some], self.weight[expert], self.scale[expert])


class Bf16Experts(ExpertsPeer):
    """torch's grouped product in bf16."""

    name = "bf16"
    tolerance = 0.01

    def __init__(self, experts: int, n: int, k: int) -> None:
        self.weight = random_bf16(experts, n, k)

    def new_copy(self) -> Tensor:
        return self.weight.clone()

    def rows(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        return x, routing.offsets[1:].clone()

    def call(self, weight: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        return torch._grouped_mm(rows[0], weight.transpose(1, 2), offs=rows[1])

    def expected(self, rows: tuple[Tensor, Tensor], expert: int, some: slice) -> Tensor:
        return rows[0][some].float() @ self.weight[expert].float().T


class Fp8Experts(ExpertsPeer):
    """torch's grouped product in e4m3, scales per row and per channel."""

    name = "fp8"
    tolerance = 0.02

    def __init__(self, experts: int, n: int, k: int) -> None:
        if n % 16 or k % 16:
            raise Unsupported("torch._scaled_grouped_mm needs N and K to be multiples of 16")
        self.weight = torch.empty(experts, n, k, dtype=torch.float8_e4m3fn, device="cuda")
        self.scale = torch.full((experts, n), 6 / FP8_MAX, device="cuda")
        for to, source in zip(self.weight, random_bf16(experts, n, k), strict=True):
            to.copy_((source / self.scale[0, 0]).clamp(-FP8_MAX, FP8_MAX))

    def new_copy(self) -> Tensor:
        return self.weight.clone()

    def rows(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        scale = x.float().abs().amax(1) / FP8_MAX
        x8 = (x.float() / scale[:, None]).to(torch.float8_e4m3fn)
        return x8, scale, routing.offsets[1:].clone()

    def call(self, weight: Tensor, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x8, scale, ends = rows
        return torch._scaled_grouped_mm(
            x8,
            weight.transpose(1, 2),
            scale,
            self.scale,
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def expected(self, rows: tuple[Tensor, Tensor, Tensor], expert: int, some: slice) -> Tensor:
        x = rows[0][some].float() * rows[1][some, None]
        return x @ (self.weight[expert].float() * self.scale[expert, :, None]).T


class HummingExperts(ExpertsPeer):
    """Groups of 64 with zero points, as ours; INT8 activations; contiguous groups."""

    name = "humming"
    module = "humming"
    tolerance = 0.2  # against the weights before they were quantized
    config: ClassVar[dict] = {
        "dtype": "uint4",
        "group_size": 64,
        "scale_dtype": "bfloat16",
        "has_zero_point": True,
    }

    def __init__(self, experts: int, n: int, k: int) -> None:
        from humming.layer import HummingLayer

        if k % self.config.get("group_size", 1):
            raise Unsupported(f"K = {k} is no multiple of the group")
        self.source = random_bf16(experts, n, k)
        self.layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            num_experts=experts,
            weight_config=dict(self.config),
            input_config={"dtype": "int8"},
            torch_dtype=torch.bfloat16,
        ).cuda()
        self.layer.load_from_unquantized(self.source)
        self.layer.transform()
        self.first = self.source[:1].clone()  # to check against
        del self.source

    def new_copy(self) -> Any:
        return copy.deepcopy(self.layer)

    def rows(self, x: Tensor, routing: Routing) -> tuple:
        from humming import ops
        from humming.tune import get_heuristics_config

        x8, _, scale = ops.process_input(x, quant_mode="dynamic_token", quant_dtype="int8")
        kind = "grouped_contiguous"
        tuning = get_heuristics_config(self.layer.humming_config, shape_m=len(x), gemm_type=kind)
        return x8, scale, routing.offsets, {"gemm_type": kind}, tuning, x

    def call(self, weight: Any, rows: tuple) -> Tensor:
        x8, scale, offsets, config, tuning, _ = rows
        return weight(
            x8,
            input_scale=scale,
            expert_layout=offsets,
            compute_config=config,
            tuning_config=tuning,
        )

    def expected(self, rows: tuple, expert: int, some: slice) -> Tensor | None:
        return rows[-1][some].float() @ self.first[0].float().T if expert == 0 else None


class HummingChannelExperts(HummingExperts):
    """One symmetric scale per channel: its fastest mode, and its least accurate."""

    name = "humming-channel"
    config: ClassVar[dict] = {"dtype": "int4"}


class HummingGroup128Experts(HummingExperts):
    """Groups of 128 without zero points."""

    name = "humming-g128"
    config: ClassVar[dict] = {"dtype": "int4", "group_size": 128, "scale_dtype": "bfloat16"}


OURS = LiquidExperts.name
EXPERT_PEERS: dict[str, type[ExpertsPeer]] = {
    peer.name: peer
    for peer in (
        LiquidExperts,
        Bf16Experts,
        Fp8Experts,
        HummingExperts,
        HummingChannelExperts,
        HummingGroup128Experts,
    )
}


def check(peer: ExpertsPeer, rows: Any, out: Tensor, routing: Routing) -> float:
    """The relative error of the rows of two experts; raises ValueError if it is too large."""
    active = [expert for expert, count in enumerate(routing.counts) if count]
    worst = 0.0
    for expert in dict.fromkeys((active[0], active[-1])):
        begin = sum(routing.counts[:expert])
        some = slice(begin, begin + min(8, routing.counts[expert]))
        expected = peer.expected(rows, expert, some)
        if expected is None:
            continue
        if peer.tolerance == 0:
            if not torch.equal(out[some], expected):
                raise ValueError(f"expert {expert}: not the bits of gemm")
            continue
        error = (out[some].float() - expected).norm() / expected.norm()
        if not error <= peer.tolerance:
            raise ValueError(f"expert {expert}: error {float(error):.3f}")
        worst = max(worst, float(error))
    return worst


def parse_names(text: str) -> Sequence[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in EXPERT_PEERS or name == OURS:
            known = ", ".join(name for name in EXPERT_PEERS if name != OURS)
            raise ValueError(f"{name!r} is none of {known}")
    return names
