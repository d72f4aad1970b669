"""``liquidgemm eval``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..checkpoints.sources import check_vocabulary, load_model, read_texts
from ..nn.linear import LiquidLinear
from ..quantization.evaluate import ContextBand, evaluate, evaluate_context, sliding_windows
from .options import DEVICE, MODEL, Precision, device_of, doing, dtype_of, options_given

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def eval_command(
    typer_context: typer.Context,
    model: MODEL,
    text: Annotated[list[Path], typer.Option(help="Text files to evaluate on.")],
    reference: Annotated[
        str | None, typer.Option(help="A model to compare with, as MODEL.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="At most this many, from the start.")] = 65536,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    stride: Annotated[int, typer.Option(min=1, help="Tokens between windows.")] = 512,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Instead: by how much context tokens have, up to this many."),
    ] = None,
    device: DEVICE = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of models that are not quantized.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity, and agreement with a reference model.

    A window of so many tokens slides over the text, and counts the tokens that the window before
    has not: each is predicted once, from at least length - stride tokens before it.

    With --context N, windows of N tokens stand side by side, and there is a row for the tokens with
    1 to 511 tokens before them, with 512 to 1023, 1024 to 2047 and so on: whether a quantized model
    loses more where the context is long.
    """
    if context is not None and (clash := options_given(typer_context) & {"length", "stride"}):
        raise ValueError(f"--{min(clash)}: expected to be left out beside --context, which says it")
    where = device_of(device)
    precision = dtype_of(dtype)
    texts = read_texts(text)
    with doing(f"loading {model}"):
        network, tokenizer = load_model(model, where, precision)
    if network.config.is_encoder_decoder or not network.can_generate():
        kind = type(network).__name__
        raise ValueError(f"{model}: expected a causal language model, got {kind}")
    other = None
    if reference is not None:
        with doing(f"loading {reference}"):
            other = load_model(reference, where, precision)[0]
    if dtype and all(map(_is_quantized, filter(None, (network, other)))):
        raise ValueError(f"--dtype: expected a model that is not quantized, got {model}")
    with doing("reading the text"):
        ids = [token for t in texts for token in tokenizer(t)["input_ids"]][:tokens]
    if context is not None:
        count = len(ids) // context
        if not count:
            raise ValueError(f"--context {context}: expected a text as long, got {len(ids)} tokens")
        whole = list(torch.tensor(ids[: count * context]).view(count, 1, context))
        _check_tokens(whole, network, other)
        _print_bands(evaluate_context(network, whole, other, progress=not as_json), as_json)
        return
    windows = list(sliding_windows(torch.tensor(ids), length, stride))
    _check_tokens([window for window, _ in windows], network, other)
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


def _is_quantized(network: PreTrainedModel) -> bool:
    return any(isinstance(module, LiquidLinear) for module in network.modules())


def _check_tokens(windows: list[torch.Tensor], *networks: PreTrainedModel | None) -> None:
    for network in networks:
        if network is not None:
            check_vocabulary(windows, network)


def _print_bands(bands: list[ContextBand], as_json: bool) -> None:
    rows = [{k: v for k, v in asdict(band).items() if v is not None} for band in bands]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(title="by tokens before")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(v) if isinstance(v, int) else f"{v:.5g}" for v in row.values()))
    Console().print(table, highlight=False)
