"""``liquidgemm info``: what is installed, which path runs here, why, and how fast."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import liquidgemm

from ..ops import _library
from ..ops.plans import plan_names
from . import demo

PACKAGES = ("transformers", "accelerate", "gguf", "peft", "torchao", "matplotlib")  # optional
SIZE = 4096  # features of the layer that is measured, in and out
TOKENS = (1, 16)


def info_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    measure: Annotated[
        bool, typer.Option(help=f"Time a layer of {SIZE} x {SIZE}, for about a second.")
    ] = True,
    plans: Annotated[bool, typer.Option("--plans", help="List the kernel's plans.")] = False,
) -> None:
    """Print what is installed, whether the Hopper kernel or the CPU path runs here, and why."""
    found = gather(measure, plans)
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")  # a path is cut nowhere
    for row in rows(found):
        table.add_row(*map(Text, row))  # as it stands: a GPU's name is no markup
    Console().print(table, highlight=False)


def gather(measure: bool = True, plans: bool = False) -> dict[str, Any]:
    """What ``--json`` prints. Keys stay as they are from version to version; more may come.

    ``speed`` is a list of measurements of one layer, times in µs, or null; ``plans`` a list of
    names, or null. A package that is not installed has null as its version.
    """
    status = _library.status()
    return {
        "liquidgemm": liquidgemm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "packages": {name: installed_version(name) for name in PACKAGES},
        "gpus": gpus(),
        "path": "kernel" if status.cuda_available else "cpu",
        "kernel": {"available": status.cuda_available, "reason": status.reason},
        "cpu": {
            "threads": torch.get_num_threads(),
            "kernel": liquidgemm.cpu_kernel(),
            "kernels": list(liquidgemm.cpu_kernels()),
        },
        "host_library": str(status.host_library),
        "cuda_library": None if status.cuda_library is None else str(status.cuda_library),
        "speed": speed() if measure else None,
        "plans": plan_names() if plans else None,
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people."""
    cuda = found["torch_cuda"]
    missing = [name for name, version in found["packages"].items() if version is None]
    threads = found["cpu"]["threads"]
    cpu = f"CPU kernel {found['cpu']['kernel']}, exact to the same bits, in {threads} thread"
    cpu += f"{'s' if threads > 1 else ''}; there are {', '.join(found['cpu']['kernels'])}"
    on_gpu = found["kernel"]["available"]
    lines = [
        ("liquidgemm", found["liquidgemm"]),
        ("Python", f"{found['python']} on {found['platform']}"),
        ("torch", f"{found['torch']}, {f'built with CUDA {cuda}' if cuda else 'without CUDA'}"),
        *((name, version) for name, version in found["packages"].items() if version is not None),
        *([("not installed", ", ".join(missing))] if missing else []),
        *(("GPU", _gpu_line(gpu)) for gpu in found["gpus"]),
        *([] if found["gpus"] else [("GPU", "none")]),
        ("host library", found["host_library"]),
        ("CUDA library", found["cuda_library"] or "not loaded"),
        ("Hopper kernel", found["kernel"]["reason"]),
        ("CPU tensors" if on_gpu else "runs on", cpu),
    ]
    for case in found["speed"] or ():
        name = f"{case['tokens']} token{'s' if case['tokens'] > 1 else ''}"
        lines.append(
            (
                name,
                f"{case['liquidgemm_us']:.0f} µs for a layer of {case['out_features']} x "
                f"{case['in_features']}; torch in {case['torch_dtype']} {case['torch_us']:.0f} µs",
            )
        )
    if found["plans"] is not None:
        lines.append(("plans", ", ".join(found["plans"])))
    return lines


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[dict[str, Any]]:
    """Each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "sms": gpu.multi_processor_count,
                "memory_bytes": gpu.total_memory,
            }
        )
    return found


def _gpu_line(gpu: dict[str, Any]) -> str:
    return (
        f"cuda:{gpu['index']} {gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{gpu['sms']} SMs, {gpu['memory_bytes'] / 2**30:.0f} GiB"
    )


def speed() -> list[dict[str, Any]]:
    """`linear` beside torch's own, on the GPU in bfloat16 where the kernel runs, else in float32
    on the CPU."""
    hopper = _library.hopper_devices() if _library.status().cuda_available else []
    cases = []
    for tokens in TOKENS:
        if hopper:
            device = torch.device("cuda", hopper[0])
            with torch.cuda.device(device):
                torch_us, _, ours_us = demo.gemm_times_us(device, SIZE, SIZE, tokens)
        else:
            torch_us, ours_us = _cpu_times_us(tokens)
        cases.append(
            {
                "tokens": tokens,
                "out_features": SIZE,
                "in_features": SIZE,
                "liquidgemm_us": round(ours_us, 1),
                "torch_us": round(torch_us, 1),
                "torch_dtype": "bfloat16" if hopper else "float32",
            }
        )
    return cases


@torch.inference_mode()
def _cpu_times_us(tokens: int) -> tuple[float, float]:
    weight = torch.ones(SIZE, SIZE)
    scale, x = torch.ones(SIZE), torch.ones(tokens, SIZE)
    shape = (SIZE, SIZE // 64)
    step, offset = (torch.full(shape, value, dtype=torch.uint8) for value in (8, 64))
    codes = torch.full((SIZE, SIZE // 2), 0x88, dtype=torch.uint8)
    packed = liquidgemm.pack_weight(codes, step, offset)

    def ours() -> Tensor:
        return liquidgemm.linear(x, packed, scale)

    return _best_us(lambda: torch.nn.functional.linear(x, weight)), _best_us(ours)


def _best_us(call: Callable[[], Tensor], seconds: float = 0.2) -> float:
    """Of the calls that fit in so many seconds; at least one after the first, which warms up."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6
