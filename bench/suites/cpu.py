"""``python -m bench cpu``: liquidgemm's `linear` on the CPU beside what else a CPU offers.

All candidates get the same weight and float32 (or bfloat16) tokens, and return the same product:
INT8 and 4-bit ones quantize the tokens within the call. One call of each in turn, over copies of
the weight that no cache of a core holds; the minimum counts, which other work on the machine
disturbs least, and the median is recorded beside it. With one thread the clock is that thread's
time on a processor, which stands still while other programs run; with more it is the wall's.

``--isa avx2`` asks everything for AVX2, ``--isa avx512_vnni`` for AVX-512 without AMX: our kernels
by name, torch's by the variables of ATen, oneDNN and MKL, FBGEMM by the function that it has for
that. llama.cpp has the instructions that it was compiled for.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liquidgemm
from liquidgemm import QuantizedWeight, pack_weight, quantize_weight

from ..core import machine
from ..peers import ggml

OURS = "liquidgemm"
ISA_VARIABLES = {
    "avx512_vnni": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "LIQUIDGEMM_CPU": "avx512_vnni",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "LIQUIDGEMM_CPU": "avx2",
    },
}
# FBGEMM's fbgemmForceIsa(inst_set_t), in torch's library: it has no variable. It has no AMX either,
# so that only AVX2 is to be asked for.
FBGEMM_FORCE_ISA = "_ZN6fbgemm14fbgemmForceIsaENS_10inst_set_tE"
FBGEMM_ISA = {"avx2": 1}
WARM_UP_S = 0.2
COPY_BYTES = 256 << 20

Call = Callable[[Tensor], Tensor]
Candidate = Callable[[int], list[Call]]  # tokens to calls, one for each copy of the weight


def processor() -> str:
    """The processor's name as Linux has it."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return re.sub(r"\s+", " ", match[1]).strip() if match else platform.machine()


def folder(kernel: str) -> Path:
    words = re.sub(r"\(.*?\)", "", processor()).lower().split()
    kept = [word for word in words if re.fullmatch(r"[a-z0-9-]+", word) and word != "processor"]
    return machine.RESULTS / "-".join(["cpu", *kept, kernel.replace("_", "-")]) / machine.now()[:10]


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by one large copy."""
    source, target = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
    target.resize_(COPY_BYTES)
    best = min(timed(lambda: target.copy_(source)) for _ in range(9))
    return 2 * COPY_BYTES / best


def timed(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    function()
    return clock() - start


def lower_fbgemm(isa: str) -> None:
    """Asks FBGEMM for an instruction set, before it packs a weight."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    force = getattr(library, FBGEMM_FORCE_ISA, None)
    if force is None:
        raise SystemExit(f"--isa {isa}: FBGEMM of torch {torch.__version__} cannot be asked for it")
    force.argtypes, force.restype = [ctypes.c_int], None
    force(FBGEMM_ISA[isa])


def dynamic_int8(weight: Tensor, engine: str) -> Call:
    """torch's dynamically quantized linear layer: INT8 weights, tokens quantized per call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = engine
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
        module = torch.ao.nn.quantized.dynamic.Linear.from_float(layer)

    def call(x: Tensor) -> Tensor:
        torch.backends.quantized.engine = engine
        return module(x)

    return call


def candidates(weights: list[Tensor], kernels: list[str], library: ggml.Ggml | None) -> dict:
    """Each by name, as a function of the number of tokens."""
    quantized: list[QuantizedWeight] = [quantize_weight(weight) for weight in weights]
    packed = [(pack_weight(q.qweight, q.qscale, q.qoffset), q.scale) for q in quantized]

    def ours(kernel: str) -> Candidate:
        def one(w: Tensor, scale: Tensor) -> Call:
            def call(x: Tensor) -> Tensor:
                liquidgemm.set_cpu_kernel(kernel)
                return liquidgemm.linear(x, w, scale)

            return call

        return lambda m: [one(*pair) for pair in packed]

    def torch_linear(dtype: torch.dtype) -> Candidate:
        cast = [weight.to(dtype) for weight in weights]
        return lambda m: [lambda x, w=w: F.linear(x.to(dtype), w) for w in cast]

    found: dict[str, Candidate] = {
        OURS if kernel == kernels[0] else f"{OURS} {kernel}": ours(kernel) for kernel in kernels
    }
    found["float32"] = torch_linear(torch.float32)
    found["bfloat16"] = torch_linear(torch.bfloat16)
    for engine in ("fbgemm", "onednn"):
        if engine in torch.backends.quantized.supported_engines:
            layers = [dynamic_int8(weight, engine) for weight in weights]
            found[f"INT8 {engine}"] = lambda m, layers=layers: layers
    if library is not None:
        columns = weights[0].shape[1]
        for kind in (kind for kind, block in ggml.BLOCKS.items() if columns % block == 0):
            found[f"ggml {kind}"] = lambda m, kind=kind: [
                library.linear(kind, weight, m)[0] for weight in weights
            ]
    return found


def measure(calls: dict[str, list[Call]], x: Tensor, exact: Tensor, seconds: float) -> dict:
    """Times in µs and the relative error of each, one call of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    record: dict[str, dict] = {}
    for name, copies in calls.items():
        error = (copies[0](x).double() - exact).norm() / exact.norm()
        record[name] = {"error": float(error)}
        until = time.perf_counter() + WARM_UP_S / len(calls)
        while time.perf_counter() < until:
            copies[-1](x)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    until = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < until or turn < 8:
        # Each takes another copy than those before it, which may share the weight.
        for place, (name, copies) in enumerate(calls.items()):
            call = copies[(turn + place) % len(copies)]
            times[name].append(timed(lambda call=call: call(x), clock) * 1e6)
        turn += 1
    for name, samples in times.items():
        record[name] |= {
            "min_us": min(samples),
            "median_us": statistics.median(samples),
            "calls": len(samples),
        }
    return record


def run(options: argparse.Namespace) -> dict:
    library = None
    if options.isa in FBGEMM_ISA:
        lower_fbgemm(options.isa)
    try:
        library = ggml.Ggml()
    except ImportError as error:
        print(f"llama.cpp is left out: {error}", file=sys.stderr)
    kernels = options.kernels or [liquidgemm.cpu_kernel()]
    cases = []
    result = {
        "processor": processor(),
        "cpu_kernels": liquidgemm.cpu_kernels(),
        "kernel": kernels[0],
        "isa": options.isa or "all",
        "torch": torch.__version__,
        "ggml": library.describe() if library else None,
        "commit": machine.commit(),
        "date": machine.now(),
        "command": machine.command_line("cpu", options.words),
        "load": list(os.getloadavg()),
        "copy_bytes_per_s": {},
        "cases": cases,
    }
    for threads in options.threads:
        torch.set_num_threads(threads)
        result["copy_bytes_per_s"][str(threads)] = copy_bandwidth()
    for n, k in options.shapes:
        copies = max(2, -(-options.cold_mb * 10**6 // (n * k // 2)))
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, k, generator=generator) * 0.02 for _ in range(copies)]
        available = candidates(weights, kernels, library)
        for m in options.m:
            x = torch.randn(m, k, generator=generator)
            exact = x.double() @ weights[0].double().T
            calls = {name: make(m) for name, make in available.items()}
            for threads in options.threads:
                torch.set_num_threads(threads)
                if library:
                    library.set_threads(threads)
                with torch.inference_mode():
                    times = measure(calls, x, exact, options.seconds)
                cases.append({"n": n, "k": k, "m": m, "threads": threads, "times": times})
                ours = times[OURS]["min_us"]
                print(
                    f"{n} x {k}, {m} tokens, {threads} threads: {OURS} {ours:.0f} us; "
                    + ", ".join(
                        f"{name} {of['min_us'] / ours:.2f}x"
                        for name, of in times.items()
                        if name != OURS
                    ),
                    flush=True,
                )
    return result


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    return [tuple(map(int, word.split("x"))) for word in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", type=shapes, default=[(4096, 4096)], help="N x K of weights")
    parser.add_argument("--m", type=numbers, default=[1, 4, 16, 64], help="numbers of tokens")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--kernels", type=lambda text: text.split(","), help="the first is ours")
    parser.add_argument("--isa", choices=ISA_VARIABLES, help="ask all for this instruction set")
    parser.add_argument("--seconds", type=float, default=8, help="per case")
    parser.add_argument("--cold-mb", type=int, default=60, help="packed weights to rotate over")
    parser.add_argument("--folder", type=Path, help="bench/results/cpu-NAME/DATE by default")
    options = parser.parse_args(words)
    options.words = words
    variables = ISA_VARIABLES.get(options.isa, {})
    if any(os.environ.get(name) != value for name, value in variables.items()):
        command = [sys.executable, "-m", "bench", "cpu", *words]
        return subprocess.run(command, env=os.environ | variables, check=False).returncode

    from ..report import cpu as report

    result = run(options)
    target = options.folder or folder(result["kernel"])
    machine.save_json(machine.ROOT / target / "cpu.json", result)
    for file in report.write(machine.ROOT / target):
        print(file.relative_to(machine.ROOT) if file.is_relative_to(machine.ROOT) else file)
    return 0
