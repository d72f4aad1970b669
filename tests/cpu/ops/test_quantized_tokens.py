"""Quantized tokens in layers: the same bits as of x itself, in one graph, as a pytree."""

import pytest
import reference
import torch
from test_ops import FLOATS

from liquidgemm import (
    LiquidLinear,
    MergedLinear,
    QuantizedTokens,
    glu_quantize,
    quantize_activation,
    rms_norm_quantize,
)


def layer(in_features: int, out_features: int, augment: int = 0) -> LiquidLinear:
    generator = torch.Generator().manual_seed(out_features)
    made = LiquidLinear(in_features, out_features, dtype=torch.bfloat16, augment=augment)
    state = made.state_dict()
    groups = state["qscale"].shape[1]
    logical = reference.random_logical(out_features, groups * 64, seed=out_features)
    state.update(zip(("qweight", "qscale", "qoffset"), logical, strict=True))
    state["scale"] = torch.rand(out_features, generator=generator)
    state["bias"] = torch.randn(out_features, generator=generator).bfloat16()
    if augment:
        columns = torch.randint(0, in_features, (augment,), generator=generator)
        state["columns"] = columns.to(torch.int32)
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("augment", [0, 64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_takes_tokens(dtype, augment):
    """The same bits as of x itself, with residual columns as well, and the dtype of x."""
    linear = layer(100, 64, augment)
    merged = MergedLinear((layer(100, 64, augment), layer(100, 64, augment)))
    x = torch.randn(2, 3, 100).to(dtype)
    tokens = QuantizedTokens(*quantize_activation(x), x.dtype)
    for module in (linear, merged):
        assert not isinstance(module, MergedLinear) or module.is_merged
        reference.assert_same(module(tokens), module(x))
    linear.out_dtype = torch.float32
    reference.assert_same(linear(tokens), linear(x))


def test_what_a_layer_does_not_take():
    """CHECKLIST 24, 28."""
    linear = layer(100, 64)
    x8, scale = quantize_activation(torch.randn(2, 99))
    with pytest.raises(RuntimeError, match=r"x: expected K = 100 .* got shape \[2, 99\]"):
        linear(QuantizedTokens(x8, scale, torch.float32))
    x8, scale = quantize_activation(torch.randn(2, 100))
    with pytest.raises(RuntimeError, match=r"x.dtype: expected float32, .* got torch.int8"):
        linear(QuantizedTokens(x8, scale, torch.int8))
    with pytest.raises(RuntimeError, match=r"x_scale: expected shape \[2\]"):
        linear(QuantizedTokens(x8, scale[:1], torch.float32))
    with pytest.raises(TypeError, match=r"x: expected a Tensor or QuantizedTokens, got tuple"):
        linear((x8, scale))


class Block(torch.nn.Module):
    """The linear half of a decoder layer, fused or not."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = layer(64, 256)
        self.down = layer(128, 64)
        self.norm = torch.nn.Parameter(torch.rand(64))

    def forward(self, x, residual):
        tokens, h, _ = rms_norm_quantize(x, self.norm, 1e-6, residual)
        tokens, _ = glu_quantize(self.gate_up(tokens))
        return self.down(tokens), h

    def unfused(self, x, residual):
        _, h, y = rms_norm_quantize(x, self.norm, 1e-6, residual, return_y=True)
        _, y = glu_quantize(self.gate_up(y), return_y=True)
        return self.down(y), h


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@torch.no_grad()
def test_a_block_compiles(backend):
    """CHECKLIST 18: in one graph, with the carrier in it, for any number of tokens."""
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for m in (3, 5):
        x, residual = torch.randn(m, 64).bfloat16(), torch.randn(m, 64).bfloat16()
        expected = block.unfused(x, residual)
        for got in (block(x, residual), compiled(x, residual)):
            for part, whole in zip(got, expected, strict=True):
                reference.assert_same(part, whole, m=m)


def test_tokens_are_a_pytree():
    """CHECKLIST 27: hooks and walkers find the tensors, and give back the same kind."""
    tokens = QuantizedTokens(*quantize_activation(torch.randn(2, 8)), torch.float32)
    double = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t + t, tokens)
    assert type(double) is QuantizedTokens
    reference.assert_same(double.scale, 2 * tokens.scale)
    assert (tokens.shape, tokens.device) == ((2, 8), torch.device("cpu"))
    seen = []
    linear = layer(8, 64)
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    linear(tokens)
    assert seen[0] is tokens
