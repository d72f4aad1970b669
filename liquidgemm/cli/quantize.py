"""``liquidgemm quantize``."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from .._files import check_new_folder, new_folder, parse_json, path_of
from ..checkpoints.checkpoint import save_quantized
from ..checkpoints.sources import check_vocabulary, folders_of, load_model, read_texts
from ..quantization.calibration.data import text_window, token_windows
from ..quantization.choice import CHOSEN_FIELDS, choose_recipe
from ..quantization.choice_report import Choice, NoRecipeError, trial_table
from ..quantization.config import LiquidConfig
from ..quantization.model import quantize_
from ..quantization.report import QuantizationReport
from .options import DEVICE, MODEL, Precision, device_of, doing, dtype_of, options_given

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Enum(
    "Method",
    {"search": "search", "rtn": "rtn", "hessian": "hessian", "gptq": "gptq"},
    type=str,
)
Gate = Enum("Gate", {"raise": "raise", "warn": "warn", "off": "off"}, type=str)
Head = Enum("Head", {"float": "float", "int8": "int8"}, type=str)


def settings_of(values: dict[str, Any], more: str, given: Collection[str]) -> LiquidConfig:
    """The config of the options and of the JSON object in --config.

    Args:
        values: of the options, by field.
        more: the object, whose fields come before options that are not given.
        given: the names of the options that are.
    """
    try:
        fields = parse_json(more)
    except ValueError as error:
        raise ValueError(f"--config: expected a JSON object, got {more!r} ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"--config: expected a JSON object, got {type(fields).__name__}")
    for field in values:
        if field in given and field in fields:
            raise ValueError(
                f"--config: expected fields that no other option sets, got {field!r} beside "
                f"--{field}: leave out one of them"
            )
    return LiquidConfig.from_json(json.dumps({**values, **fields}))


def _bits_of(options: Sequence[str]) -> dict[str, int]:
    """The bits of patterns, of options ``PATTERN=BITS``."""
    found = {}
    for option in options:
        pattern, sign, bits = option.rpartition("=")
        if not pattern or not sign or not bits.isdecimal():
            raise ValueError(f"--bits: expected PATTERN=4, 6 or 8, got {option!r}")
        if pattern in found:
            raise ValueError(f"--bits: expected a pattern once, got {pattern!r} again")
        found[pattern] = int(bits)
    return found


def _check_data(
    settings: LiquidConfig, calib: bool, held_out: bool, given: Collection[str], dry_run: bool
) -> None:
    """Raises a ValueError for texts that are missing, and for options that would do nothing."""
    measures = settings.budget is not None  # for a plan, too
    if settings.needs_calibration and not calib and (measures or not dry_run):
        what = "budget" if measures else f"method {settings.method}"
        raise ValueError(f"--calib: expected text files for {what}, got none")
    for name in ("held_out", "tokens", "resume"):
        if name in given and not calib:
            raise ValueError(f"--{name.replace('_', '-')}: expected --calib beside it, got none")
    if "gate" in given and settings.gate != "off" and not held_out:
        raise ValueError(f"--gate {settings.gate}: expected --held-out beside it, got none")


def _check_resume(folder: Path | None, output: Path, sources: Iterable[Path]) -> None:
    """Raises a ValueError if blocks would be written to what is read, or to what is to be new."""
    if folder is None:
        return
    folder, output = path_of(folder).resolve(), path_of(output).resolve()
    if output in (folder, *folder.parents) or folder in output.parents:
        raise ValueError(f"--resume: expected a folder apart from {output}, got {folder}")
    for source in map(Path.resolve, sources):
        if source in (folder, *folder.parents):
            raise ValueError(
                f"--resume: expected a folder outside of {source}, which is read, got {folder}"
            )


def quantize_command(
    context: typer.Context,
    model: MODEL,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to create.")],
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
    bits: Annotated[
        list[str] | None,
        typer.Option(help="Of layers, as PATTERN=4, 6 or 8: the first that matches counts."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Bits per weight: which layers get 4, 6 and 8 is measured."),
    ] = None,
    head: Annotated[
        Head, typer.Option(help="int8: the output embeddings get INT8 precision.")
    ] = Head["float"],
    config: Annotated[
        str, typer.Option(help="Other fields of LiquidConfig, as a JSON object.")
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
    target: Annotated[
        float | None, typer.Option(help="Choose the recipe that loses least: bits per weight.")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Choose the recipe of fewest bits: percent of perplexity.")
    ] = None,
) -> None:
    """Quantize a model of text and write a checkpoint and a report into a new folder.

    The report is quantization.json, and quantization.png if matplotlib is installed. For models
    that take other data (speech, images) use liquidgemm.quantize_ in Python.

    With --target or --max-loss, recipes are tried and judged on the --held-out text. What was tried
    is printed and written as choice.json and choice.png; if nothing meets the demand, nothing else
    is written.
    """
    console = Console()
    values: dict[str, Any] = {
        "method": method.value,
        "smooth": smooth,
        "rotate": rotate,
        "augment": augment,
        "keep": keep or (),
        "bits": _bits_of(bits or ()),
        "budget": budget,
        "head": head.value,
        "gate": gate.value,
    }
    if skip is not None:
        values["skip"] = skip
    given = options_given(context)
    settings = settings_of(values, config, given)
    chooses = target is not None or max_loss is not None
    if chooses:
        _check_choice(given, bool(calib), bool(held_out))
    else:
        _check_data(settings, bool(calib), bool(held_out), given, dry_run)
    where = device_of(device, for_kernel=True)
    sources = folders_of(model)
    check_new_folder(output, *sources)
    _check_resume(resume, output, sources)
    texts = read_texts(calib or ())
    unseen = read_texts(held_out or ())
    with nullcontext() if dry_run else new_folder(output, *sources) as staging:
        with doing(f"loading {model}"):
            network, tokenizer = load_model(model, where, dtype_of(dtype))
        if texts or unseen:
            _check_takes_texts(network)
        with doing("reading the texts"):
            window = text_window(tokenizer, network)
            batches = token_windows(texts, tokenizer, window, tokens)
            held_out_batches = token_windows(unseen, tokenizer, window, 8192)
        check_vocabulary([*batches, *held_out_batches], network)
        choice = None
        if chooses:
            assert staging is not None
            choice = _choose(
                network,
                console,
                staging,
                config=settings,
                target=target,
                max_loss=max_loss,
                calibration=batches if texts else None,
                held_out=held_out_batches,
                resume=resume,
            )
            network, report = cast("PreTrainedModel", choice.model), choice.report
        else:
            report = quantize_(
                network,
                settings,
                calibration=batches if texts else None,
                held_out=held_out_batches if unseen else None,
                resume=resume,
                dry_run=dry_run,
            )
        if not report.quantized:
            raise ValueError(f"{model}: expected a float model, got one that is quantized already")
        if staging is not None:
            with doing(f"writing {output}"):
                without_plot = _write(network, tokenizer, report, staging)
    # Only now: whoever reads it may be gone.
    console.print(str(report), markup=False, highlight=False)
    if not dry_run:
        console.print(report.table())
        if choice is not None:
            console.print(choice.table())
            console.print(str(choice), markup=False, highlight=False)
        console.print(f"written to {output}{without_plot}", markup=False, highlight=False)


def _check_choice(given: Collection[str], calib: bool, held_out: bool) -> None:
    """Raises a ValueError for options that say what --target and --max-loss choose, or nothing."""
    for name in (*CHOSEN_FIELDS, "dry_run"):
        if name in given:
            raise ValueError(
                f"--{name.replace('_', '-')}: expected to be left out beside --target or "
                "--max-loss, which choose the recipe"
            )
    if not held_out:
        raise ValueError("--held-out: expected text files that recipes are judged by, got none")
    if "tokens" in given and not calib:
        raise ValueError("--tokens: expected --calib beside it, got none")


def _choose(network: PreTrainedModel, console: Console, folder: Path, **options: Any) -> Choice:
    """The choice, its table and plot in a folder; what was tried is printed if nothing will do."""
    try:
        choice = choose_recipe(network, **options)
    except NoRecipeError as error:
        console.print(trial_table(error.trials, error.measure))
        raise
    (folder / "choice.json").write_text(choice.to_json() + "\n")
    with suppress(ImportError):  # as the report's, which says so
        choice.plot(folder / "choice.png")
    return choice


def _check_takes_texts(network: PreTrainedModel) -> None:
    takes = network.main_input_name
    if takes == "input_ids" and network.config.is_encoder_decoder:
        takes = "input_ids and decoder_input_ids"
    if takes != "input_ids":
        raise ValueError(
            f"--calib: expected a model that takes texts alone, got {type(network).__name__}, "
            f"which takes {takes}: calibrate it in Python with liquidgemm.quantize_"
        )


def _write(
    network: PreTrainedModel, tokenizer: Any, report: QuantizationReport, folder: Path
) -> str:
    """The checkpoint and the report; why there is no plot, if there is none."""
    save_quantized(network, folder)
    tokenizer.save_pretrained(folder)
    (folder / "quantization.json").write_text(report.to_json() + "\n")
    try:
        report.plot(folder / "quantization.png")
    except ImportError as error:
        return f"; {error}"
    return ""
