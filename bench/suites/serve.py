"""Whole models in vLLM: bf16, FP8, humming's W4A8 and ours, through the same engine.

    python -m bench serve --models llama3-8b --json serve.json
    python -m bench serve --formats fp8,humming,w4a8 --at-once --tokens 448 --json serve.json

Weights are random, in the sizes of well-known models; ours are codes as a checkpoint of ours would
bring them, served by the plug-in. w4a8-head has a head of 8 bits as well, which is bf16 in all
others; in w4a8-apart no norm quantizes for the layer after it, and no activation, unless vLLM has a
table for that. Each format gets a process of its own, in which the engine answers so many requests
at once:

- prefill: the time until all have their first token;
- a decode step: the time from then on until the first request ends, by the steps between;
- one prompt of 4096 tokens: the time to its first token.

Of several turns each time the fastest. With prefix caching off, and one KV cache dtype for all. The
record says which class computes the layers and how many bytes they take, so that no format can run
as another without being seen.

One format runs after the other, so that start-up and room for keys and values are those of an
engine alone. With --at-once all engines are on the GPU together, each with a KV cache for
the largest batch alone, and measure in turn, batch by batch, while the others wait.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..core import machine
from ..core.engine import ENVIRONMENT, FORMATS, HUMMING, TURNS, answer
from ..core.machine import require_gpu
from ..core.shapes import argument
from ..decoder.sizes import MODELS, Sizes, parse_models
from .step import parse_batches

SCHEMA = 1
STARTING = 0.8  # of the budget; who is not there then is left out


def parse_formats(text: str) -> list[str]:
    """Names of FORMATS. Raises a ValueError for others."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or any(name not in FORMATS for name in names):
        raise ValueError(f"expected formats among {', '.join(FORMATS)}, got {text!r}")
    return names


class Process:
    """A process that measures a format, and the row of the record that comes of it."""

    def __init__(self, sizes: Sizes, name: str, options: argparse.Namespace, target) -> None:
        self.row = {"model": sizes.name, "layers": sizes.layers, "format": name, "kv": options.kv}
        self.row |= {"tokens_in": options.tokens, "steps": [], "status": "ok"}
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, sizes, name, options))
        with _environment(ENVIRONMENT | (HUMMING if name == "humming" else {})):
            self._process.start()
        theirs.close()
        self._unasked = "it started"

    def ask(self, cell: int | str) -> None:
        self._unasked = f"a batch of {cell}" if isinstance(cell, int) else f"a {cell}"
        with contextlib.suppress(OSError):  # it has ended, which `answered` finds
            self._connection.send(cell)

    def answered(self, deadline: float) -> dict | None:
        """None if it failed, or did not answer in time; it has ended then."""
        if self.row["status"] != "ok" or "reason" in self.row:
            return None
        try:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                self.row["reason"] = f"the budget ended before {self._unasked}"
                if self._unasked == "it started":
                    self.row["status"] = "failed"
                self._process.kill()
                return None
            found = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            found = f"it ended with {self._process.exitcode} before {self._unasked}"
        if isinstance(found, str):
            self.row |= {"status": "failed", "reason": found}
            self.end()
            return None
        return found

    def end(self) -> None:
        """With what it holds of the GPU."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """For processes that start within."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(
    pairs: list[tuple[Sizes, str]],
    options: argparse.Namespace,
    save: Callable[[list[dict]], None],
    target=answer,
) -> list[dict]:
    """Rows of these models and formats, whose engines are there together.

    Args:
        save: gets the rows after each cell.
        target: what the processes run.
    """
    start = time.monotonic()
    started, deadline = start + STARTING * options.budget, start + options.budget
    processes = [Process(sizes, name, options, target) for sizes, name in pairs]
    rows = [process.row for process in processes]
    try:
        for process in processes:
            about = process.answered(started)
            process.row |= about or {}
            process.row["engines_at_once"] = len(pairs)
            print(summary(process.row), flush=True)
            save(rows)
        for cell in ["prompt", *options.batch]:
            for process in processes:
                process.ask(cell)
                found = process.answered(deadline)
                if found is None:
                    continue
                if cell == "prompt":
                    process.row["prompt"] = found
                else:
                    process.row["steps"].append(found)
                print(line(process.row, found), flush=True)
                save(rows)
    finally:
        for process in processes:
            process.end()
    return rows


def line(row: dict, found: dict) -> str:
    about = f"  {row['model']:11} {row['format']:9} kv {row['kv']:5}"
    if "batch" not in found:
        return f"{about} prompt of {found['tokens']} tokens {found['first_token_s'] * 1e3:.1f} ms"
    return (
        f"{about} batch {found['batch']:4} step {found['step_ms']:8.3f} ms  "
        f"prefill {found['prefill_s']:8.4f} s  {found['tokens_per_s']:8.0f} tokens/s"
    )


def summary(row: dict) -> str:
    return (
        f"{row['model']} {row['format']}: {row['status']} {row.get('reason', '')} started in "
        f"{row.get('started_s', 0):.0f} s, {row.get('bytes_per_weight', 0):.2f} bytes per "
        f"weight by {', '.join(row.get('methods', []))}, KV cache of "
        f"{row.get('kv_tokens', 0)} tokens"
    )


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=argument(parse_models), default="llama3-8b")
    parser.add_argument("--formats", type=argument(parse_formats), default="bf16,fp8,humming,w4a8")
    parser.add_argument("--batch", type=argument(parse_batches), default="1,16,64,128,256")
    parser.add_argument("--tokens", type=int, default=512, help="of each prompt (default 512)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps (default 64)")
    parser.add_argument("--prompt", type=int, default=4096, help="one of so many tokens")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="of a step of prefill")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--kv", default="auto", help="dtype of the KV cache, as vLLM names it")
    parser.add_argument("--at-once", action="store_true", help="all engines together, in turn")
    parser.add_argument(
        "--budget", type=float, default=600, help="seconds for each format; at once, for all"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: for tests")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the results")
    parser.add_argument("--commit", help="the commit to record, where there is no git checkout")
    options = parser.parse_args(words)
    if "max" in options.batch:
        parser.error("--batch: expected numbers, got max")
    for name in ("tokens", "steps", "layers", "prompt"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}: expected 1 or more, got {value}")
    if options.batched_tokens <= max(options.batch):
        parser.error(
            f"--batched-tokens: expected more than the largest batch, {max(options.batch)}, "
            f"got {options.batched_tokens}"
        )
    if options.device == "cuda":
        require_gpu(parser)
    return options


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(words)
    models = [MODELS[sizes.name].with_layers(options.layers) for sizes in options.models]
    pairs = [(sizes, name) for sizes in models for name in options.formats]
    device = torch.device(options.device)
    record = {
        "schema": SCHEMA,
        "command": machine.command_line("serve", words),
        "commit": options.commit or machine.commit(),
        "started": machine.now(),
        "machine": machine.describe(device) if options.device == "cuda" else {"gpu": None},
        "protocol": {
            "tokens": options.tokens,
            "steps": options.steps,
            "turns": TURNS,
            "batched_tokens": options.batched_tokens,
            "at_once": options.at_once,
        },
        "rows": [],
    }
    done: list[dict] = []

    def save(rows: list[dict]) -> None:
        record["rows"] = done + rows
        record["finished"] = machine.now()
        if options.json:
            machine.save_json(options.json, record)

    for group in [pairs] if options.at_once else [[pair] for pair in pairs]:
        done += measure(group, options, save)
        save([])
    return 1 if any(row["status"] != "ok" for row in done) else 0


if __name__ == "__main__":
    sys.exit(main())
