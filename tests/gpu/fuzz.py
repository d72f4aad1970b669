"""Random cases for hypothesis, and the check that each has to pass."""

import math
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from problems import DEVICE, assert_equal, testing

import liquidgemm
from liquidgemm.formats.liquidquant import pack_codes
from liquidgemm.ops.plans import compiled_plans

LAYOUTS = ("plain", "row stride", "odd row stride", "odd offset", "transposed", "batched", "same")
VECTORS = ("plain", "strided", "offset")
WEIGHTS = ("plain", "odd offset", "strided")
VALUES = ("random", "saturated", "zeros", "one-hot")
GROUPS = ("random", "ends", "zero step", "whole row", "pairs", "symmetric")
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32)
BIAS_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)
SMS = (0, 0, 1, 2, 3, 7, 8, 16, 66, 131, 132)


@dataclass(frozen=True)
class Case:
    """One call. `plan` None is the public op; `num_sms` 0 all of them; `bits` of a weight, whose
    groups have so many columns."""

    bits: int
    group: int
    m: int
    n: int
    k: int
    plan: int | None
    num_sms: int
    out_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    x_layout: str
    scale_layout: str
    weight_layout: str
    x_values: str
    groups: str
    seed: int


def near(*centres: int, low: int = 1) -> st.SearchStrategy[int]:
    """Numbers next to those at which something changes."""
    return st.builds(
        lambda centre, step: max(low, centre + step), st.sampled_from(centres), st.integers(-3, 3)
    )


@st.composite
def cases(draw) -> Case:
    m = draw(st.one_of(st.integers(0, 40), near(8, 16, 32, 64, 128, 256), st.integers(1, 400)))
    n = draw(
        st.one_of(
            st.integers(1, 200),
            near(64, 128, 192, 256, 512),
            st.integers(1, 80).map(lambda i: 8 * i),
        )
    )
    k = draw(
        st.one_of(
            st.integers(1, 600),
            st.integers(1, 40).map(lambda i: 64 * i),
            near(128, 256, 512, 1024, 2048),
            st.sampled_from([2880, 4096, 5472, 9000]),
        )
    )
    bits, group = draw(st.sampled_from([(4, 64), (4, 64), (4, 32), (6, 64), (8, 64)]))
    plans = [plan for plan, _ in compiled_plans(bits, group)]
    plan = draw(st.one_of(st.none(), st.sampled_from(plans)))
    out_dtype = draw(st.sampled_from(OUT_DTYPES))
    return Case(
        bits=bits,
        group=group,
        m=m,
        n=n,
        k=k,
        plan=plan,
        num_sms=draw(st.sampled_from(SMS)),
        out_dtype=out_dtype,
        bias_dtype=None if out_dtype == torch.int32 else draw(st.sampled_from(BIAS_DTYPES)),
        x_layout=draw(st.sampled_from(LAYOUTS)),
        scale_layout=draw(st.sampled_from(VECTORS)),
        weight_layout=draw(st.sampled_from(WEIGHTS)),
        x_values=draw(st.sampled_from(VALUES)),
        groups=draw(st.sampled_from(GROUPS)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


class Maker:
    """The tensors of a case, all from its seed."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(case.seed)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def x(self) -> torch.Tensor:
        m, k = self.case.m, self.case.k
        if self.case.x_values == "zeros":
            x = self.integers(0, 1, m, k)
        elif self.case.x_values == "saturated":
            x = self.integers(0, 2, m, k) * 254 - 127
        elif self.case.x_values == "one-hot":
            x = torch.zeros(m, k, dtype=torch.int64, device=self.device)
            x.scatter_(1, self.integers(0, k, m, 1), 127)
        else:
            x = self.integers(-127, 128, m, k)
        if self.case.x_layout == "same":
            x[:] = x[:1].clone()
        return x.to(torch.int8)

    def groups(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, steps and offsets as int64: feasible for the codes that occur."""
        n, k = self.case.n, -(-self.case.k // 64) * 64
        largest, groups = 2**self.case.bits - 1, k // self.case.group
        codes = self.integers(0, largest + 1, n, k)
        step = self.integers(1, 255 // largest + 1, n, groups)
        kind = self.case.groups
        if kind == "ends":
            codes = (codes % 2) * largest
            step = torch.full_like(step, 255 // largest)
        elif kind == "zero step":
            step = step * 0
        elif kind == "whole row":
            step = step[:, :1].expand_as(step)
        elif kind == "pairs":
            step = step[:, ::2].repeat_interleave(2, 1)[:, :groups]
        elif kind == "symmetric":
            middle = (largest + 1) // 2
            step = step.clamp(max=128 // middle)
            return codes, step, 128 - middle * step
        span = 255 - largest * step
        offset = (self.rand(n, groups) * (span + 1)).long()
        if kind == "whole row":
            offset = offset[:, :1].expand_as(offset)
        return codes, step, offset

    def weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 ``[N, K]``, K padded, and the same packed."""
        if self.case.bits == 8:
            n, k = self.case.n, -(-self.case.k // 64) * 64
            ends = self.case.groups == "ends"
            w8 = self.integers(0, 2, n, k) * 255 - 128 if ends else self.integers(-128, 128, n, k)
            return w8, liquidgemm.pack_int8_weight(w8.to(torch.int8))
        codes, step, offset = self.groups()
        step_of, offset_of = (t.repeat_interleave(self.case.group, 1) for t in (step, offset))
        w8 = codes * step_of + offset_of - 128
        qweight = pack_codes(codes, self.case.bits) & 255
        logical = (t.to(torch.uint8) for t in (qweight, step, offset))
        return w8, liquidgemm.pack_weight(*logical)


def place(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in memory of another layout; what lies around them is no zero."""
    if layout in ("plain", "same") or t.dim() == 0:
        return t
    if layout in ("row stride", "odd row stride"):
        columns = t.shape[-1]
        pitch = -(-columns // 16) * 16 + 32 if layout == "row stride" else (columns + 5) | 1
        around = torch.full((*t.shape[:-1], pitch), 99, dtype=t.dtype, device=t.device)
        around[..., :columns] = t
        return around[..., :columns]
    if layout in ("odd offset", "offset"):
        around = torch.full((t.numel() + 3,), 99, dtype=t.dtype, device=t.device)
        around[3:] = t.flatten()
        return around[3:].view(t.shape)
    if layout == "strided":
        return torch.stack((t, torch.full_like(t, 99)), -1)[..., 0]
    if layout == "transposed":
        return t.T.contiguous().T
    assert layout == "batched", layout
    rows = len(t)
    outer = next((d for d in (2, 3, 5, 7) if rows % d == 0), 1)
    return t.view(outer, rows // outer, *t.shape[1:])


def check(case: Case, device: str = DEVICE) -> None:
    """Raises an AssertionError unless every bit of the result is that of the reference."""
    make = Maker(case, device)
    x = make.x()
    w8, weight = make.weight()
    x_scale = make.rand(case.m) + 0.01
    weight_scale = make.rand(case.n) + 0.01
    bias = None if case.bias_dtype is None else (make.rand(case.n) - 0.5).to(case.bias_dtype)

    expected = x.double() @ w8[:, : case.k].double().T
    if case.out_dtype == torch.int32:
        expected = expected.to(torch.int32)
    else:
        expected = expected.to(torch.int32).float() * x_scale[:, None] * weight_scale
        if bias is not None:
            expected = expected + bias.float()
        expected = expected.to(case.out_dtype)

    rows = place(x, case.x_layout)
    token_scale = place(x_scale, case.scale_layout)
    if case.x_layout == "same" and case.m > 0:
        rows = x[:1].expand(case.m, case.k)
    if case.x_layout == "batched":
        token_scale = token_scale.reshape(rows.shape[:-1])
    arguments = (
        rows,
        token_scale,
        place(weight, case.weight_layout),
        place(weight_scale, case.scale_layout),
        None if bias is None else place(bias, case.scale_layout),
        case.out_dtype,
    )
    if case.plan is None:
        y = liquidgemm.gemm(*arguments)
    else:
        y = testing.gemm_with_plan(*arguments, case.plan, case.num_sms)
    shape = (*rows.shape[:-1], case.n)
    assert y.shape == shape, f"{case}: {list(y.shape)}"
    assert math.prod(shape) == 0 or y.is_contiguous()
    assert_equal(y.reshape(case.m, case.n), expected, str(case))

    if case.out_dtype != torch.int32:  # and `linear`, in one launch or two
        activations = (x.float() * make.rand(case.m)[:, None]).to(case.out_dtype)
        layer = arguments[2:5]
        x8, scale = liquidgemm.quantize_activation(activations)
        expected = liquidgemm.gemm(x8, scale, *layer, case.out_dtype)
        rows = place(activations, case.x_layout)
        y = liquidgemm.linear(rows, *layer)
        assert y.shape == (*rows.shape[:-1], case.n), f"linear: {case}"
        assert_equal(y.reshape(case.m, case.n), expected, f"linear: {case}")


def run_cases(count: int, with_seed: int, device: str = DEVICE) -> None:
    """Checks this many random cases; the same ones for the same seed and version of hypothesis."""
    done = 0

    @seed(with_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(cases())
    def body(case: Case) -> None:
        nonlocal done
        check(case, device)
        done += 1

    body()
    print(f"fuzz: seed {with_seed}: {done} cases on {device}")
    assert done >= count, f"only {done} of {count} cases"
