"""Every weight there can be, read back through the kernel."""

import pytest
import torch
from problems import DEVICE, assert_equal, testing

import liquidgemm
from liquidgemm.ops.plans import plan_names

PLANS = list(enumerate(plan_names()))


def every_group() -> tuple[torch.Tensor, ...]:
    """Logical tensors with one row per (s, a), s from 0 to 255, whose codes repeat all 16 values.

    Codes that would overflow are replaced by the largest that does not.
    """
    s, a = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    s, a = s.reshape(-1, 1), a.reshape(-1, 1)
    largest = ((255 - a) // s.clamp(min=1)).clamp(max=15)
    largest[s == 0] = 15
    codes = torch.minimum((torch.arange(64) % 16)[None], largest)
    w8 = codes * s + a - 128
    qweight = codes[:, 0::2] | codes[:, 1::2] << 4
    return *(t.to(torch.uint8) for t in (qweight, s, a)), w8.to(torch.int32)


@pytest.mark.parametrize(("plan", "name"), PLANS, ids=lambda v: str(v))
def test_every_step_offset_and_code(plan: int, name: str) -> None:
    """CHECKLIST 4: tokens that are unit vectors give the decoded weights themselves."""
    *logical, w8 = every_group()
    weight = liquidgemm.pack_weight(*(t.to(DEVICE) for t in logical))
    unit = torch.eye(64, dtype=torch.int8, device=DEVICE)
    ones = torch.ones(len(w8), device=DEVICE)
    y = testing.gemm_with_plan(unit, ones[:64], weight, ones, None, torch.int32, plan, 0)
    assert_equal(y.T, w8.to(DEVICE), name)
