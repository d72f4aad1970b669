"""What fused producers cost: norm and gated activation, beyond `gemm` and beside separate kernels.

    python -m bench producers --json producers.json

Each case is a CUDA graph of layers that alternate, with cold weights: "norm" is RMSNorm of x and a
residual before qkv, "glu" SiLU * up before down, "mlp" norm, gate_up, glu and down. Candidates:

- gemm: the products alone, of tokens that are there;
- fused: each behind its producer, `rms_norm_quantize` or `glu_quantize`;
- linear: each by `linear`, whose activations are there;
- separate: torch's kernels for the norm or activation, then `linear`.

A producer costs (fused - gemm) / producers. `alone` are the producers by themselves, at sizes that
come from memory, beside a copy that moves as many bytes. Everything is compared to the bit first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import liquidgemm

from ..core import machine
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_tokens
from ..core.timing import capture_rotation, interleave, summarize
from ..core.weights import random_weights

MODELS = {"llama3-8b": (4096, 14336, 6144), "llama2-70b": (8192, 28672, 10240)}  # H, I, qkv
EPS = 1e-5
COLD_BYTES = 160e6
DEVICE = "cuda"

Calls = dict[str, list[Callable[[], torch.Tensor]]]


class Layer:
    """A weight in as many copies as find the L2 cache cold."""

    def __init__(self, n: int, k: int) -> None:
        self.weights = random_weights(n, k)
        self.scale = torch.rand(n, device=DEVICE) * 1e-3 / k**0.5
        self.ready = torch.randint(-127, 128, (4096, k), device=DEVICE).to(torch.int8)
        self.ready_scale = torch.rand(4096, device=DEVICE) * 0.01

    def weight(self, i: int) -> torch.Tensor:
        return self.weights[i % len(self.weights)]

    def gemm(self, i: int, m: int) -> torch.Tensor:
        return liquidgemm.gemm(self.ready[:m], self.ready_scale[:m], self.weight(i), self.scale)

    def behind(self, i: int, tokens: liquidgemm.QuantizedTokens) -> torch.Tensor:
        x8, scale, dtype = tokens
        return liquidgemm.gemm(x8, scale, self.weight(i), self.scale, None, dtype, True)

    def linear(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return liquidgemm.linear(x, self.weight(i), self.scale)


def separate_norm(x, residual, weight) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + residual
    return F.rms_norm(h, (h.shape[-1],), weight, EPS), h


def separate_glu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def sites(model: str, m: int, layers: dict[str, Layer]) -> dict[str, tuple[int, Calls]]:
    """Producers per call, and the calls of each candidate, by site."""
    hidden, wide, _ = MODELS[model]
    x, residual = (torch.randn(m, hidden, device=DEVICE).bfloat16() for _ in range(2))
    gate_up = torch.randn(m, 2 * wide, device=DEVICE).bfloat16()
    y_wide = separate_glu(gate_up)
    weight = torch.rand(hidden, device=DEVICE).bfloat16()
    qkv, up, down = (layers[name] for name in ("qkv", "gate_up", "down"))

    def norm():
        return liquidgemm.rms_norm_quantize(x, weight, EPS, residual)[0]

    def fused_mlp(i: int) -> torch.Tensor:
        return down.behind(i, liquidgemm.glu_quantize(up.behind(i, norm()))[0])

    def separate_mlp(i: int) -> torch.Tensor:
        gates = up.linear(i, separate_norm(x, residual, weight)[0])
        return down.linear(i, separate_glu(gates))

    def linear_mlp(i: int) -> torch.Tensor:
        up.linear(i, x)
        return down.linear(i, y_wide)

    def gemm_mlp(i: int) -> torch.Tensor:
        up.gemm(i, m)
        return down.gemm(i, m)

    ways = {
        "norm": {
            "gemm": lambda i: qkv.gemm(i, m),
            "fused": lambda i: qkv.behind(i, norm()),
            "linear": lambda i: qkv.linear(i, x),
            "separate": lambda i: qkv.linear(i, separate_norm(x, residual, weight)[0]),
        },
        "glu": {
            "gemm": lambda i: down.gemm(i, m),
            "fused": lambda i: down.behind(i, liquidgemm.glu_quantize(gate_up)[0]),
            "linear": lambda i: down.linear(i, y_wide),
            "separate": lambda i: down.linear(i, separate_glu(gate_up)),
        },
        "mlp": {
            "gemm": gemm_mlp,
            "fused": fused_mlp,
            "linear": linear_mlp,
            "separate": separate_mlp,
        },
    }
    copies = max(len(layer.weights) for layer in layers.values())
    return {
        site: (
            2 if site == "mlp" else 1,
            {name: [partial(way, i) for i in range(copies)] for name, way in of_site.items()},
        )
        for site, of_site in ways.items()
    }


def check(model: str, m: int, layers: dict[str, Layer]) -> None:
    """Fused is what its own y gives by `linear`, and so is the chain, on poisoned memory.

    Raises:
        AssertionError: it is not, to the bit.
    """
    hidden, wide, _ = MODELS[model]
    x, residual = (torch.randn(m, hidden, device=DEVICE).bfloat16() for _ in range(2))
    weight = torch.rand(hidden, device=DEVICE).bfloat16()
    tokens, h, y = liquidgemm.rms_norm_quantize(x, weight, EPS, residual, return_y=True)
    theirs, their_h = separate_norm(x, residual, weight)
    assert torch.equal(h, their_h), "h"
    differs = (y != theirs).float().mean().item()
    print(f"  y of the norm differs from torch's at {differs:.1e} of all places", flush=True)
    assert ((y - theirs).abs() <= 2**-6 * theirs.abs()).all(), "y of the norm"
    up, down = layers["gate_up"], layers["down"]
    torch.full((m, 2 * wide), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    gates = up.behind(0, tokens)
    assert torch.equal(gates, up.linear(0, y)), "gate_up behind the norm"
    tokens, y = liquidgemm.glu_quantize(gates, return_y=True)
    assert torch.equal(down.behind(0, tokens), down.linear(0, y)), "down behind the glu"
    theirs = separate_glu(gates)
    assert ((y - theirs).abs() <= 2**-6 * theirs.abs() + 2.0**-100).all(), "y of the glu"


def measure_sites(model: str, m: int, layers: dict[str, Layer], seconds: float) -> list[dict]:
    rows = []
    for site, (producers, candidates) in sites(model, m, layers).items():
        graphs = [capture_rotation(calls) for calls in candidates.values()]
        times = interleave(graphs, seconds)
        us = {}
        for name, graph, samples in zip(candidates, graphs, times, strict=True):
            summary = summarize(samples, graph.calls, len(candidates[name]))
            us[name] = summary.median_us
            rows.append(
                {"model": model, "site": site, "m": m, "way": name, "time": summary.as_dict()}
            )
            graph.release()
        beyond = (us["fused"] - us["gemm"]) / producers
        print(
            f"{model:11} {site:5} M={m:5}  "
            + "  ".join(f"{name} {value:8.2f}" for name, value in us.items())
            + f"  us; a producer costs {beyond:+.2f}",
            flush=True,
        )
    return rows


def measure_alone(model: str, m: int, seconds: float) -> list[dict]:
    """The producers by themselves, and copies of as many bytes, on inputs that are not cached."""
    hidden, wide, _ = MODELS[model]
    weight = torch.rand(hidden, device=DEVICE).bfloat16()
    sizes = {
        "norm": (7 * m * hidden, lambda x, r: liquidgemm.rms_norm_quantize(x, weight, EPS, r)),
        "norm without residual": (
            3 * m * hidden,
            lambda x, _: liquidgemm.rms_norm_quantize(x, weight, EPS),
        ),
        "glu": (5 * m * wide, lambda gate_up, _: liquidgemm.glu_quantize(gate_up)),
    }
    rows = []
    for name, (moved, call) in sizes.items():
        columns = 2 * wide if name == "glu" else hidden
        copies = range(max(2, round(COLD_BYTES / (2 * m * columns))))
        inputs = [
            [torch.randn(m, columns, device=DEVICE).bfloat16() for _ in range(2)] for _ in copies
        ]
        halves = [torch.zeros(2, moved // 2, dtype=torch.uint8, device=DEVICE) for _ in copies]
        graphs = [
            capture_rotation([partial(call, *pair) for pair in inputs]),
            capture_rotation([partial(half[0].copy_, half[1]) for half in halves]),
        ]
        ours, copy = (statistics.median(times) for times in interleave(graphs, seconds))
        for graph in graphs:
            graph.release()
        print(
            f"{model:11} {name:21} alone M={m:5}  {ours:8.2f} us, {moved / ours / 1e6:5.2f} TB/s; "
            f"a copy {copy:8.2f} us",
            flush=True,
        )
        rows.append(
            {
                "model": model,
                "site": name,
                "m": m,
                "alone_us": ours,
                "copy_us": copy,
                "bytes": moved,
            }
        )
    return rows


def parse_models(text: str) -> list[str]:
    models = text.split(",")
    for model in models:
        if model not in MODELS:
            raise ValueError(f"{model!r} is none of {', '.join(MODELS)}")
    return models


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench producers", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--json", type=Path, help="where the times go")
    parser.add_argument("--models", type=argument(parse_models), default=",".join(MODELS))
    parser.add_argument(
        "--m", type=argument(parse_tokens), default="1,4,16,32,64,128,256,1024,4096", help="tokens"
    )
    parser.add_argument("--seconds", type=float, default=0.8, help="per case (default 0.8)")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    options = parser.parse_args(words)
    if max(options.m) > 4096:
        parser.error(f"--m: expected at most 4096 tokens, got {max(options.m)}")
    if not options.seconds > 0:
        parser.error(f"--seconds: expected a positive number, got {options.seconds}")
    require_gpu(parser)

    rows = []
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        for model in options.models:
            hidden, wide, qkv = MODELS[model]
            layers = {
                "qkv": Layer(qkv, hidden),
                "gate_up": Layer(2 * wide, hidden),
                "down": Layer(hidden, wide),
            }
            for m in options.m:
                check(model, m, layers)
                rows += measure_sites(model, m, layers, options.seconds)
                if m >= 1024:
                    rows += measure_alone(model, m, options.seconds)
            del layers
    if options.json:
        record = {
            "commit": options.commit or machine.commit(),
            "started": machine.now(),
            "command": machine.command_line("producers", words),
            "machine": machine.describe(torch.device(DEVICE, torch.cuda.current_device())),
            "rows": rows,
        }
        machine.save_json(options.json, record)
    return 0
