"""What exact tensor parallelism costs: layers split by inputs, as vLLM adds them and to the bit.

    python -m bench exact --json exact.json                    (two or more GPUs of one host)

For the layers o and down of a model, by tokens, each a CUDA graph on every GPU at once:

- floats: `linear` of the slice, then an all-reduce in bf16;
- exact: the maxima of tokens, the INT32 sums and what follows, as `exact_tensor_parallel` does.

Both by NCCL; vLLM's own all-reduce for few tokens is faster and adds floats alone. The exact output
is compared with the whole layer on one GPU first, to the bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

import liquidgemm
from liquidgemm.integrations.serving import exact
from liquidgemm.integrations.serving.layout import Slice, as_packed, pack

from ..core import machine
from ..core.machine import require_gpu
from ..core.shapes import argument
from ..decoder.sizes import MODELS
from .step import parse_batches

CALLS, REPLAYS = 20, 30


def codes(n: int, k: int) -> list[Tensor]:
    """Of random weights, the same on every GPU."""
    generator = torch.Generator().manual_seed(n + k)
    qweight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    qscale = torch.randint(1, 18, (n, k // 64), dtype=torch.uint8, generator=generator)
    return [qweight, qscale, torch.zeros_like(qscale)]


def reduced(op: dist.ReduceOp.RedOpType):
    def reduce(own: Tensor) -> Tensor:
        dist.all_reduce(own, op=op)
        return own

    return reduce


def microseconds(call, device: str) -> float:
    """Of one call, the median of replays; as often on each GPU, which wait for each other."""
    for _ in range(3):
        call()
    if device == "cpu":  # a rehearsal
        return 0.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog runs on
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    """What each process does."""
    device = options.device
    store = dist.FileStore(f"{folder}/store", options.gpus)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=options.gpus)
    sizes, rows = MODELS[options.model], []
    for layer in ("o", "down"):
        n, k = sizes.linears[layer]
        part = Slice(rank * k // options.gpus, k // options.gpus, k)
        logical = codes(n, k)
        generator = torch.Generator().manual_seed(n)
        scale = (torch.rand(n, generator=generator) * 1e-3).to(device)
        whole = liquidgemm.pack_weight(*(t.to(device) for t in logical))
        own = tuple(part.of_codes(t, 0).to(device) for t in logical)
        packed = pack(own, scale, [n], [], part)
        for m in options.batch:
            x = torch.randn(m, k, generator=generator).bfloat16().to(device)
            mine = x[:, part.start : part.start + part.length].contiguous()

            def floats(mine=mine, packed=packed) -> Tensor:
                given = as_packed(mine, packed.gather, packed.pad)
                return reduced(dist.ReduceOp.SUM)(
                    liquidgemm.linear(given, packed.weight, packed.scale)
                )

            def to_the_bit(mine=mine, packed=packed) -> Tensor:
                given = packed.weight, packed.scale, None, packed.gather, packed.pad
                largest, total = reduced(dist.ReduceOp.MAX), reduced(dist.ReduceOp.SUM)
                return exact.row_parallel(mine, *given, largest=largest, total=total)

            wanted = liquidgemm.linear(x, whole, scale)
            same = torch.equal(to_the_bit(), wanted)
            apart = (floats().float() - wanted.float()).norm() / wanted.float().norm()
            row = {"layer": layer, "n": n, "k": k, "m": m, "equal": same}
            row |= {"floats_error": float(apart), "floats_us": microseconds(floats, device)}
            row |= {"exact_us": microseconds(to_the_bit, device)}
            rows.append(row)
            if rank == 0:
                print(
                    f"  {layer:5} {n} x {k} M={m:5}  floats {row['floats_us']:8.2f} us  exact "
                    f"{row['exact_us']:8.2f} us  {'equal' if same else 'NOT EQUAL'} to one GPU; "
                    f"floats differ by {row['floats_error']:.1e}",
                    flush=True,
                )
    machine.save_json(Path(folder) / f"{rank}.json", {"rows": rows})
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench exact",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="llama3-8b")
    parser.add_argument("--gpus", type=int, default=2, choices=(2, 4, 8))
    parser.add_argument("--batch", type=argument(parse_batches), default="1,16,64,256,2048")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: for tests")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    options = parser.parse_args(words)
    if "max" in options.batch:
        parser.error("--batch: expected numbers, got max")
    if options.device == "cuda":
        require_gpu(parser)
        if torch.cuda.device_count() < options.gpus:
            parser.error(f"needs {options.gpus} GPUs; there are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (options, folder), nprocs=options.gpus)
        found = [
            json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(options.gpus)
        ]
    record = {
        "command": machine.command_line("exact", words),
        "commit": options.commit or machine.commit(),
        "finished": machine.now(),
        "machine": machine.describe(torch.device("cuda")) if options.device == "cuda" else {},
        "gpus": options.gpus,
        "model": options.model,
        "rows": found[0]["rows"],
    }
    if options.json:
        machine.save_json(options.json, record)
    return 0 if all(row["equal"] for one in found for row in one["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
