"""``python -m bench gemm``: measure, print, and write JSON."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import torch

from liquidgemm.ops import _library

from ..core import machine, stream_floor
from ..core.shapes import MODELS, TOKENS, argument, parse_shapes, parse_tokens
from ..peers import OURS, PEERS, parse_peers

OPS = ("gemm", "linear")


def parse_ops(text: str) -> list[str]:
    ops = [part.strip() for part in text.split(",") if part.strip()]
    for op in ops:
        if op not in OPS:
            raise ValueError(f"{op!r} is none of {', '.join(OPS)}")
    if not ops:
        raise ValueError("no ops given")
    return [op for op in OPS if op in ops]


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is not a positive number")
    return value


def not_negative(text: str) -> float:
    return 0.0 if float(text) == 0 else positive(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gemm",
        description="Times liquidgemm and its peers on a Hopper GPU. docs/benchmarks.md has the "
        "protocol; python -m bench report makes tables and plots of the JSON file.",
    )
    parser.add_argument(
        "--shapes",
        type=argument(parse_shapes),
        default="targets",
        help=f"comma-separated: NxK, or the layers of {', '.join(MODELS)} (default: targets)",
    )
    parser.add_argument(
        "--m",
        type=argument(parse_tokens),
        default=",".join(map(str, TOKENS)),
        help="comma-separated numbers of tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--against",
        type=argument(parse_peers),
        default="bf16,fp8",
        help=f"comma-separated peers: {', '.join(name for name in PEERS if name != OURS)} "
        "(default: %(default)s; empty: none)",
    )
    parser.add_argument(
        "--ops", type=argument(parse_ops), default="gemm,linear", help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument(
        "--seconds",
        type=argument(positive),
        default=240.0,
        help="budget for the whole run; it sets how often each case is repeated "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--rest",
        type=argument(not_negative),
        default=0.0,
        metavar="MS",
        help="the GPU idles for so long before each sample: bursts, without a limit of power "
        "(default: %(default)s, under load)",
    )
    parser.add_argument(
        "--stream-floor",
        type=Path,
        metavar="PATH",
        default=stream_floor.PROGRAM,
        help="the built microbenchmark (default: build/bench/stream_floor)",
    )
    parser.add_argument(
        "--commit", help="the commit to record, where the sources are no git checkout"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parser.parse_args(words)
    status = _library.status()
    if not status.cuda_available:
        parser.error(status.reason)
    torch.cuda.set_device(_library.hopper_devices()[0])

    from .driver import Driver, Options

    def stop(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    run = Driver(
        Options(
            shapes=options.shapes,
            tokens=options.m,
            peers=[OURS, *options.against],
            ops=options.ops,
            seconds=options.seconds,
            rest_ms=options.rest,
            json=options.json,
            floor_program=options.stream_floor,
            command=machine.command_line("gemm", words),
            commit=options.commit,
        )
    ).run()
    if options.json:
        print(f"results: {options.json}")
    failed = any(one.status == "failed" for case in run.cases for one in case.measurements)
    return 1 if run.partial or failed else 0
