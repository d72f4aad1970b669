"""Rotation of the residual stream, folded into the weights (QuaRot, arXiv 2404.00456).

RMSNorm without a gain commutes with an orthogonal matrix Q. So gains go into the linears after the
norms; embeddings and everything that writes to the stream are multiplied by Q, everything that
reads from it by Qᵀ, and the model computes what it did, on a stream without outliers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, cast

import torch
from torch import Tensor, nn

from ...nn._modules import linear_at
from ..config import LiquidConfig
from .units import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def random_hadamard(size: int, seed: int, device: torch.device | None = None) -> Tensor:
    """A random orthogonal matrix ``[size, size]``, float64: signs times Hadamard times signs.

    What is left of a size without its powers of two is a random orthogonal factor (Kronecker
    product).
    """
    generator = torch.Generator().manual_seed(seed)
    two = size & -size
    cpu = torch.device("cpu")  # like the generator, whatever the default device is
    h = torch.ones(1, 1, dtype=torch.float64, device=cpu)
    while len(h) < two:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    rest = size // two
    if rest > 1:
        factor = torch.randn(rest, rest, generator=generator, dtype=torch.float64, device=cpu)
        h = torch.kron(torch.linalg.qr(factor).Q.contiguous(), h)
    left, right = (
        torch.randint(0, 2, (size,), generator=generator, device=cpu) * 2.0 - 1 for _ in range(2)
    )
    return (h / two**0.5 * left.unsqueeze(1) * right).to(device)


@torch.no_grad()
def rotate_(model: nn.Module, config: LiquidConfig) -> None:
    """Rotate a model in place; what it computes stays the same but for rounding.

    Tied embeddings are untied: the gain of the last norm goes into lm_head alone. Nothing is done
    if the config asks for no rotation.

    Raises:
        ValueError: the model is not of the Llama family; nothing has been changed.
    """
    if not (config.rotate or config.rotate_heads):
        return
    blocks = [model.get_submodule(name) for name in _llama_blocks(model)]
    if config.rotate:
        _rotate_stream(model, blocks, config.seed)
    if config.rotate_heads:
        for block in blocks:
            _rotate_heads(block.get_submodule("self_attn"), config.seed)


def _llama_blocks(model: PreTrainedModel) -> list[str]:
    def refuse(why: str) -> NoReturn:
        raise ValueError(f"rotate: expected a model of the Llama family, got one {why}")

    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    names = find_blocks(model, linears)
    wanted = {name for group in _READERS.values() for name in group} | {*_WRITERS}
    for name in names:
        modules = dict(model.get_submodule(name).named_modules())
        if missing := sorted(n for n in wanted if type(modules.get(n)) is not nn.Linear):
            refuse(f"without {missing[0]} in {name or 'it'}")
        # A third norm would work on the branches, and no rotation passes through its gain.
        norms = [n for n in modules if "norm" in n and "." not in n]
        if sorted(norms) != sorted(_READERS):
            refuse(f"with the norms {norms} in {name}")
        for norm in _READERS:
            if "RMSNorm" not in type(modules[norm]).__name__:
                refuse(f"whose {norm} is a {type(modules[norm]).__name__}")
            if "Gemma" in type(modules[norm]).__name__:
                refuse("whose embeddings are scaled")
    if _final_gain(model) is None or not hasattr(model, "get_output_embeddings"):
        refuse("without a final norm and lm_head")
    if type(model.get_output_embeddings()) is not nn.Linear:
        refuse("without an lm_head")
    return names


def _final_gain(model: PreTrainedModel) -> Tensor | None:
    return getattr(getattr(getattr(model, "model", None), "norm", None), "weight", None)


def _rotate_stream(model: PreTrainedModel, blocks: list[nn.Module], seed: int) -> None:
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    last = model.get_parameter("model.norm.weight")
    q = random_hadamard(embed.weight.shape[1], seed)
    if head.weight is embed.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        model.config.tie_word_embeddings = False
    _read(head, q, last)
    last.fill_(1)
    embed.weight.copy_(_product(embed.weight.double(), q))
    for block in blocks:
        for name, readers in _READERS.items():
            gain = block.get_parameter(f"{name}.weight")
            for reader in readers:
                _read(linear_at(block, reader), q, gain)
            gain.fill_(1)
        for name in _WRITERS:
            linear = linear_at(block, name)
            linear.weight.copy_(_product(q.T, linear.weight.double()))
            if linear.bias is not None:
                linear.bias.copy_(_product(linear.bias.double(), q))


def _read(linear: nn.Linear, q: Tensor, gain: Tensor) -> None:
    linear.weight.copy_(_product(linear.weight.double() * gain.double(), q))


def _product(a: Tensor, b: Tensor) -> Tensor:
    device = a.device if a.device.type != "cpu" else b.device
    return a.to(device) @ b.to(device)


def _rotate_heads(attention: nn.Module, seed: int) -> None:
    size = cast(int, attention.head_dim)
    q = random_hadamard(size, seed + 1)
    v, o = linear_at(attention, "v_proj"), linear_at(attention, "o_proj")
    weight = v.weight.double().unflatten(0, (-1, size))
    v.weight.copy_(torch.einsum("hdk,de->hek", weight, q.to(weight.device)).flatten(0, 1))
    if v.bias is not None:
        bias = v.bias.double().unflatten(0, (-1, size))
        v.bias.copy_((bias @ q.to(bias.device)).flatten())
    columns = o.weight.double().unflatten(1, (-1, size))
    o.weight.copy_((columns @ q.to(columns.device)).flatten(1))
