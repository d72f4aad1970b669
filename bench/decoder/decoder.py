"""A lean decoder of the Llama family: the same for all formats but for what `formats` says."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache, rotations
from .formats import Format, head_of
from .sizes import Sizes

_TABLE, _NORMS = 10**6, 10**7  # seeds
PARTS = frozenset({"linear", "attention", "head"})


def random_weight(n: int, k: int, seed: int, device: torch.device) -> Tensor:
    """bf16 ``[n, k]`` of variance 1 / k, so that activations stay of order 1."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(n, k, dtype=torch.bfloat16, device=device)
    return weight.normal_(std=k**-0.5, generator=generator)


class Decoder:
    """One model of random weights in one format.

    Args:
        head: "bf16" or "8bit".
    """

    def __init__(self, sizes: Sizes, form: Format, head: str, device: torch.device) -> None:
        self.sizes, self.form, self.device = sizes, form, device
        self.head_form = head_of(form, head)
        self.layers = [
            {name: form.hold(weight) for name, weight in self._weights(index)}
            for index in range(sizes.layers)
        ]
        self.norms = [self._norm(index) for index in range(2 * sizes.layers + 1)]
        table = random_weight(sizes.vocabulary, sizes.hidden, _TABLE, device)
        # Tied, as far as numbers go: the head has a copy in its own format.
        self.embeddings = table * sizes.hidden**0.5
        self.head = self.head_form.hold(table)

    def with_head(self, head: str) -> Decoder:
        """The same layers with a head in another format."""
        other = copy.copy(self)
        other.head_form = head_of(self.form, head)
        table = random_weight(self.sizes.vocabulary, self.sizes.hidden, _TABLE, self.device)
        other.head = other.head_form.hold(table)
        return other

    def as_format(self, form: Format) -> Decoder:
        """The same weights, which another format takes as they are."""
        other = copy.copy(self)
        other.form = form
        if self.head_form.name != Format.name:
            other.head_form = head_of(form, "8bit")
        return other

    def _weights(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        for index, (name, (n, k)) in enumerate(self.sizes.linears.items()):
            yield name, random_weight(n, k, 4 * layer + index, self.device)

    def _norm(self, index: int) -> Tensor:
        noise = random_weight(1, self.sizes.hidden, _NORMS + index, self.device)[0]
        return 1 + 3 * noise

    @property
    def weight_bytes(self) -> int:
        """Of what a step reads of layers and head."""
        held = sum(self.form.nbytes(one) for layer in self.layers for one in layer.values())
        return held + self.head_form.nbytes(self.head)

    def first_tokens(self, batch: int) -> Tensor:
        """Ids ``[batch]``; a step writes the next ones in their place."""
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randint(
            self.sizes.vocabulary, (batch,), generator=generator, device=self.device
        )

    def step(
        self, ids: Tensor, cache: Cache, parts: frozenset[str] = PARTS, write: bool = True
    ) -> Tensor:
        """Logits ``[B, vocabulary]`` of one token per sequence; the most likely go to ids.

        Args:
            ids: int64 ``[B]``.
            parts: what is computed of attention and head; without "attention" its output is q.
            write: whether ids are written.
        """
        x, h = F.embedding(ids, self.embeddings), None
        form = self.form
        for index, layer in enumerate(self.layers):
            tokens, h = form.norm(x, self.norms[2 * index], h)
            q = cache.write(index, form.linear(tokens, layer["qkv"]))
            a = cache.attend(index, q) if "attention" in parts else q.flatten(1)
            x = form.linear(form.tokens(a), layer["o"])
            tokens, h = form.norm(x, self.norms[2 * index + 1], h)
            x = form.linear(form.silu_mul(form.linear(tokens, layer["gate_up"])), layer["down"])
        tokens, h = self.head_form.norm(x, self.norms[-1], h)
        if "head" not in parts:
            return h
        logits = self.head_form.linear(tokens, self.head)
        if write:
            ids.copy_(self.form.elementwise.greedy(logits))
        return logits

    def linears(self, batch: int) -> list:
        """Functions without arguments that run the products of a step alone, each on tokens of its
        own, made here."""
        generator = torch.Generator(self.device).manual_seed(3)

        def row(width: int) -> Tensor:
            empty = torch.empty(batch, width, dtype=torch.bfloat16, device=self.device)
            return empty.normal_(generator=generator)

        form, sizes = self.form, self.sizes
        hidden, _ = form.norm(row(sizes.hidden), self.norms[0], None)
        inputs = {
            "qkv": hidden,
            "o": form.tokens(row(sizes.heads * sizes.head_dim)),
            "gate_up": hidden,
            "down": form.silu_mul(row(2 * sizes.intermediate)),
        }
        return [
            lambda held=held, tokens=inputs[name]: form.linear(tokens, held)
            for layer in self.layers
            for name, held in layer.items()
        ]

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits ``[B, vocabulary]`` of the last token of whole sequences ``[B, T]``."""
        batch, length = ids.shape
        sizes, form = self.sizes, self.form
        cos, sin = rotations(sizes.head_dim, length, self.device)
        x, h = F.embedding(ids.flatten(), self.embeddings), None
        for index, layer in enumerate(self.layers):
            tokens, h = form.norm(x, self.norms[2 * index], h)
            qkv = form.linear(tokens, layer["qkv"])
            q, k, v = form.elementwise.rope_sequence(
                qkv, cos, sin, batch, sizes.heads, sizes.kv_heads
            )
            a = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=sizes.heads != sizes.kv_heads
            )
            a = a.transpose(1, 2).flatten(2).flatten(0, 1)
            x = form.linear(form.tokens(a), layer["o"])
            tokens, h = form.norm(x, self.norms[2 * index + 1], h)
            x = form.linear(form.silu_mul(form.linear(tokens, layer["gate_up"])), layer["down"])
        last = slice(length - 1, None, length)
        tokens, _ = self.head_form.norm(x[last], self.norms[-1], h[last])
        return self.head_form.linear(tokens, self.head)
