"""Padding: which rows of a layer's input are no tokens.

A batch says it in its masks, and labels of -100 at the end of a row say it too. A layer sees rows
of the batch's sequence, of the sequence flattened, of an encoder's output, or of features at a
lower rate; where rows cannot be told apart all of them count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .trees import tensors

# 1 for what is a token; of torch's own ``key_padding_mask``, 1 for what is none.
_MASK = re.compile(r"(.*_)?(attention_mask|padding_mask|features?_mask|pixel_mask|input_mask)|mask")
_OTHER = ("global_attention_mask", "cross_attention_mask")  # these say something else
_DECODER = ("decoder_", "tgt_", "target_")
_HUGE = -1e3  # additive masks have less where nothing is to be attended to
_IGNORED = -100  # labels that do not count


class Padding:
    """The masks of one batch.

    Attributes:
        main: bool ``[B, S]`` each, the tokens of the model's or the encoder's sequence.
        decoder: the same of the decoder's.
    """

    def __init__(self, batch: Tensor | Mapping[str, Any], encoder_decoder: bool = False) -> None:
        self.encoder_decoder = encoder_decoder
        self.main: list[Tensor] = []
        self.decoder: list[Tensor] = []
        self._frames: set[int] = set()  # lengths of the axes of features
        if not isinstance(batch, Mapping):
            return
        said = {False: False, True: False}  # for the decoder or not: is there a mask?
        for key, value in batch.items():
            if (mask := token_mask(key, value)) is not None:
                in_decoder = encoder_decoder and key.startswith(_DECODER)
                said[in_decoder] = True
                (self.decoder if in_decoder else self.main).append(mask)
            elif isinstance(value, Tensor) and value.is_floating_point():
                self._frames |= {*value.shape[1:]}
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2 and not said[encoder_decoder]:
            counted = (labels != _IGNORED).flip(1).cumsum(1).flip(1) > 0
            (self.decoder if encoder_decoder else self.main).append(counted)
        self.main = [mask for mask in self.main if not mask.all()]
        self.decoder = [mask for mask in self.decoder if not mask.all()]

    @property
    def any(self) -> bool:
        return bool(self.main or self.decoder)

    def rows(
        self, x: Tensor, hidden: Tensor | None, others: list[Tensor], unit: str, decoder: bool
    ) -> Tensor | None:
        """Which rows of ``x [..., K]`` are tokens, as bool over its first axes; None for all.

        Args:
            x: the input of a layer in a unit.
            hidden: the unit's hidden state.
            others: the other tensors that the unit is given; x may be one of them.
            unit: the unit's name.
            decoder: whether it belongs to the decoder of an encoder-decoder.
        """
        if not self.any:
            return None
        foreign = any(x is other for other in others)
        own = hidden is None or not foreign
        if decoder and own and (hidden is None or _same_rows(x, hidden)):
            return _matching(self.decoder, x)
        found = _matching(self.main, x)
        if found is None and not decoder and hidden is not None and x.dim() >= 3:
            found = _from_arguments(others, x)
        if found is None and (foreign or not decoder):
            found = self._at_lower_rate(x, unit if not foreign else "encoder")
        return found

    def _at_lower_rate(self, x: Tensor, unit: str) -> Tensor | None:
        """For features of which the model makes fewer rows: the row of a frame that is one."""
        if x.dim() < 3 or not re.search("encoder|audio|speech|feature|tower", unit):
            return None
        for mask in self.main:
            frames, rows = mask.shape[1], x.shape[1]
            if frames in self._frames and mask.shape[0] == x.shape[0] and rows < frames:
                return mask[:, torch.arange(rows, device=mask.device) * frames // rows]
        return None


def token_mask(key: str, value: Any) -> Tensor | None:
    """An argument of a model as bool ``[B, S]``, 1 for tokens; None if it is no such mask."""
    if not (isinstance(value, Tensor) and value.dim() == 2 and _MASK.fullmatch(key)):
        return None
    if key.endswith(_OTHER):
        return None
    mask = value >= 0 if value.is_floating_point() and (value < 0).any() else value.bool()
    # torch's are 1 for padding, those of transformers 1 for tokens. The longest row of a batch has
    # no padding.
    if value.dtype != torch.bool or not key.endswith("padding_mask"):
        return mask
    return ~mask if key.endswith("key_padding_mask") or not mask.all(1).any() else mask


def _same_rows(x: Tensor, hidden: Tensor) -> bool:
    rows = hidden.shape[:-1].numel()
    return x.shape[:2] == hidden.shape[:2] or (x.dim() == 2 and len(x) == rows)


def _matching(masks: list[Tensor], x: Tensor) -> Tensor | None:
    for mask in masks:
        if x.dim() >= 3 and x.shape[:2] == mask.shape:
            return mask
        if x.dim() >= 3 and x.shape[:2] == mask.T.shape:  # the sequence comes first
            return mask.T
        if x.dim() == 2 and len(x) == mask.numel():
            return mask.flatten()
    return None


def _from_arguments(others: list[Tensor], x: Tensor) -> Tensor | None:
    """From a mask ``[B, 1, Q, S]`` that the model has made: what some query attends to."""
    for mask in others:
        if mask.dim() != 4 or mask.shape[-1] != x.shape[1] or mask.shape[0] != x.shape[0]:
            continue
        if mask.dtype == torch.bool:
            return mask.flatten(1, 2).any(1)
        if mask.is_floating_point() and (mask < _HUGE).any():
            return (mask > _HUGE).flatten(1, 2).any(1)
    return None


def is_encoder_decoder(model: Any, batch: Tensor | Mapping[str, Any]) -> bool:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return True
    return isinstance(batch, Mapping) and any(key.startswith(_DECODER) for key in batch)


def others_of(args: tuple, kwargs: Mapping[str, Any], hidden: Tensor | None) -> list[Tensor]:
    return [t for t in tensors((args, dict(kwargs))) if t is not hidden]
