"""Two GPUs in one process."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import Problem, random_problem

import liquidgemm
from liquidgemm.ops import _library


@pytest.fixture
def devices() -> list[str]:
    found = _library.hopper_devices()
    if len(found) < 2:
        pytest.skip(f"needs two Hopper GPUs, and there {'is one' if found else 'is none'}")
    return [f"cuda:{index}" for index in found[:2]]


def on(device: str, problem: Problem) -> tuple[torch.Tensor, ...]:
    return tuple(
        t.to(device) for t in (problem.x, problem.x_scale, problem.weight, problem.weight_scale)
    )


def test_the_current_device_is_another_one(devices) -> None:
    """CHECKLIST 11: tensors say where an op runs; the current device stays what it was."""
    problem = random_problem(40, 200, 1088)
    x = torch.randn(40, 1088).bfloat16()
    x_scale, weight, scale = (t.cpu() for t in on("cpu", problem)[1:])
    expected = liquidgemm.gemm(problem.x.cpu(), x_scale, weight, scale)
    expected_linear = liquidgemm.linear(x, weight, scale)
    for current in devices:
        for place in devices:
            with torch.cuda.device(current):
                arguments = on(place, problem)
                y = liquidgemm.gemm(*arguments)
                z = liquidgemm.linear(x.to(place), *arguments[2:])
                assert torch.cuda.current_device() == torch.device(current).index
            assert str(y.device) == str(z.device) == place
            assert torch.equal(y.cpu(), expected), (current, place)
            assert torch.equal(z.cpu(), expected_linear), (current, place)


def test_streams_of_both(devices) -> None:
    """CHECKLIST 11: work queued on a side stream of each device, fed by a copy between them."""
    problem = random_problem(64, 1024, 4096)
    expected = problem.accumulator().cpu()
    arguments = {device: on(device, problem) for device in devices}
    for source, target in (devices, devices[::-1]):
        x = torch.zeros_like(arguments[target][0])
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        sender, receiver = torch.cuda.Stream(source), torch.cuda.Stream(target)
        with torch.cuda.stream(sender):
            torch.cuda._sleep(50_000_000)
            ready = sender.record_event()
        with torch.cuda.stream(receiver):
            receiver.wait_event(ready)
            x.copy_(arguments[source][0], non_blocking=True)
            y = liquidgemm.gemm(x, *arguments[target][1:], out_dtype=torch.int32)
        receiver.synchronize()
        assert torch.equal(y.cpu(), expected), (source, target)


def test_threads_on_both(devices) -> None:
    """CHECKLIST 11: threads times streams times devices."""
    problem = random_problem(300, 640, 1088)
    expected = problem.accumulator()
    arguments = {device: on(device, problem) for device in devices}
    wanted = {device: expected.to(device) for device in devices}
    for device in devices:
        torch.cuda.synchronize(device)

    def work(thread: int) -> int:
        device = devices[thread % 2]
        x, x_scale, weight, scale = arguments[device]
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            wrong = torch.zeros((), dtype=torch.int64, device=device)
            for i in range(100):
                m = 1 + (37 * i + 11 * thread) % 300
                y = liquidgemm.gemm(x[:m], x_scale[:m], weight, scale, out_dtype=torch.int32)
                wrong += (y != wanted[device][:m]).any()
            stream.synchronize()
            return int(wrong)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [0] * 8


def test_arguments_on_both_are_refused(devices) -> None:
    """CHECKLIST 7, 11."""
    problem = random_problem(4, 64, 128)
    here, there = (on(device, problem) for device in devices)
    for index, name in ((1, "x_scale"), (2, "weight"), (3, "weight_scale")):
        mixed = list(here)
        mixed[index] = there[index]
        with pytest.raises(RuntimeError, match=f"{name}: expected on {devices[0]} like x, got on"):
            liquidgemm.gemm(*mixed)
