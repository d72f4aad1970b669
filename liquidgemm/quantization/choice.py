"""A recipe by what it has to give: bits per weight, or how much may be lost on held-out data."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .._files import path_of
from ..formats.liquidquant import GROUP, padded
from ..nn._modules import conv1d_as_linear, linear_at
from .budget import stored_bits
from .calibration.data import as_batches, digest
from .choice_report import Choice, NoRecipeError, Trial, in_words
from .choice_trials import Finished, Judge, Quantized, Tries
from .config import LiquidConfig
from .experts import experts_as_linear
from .layer import layer_bits, residual_columns
from .model import quantize_
from .selection import select

CHOSEN_FIELDS = ("method", "smooth", "augment", "keep", "bits", "budget", "gate")
"""Of `LiquidConfig`: what recipes set; and the gate, as held-out data judges all of them."""

_DATA: dict[str, Any] = {"method": "gptq", "smooth": True}
_COLUMNS = (64, 128, 256)
_SHARES = (1 / 8, 1 / 4, 1 / 2)
_ROUNDING = 1e-9  # so that a share that fills the target is not beyond it
_BUDGETS = (5.0, 5.5)  # between 4 and 6 bits for all layers
_LEAST_SHARE = 0.02  # of the weights; to keep less is not worth a trial


@dataclass(frozen=True)
class _Recipe:
    """Fields of the config, and the share of weights that get INT8 precision.

    Those are in the layers with the largest error at their output in the trial of "gptq, smooth".
    """

    name: str
    fields: Mapping[str, Any]
    share: float = 0.0

    @property
    def needs_data(self) -> bool:
        return "method" in self.fields


@dataclass(frozen=True)
class _Layer:
    """A layer to be quantized; with the name of the experts that it is a part of, if it is."""

    rows: int
    columns: int
    experts: str | None

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def stored(self, bits: int, extra: int = 0, group_size: int = GROUP) -> int:
        """Bits that are stored, as `LiquidLinear` has it."""
        groups = group_size if self.experts is None else GROUP
        return stored_bits(self.rows, padded(self.columns) + extra, bits, groups)


@torch.no_grad()
def choose_recipe(
    model: nn.Module,
    *,
    target: float | None = None,
    max_loss: float | None = None,
    held_out: Iterable[Any],
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    config: LiquidConfig | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    device: torch.device | str | None = None,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
    verify: bool = True,
) -> Choice:
    """Quantize a copy of a model by the recipe that meets a demand; the model stays as it is.

    Recipes are tried on copies of the model, in the order of their bits, and judged by the real
    layers on held-out data. With ``target`` alone, all within it are tried, and the one that loses
    least is chosen. With ``max_loss``, the first that loses no more is chosen, and the others are
    not tried. With both, it has to be within the target as well.

    The recipes are the search without data; "gptq" with smoothing; with residual columns; with INT8
    precision for the layers that have the largest error at their output, up to a share of the
    weights, or as many as the target leaves room for; with 4, 6 and 8 bits within a budget; with 6
    bits for all layers; and INT8 for all layers. Without calibration data, they are the search,
    also with residual columns or 6 bits, and INT8. One that needs data and does worse than one that
    needs none, at no fewer bits, is refused.

    The loss is in percent: by how much the perplexity on the held-out data grows (the exponential
    of the mean loss, of the next token or on labels), or for models without a loss the relative
    output error, ``‖y - r‖ / ‖r‖``. As held-out data decides, what the chosen one loses on it is
    a little less than on other data.

    Memory: the model, a copy of it in floats, and two quantized ones.

    Args:
        model: as for `quantize_`.
        target: most bits per weight of the quantized layers, scales and all.
        max_loss: most loss in percent.
        held_out: data that is in no calibration data, as for `quantize_`.
        calibration: as for `quantize_`.
        tokenizer: for texts.
        config: what all recipes share; `CHOSEN_FIELDS` have to be left at their defaults.
        filter_fn: as for `quantize_`.
        device: where blocks are calibrated.
        resume: a folder for the losses of finished trials and the finished blocks of each. If the
            same call was interrupted, it goes on from there.
        progress: show progress bars.
        verify: as for `quantize_`.

    Raises:
        ValueError, TypeError: there is no demand, or one that is no positive number; the config
            sets what recipes choose; no recipe needs as few bits; resume holds another choice; and
            as for `quantize_`.
        NoRecipeError: no recipe that was tried meets the demand.
    """
    _check_demand(target, max_loss)
    config = config or LiquidConfig()
    _check_config(config)
    judged = as_batches(held_out, tokenizer, "held_out", model)
    batches = None
    if calibration is not None:
        batches = as_batches(calibration, tokenizer, "calibration", model)
    layers, heads = _layers_of(model, config, filter_fn)
    if not layers:  # says why
        quantize_(model, config, filter_fn, progress=False, dry_run=True)
        raise ValueError("model: expected one with layers to quantize, got a quantized one")

    bits_of = partial(_bits_of, config, layers, heads)
    recipes = _recipes(layers, bits_of, target, max_loss, batches is not None)
    trials = [Trial(r.name, None, bits_of(r.fields, r.share)) for r in recipes]
    if target is not None and trials[0].bits > target:
        raise ValueError(
            f"target: expected at least {trials[0].bits:.2f} bits per weight, which "
            f"{trials[0].recipe!r} needs, got {target:g}"
        )
    run = {
        "config": json.loads(config.to_json()),
        "calibration": None if batches is None else digest(batches),
        "held_out": digest(judged),
        "layers": list(layers),
    }
    finished = Finished(None if resume is None else path_of(resume), run, model)
    judge = Judge(model, judged)
    options = {"device": device, "progress": progress, "verify": verify}
    tries = Tries(model, filter_fn, batches, options, finished)
    sizes = Counter[str]()
    for name, layer in layers.items():
        sizes[layer.experts or name] += layer.size
    best: Trial | None = None
    made: Quantized | None = None
    bar = tqdm(trials, desc="recipes", unit="recipe", disable=not progress)
    for recipe, trial in zip(recipes, bar, strict=True):
        bar.set_postfix_str(recipe.name)
        if target is not None and trial.bits > target:
            trial.outcome = f"not tried: more than {target:g} bits"
        elif batches is None and recipe.needs_data:
            trial.outcome = "not tried: needs calibration data"
        elif max_loss is not None and best is not None:
            trial.outcome = f"not tried: {best.recipe!r} needs no more bits"
        elif (own := _config_of(recipe, config, tries.errors, layers)) is None:
            trial.outcome = "not tried: no layer is as small as that"
        else:
            quantized = tries.run(trial, own, sizes, judge, recipe.fields == _DATA)
            trial.outcome = _refusal(trial, trials, target, max_loss)
            if not trial.outcome and (best is None or _loss(trial) < _loss(best)):
                best, made = trial, quantized
            del quantized  # before the next copy is made
    if best is None or best.config is None:
        message = _none_meets(trials, judge.measure, target, max_loss)
        raise NoRecipeError(message, trials, judge.measure)
    for trial in trials:
        trial.outcome = trial.outcome or f"loses more than {best.recipe!r}"
    best.outcome = "chosen"
    if made is None:  # judged by a call that was interrupted
        made = tries.quantized(best.config)
    return Choice(
        made.model,
        made.report,
        best.recipe,
        best.config,
        tuple(sorted(trials, key=lambda trial: trial.bits)),
        judge.measure,
        target,
        max_loss,
    )


def _check_demand(target: float | None, max_loss: float | None) -> None:
    if target is None and max_loss is None:
        raise ValueError("target: expected bits per weight, or max_loss in percent, got neither")
    for name, value in (("target", target), ("max_loss", max_loss)):
        if value is None:
            continue
        number = type(value) in (int, float) and math.isfinite(value)
        if not number or value <= 0:
            raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def _check_config(config: LiquidConfig) -> None:
    defaults = LiquidConfig()
    for name in CHOSEN_FIELDS:
        if (got := getattr(config, name)) != getattr(defaults, name):
            raise ValueError(
                f"config: expected the default {name}, which recipes choose, got {got!r}"
            )


def _layers_of(
    model: nn.Module,
    config: LiquidConfig,
    filter_fn: Callable[[str, nn.Module], bool] | None,
) -> tuple[dict[str, _Layer], list[str]]:
    """The layers to quantize by name, and which of them are heads."""
    with experts_as_linear(model) as experts:
        selection = select(model, config, filter_fn, experts)
        with conv1d_as_linear(model):
            layers = {}
            for name in selection.names:
                linear = linear_at(model, name)
                layers[name] = _Layer(linear.out_features, linear.in_features, experts.of(name))
    return layers, selection.heads


def _bits_of(
    config: LiquidConfig,
    layers: Mapping[str, _Layer],
    heads: list[str],
    fields: Mapping[str, Any],
    share: float = 0.0,
) -> float:
    """Bits per weight of a recipe; with a share about, as layers are kept as wholes, and with a
    budget at most.
    """
    config = replace(config, **fields)
    if config.budget is not None:
        return config.budget
    config = replace(config, keep=(*config.keep, *heads))
    total = 0.0
    for name, layer in layers.items():
        extra = 0 if layer.experts else residual_columns(config, name, layer.columns)
        kept = 0.0 if layer.experts else share
        stored = layer.stored(layer_bits(config, name), extra, config.group_size)
        total += (1 - kept) * stored + kept * layer.stored(8)
    return total / sum(layer.size for layer in layers.values())


def _recipes(
    layers: Mapping[str, _Layer],
    bits_of: Callable[..., float],
    target: float | None,
    max_loss: float | None,
    has_data: bool,
) -> list[_Recipe]:
    """What may be tried, in the order of bits, be they within the target or not.

    With a target alone, more bits of one kind are taken to lose less: of numbers of residual
    columns, the largest that is within it counts.
    """
    # Experts have no INT8 form: a pattern that means them would leave them in floats.
    plain = tuple(name for name, layer in layers.items() if layer.experts is None)
    widest = min((layers[name].columns for name in plain), default=0)
    columns = [count for count in _COLUMNS if 2 * count <= widest]
    if max_loss is None and target is not None:
        within = [count for count in columns if bits_of({"augment": count}) <= target]
        columns = within[-1:] or columns[:1]
    recipes = [_Recipe("search", {}), _Recipe("gptq, smooth", _DATA)]
    for count in columns:
        if not has_data:
            recipes.append(_Recipe(f"search, augment {count}", {"augment": count}))
        fields = {**_DATA, "augment": count}
        recipes.append(_Recipe(f"gptq, smooth, augment {count}", fields))
    for count in (0, *columns[:2]) if plain else ():
        fields = {**_DATA, "augment": count}
        name = f"gptq, smooth, augment {count}" if count else "gptq, smooth"
        least, most = bits_of(fields), bits_of(fields, 1.0)
        shares = set(_SHARES) if max_loss is not None else set()
        if target is not None and least < target < most:
            shares.add((1 - _ROUNDING) * (target - least) / (most - least))
        recipes += [
            _Recipe(f"{name}, keep {100 * share:.0f} %", fields, share)
            for share in shares
            if share >= _LEAST_SHARE
        ]
    if plain:
        patterns = ("*",) if len(plain) == len(layers) else plain
        six = {"bits": dict.fromkeys(patterns, 6)}
        if not has_data:
            recipes.append(_Recipe("search, 6 bits", six))
        recipes.append(_Recipe("gptq, smooth, 6 bits", {**_DATA, **six}))
        recipes.append(_Recipe("int8", {"keep": patterns}))
        budgets = set(_BUDGETS) if max_loss is not None else set()
        if target is not None:
            budgets.add(target)
        least, most = bits_of(_DATA), bits_of({"keep": patterns})
        recipes += [
            _Recipe(f"gptq, smooth, budget {budget:g}", {**_DATA, "budget": budget})
            for budget in budgets
            if _LEAST_SHARE * (most - least) <= budget - least and budget < most
        ]
    return sorted(recipes, key=lambda recipe: bits_of(recipe.fields, recipe.share))


def _config_of(
    recipe: _Recipe,
    config: LiquidConfig,
    errors: Mapping[str, float],
    layers: Mapping[str, _Layer],
) -> LiquidConfig | None:
    """The config of a recipe; None if all layers are larger than its share.

    Args:
        errors: at the output of each layer.
    """
    own = replace(config, **recipe.fields)
    if not recipe.share:
        return own
    plain = {name: layer for name, layer in layers.items() if layer.experts is None}
    room = recipe.share * sum(layer.size for layer in plain.values())
    kept = []
    for name in sorted(plain, key=lambda name: errors.get(name, 0.0), reverse=True):
        if plain[name].size <= room:
            kept.append(name)
            room -= plain[name].size
    return replace(own, keep=tuple(kept)) if kept else None


def _loss(trial: Trial) -> float:
    return math.inf if trial.loss is None or math.isnan(trial.loss) else trial.loss


def _refusal(
    trial: Trial, trials: list[Trial], target: float | None, max_loss: float | None
) -> str:
    """Why a recipe that was tried is none to choose; "" if it is one."""
    if target is not None and trial.bits > target:
        return f"{trial.bits:.2f} bits, more than {target:g}"
    if trial.config is not None and trial.config.needs_calibration:
        for other in trials:
            without = other.config is not None and not other.config.needs_calibration
            if without and other.bits <= trial.bits and _loss(other) < _loss(trial):
                return f"worse than {other.recipe!r}, which needs no data: it overfits"
    if max_loss is not None and not _loss(trial) <= max_loss:
        return f"loses more than {max_loss:g} %"
    return "" if math.isfinite(_loss(trial)) else "broken: its loss is no number"


def _none_meets(
    trials: list[Trial], measure: str, target: float | None, max_loss: float | None
) -> str:
    tried = [trial for trial in trials if trial.loss is not None]
    wanted = [] if target is None else [f"at most {target:g} bits per weight"]
    if max_loss is not None:
        wanted.append(f"{in_words(measure)} of at most +{max_loss:g} %")
    demand = "target" if max_loss is None else "max_loss"
    if not tried:
        return f"{demand}: expected a recipe that can be tried, got none without calibration data"
    nearest = min(tried, key=_loss)
    return (
        f"{demand}: no recipe has {' and '.join(wanted)}: of {len(tried)} that were tried "
        f"{nearest.recipe!r} comes nearest, with {nearest.bits:.2f} bits and "
        f"{_loss(nearest):+.1f} %"
    )
