"""Trials of recipes: on copies of a model, judged, and found again by a call that goes on."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._files import parse_json, write_atomically
from .calibration.data import digest, running
from .calibration.measure import LABELS, OUTPUT, choose_measure, loss
from .calibration.record import Recording, model_inputs
from .calibration.trees import map_tensors
from .choice_report import Trial
from .config import LiquidConfig
from .model import quantize_
from .report import QuantizationReport

_RUN_FILE = "choice.json"


@dataclass
class Quantized:
    """A copy of the model, and what was done to it."""

    model: nn.Module
    report: QuantizationReport


class Judge:
    """What quantized models lose on held-out data, in percent."""

    def __init__(self, model: nn.Module, batches: list[Tensor | Mapping[str, Any]]) -> None:
        self._model, self._batches = model, batches
        recordings = []
        with _evaluating(model):
            for number, batch in enumerate(batches):
                with running(model, batch, f"held_out: batch {number}"):
                    output = map_tensors(_call(model, batch), lambda t: t.to("meta"))
                recordings.append(Recording([], set(), batch, output))
        self.measure = choose_measure(model, batches, recordings)
        self._reference = 0.0 if self.measure == OUTPUT else self._mean(model)

    def __call__(self, model: nn.Module) -> float:
        mean = self._mean(model)
        if self.measure == OUTPUT:
            return 100 * mean
        if self.measure == LABELS and any(_has_float_labels(batch) for batch in self._batches):
            return 100 * (mean / self._reference - 1)
        return 100 * math.expm1(min(mean - self._reference, 700.0))

    def _mean(self, model: nn.Module) -> float:
        total = count = 0.0
        with _evaluating(model), _evaluating(self._model):
            for batch in self._batches:
                reference = _call(self._model, batch) if self.measure == OUTPUT else None
                output = _call(model, batch)
                part, parts = loss(self.measure, self._model, batch, output, reference)
                total, count = total + part, count + parts
        return total / count


def _call(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> Any:
    args, kwargs = model_inputs(batch, model)
    return model(*args, **kwargs)


def _has_float_labels(batch: Tensor | Mapping[str, Any]) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.is_floating_point()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Tries:
    """Quantizes copies of a model.

    Attributes:
        errors: at the output of each layer, in the trial of the recipe that others build on.
    """

    def __init__(
        self,
        model: nn.Module,
        filter_fn: Callable[[str, nn.Module], bool] | None,
        batches: list[Tensor | Mapping[str, Any]] | None,
        options: Mapping[str, Any],
        finished: Finished,
    ) -> None:
        self._model, self._filter, self._batches = model, filter_fn, batches
        self._options, self._finished = options, finished
        self.errors: dict[str, float] = {}

    def quantized(self, config: LiquidConfig) -> Quantized:
        """A copy that is quantized by a config; what of it is finished is taken from the disk."""
        needed = config.needs_calibration
        model = copy.deepcopy(self._model)
        report = quantize_(
            model,
            config,
            self._filter,
            calibration=self._batches if needed else None,
            resume=self._finished.folder_of(config) if needed else None,
            **self._options,
        )
        return Quantized(model, report)

    def run(
        self,
        trial: Trial,
        config: LiquidConfig,
        sizes: Mapping[str, int],
        judge: Judge,
        learn: bool,
    ) -> Quantized | None:
        """Fill in a trial; the quantized model, or None if its loss is known from another run."""
        trial.config = config
        stored = self._finished.find(config)
        result = None
        if stored is None:
            start = time.perf_counter()
            result = self.quantized(config)
            seconds = time.perf_counter() - start
            weights = sum(sizes[name] for name in result.report.quantized)
            stored = {
                "bits": 8 * result.report.bytes_after / weights,
                "loss": judge(result.model),
                "seconds": seconds,
                "errors": {layer.name: layer.output_error for layer in result.report.layers},
            }
            self._finished.save(config, stored)
        trial.bits, trial.loss, trial.seconds = (stored[k] for k in ("bits", "loss", "seconds"))
        if learn:
            self.errors = {name: error or 0.0 for name, error in stored["errors"].items()}
        return result


class Finished:
    """Finished trials in a folder; nothing at all if that is None.

    Raises:
        ValueError: the folder holds another choice, other files, or a damaged file. A choice is the
            shared config, the data and the model; the demand may be another.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, Any], model: nn.Module) -> None:
        self._folder = folder
        self._trials: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        self._run = {**run, "model": digest([dict(model.state_dict())])}
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"resume: expected a folder, got the file {folder}")
        path = folder / _RUN_FILE
        if not path.exists():
            if held := sorted(file.name for file in folder.glob("[!.]*")):
                raise ValueError(
                    f"resume: {folder}: expected a new or empty folder, or one of an interrupted "
                    f"choice, got one without {_RUN_FILE} that holds {held[0]}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            self._write()
            return
        try:
            stored = dict(parse_json(path.read_text(encoding="utf-8")))
            self._trials = dict(stored.pop("trials"))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"resume: {path}: truncated or damaged ({error})") from None
        for key, value in self._run.items():
            if stored.get(key) != value:
                raise ValueError(
                    f"resume: {folder} holds a choice with another {key}: expected the same one, "
                    "or an empty folder"
                )

    def folder_of(self, config: LiquidConfig) -> Path | None:
        """Where the finished blocks of a trial are kept."""
        return None if self._folder is None else self._folder / _key(config)

    def find(self, config: LiquidConfig) -> dict[str, Any] | None:
        return self._trials.get(_key(config))

    def save(self, config: LiquidConfig, trial: dict[str, Any]) -> None:
        if self._folder is not None:
            self._trials[_key(config)] = trial
            self._write()

    def _write(self) -> None:
        assert self._folder is not None
        text = json.dumps({**self._run, "trials": self._trials}, indent=1)
        write_atomically(self._folder / _RUN_FILE, lambda file: file.write_text(text))


def _key(config: LiquidConfig) -> str:
    return f"{config.method}-{hashlib.sha256(config.to_json().encode()).hexdigest()[:16]}"
