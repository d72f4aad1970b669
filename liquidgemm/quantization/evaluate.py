"""How good a language model is: perplexity, and agreement with a reference model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
        log_r = _compatible(_log_probabilities(reference, window, first), log_p)
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


_SHORTEST_BAND = 512


@dataclass(frozen=True)
class ContextBand:
    """What `evaluate_context` measures of tokens with ``first`` to ``last`` tokens before them.

    Attributes:
        tokens: number of them.
        perplexity, reference_perplexity, agreement, mean_kl: as of `Evaluation`.
    """

    first: int
    last: int
    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    agreement: float | None = None
    mean_kl: float | None = None


@torch.no_grad()
def evaluate_context(
    model: nn.Module,
    windows: Iterable[Tensor],
    reference: nn.Module | None = None,
    chunk: int = 512,
    progress: bool = False,
) -> list[ContextBand]:
    """Perplexity by how many tokens come before: what a long context is worth, and what it loses.

    Each window is given to the models in chunks, with a cache of keys and values, so that logits of
    one chunk are there at a time.

    Args:
        model: a causal language model of ``transformers``.
        windows: int64 ``[1, T]``, all of one length of at least 2.
        reference: a model with the same vocabulary.
        chunk: tokens at a time.
        progress: show a progress bar.

    Returns:
        bands of 1 to 511 tokens before, 512 to 1023, 1024 to 2047 and so on, up to T - 1.

    Raises:
        ValueError: there are no windows, they are too short, of several lengths, or longer than a
            model has positions for; chunk is below 1; or the reference has another vocabulary.
    """
    windows = list(windows)
    lengths = {window.shape[1] for window in windows}
    if len(lengths) != 1 or min(lengths) < 2:
        got = f"lengths {sorted(lengths)}" if windows else "none"
        raise ValueError(f"windows: expected some of one length of at least 2, got {got}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    (length,) = lengths
    for each in (model, reference):
        positions = getattr(getattr(each, "config", None), "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise ValueError(
                f"windows: expected at most {positions} tokens, as {type(each).__name__} has "
                f"positions, got {length}"
            )
    firsts = [1, *_doubling(length)]
    # Sums of: loss, that of the reference, tokens with the same most likely one, divergence.
    sums = torch.zeros(len(firsts), 4, dtype=torch.float64)
    for window in tqdm(windows, desc="evaluating", disable=not progress):
        streams = [_stream(m, window, chunk) for m in (model, reference) if m is not None]
        before = 1  # tokens before the first one that the chunk predicts
        for log_p, *others in zip(*streams, strict=True):
            target = window[0, before : before + len(log_p)].to(log_p.device)
            values = torch.zeros(len(target), 4, dtype=torch.float64)
            values[:, 0] = F.nll_loss(log_p, target, reduction="none")
            for other in others:
                log_r = _compatible(other, log_p)
                values[:, 1] = F.nll_loss(log_r, target, reduction="none")
                values[:, 2] = log_p.argmax(1) == log_r.argmax(1)
                kl = F.kl_div(log_p, log_r, log_target=True, reduction="none")
                values[:, 3] = kl.sum(1)
            at = torch.arange(before, before + len(target))
            band = torch.bucketize(at, torch.tensor(firsts), right=True) - 1
            sums.index_add_(0, band, values)
            before += len(target)
    bands = []
    for first, stop, row in zip(firsts, [*firsts[1:], length], sums.tolist(), strict=True):
        count = (stop - first) * len(windows)
        loss, reference_loss, same, kl = (value / count for value in row)
        compared = (_exp(reference_loss), same, kl) if reference is not None else ()
        bands.append(ContextBand(first, stop - 1, count, _exp(loss), *compared))
    return bands


def _doubling(length: int) -> Iterator[int]:
    first = _SHORTEST_BAND
    while first < length:
        yield first
        first *= 2


def _stream(model: nn.Module, window: Tensor, chunk: int) -> Iterator[Tensor]:
    """Log-probabilities ``[<= chunk, V]`` of the tokens after each but the last."""
    device = next(t.device for t in (*model.parameters(), *model.buffers()))
    cache: Any = None
    for ids in window[:, :-1].split(chunk, dim=1):
        output = model(input_ids=ids.to(device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield F.log_softmax(output.logits[0].float(), dim=-1)


def _compatible(log_r: Tensor, log_p: Tensor) -> Tensor:
    """The reference's, on the device of the model's.

    Raises:
        ValueError: it has another vocabulary.
    """
    log_r = log_r.to(log_p.device)
    if log_r.shape != log_p.shape:
        raise ValueError(
            f"reference: expected the model's vocabulary of {log_p.shape[1]} tokens, "
            f"got one of {log_r.shape[1]}"
        )
    return log_r


def _exp(mean: float) -> float:
    """Of a broken model that is infinity, where `math.exp` would raise an OverflowError."""
    return torch.tensor(mean, dtype=torch.float64).exp().item()


def _log_probabilities(model: nn.Module, window: Tensor, first: int) -> Tensor:
    device = next(t.device for t in (*model.parameters(), *model.buffers()))
    logits = model(input_ids=window.to(device)).logits[0, first - 1 : -1]
    return F.log_softmax(logits.float(), dim=-1)
