"""Compiles a quantized block, and shows that results are the same bits at any number of tokens.

python examples/compiled_layer.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import liquidgemm


class Block(nn.Module):
    """A gated MLP, as in the Llama family."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args(arguments)

    on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    device = "cuda" if on_hopper else "cpu"
    torch.manual_seed(0)
    block = Block(options.hidden, options.inner).to(device)
    liquidgemm.quantize_(block, progress=False)
    # One graph without breaks, for every number of tokens.
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=options.backend)

    x = torch.randn(64, options.hidden, device=device)
    layer = block.up
    together = layer(x)
    for tokens in (1, 7, 64):
        if not torch.equal(layer(x[:tokens]), together[:tokens]):
            raise SystemExit(f"{tokens} tokens alone differ from the same ones among 64")
        error = (compiled(x[:tokens]) - block(x[:tokens])).abs().max().item()
        print(
            f"{tokens:2} tokens on {device}: the layer is exact; compiled block off by {error:.1e}"
        )


if __name__ == "__main__":
    main()
