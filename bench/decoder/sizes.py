"""The models whose decode steps are measured: sizes alone, weights are random."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """A decoder of the Llama family."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_dim: int = 128

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``[N, K]`` of the products of one layer, q/k/v and gate/up as one each."""
        width = self.heads * self.head_dim
        return {
            "qkv": (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, width),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def weights(self) -> int:
        """Of all layers, without embeddings and head."""
        return self.layers * sum(n * k for n, k in self.linears.values())

    @property
    def kv_values(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def with_layers(self, layers: int | None) -> Sizes:
        """The same with fewer layers, where a whole model would take too long."""
        return self if layers is None else replace(self, layers=min(layers, self.layers))


MODELS = {
    one.name: one
    for one in (
        Sizes("llama1-30b", 6656, 60, 52, 52, 17920, 32000),
        Sizes("llama2-7b", 4096, 32, 32, 32, 11008, 32000),
        Sizes("llama2-13b", 5120, 40, 40, 40, 13824, 32000),
        Sizes("llama2-70b", 8192, 80, 64, 8, 28672, 32000),
        Sizes("llama3-8b", 4096, 32, 32, 8, 14336, 128256),
        Sizes("mistral-7b", 4096, 32, 32, 8, 14336, 32000),
        Sizes("yi-34b", 7168, 60, 56, 8, 20480, 64000),
        Sizes("tiny", 128, 2, 4, 2, 192, 256, head_dim=64),  # for the tests
    )
}


def parse_models(text: str) -> list[Sizes]:
    """Models of a comma-separated list of names, each once, in order.

    Raises:
        ValueError: an unknown name.
    """
    names = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in MODELS:
            raise ValueError(f"{name!r} is none of {', '.join(MODELS)}")
    if not names:
        raise ValueError("no models given")
    return [MODELS[name] for name in names]
