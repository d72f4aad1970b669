"""How good a language model is: perplexity, and agreement with a reference model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measures; the last four are None without a reference.

    Attributes:
        tokens: number of tokens that were predicted.
        perplexity: exp of their mean negative log-likelihood.
        reference_perplexity: that of the reference model.
        agreement: fraction of tokens for which both models find the same token most likely.
        mean_kl, p99_kl: mean and 99th percentile over tokens of KL(reference || model), in nats.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    agreement: float | None = None
    mean_kl: float | None = None
    p99_kl: float | None = None


def sliding_windows(tokens: Tensor, length: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Windows ``[1, <= length]`` over ``tokens [T]``, ``stride`` apart, and what is new in each.

    The second value is the index, in the window, of the first token that no window before has
    predicted. So every token but the first is predicted once, given at least ``length - stride``
    tokens before it where there are that many.

    Raises:
        ValueError: length < 2, stride not in 1..length - 1, or fewer than 2 tokens.
    """
    if length < 2 or not 1 <= stride < length:
        raise ValueError(f"stride: expected 1 to length - 1, got {stride} for length {length}")
    if len(tokens) < 2:
        raise ValueError(f"tokens: expected at least 2, got {len(tokens)}")
    done = 1
    for start in range(0, len(tokens), stride):
        stop = min(start + length, len(tokens))
        if stop > done:
            yield tokens[start:stop].unsqueeze(0), done - start
        done = stop
        if stop == len(tokens):
            return


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Iterable[tuple[Tensor, int]],
    reference: nn.Module | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run a model, and a reference model, over the windows of `sliding_windows`.

    Args:
        model: called with ``input_ids [1, T]``, its output has ``logits [1, T, V]``.
        windows: int64 ``[1, T]`` and the index of the first token that counts, at least 1.
        reference: a model with the same vocabulary; where it is does not matter.
        progress: show a progress bar.

    Raises:
        ValueError: there are no windows, or the reference has another vocabulary.
    """
    loss = reference_loss = 0.0
    same, divergences, count = 0, [], 0
    for window, first in tqdm(list(windows), desc="evaluating", disable=not progress):
        log_p = _log_probabilities(model, window, first)
        target = window[0, first:].to(log_p.device)
        loss += F.nll_loss(log_p, target, reduction="sum").item()
        count += len(target)
        if reference is None:
            continue
        log_r = _log_probabilities(reference, window, first).to(log_p.device)
        if log_r.shape != log_p.shape:
            raise ValueError(
                f"reference: expected the model's vocabulary of {log_p.shape[1]} tokens, "
                f"got one of {log_r.shape[1]}"
            )
        reference_loss += F.nll_loss(log_r, target, reduction="sum").item()
        same += int((log_p.argmax(1) == log_r.argmax(1)).sum())
        divergences.append(F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(1).cpu())
    if count == 0:
        raise ValueError("windows: expected at least one, got none")
    if reference is None:
        return Evaluation(count, _exp(loss / count))
    kl = torch.cat(divergences).double()
    return Evaluation(
        count,
        _exp(loss / count),
        _exp(reference_loss / count),
        same / count,
        kl.mean().item(),
        kl.quantile(0.99).item(),
    )


def _exp(mean: float) -> float:
    """Of a broken model that is infinity, where `math.exp` would raise an OverflowError."""
    return torch.tensor(mean, dtype=torch.float64).exp().item()


def _log_probabilities(model: nn.Module, window: Tensor, first: int) -> Tensor:
    device = next(t.device for t in (*model.parameters(), *model.buffers()))
    logits = model(input_ids=window.to(device)).logits[0, first - 1 : -1]
    return F.log_softmax(logits.float(), dim=-1)
