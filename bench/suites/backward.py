"""What a layer costs in training: forward and backward with respect to x, beside a bf16 layer's.

    python -m bench backward --json backward.json

Each call is the forward pass of one layer and the gradient of x, in a CUDA graph whose weights are
cold. Candidates:

- bf16: ``nn.Linear`` in bfloat16 with a frozen weight;
- ours: a `LiquidLinear`, whose backward expands its weight in one kernel;
- composite: the same with the weight expanded by torch's operations on what `unpack_weight` gives;
- expand: that kernel alone, with the bytes that it reads and writes per second.

Gradients are compared to the bit first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import liquidgemm
from liquidgemm.formats.liquidquant import decode
from liquidgemm.ops._dequantize import dequantize_packed

from ..core import machine
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_tokens
from ..core.timing import capture_rotation, interleave
from ..core.weights import random_weights

SHAPES = {"4096x4096": (4096, 4096), "14336x4096": (14336, 4096), "4096x14336": (4096, 14336)}
DEVICE = "cuda"


class Layer:
    """One layer in all its ways; x takes a gradient, the weights do not."""

    def __init__(self, n: int, k: int, m: int) -> None:
        self.n, self.k = n, k
        self.weights = random_weights(n, k)
        self.scale = torch.rand(n, device=DEVICE) * 1e-3 / k**0.5
        self.floats = [self.expand(w) for w in self.weights]
        self.x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        self.grad = torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)

    def expand(self, weight: torch.Tensor) -> torch.Tensor:
        return dequantize_packed(weight, self.scale, self.k, torch.bfloat16)

    def gradient(self, y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, self.x, self.grad)[0]

    def bf16(self, i: int) -> torch.Tensor:
        return self.gradient(nn.functional.linear(self.x, self.floats[i]))

    def ours(self, i: int) -> torch.Tensor:
        return self.gradient(liquidgemm.linear(self.x, self.weights[i], self.scale))

    def composite(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            liquidgemm.linear(self.x, self.weights[i], self.scale)
            w8 = decode(*liquidgemm.unpack_weight(self.weights[i], self.n))[:, : self.k]
            return self.grad @ (w8.float() * self.scale.unsqueeze(-1)).to(torch.bfloat16)

    def calls(self) -> dict[str, list[Callable[[], torch.Tensor]]]:
        copies = range(len(self.weights))
        ways = {"bf16": self.bf16, "ours": self.ours, "composite": self.composite}
        calls = {name: [partial(way, i) for i in copies] for name, way in ways.items()}
        return {**calls, "expand": [partial(self.expand, w) for w in self.weights]}

    def check(self) -> None:
        """Raises an AssertionError if the gradient is not the composite's, to the bit."""
        expected = self.composite(0)
        torch.full_like(expected, float("nan"))
        assert torch.equal(self.ours(0), expected), "the gradient is not the composite's"


def measure(shape: str, m: int, seconds: float) -> dict:
    layer = Layer(*SHAPES[shape], m)
    layer.check()
    calls = layer.calls()
    graphs = [capture_rotation(of_way) for of_way in calls.values()]
    times = interleave(graphs, seconds)
    us = {name: statistics.median(t) for name, t in zip(calls, times, strict=True)}
    for graph in graphs:
        graph.release()
    moved = layer.weights[0].nbytes + layer.scale.nbytes + layer.floats[0].nbytes
    print(
        f"{shape:10} M={m:5}  "
        + "  ".join(f"{name} {value:8.1f}" for name, value in us.items())
        + f"  us; ours / bf16 {us['ours'] / us['bf16']:.2f}, "
        f"composite / bf16 {us['composite'] / us['bf16']:.2f}; "
        f"expand {moved / us['expand'] / 1e6:.2f} TB/s",
        flush=True,
    )
    return {"shape": shape, "m": m, "us": us, "expand_bytes": moved}


def parse_shapes(text: str) -> list[str]:
    shapes = text.split(",")
    for shape in shapes:
        if shape not in SHAPES:
            raise ValueError(f"{shape!r} is none of {', '.join(SHAPES)}")
    return shapes


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench backward", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--json", type=Path, help="where the times go")
    parser.add_argument(
        "--shapes", type=argument(parse_shapes), default=",".join(SHAPES), help="N x K"
    )
    parser.add_argument(
        "--m", type=argument(parse_tokens), default="256,2048,8192", help="tokens of a step"
    )
    parser.add_argument("--seconds", type=float, default=0.8, help="per case (default 0.8)")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    options = parser.parse_args(words)
    if not options.seconds > 0:
        parser.error(f"--seconds: expected a positive number, got {options.seconds}")
    require_gpu(parser)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        rows = [measure(shape, m, options.seconds) for shape in options.shapes for m in options.m]
    if options.json:
        record = {
            "commit": options.commit or machine.commit(),
            "started": machine.now(),
            "command": machine.command_line("backward", words),
            "machine": machine.describe(torch.device(DEVICE, torch.cuda.current_device())),
            "rows": rows,
        }
        machine.save_json(options.json, record)
    return 0
