"""``liquidgemm quantize`` and ``liquidgemm eval``."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import _library
from .calibration.data import token_windows
from .checkpoint import save_quantized
from .config import GATES, METHODS, LiquidConfig
from .evaluate import evaluate, sliding_windows
from .model import quantize_
from .sources import load_model, read_texts

Method = Enum("Method", {name: name for name in METHODS}, type=str)
Gate = Enum("Gate", {name: name for name in GATES}, type=str)

MODEL = Annotated[
    str,
    typer.Argument(
        help="A folder of save_quantized or transformers, a GGUF file, or a name on the hub."
    ),
]
DEVICE = Annotated[
    str | None, typer.Option(help="cpu, cuda, ...; the Hopper GPU if there is one, else the CPU.")
]


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def default_device(device: str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if _library.status().cuda_available else "cpu")


def quantize_command(
    model: MODEL,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    method: Annotated[Method, typer.Option(help="How codes are chosen.")] = Method.search,
    calib: Annotated[
        list[Path] | None, typer.Option(help="Text files to calibrate on; several kinds are best.")
    ] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="Text files of another kind, for the gate.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens.")] = 32768,
    smooth: Annotated[bool, typer.Option(help="Move outliers into the weights.")] = False,
    rotate: Annotated[bool, typer.Option(help="Rotate the residual stream.")] = False,
    augment: Annotated[int, typer.Option(help="Residual columns, a multiple of 64.")] = 0,
    keep: Annotated[
        list[str] | None, typer.Option(help="Patterns of layers that get INT8 precision.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Patterns of layers to leave alone: lm_head if none.")
    ] = None,
    config: Annotated[
        str, typer.Option(help="More fields of LiquidConfig, as a JSON object.")
    ] = "{}",
    gate: Annotated[
        Gate, typer.Option(help="If held-out text does worse than without data.")
    ] = Gate["raise"],
    device: DEVICE = None,
    dtype: Annotated[Precision | None, typer.Option(help="Of what stays in floats.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder for finished blocks; go on from it if it has some.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan for each layer and stop.")] = False,
) -> None:
    """Quantize a causal language model and write a checkpoint and a report.

    The report is quantization.json, and quantization.png if matplotlib is installed.
    """
    console = Console()
    values: dict[str, Any] = {
        "method": method.value,
        "smooth": smooth,
        "rotate": rotate,
        "augment": augment,
        "keep": keep or (),
        "gate": gate.value,
    }
    if skip is not None:
        values["skip"] = skip
    settings = LiquidConfig.from_json(json.dumps({**values, **json.loads(config)}))
    where = default_device(device)
    texts = read_texts(calib or ())
    unseen = read_texts(held_out or ())
    if settings.needs_calibration and not texts and not dry_run:
        raise ValueError(f"--calib: expected text files for method {settings.method}, got none")
    network, tokenizer = load_model(model, where, dtype and getattr(torch, dtype.value))
    report = quantize_(
        network,
        settings,
        calibration=token_windows(texts, tokenizer, limit=tokens) if texts else None,
        held_out=token_windows(unseen, tokenizer, limit=8192) if unseen else None,
        resume=resume,
        dry_run=dry_run,
    )
    console.print(str(report), markup=False, highlight=False)
    if dry_run:
        return
    console.print(report.table())
    save_quantized(network, output)
    tokenizer.save_pretrained(output)
    (output / "quantization.json").write_text(report.to_json() + "\n")
    try:
        report.plot(output / "quantization.png")
    except ImportError as error:
        console.print(str(error), style="dim")


def eval_command(
    model: MODEL,
    text: Annotated[list[Path], typer.Option(help="Text files to evaluate on.")],
    reference: Annotated[
        str | None, typer.Option(help="A model to compare with, as MODEL.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="At most this many, from the start.")] = 65536,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    stride: Annotated[int, typer.Option(min=1, help="Tokens between windows.")] = 512,
    device: DEVICE = None,
    dtype: Annotated[Precision | None, typer.Option(help="Of what is in floats.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity, and agreement with a reference model.

    A window of so many tokens slides over the text, and counts the tokens that the window before
    has not: each is predicted once, from at least length - stride tokens before it.
    """
    where = default_device(device)
    precision = dtype and getattr(torch, dtype.value)
    network, tokenizer = load_model(model, where, precision)
    other = None if reference is None else load_model(reference, where, precision)[0]
    ids = [token for t in read_texts(text) for token in tokenizer(t)["input_ids"]][:tokens]
    windows = list(sliding_windows(torch.tensor(ids), length, stride))
    result = asdict(evaluate(network, windows, other, progress=not as_json))
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table(show_header=False, box=None)
    for name, value in result.items():
        if value is not None:
            shown = str(value) if isinstance(value, int) else f"{value:.5g}"
            table.add_row(name.replace("_", " "), shown)
    Console().print(table, highlight=False)
