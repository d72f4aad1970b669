"""Calibration data: texts or batches of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

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


def as_batches(
    data: Iterable[Any], tokenizer: Any = None, argument: str = "calibration"
) -> list[Tensor | dict[str, Tensor]]:
    """Batches of tokens as they are, and texts as windows of tokens.

    Raises:
        ValueError, TypeError: naming the argument: there is nothing in it, a text but no
            tokenizer, or an item of another kind.
    """
    if isinstance(data, str | bytes | Tensor | Mapping):
        raise TypeError(
            f"{argument}: expected an iterable of token batches or texts, "
            f"got one {type(data).__name__}: put it in a list"
        )
    batches: list[Tensor | dict[str, Tensor]] = []
    texts: list[str] = []
    for item in data:
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, Tensor):
            batches.append(item)
        elif isinstance(item, Mapping) and all(isinstance(v, Tensor) for v in item.values()):
            batches.append(dict(item))
        else:
            raise TypeError(
                f"{argument}: expected tensors, mappings of tensors or texts, "
                f"got {type(item).__name__}"
            )
    if texts and tokenizer is None:
        raise ValueError(f"tokenizer: expected one, as {argument} holds texts, got None")
    if texts:
        batches += token_windows(texts, tokenizer)
    if not batches:
        raise ValueError(f"{argument}: expected at least one batch or text, got none")
    return batches


def digest(batches: Iterable[Tensor | Mapping[str, Tensor]]) -> str:
    """A hash of all tensors in batches."""
    total = hashlib.sha256()
    for batch in batches:
        items = sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]
        for name, value in items:
            tensor = value.detach().cpu().contiguous()
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()
