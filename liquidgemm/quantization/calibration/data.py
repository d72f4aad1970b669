"""Calibration data: texts, batches of tokens, or whatever else a model takes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .masks import token_mask
from .trees import tensors

TEXT_WINDOW = 1024


def token_windows(
    texts: Iterable[str], tokenizer: Any, length: int = TEXT_WINDOW, limit: int | None = None
) -> list[Tensor]:
    """Texts, one after the other, as windows of tokens: int64 ``[1, length]`` each.

    What is left at the end is dropped, unless it is all there is.

    Args:
        texts: any number of texts.
        tokenizer: called with a text, gives ``input_ids``, as those of transformers do.
        length: tokens in a window.
        limit: about how many tokens to keep, in windows spread evenly; all of them if None.
    """
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    tokens = torch.tensor(ids, dtype=torch.int64)
    if len(tokens) < length:
        return [tokens.unsqueeze(0)] if len(tokens) else []
    windows = list(tokens[: len(tokens) // length * length].view(-1, 1, length))
    if limit is None or limit >= len(windows) * length:
        return windows
    chosen = torch.linspace(0, len(windows) - 1, max(1, limit // length)).long().tolist()
    return [windows[i] for i in chosen]


def text_window(tokenizer: Any, model: nn.Module | None) -> int:
    """Tokens in a window of text: `TEXT_WINDOW`, or what the model and its tokenizer take."""
    limits = (
        getattr(getattr(model, "config", None), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    )
    return min([TEXT_WINDOW, *(n for n in limits if isinstance(n, int) and n > 0)])


def as_batches(
    data: Iterable[Any],
    tokenizer: Any = None,
    argument: str = "calibration",
    model: nn.Module | None = None,
) -> list[Tensor | Mapping[str, Any]]:
    """Batches as they are, and texts as windows of tokens.

    Args:
        data: tensors, mappings of the model's arguments, or texts.
        tokenizer: for texts.
        argument: what errors call the data.
        model: what takes them, if they are to be checked against it.

    Raises:
        ValueError, TypeError: naming the argument: there is nothing in it, a text but no
            tokenizer or a model that takes no tokens, an item of another kind, or a batch that
            `check_batches` refuses.
    """
    if isinstance(data, str | bytes | Tensor | Mapping):
        raise TypeError(
            f"{argument}: expected an iterable of token batches or texts, "
            f"got one {type(data).__name__}: put it in a list"
        )
    batches: list[Tensor | Mapping[str, Any]] = []
    texts: list[str] = []
    for item in data:
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, Tensor):
            batches.append(item)
        elif isinstance(item, Mapping) and all(map(_is_argument, item.values())):
            batches.append({key: value for key, value in item.items() if value is not None})
        else:
            raise TypeError(
                f"{argument}: expected tensors, mappings of tensors or texts, got {_kinds(item)}"
            )
    main_input = getattr(model, "main_input_name", None)
    if model is not None and texts and main_input not in (None, "input_ids"):
        raise ValueError(
            f"{argument}: expected mappings with {main_input!r}, as {_call(model)} takes, got texts"
        )
    if texts and tokenizer is None:
        raise ValueError(f"tokenizer: expected one, as {argument} holds texts, got None")
    if texts:
        batches += token_windows(texts, tokenizer, text_window(tokenizer, model))
    if not batches:
        raise ValueError(f"{argument}: expected at least one batch or text, got none")
    if model is not None:
        check_batches(model, batches, argument)
    return batches


def digest(batches: Iterable[Tensor | Mapping[str, Any]]) -> str:
    """A hash of all that batches hold."""
    total = hashlib.sha256()
    for batch in batches:
        items = sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]
        for name, value in items:
            if not isinstance(value, Tensor | list | tuple):
                total.update(f"{name} {value!r}".encode())
            for part in tensors(value):
                tensor = part.detach().cpu().contiguous()
                total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                total.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()


def _is_argument(value: Any) -> bool:
    """A tensor, tensors, or a setting of the model's forward."""
    if isinstance(value, list | tuple):
        return all(isinstance(item, Tensor) for item in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _kinds(item: Any) -> str:
    if not isinstance(item, Mapping):
        return type(item).__name__
    wrong = {k: type(v).__name__ for k, v in item.items() if not _is_argument(v)}
    return f"a mapping with {wrong}"


def check_batches(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], argument: str
) -> None:
    """What can be said of batches before the model is run.

    Raises:
        ValueError: naming the argument and the batch: nothing in it, nothing but padding, a NaN or
            an infinity, or tokens for a model that takes features.
    """
    wanted = getattr(model, "main_input_name", None)
    for number, batch in enumerate(batches):
        where = f"{argument}: batch {number}"
        items = batch.items() if isinstance(batch, Mapping) else [("", batch)]
        named = wanted not in (None, "input_ids")
        if named and isinstance(batch, Tensor) and not batch.is_floating_point():
            raise ValueError(
                f"{where}: expected a mapping with {wanted!r}, as {_call(model)} takes, got a "
                f"tensor of {batch.dtype}, as texts give"
            )
        for key, value in items:
            for tensor in tensors(value):
                if not tensor.numel():
                    shape = list(tensor.shape)
                    raise ValueError(f"{where}: expected data, got {key or 'a tensor'} of {shape}")
                floats = tensor.is_floating_point() and "mask" not in key
                if floats and not tensor.isfinite().all():
                    raise ValueError(
                        f"{where}: expected finite numbers, got a NaN or an infinity"
                        + (f" in {key}" if key else "")
                    )
            mask = token_mask(key, value)
            if mask is not None and not mask.any():
                raise ValueError(f"{where}: expected a token that is no padding, got none in {key}")


class OtherWay(ValueError):
    """A batch goes another way through the model than others of its kind."""


@contextmanager
def running(model: nn.Module, batch: Tensor | Mapping[str, Any], where: str) -> Iterator[None]:
    """Around a run of the float model: its own errors with what was given and what it takes.

    Raises:
        ValueError: in place of whatever the model raises.
    """
    try:
        yield
    except (torch.OutOfMemoryError, OtherWay):
        raise
    except Exception as error:
        if isinstance(batch, Mapping):
            got = ", ".join(f"{key} {_shape(value)}" for key, value in batch.items())
        else:
            got = f"a tensor {_shape(batch)}"
        raise ValueError(
            f"{where}: expected what {_call(model)} takes, got {got}; "
            f"it raises {type(error).__name__}: {error}"
        ) from error


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)


def _call(model: nn.Module) -> str:
    """``Model.forward(its arguments)``."""
    names = [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]
    main = getattr(model, "main_input_name", None)
    said = f", whose main input is {main!r}," if main else ""
    return f"{type(model).__name__}.forward({', '.join(names)}){said}"
