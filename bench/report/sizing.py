"""Tokens per second and per dollar, and KV room, from measured steps: a model of what was not run.

    python -m bench sizing serve.json --price 2.5 --context 2048 --batch 1,64 --gpus 1,2,8

A step that was measured is given as it is. Of others, the time is a sum:

- traffic: the bytes of the weights that a step needs, and of keys and values, of a GPU, by the
  memory's bandwidth;
- overhead: what the smallest measured batch took beyond its traffic, for each layer alike;
- work: what a larger batch took beyond both, for each weight that a token needs alike;
- links: with tensor or expert parallelism two all-reduces for each layer.

Overhead and work are those of the measured model and format whose layers are nearest in size. Each
line says whether it was measured, modelled, or modelled for what has no step measured. The last
holds for experts in W4A8.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.results import BadResults
from ..core.shapes import argument
from ..decoder.sizes import MODELS, Sizes
from ..suites.step import parse_batches
from . import serve

BYTES = {"bf16": 2.0, "fp8": 1.0, "humming": 0.5 + 2 / 128, "w4a8": 34 / 64}  # of a weight
KV_BYTES = {"auto": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1}
UTILIZATION = 0.88  # of the memory, as the suite serve asks of vLLM


@dataclass(frozen=True)
class Model:
    """A decoder, of which some weights may be experts.

    Attributes:
        sizes: of its dense layers; with experts ``intermediate`` is that of one expert.
        experts, active: of a layer, and of those what a token needs; 1 and 1 without experts.
    """

    sizes: Sizes
    experts: int = 1
    active: int = 1

    @property
    def _mlp(self) -> int:
        return 3 * self.sizes.layers * self.sizes.hidden * self.sizes.intermediate

    @property
    def weights(self) -> int:
        return self.sizes.weights + (self.experts - 1) * self._mlp

    @property
    def active_weights(self) -> int:
        return self.sizes.weights + (self.active - 1) * self._mlp

    def read_weights(self, batch: int) -> float:
        """What a step reads: experts that some token needs, if tokens choose evenly."""
        touched = self.experts * (1 - (1 - self.active / self.experts) ** batch)
        return self.sizes.weights + (touched - 1) * self._mlp


SIZED = {name: Model(MODELS[name]) for name in ("llama3-8b", "llama2-70b")} | {
    "mixtral-8x7b": Model(Sizes("mixtral-8x7b", 4096, 32, 32, 8, 14336, 32000), 8, 2)
}


@dataclass(frozen=True)
class Gpu:
    """What is assumed of a GPU and its links; the defaults are of an H100 with NVLink.

    Attributes:
        memory: bytes.
        bandwidth: bytes/s that a kernel gets.
        link: bytes/s in one direction.
        latency: seconds of a small all-reduce.
        reserve: bytes that are neither weights nor keys and values.
    """

    memory: float = 80e9
    bandwidth: float = 3.0e12
    link: float = 300e9
    latency: float = 12e-6
    reserve: float = 3e9

    def all_reduce(self, size: float, gpus: int) -> float:
        return 0.0 if gpus == 1 else self.latency + 2 * (gpus - 1) / gpus * size / self.link


def head_bytes(sizes: Sizes) -> int:
    """Of embeddings, or of the head, in bf16."""
    return 2 * sizes.vocabulary * sizes.hidden


def kv_bytes(sizes: Sizes, kv: str, gpus: int) -> float:
    """Of a token, of a GPU: heads are copied where there are fewer of them than GPUs."""
    return KV_BYTES[kv] * sizes.kv_values * max(1, sizes.kv_heads / gpus) / sizes.kv_heads


def kv_room(model: Model, form: str, kv: str, gpu: Gpu, gpus: int = 1, stages: int = 1) -> int:
    """Tokens whose keys and values fit beside the weights; 0 where the weights do not fit."""
    held = BYTES[form] * model.weights / stages + 2 * head_bytes(model.sizes)
    room = UTILIZATION * gpu.memory - gpu.reserve - held / gpus
    return max(0, int(room / (kv_bytes(model.sizes, kv, gpus) / stages)))


def traffic(
    model: Model, form: str, kv: str, batch: int, context: float, gpu: Gpu, gpus: int = 1
) -> float:
    """Seconds in which the memory gives what a step needs."""
    weights = BYTES[form] * model.read_weights(batch) + head_bytes(model.sizes)
    return (weights / gpus + batch * context * kv_bytes(model.sizes, kv, gpus)) / gpu.bandwidth


@dataclass(frozen=True)
class Step:
    seconds: float
    measured: bool


def step_of(row: dict, model: Model, batch: int, context: float, gpu: Gpu, gpus: int = 1) -> Step:
    """The decode step of a batch, by a row of the suite serve.

    Args:
        row: of a dense model on one GPU.
        context: tokens that each request holds.

    Raises:
        ValueError: the batch is beyond those of the row.
    """
    points = {step["batch"]: step["step_ms"] / 1e3 for step in row["steps"]}
    if not min(points) <= batch <= max(points):
        raise ValueError(
            f"batch: expected {min(points)} to {max(points)}, as measured, got {batch}"
        )
    base = MODELS[row["model"]].with_layers(row["layers"])
    same = gpus == 1 and model == Model(base) and context == row["tokens_in"]
    if same and batch in points:
        return Step(points[batch], True)
    form, kv = row["format"], row["kv"]

    def beyond(one: int) -> float:
        return points[one] - traffic(Model(base), form, kv, one, row["tokens_in"], gpu)

    overhead = max(0.0, beyond(min(points)))
    low = max(one for one in points if one <= batch)
    high = min(one for one in points if one >= batch)
    share = 0.0 if low == high else (batch - low) / (high - low)
    between = (1 - share) * beyond(low) + share * beyond(high)
    work = max(0.0, between - overhead) / base.weights * model.active_weights / gpus
    layers = model.sizes.layers
    links = 2 * layers * gpu.all_reduce(2 * batch * model.sizes.hidden, gpus)
    total = traffic(model, form, kv, batch, context, gpu, gpus)
    return Step(total + overhead / base.layers * layers + work + links, False)


def nearest(rows: Sequence[dict], model: Model, form: str) -> dict | None:
    """The row of a format whose model is the model, or has layers of the nearest size."""
    rows = [row for row in rows if row["format"] == form and row["steps"]]

    def distance(row: dict) -> tuple:
        base = MODELS[row["model"]]
        size = abs(math.log(base.hidden / model.sizes.hidden))
        return size, base.name != model.sizes.name, -row["layers"]

    return min(rows, key=distance, default=None)


def lines(rows: Sequence[dict], options: argparse.Namespace) -> list[str]:
    found = [
        "| model | format | GPUs | requests | ms per step | tokens/s | tokens/$ | KV room, tokens "
        "| which is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in SIZED.items():
        for form in BYTES:
            row = nearest(rows, model, form)
            for gpus in options.gpus if row else ():
                room = kv_room(model, form, row["kv"], options.gpu, gpus, options.stages)
                for batch in options.batch:
                    about = f"| {name} | {form} | {gpus * options.stages} | "
                    about += f"{batch * options.stages} | "
                    if room < batch * options.stages * options.context:
                        found.append(f"{about}does not fit | | | {room} | modelled |")
                        continue
                    try:
                        step = step_of(row, model, batch, options.context, options.gpu, gpus)
                    except ValueError:
                        found.append(f"{about}not measured | | | {room} | |")
                        continue
                    # Of a pipeline each stage is at work on a batch of its own.
                    rate = batch * options.stages / step.seconds
                    dollars = options.price * gpus * options.stages / 3600
                    kind = "measured" if step.measured and options.stages == 1 else "modelled"
                    if model.experts > 1 and form == "w4a8":
                        kind = "modelled; no step of it was measured"
                    found.append(
                        f"{about}{step.seconds * 1e3:.2f} | {rate:.0f} | {rate / dollars:.3g} | "
                        f"{room} | {kind} |"
                    )
    return found


def read(paths: Sequence[Path]) -> list[dict]:
    """Rows of files of the suite serve.

    Raises:
        BadResults: a file is not readable, or of another kind.
    """
    rows = (row for record in serve.read(paths) for row in record["rows"])
    return [row for row in rows if row.get("status") == "ok"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench sizing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", nargs="+", type=Path, help="results of `bench serve`")
    parser.add_argument("--price", type=float, required=True, help="dollars per GPU and hour")
    parser.add_argument("--context", type=float, default=512, help="tokens that a request holds")
    parser.add_argument("--batch", type=argument(parse_batches), default="1,64,256")
    parser.add_argument(
        "--gpus",
        type=argument(parse_batches),
        default="1,2,8",
        help="in tensor or expert parallel (default 1,2,8)",
    )
    parser.add_argument("--stages", type=int, default=1, help="of a pipeline, each of --gpus")
    parser.add_argument("--memory", type=float, default=80, help="GB of a GPU (default 80)")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    for name in ("price", "context", "stages", "memory"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(options, name)}")
    if "max" in (*options.batch, *options.gpus):
        parser.error("--batch, --gpus: expected numbers, got max")
    options.gpu = Gpu(memory=options.memory * 1e9)
    try:
        rows = read(options.json)
    except BadResults as error:
        parser.error(str(error))
    print("\n".join(lines(rows, options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
