"""Two builds of liquidgemm in turn: is any shape slower than before?

    python -m bench builds OLD NEW --json builds.json

OLD and NEW are folders that hold a `liquidgemm` package with its libraries, such as two checkouts.
Each runs in a process of its own, as one process cannot load the ops twice; for every shape the
two are timed in alternation, on the same GPU and the same random operands, over weights that no L2
cache holds, each round a replay of a CUDA graph. Outputs have to be equal to the bit before
anything is timed. A ratio above 1 means that NEW is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..core import machine
from ..core.machine import require_gpu
from ..core.shapes import argument, parse_shapes, parse_tokens

# What a build's process runs: it has to work with every liquidgemm that OLD may be, so it needs
# only the ops that were there from the start. A line of standard input asks for something, a line
# of standard output answers.
WORKER = """
import hashlib, json, sys
import torch
import liquidgemm

CALLS_US, COLD_BYTES = 1500.0, 150e6
cases = {}

def prepare(n, k, m):
    torch.manual_seed(n + k + m)
    cuda = {"device": "cuda", "dtype": torch.uint8}
    groups = (n, k // 64)
    copies = max(1, int(COLD_BYTES // (n * k // 2)) + 1)
    weights = [liquidgemm.pack_weight(torch.randint(0, 256, (n, k // 2), **cuda),
                                      torch.randint(1, 9, groups, **cuda),
                                      torch.randint(0, 120, groups, **cuda)) for _ in range(copies)]
    scale = torch.rand(n, device="cuda") / 1000
    x8 = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
    x_scale = torch.rand(m, device="cuda")
    call = lambda w: liquidgemm.gemm(x8, x_scale, w, scale, out_dtype=torch.bfloat16)
    digest = hashlib.sha256(call(weights[0]).view(torch.int16).cpu().numpy().tobytes()).hexdigest()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for w in weights: call(w)
    begin.record()
    for w in weights: call(w)
    end.record(); end.synchronize()
    rotations = max(1, int(CALLS_US / (begin.elapsed_time(end) * 1000)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rotations):
            for w in weights: call(w)
    cases["now"] = graph, rotations * copies, weights, begin, end
    return digest

def replay():
    graph, calls, _, begin, end = cases["now"]
    torch.cuda.synchronize()
    begin.record(); graph.replay(); end.record(); end.synchronize()
    return begin.elapsed_time(end) * 1000 / calls

for line in sys.stdin:
    words = json.loads(line)
    print(json.dumps(prepare(*words) if words else replay()), flush=True)
"""


class Build:
    """A process that answers for one folder's liquidgemm."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )

    def __enter__(self) -> Build:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, *words: int) -> Any:
        """The answer to a case's N, K and M: a digest of its output; to nothing: µs of a call.

        Raises:
            RuntimeError: the process has ended; what it wrote to standard error says why.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(words), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.process.args!r} ended: see its error above")
        return json.loads(line)


def measure(old: Build, new: Build, case: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Medians of both builds and of their ratio, round by round."""
    if old.ask(*case) != new.ask(*case):
        raise RuntimeError(
            "outputs of N, K, M = {}, {}, {} differ between the builds".format(*case)
        )
    for build in (old, new):  # the first replay uploads the graph
        build.ask()
    turns = [(old.ask(), new.ask()) for _ in range(rounds)]
    return {
        "n": case[0],
        "k": case[1],
        "m": case[2],
        "old_us": statistics.median(before for before, _ in turns),
        "new_us": statistics.median(after for _, after in turns),
        "ratio": statistics.median(after / before for before, after in turns),
    }


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench builds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="folder with a liquidgemm package")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument(
        "--shapes", type=argument(parse_shapes), default="4096x4096,28672x4096,4096x14336,1024x1024"
    )
    parser.add_argument(
        "--m", type=argument(parse_tokens), default="1,8,16,32,64,128,256,512,1024,4096"
    )
    parser.add_argument("--rounds", type=int, default=15, help="of both, per case (default 15)")
    parser.add_argument("--json", type=Path, help="where the times go")
    options = parser.parse_args(words)
    for folder in (options.old, options.new):
        if not (folder / "liquidgemm" / "__init__.py").exists():
            parser.error(f"{folder}: expected a folder that holds a liquidgemm package")
    require_gpu(parser)
    rows = []
    with Build(options.old) as old, Build(options.new) as new:
        for shape in options.shapes:
            for m in options.m:
                rows.append(measure(old, new, (shape.n, shape.k, m), options.rounds))
                print(
                    "  {n:6} x {k:6} {m:6} tokens  old {old_us:9.2f} us  new {new_us:9.2f} us  "
                    "new/old {ratio:.3f}".format(**rows[-1]),
                    flush=True,
                )
    worst = max(rows, key=lambda row: row["ratio"])
    print("slowest beside the old build: {n} x {k}, {m} tokens, {ratio:.3f}".format(**worst))
    if options.json is not None:
        device = torch.device("cuda")
        command = machine.command_line("builds", words)
        data = {"command": command, "machine": machine.describe(device), "rows": rows}
        machine.save_json(options.json, data)
    return 0
