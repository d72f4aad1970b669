"""Other streams and other threads beside ours change nothing."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import DEVICE, assert_equal, random_problem, run

import liquidgemm
from liquidgemm.ops.plans import plan_names

PLANS = list(enumerate(plan_names()))


class Hog:
    """Keeps the GPU busy from a stream of its own."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.matrix = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)

    def work(self, products: int = 1) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(products):
                torch.mm(self.matrix, self.matrix)


@pytest.mark.parametrize("m", [1, 48, 200])
def test_repetition_beside_a_busy_stream(m: int) -> None:
    """CHECKLIST 10: 1000 runs with the same bits while another stream takes SMs away."""
    problem = random_problem(m, 1536, 4096)
    expected = problem.accumulator()
    hog = Hog()
    torch.cuda.synchronize()
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for i in range(1000):
        hog.work()
        wrong += (run(problem, poisoned=i % 2 == 0) != expected).any()
    torch.cuda.synchronize()
    assert wrong.item() == 0, f"{wrong.item()} of 1000 runs differ, {m=}"


@pytest.mark.parametrize(("plan", "name"), PLANS, ids=lambda v: str(v))
def test_every_plan_beside_a_busy_stream(plan: int, name: str) -> None:
    """CHECKLIST 10."""
    problem = random_problem(70, 1536, 2880)
    expected = problem.accumulator()
    hog = Hog()
    torch.cuda.synchronize()
    hog.work(20)
    outputs = [run(problem, plan=plan, poisoned=False) for _ in range(50)]
    for i, y in enumerate(outputs):
        assert_equal(y, expected, f"{name} run {i}")


def test_threads_and_streams_share_weights() -> None:
    """CHECKLIST 11: eight threads with a stream each, one weight, batches of many sizes."""
    problem = random_problem(300, 640, 1088)
    x = torch.randn(300, 1088, device=DEVICE).bfloat16()
    expected = liquidgemm.linear(x, problem.weight, problem.weight_scale, problem.bias)
    torch.cuda.synchronize()

    def work(thread: int) -> int:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
            for i in range(100):
                m = 1 + (37 * i + 11 * thread) % 300
                y = liquidgemm.linear(x[:m], problem.weight, problem.weight_scale, problem.bias)
                wrong += (y != expected[:m]).any()
            stream.synchronize()
            return int(wrong)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [0] * 8


def test_streams_in_one_thread() -> None:
    """CHECKLIST 11: launches of several streams in flight at once, with clusters along K."""
    problem = random_problem(33, 512, 4096)
    expected = problem.accumulator()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(6)]
    outputs = []
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs.append(run(problem, plan=5 * i % len(PLANS), poisoned=False))
    torch.cuda.synchronize()
    for i, y in enumerate(outputs):
        assert_equal(y, expected, f"launch {i}")


def test_a_stream_of_another_library() -> None:
    """CHECKLIST 11: the stream is the one that torch says is current, not its pool's."""
    problem = random_problem(64, 1024, 4096)
    expected = problem.accumulator()
    raw = torch.cuda.Stream()
    external = torch.cuda.ExternalStream(raw.cuda_stream)
    x = torch.zeros_like(problem.x)
    torch.cuda.synchronize()
    with torch.cuda.stream(external):
        torch.cuda._sleep(50_000_000)
        x.copy_(problem.x)
        y = liquidgemm.gemm(
            x, problem.x_scale, problem.weight, problem.weight_scale, out_dtype=torch.int32
        )
    external.synchronize()
    assert_equal(y, expected, "external stream")
