"""Random routings, sizes and plans of the grouped product."""

import os

import torch
from grouped import GROUPED_PLANS, grouped_problem, run_grouped
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from problems import assert_equal

SEED = int(os.environ.get("SEED", "0"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32)

rows = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 40), st.integers(0, 600))
sizes = st.one_of(st.integers(1, 200), st.integers(1, 20).map(lambda i: 64 * i))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@seed(SEED)
@given(
    counts=st.lists(rows, min_size=1, max_size=40),
    beyond=st.sampled_from((0, 0, 1, 50)),
    n=sizes,
    k=sizes,
    plan=st.one_of(st.none(), st.sampled_from([plan for plan, _ in GROUPED_PLANS])),
    num_sms=st.sampled_from((0, 0, 1, 2, 7, 66)),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_random_routings(counts, beyond, n, k, plan, num_sms, dtype, bias) -> None:
    """CHECKLIST 17, 30: the exact sums, or the documented formula, to the bit."""
    problem = grouped_problem(counts, n, k, beyond, seed=len(counts))
    bias = bias and dtype.is_floating_point
    found = run_grouped(problem, dtype, bias, plan, num_sms if plan is not None else 0)
    integers = dtype == torch.int32
    expected = problem.accumulator() if integers else problem.output(dtype, bias)
    what = f"{counts=} {beyond=} {n=} {k=} {plan=} {num_sms=} {dtype} {bias=}"
    assert_equal(found[: problem.written], expected, what)
