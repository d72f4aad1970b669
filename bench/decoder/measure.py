"""Times of decode steps and prefills, after their results have been checked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from liquidgemm.cli._timing import CallGraph, capture

from ..core import timing
from .cache import CACHES, Cache
from .decoder import PARTS, Decoder
from .elementwise import Elementwise
from .formats import Composite, Format, Fused, make
from .sizes import Sizes

SPARE_BYTES = 4e9  # activations, graphs, the context
OUTPUT = 512  # tokens that a sequence grows by: what "max" leaves room for
MOST = 512  # sequences
LEAST_COSINE = 0.8  # of logits, with those of bf16


class Options(Protocol):
    """What is measured of each model and format; see the command's help."""

    settings: list[tuple[str, str]]
    batch: list[int | str]
    prefill: list[tuple[int, int]]
    context: int
    breakdown: bool


def largest_batch(sizes: Sizes, cache: type[Cache], weights: int, context: int, total: int) -> int:
    """How many sequences fit beside the weights when each has grown to its end; 0 if none."""
    each = cache.bytes_per_token(sizes) * (context + OUTPUT)
    fit = int((total - SPARE_BYTES - weights) // each)
    fit = max(0, min(MOST, fit))
    return fit if fit < 16 else fit // 8 * 8


class Clock:
    """How functions are timed: as CUDA graphs, or on a CPU, for the tests, as they are."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.on_gpu, self.seconds = device.type == "cuda", seconds

    def graph(self, function: Callable[[], object]) -> CallGraph | Callable:
        for _ in range(2):  # compiles, loads, allocates
            function()
        return capture([function], 1) if self.on_gpu else function

    def ms(self, graph: CallGraph | Callable, share: float = 1.0) -> dict[str, float]:
        """Median, 10th and 90th percentile of a call in ms."""
        if self.on_gpu:
            (times,) = timing.interleave([graph], share * self.seconds)
        else:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                graph()
                times.append((time.perf_counter() - start) * 1e6)
        return {
            "ms": statistics.median(times) / 1e3,
            "p10_ms": timing.percentile(times, 0.1) / 1e3,
            "p90_ms": timing.percentile(times, 0.9) / 1e3,
            "replays": len(times),
        }

    def tidy(self) -> None:
        """Gives memory back: caches of other sizes follow."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def release(self, graph: CallGraph | Callable) -> None:
        if isinstance(graph, CallGraph):
            torch.cuda.synchronize()
            graph.release()


class Shared:
    """What models and formats have in common: device, compiled functions, logits of bf16."""

    def __init__(self, device: torch.device, seconds: float, compiled: bool) -> None:
        self.device = device
        self.elementwise = Elementwise(compiled)
        self.clock = Clock(device, seconds)
        self.reference: dict[tuple, Tensor] = {}
        on_gpu = device.type == "cuda"
        self.total_bytes = (
            torch.cuda.get_device_properties(device).total_memory if on_gpu else int(80e9)
        )


class Model:
    """One model in one format, measured at each setting and batch."""

    def __init__(self, sizes: Sizes, name: str, options: Options, shared: Shared):
        self.sizes, self.options, self.shared = sizes, options, shared
        self.form = make(name, shared.elementwise)
        self._decoders: dict[str, Decoder] = {}

    def fits(self) -> bool:
        """Whether the weights alone do; else nothing is built."""
        embeddings = 2 * 2 * self.sizes.vocabulary * self.sizes.hidden
        weights = self.sizes.weights * self.form.bytes_per_weight + embeddings
        return weights + SPARE_BYTES <= self.shared.total_bytes

    def decoder(self, head: str) -> Decoder:
        """With this head; the layers are the same."""
        if head not in self._decoders:
            start = time.perf_counter()
            if self._decoders:
                first = next(iter(self._decoders.values()))
                made = first.with_head(head)
            else:
                made = Decoder(self.sizes, self.form, head, self.shared.device)
            self._decoders[head] = made
            seconds = time.perf_counter() - start
            print(f"  {self.form.name}, head {head}: built in {seconds:.1f} s", flush=True)
        return self._decoders[head]

    def rows(self) -> Iterator[dict]:
        for kv, head in self.options.settings:
            decoder = self.decoder(head) if self.fits() else None
            for wanted in self.options.batch:
                row = self._place() | {
                    "kv": kv,
                    "head": head,
                    "context": self.options.context,
                    "wanted_batch": wanted,
                }
                if decoder is None:
                    yield row | {"status": "does not fit", "batch": 0}
                    continue
                row["head_format"] = decoder.head_form.name
                row["weight_bytes"] = decoder.weight_bytes
                absent = CACHES[kv].why_absent(self.shared.device)
                if absent:
                    yield row | {"status": "absent", "reason": absent}
                else:
                    yield row | self._measured(decoder, CACHES[kv], wanted)
                self.shared.clock.tidy()
            for batch, length in self.options.prefill if decoder else ():
                yield self._place() | {"head": head} | self._prefilled(decoder, batch, length)
                self.shared.clock.tidy()

    def _place(self) -> dict:
        return {
            "model": self.sizes.name,
            "layers": self.sizes.layers,
            "format": self.form.name,
        }

    def _measured(self, decoder: Decoder, kind: type[Cache], wanted: int | str) -> dict:
        context, total = self.options.context, self.shared.total_bytes
        room = largest_batch(self.sizes, kind, decoder.weight_bytes, context, total)
        batch = room if wanted == "max" else wanted
        kv_bytes = kind.bytes_per_token(self.sizes) * (context + 1) * batch
        needed = decoder.weight_bytes + kv_bytes + SPARE_BYTES
        if batch < 1 or needed > total:
            return {"status": "does not fit", "needed_bytes": needed, "batch": batch}
        result = {"batch": batch, "kv_bytes": kv_bytes}
        try:
            cache = kind(self.sizes, batch, context, self.shared.elementwise, self.shared.device)
            result |= self._timed(decoder, cache)
        except Exception as error:  # one cell must not take the others with it
            result |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        bytes_moved = decoder.weight_bytes + kv_bytes
        if "ms" in result:
            result["tokens_per_s"] = batch / result["ms"] * 1e3
            result["gb_per_s"] = bytes_moved / result["ms"] / 1e6
        return result | {"bytes": bytes_moved}

    def _timed(self, decoder: Decoder, cache: Cache) -> dict:
        clock, batch = self.shared.clock, cache.batch
        ids = decoder.first_tokens(batch)

        def once() -> Tensor:
            return decoder.step(ids, cache)

        with cache.repeating():
            checks = self._checked(decoder, cache)
            if checks["status"] == "ok" and not cache.repeatable:
                step = clock.graph(once)
                checks |= self._replayed(decoder, cache, step, ids)
                clock.release(step)
        if checks["status"] != "ok":
            return checks
        step = clock.graph(once)
        result = checks | clock.ms(step)
        if cache.repeatable:
            result |= self._replayed(decoder, cache, step, ids)
        else:  # attention with it changes from call to call: nothing is to be equal
            result |= self._near(decoder, cache, step, ids)
        clock.release(step)
        if self.options.breakdown:
            result["parts"] = self._parts(decoder, cache, result["ms"])
        return result

    def _checked(self, decoder: Decoder, cache: Cache) -> dict:
        """That logits are what they should be."""
        ids = decoder.first_tokens(cache.batch)
        logits = decoder.step(ids, cache, write=False)
        result: dict = {"status": "ok", "logits_equal_composite": None, "logits_cosine": None}
        if not bool(logits.isfinite().all()):
            return result | {"status": "wrong", "reason": "logits are not finite"}
        if isinstance(self.form, Fused):
            composite = decoder.as_format(make(Composite.name, self.shared.elementwise))
            expected = composite.step(ids, cache, write=False)
            equal = torch.equal(logits, expected)
            result["logits_equal_composite"] = equal
            if not equal:
                off = int((logits != expected).sum())
                reason = f"{off} of {logits.numel()} logits are not those of the composite"
                return result | {"status": "wrong", "reason": reason}
        key = (self.sizes.name, self.sizes.layers, cache.name, cache.batch)
        if self.form.name == Format.name:
            self.shared.reference[key] = logits[:64].float().cpu()
        elif key in self.shared.reference:
            pair = logits[:64].float().cpu(), self.shared.reference[key]
            cosine = torch.cosine_similarity(*pair, dim=-1).min().item()
            result["logits_cosine"] = cosine
            if not cosine >= LEAST_COSINE:
                reason = f"logits have a cosine of {cosine:.3f} with those of bf16"
                return result | {"status": "wrong", "reason": reason}
        return result

    def _replayed(
        self, decoder: Decoder, cache: Cache, step: CallGraph | Callable, ids: Tensor
    ) -> dict[str, object]:
        """A replay on poisoned logits writes what an eager step gives, to the bit."""
        if not isinstance(step, CallGraph):
            return {"replay_equals_eager": None}
        replayed, expected = self._pair(decoder, cache, step, ids)
        if torch.equal(replayed, expected):
            return {"replay_equals_eager": True}
        off = int((replayed != expected).sum())
        reason = f"a replay of the graph gave {off} of {expected.numel()} other logits than a step"
        return {"replay_equals_eager": False, "status": "wrong", "reason": reason}

    def _near(
        self, decoder: Decoder, cache: Cache, step: CallGraph | Callable, ids: Tensor
    ) -> dict[str, object]:
        """A replay on poisoned logits writes about what an eager step gives."""
        if not isinstance(step, CallGraph):
            return {}
        pair = [logits.float() for logits in self._pair(decoder, cache, step, ids)]
        cosine = torch.cosine_similarity(*pair, dim=-1).min().item()
        if cosine > 0.99:
            return {"replay_cosine": cosine}
        reason = (
            f"logits of a replay of the graph have a cosine of {cosine:.3f} with those of a step"
        )
        return {"replay_cosine": cosine, "status": "wrong", "reason": reason}

    def _pair(
        self, decoder: Decoder, cache: Cache, step: CallGraph, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of a replay and of an eager step."""
        ids.copy_(decoder.first_tokens(cache.batch))
        step.last.fill_(float("nan"))
        step.graph.replay()
        expected = decoder.step(decoder.first_tokens(cache.batch), cache, write=False)
        return step.last, expected

    def _parts(self, decoder: Decoder, cache: Cache, whole: float) -> dict[str, float]:
        """ms of products alone, of attention and head by leaving them out, and of the rest."""
        clock = self.shared.clock
        ids = decoder.first_tokens(cache.batch)
        products = decoder.linears(cache.batch)

        def linears() -> None:
            for product in products:
                product()

        def without(part: str) -> Callable[[], object]:
            return lambda: decoder.step(ids, cache, PARTS - {part}, write=False)

        def median(function: Callable[[], object]) -> float:
            graph = clock.graph(function)
            ms = clock.ms(graph, share=0.3)["ms"]
            clock.release(graph)
            return ms

        parts = {"linear": median(linears)}
        parts |= {part: whole - median(without(part)) for part in ("attention", "head")}
        return parts | {"rest": whole - sum(parts.values())}

    def _prefilled(self, decoder: Decoder, batch: int, length: int) -> dict:
        clock, row = self.shared.clock, {"prefill": [batch, length]}
        generator = torch.Generator(self.shared.device).manual_seed(4)
        ids = torch.randint(
            self.sizes.vocabulary, (batch, length), generator=generator, device=self.shared.device
        )
        try:
            graph = clock.graph(lambda: decoder.prefill(ids))
            row |= {"status": "ok"} | clock.ms(graph)
            clock.release(graph)
        except Exception as error:
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        return row
