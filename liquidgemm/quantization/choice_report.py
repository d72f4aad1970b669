"""What came of choosing a recipe: the recipes that were tried, as a table, a picture and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import nn

from .config import LiquidConfig
from .report import QuantizationReport

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Trial:
    """One recipe.

    Attributes:
        recipe: its name.
        config: its config; None where that depends on a trial that was not made.
        bits: stored bits per weight of the layers that are quantized.
        loss: in percent, on held-out data (see `choose_recipe`); None if it was not tried.
        seconds: to quantize and to judge; None if it was not tried.
        outcome: what came of it, in words.
    """

    recipe: str
    config: LiquidConfig | None
    bits: float
    loss: float | None = None
    seconds: float | None = None
    outcome: str = ""


class NoRecipeError(RuntimeError):
    """No recipe meets the demand. ``trials`` says what was tried, ``measure`` how it was judged."""

    def __init__(self, message: str, trials: Sequence[Trial], measure: str) -> None:
        super().__init__(message)
        self.trials, self.measure = tuple(trials), measure


@dataclass(frozen=True)
class Choice:
    """A quantized model, and why it was quantized like that.

    Attributes:
        model: a quantized copy.
        report: of its quantization.
        chosen: name of the recipe.
        config: the config of that, for `quantize_`.
        trials: every recipe, in the order of their bits.
        measure: what losses are: "loss" (of the next token) and "loss on labels" in percent of
            perplexity, "relative output error" in percent.
        target: the demand on bits per weight; None for none.
        max_loss: the demand on the loss in percent; None for none.
    """

    model: nn.Module
    report: QuantizationReport
    chosen: str
    config: LiquidConfig
    trials: tuple[Trial, ...]
    measure: str
    target: float | None
    max_loss: float | None

    def __str__(self) -> str:
        trial = next(trial for trial in self.trials if trial.recipe == self.chosen)
        return (
            f"chosen: {self.chosen}, {trial.bits:.2f} bits per weight, "
            f"{in_words(self.measure)} {trial.loss:+.1f} %"
        )

    def to_json(self) -> str:
        """All but the model and its report."""
        return json.dumps(
            {
                "chosen": self.chosen,
                "config": self.config.to_dict(),
                "target": self.target,
                "max_loss": self.max_loss,
                "measure": self.measure,
                "trials": [_plain(trial) for trial in self.trials],
            },
            indent=1,
        )

    def table(self) -> Table:
        """What was tried, as a table of rich."""
        return trial_table(self.trials, self.measure)

    def plot(self, path: str | os.PathLike) -> None:
        """Write a PNG of loss against bits, with the demands.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plot_trials(self, path)


def in_words(measure: str) -> str:
    """What the percentages of a measure are."""
    return "output error" if measure == "relative output error" else "perplexity"


def _plain(trial: Trial) -> dict:
    """A trial as JSON: the loss of a broken model is infinite, which JSON cannot hold, so None."""
    values = {**asdict(trial), "config": trial.config and trial.config.to_dict()}
    if trial.loss is not None and not math.isfinite(trial.loss):
        values["loss"] = None
    return values


def trial_table(trials: Sequence[Trial], measure: str) -> Table:
    """One row for each recipe."""
    from rich.table import Table

    table = Table(title=f"recipes, by {in_words(measure)} on held-out data")
    for heading in ("recipe", "bits", "loss", "time, s", ""):
        table.add_column(heading, justify="left" if heading in ("recipe", "") else "right")
    for trial in trials:
        table.add_row(
            trial.recipe,
            f"{trial.bits:.2f}",
            "" if trial.loss is None else f"{trial.loss:+.1f} %",
            "" if trial.seconds is None else f"{trial.seconds:.0f}",
            trial.outcome,
        )
    return table


def plot_trials(choice: Choice, path: str | os.PathLike) -> None:
    """A PNG: one point for each trial, the chosen one filled; lines are the demands.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for trial in choice.trials:
        if trial.loss is None or not math.isfinite(trial.loss):
            continue
        chosen = trial.recipe == choice.chosen
        face = "tab:blue" if chosen else "none"
        axes.scatter(trial.bits, trial.loss, s=60, facecolors=face, edgecolors="tab:blue")
        axes.annotate(
            trial.recipe,
            (trial.bits, trial.loss),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize="small",
            weight="bold" if chosen else "normal",
        )
    if choice.target is not None:
        axes.axvline(choice.target, color="grey", linestyle="--", linewidth=1)
    if choice.max_loss is not None:
        axes.axhline(choice.max_loss, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="bits per weight", ylabel=f"{in_words(choice.measure)} on held-out data, %")
    axes.margins(x=0.15, y=0.1)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
