"""How a model is judged on held-out data, by what it takes and gives.

- a loss of its own, where the batch has labels;
- the mean negative log-likelihood of the next token, for language models;
- else the relative error of its outputs: ``‖y - r‖ / ‖r‖``, r what the float model gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import Padding, is_encoder_decoder
from .record import Recording
from .trees import tensors

NEXT_TOKEN, LABELS, OUTPUT = "loss", "loss on labels", "relative output error"

# What is in an output besides the output.
_ASIDE = ("loss", "hidden_states", "attentions", "cache", "past_key_values", "_weights")


def choose_measure(
    model: nn.Module, batches: list[Tensor | Mapping[str, Any]], recordings: list[Recording]
) -> str:
    """The measure for held-out batches, given a forward with a batch of its kind for each.

    Raises:
        ValueError: naming held_out and the batch, for one that no measure fits.
    """
    found = set()
    for number, (batch, recording) in enumerate(zip(batches, recordings, strict=True)):
        where = f"held_out: batch {number}"
        output = recording.output
        measure = _measure(model, recording.batch, output)
        if measure == LABELS:
            labels = _labels(batch)
            if not labels.is_floating_point() and not (labels != -100).any():
                raise ValueError(f"{where}: expected a label other than -100, got none")
        elif measure == NEXT_TOKEN:
            if not _counted(model, batch).any():
                shape = list(_known_ids(batch).shape)
                raise ValueError(f"{where}: expected at least 2 tokens in a row, got ids {shape}")
        elif not _outputs(output):
            raise ValueError(
                f"{where}: expected a model that gives tensors of floats, to compare with the "
                f"float model's, got {type(output).__name__}"
            )
        found.add(measure)
    return found.pop() if len(found) == 1 else OUTPUT


def loss(
    measure: str, model: nn.Module, batch: Tensor | Mapping[str, Any], output: Any, reference: Any
) -> tuple[float, float]:
    """A sum, and the number that it has to be divided by."""
    if measure == LABELS:
        labels = _labels(batch)
        count = labels.numel() if labels.is_floating_point() else int((labels != -100).sum())
        return _field(output, "loss").float().mean().item() * count, count
    if measure == NEXT_TOKEN:
        logits, counted = _field(output, "logits"), _counted(model, batch)
        target = _known_ids(batch)[:, 1:][counted].to(logits.device)
        flat = logits[:, :-1][counted.to(logits.device)].float()
        return F.cross_entropy(flat, target, reduction="sum").item(), target.numel()
    padding = Padding(batch, is_encoder_decoder(model, batch))
    errors = []
    for ours, theirs in zip(_outputs(output), _outputs(reference), strict=True):
        counted = _rows_that_count(padding, theirs)
        expected = theirs[counted].double()
        difference = ours[counted].double() - expected
        errors.append((difference.norm() / expected.norm().clamp_min(1e-30)).item())
    return sum(errors) / len(errors), 1


def divergence(
    model: nn.Module, batch: Tensor | Mapping[str, Any], output: Any, reference: Any
) -> Tensor:
    """How far an output is from the reference, differentiable.

    For language models that is the mean KL divergence of the distributions of the next token, in
    nats; else the squared error relative to the reference, averaged over the outputs.
    """
    logits, ids = _field(output, "logits"), _ids(batch)
    of_tokens = isinstance(logits, Tensor) and logits.dim() == 3 and ids is not None
    if of_tokens and logits.shape[:2] == _known_ids(batch).shape and _predicts_next(model, batch):
        counted = _counted(model, batch).to(logits.device)
        ours, theirs = (
            out[:, :-1][counted].float().log_softmax(-1)
            for out in (logits, _field(reference, "logits"))
        )
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    padding = Padding(batch, is_encoder_decoder(model, batch))
    errors = []
    for ours, theirs in zip(_outputs(output), _outputs(reference), strict=True):
        counted = _rows_that_count(padding, theirs)
        expected = theirs[counted].float()
        error = (ours[counted].float() - expected).square().sum()
        errors.append(error / expected.square().sum().clamp_min(1e-30))
    return torch.stack(errors).mean()


def _rows_that_count(padding: Padding, output: Tensor) -> Tensor:
    """bool, of the shape of an output: what is finite and no padding."""
    rows, counted = padding.rows(output, None, [], "", False), output.isfinite()
    if rows is None:
        return counted
    return counted & rows.to(output.device).view(*rows.shape, *[1] * (output.dim() - 2))


def _measure(model: nn.Module, batch: Tensor | Mapping[str, Any], output: Any) -> str:
    has_labels = isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor)
    if has_labels and isinstance(_field(output, "loss"), Tensor):
        return LABELS
    logits, ids = _field(output, "logits"), _ids(batch)
    if not isinstance(logits, Tensor) or ids is None or not _predicts_next(model, batch):
        return OUTPUT
    # A model that puts tokens of its own before those gives more logits than there are ids.
    return NEXT_TOKEN if logits.dim() == 3 and logits.shape[:2] == ids.shape else OUTPUT


def _predicts_next(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> bool:
    if is_encoder_decoder(model, batch):
        return isinstance(batch, Mapping) and "decoder_input_ids" in batch
    asked = getattr(model, "can_generate", None)
    return asked() if callable(asked) else True


def _ids(batch: Tensor | Mapping[str, Any]) -> Tensor | None:
    """The tokens that a language model predicts from those before."""
    ids = batch
    if isinstance(batch, Mapping):
        ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def _known_ids(batch: Tensor | Mapping[str, Any]) -> Tensor:
    """As `_ids`, of a batch that has them."""
    return cast(Tensor, _ids(batch))


def _labels(batch: Tensor | Mapping[str, Any]) -> Tensor:
    """Of a batch that has them."""
    return cast(Mapping[str, Tensor], batch)["labels"]


def _counted(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> Tensor:
    """bool ``[B, T - 1]``: the tokens to predict that are no padding."""
    ids = _known_ids(batch)
    padding = Padding(batch, is_encoder_decoder(model, batch))
    in_decoder = isinstance(batch, Mapping) and "decoder_input_ids" in batch
    for mask in padding.decoder if in_decoder else padding.main:
        if mask.shape == ids.shape:
            return (mask[:, 1:] & mask[:, :-1]).cpu()
    return torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _outputs(output: Any) -> list[Tensor]:
    """Tensors of floats that are the model's output."""
    if isinstance(output, Mapping):
        output = [v for key, v in output.items() if not key.endswith(_ASIDE)]
    return [t for t in tensors(output) if t.is_floating_point() and t.numel() > 1]
