"""Which layers of a float checkpoint an engine quantizes while it loads them."""

import pytest
import torch

from liquidgemm import LiquidConfig
from liquidgemm.integrations.serving.online import (
    check_experts,
    check_online,
    left_in_floats,
    quantized,
)

QKV = ["a.q_proj", "a.k_proj", "a.v_proj"]


def test_what_stays_in_floats_says_why():
    config = LiquidConfig(skip=["o_proj"], augment={"q_proj": 64, "k_proj": 64, "v_proj": 64})
    assert left_in_floats(config, "a.qkv_proj", QKV, 192, 256) is None
    assert left_in_floats(config, "a.gate", ["a.gate"], 128, 256) == "it chooses experts"
    assert left_in_floats(config, "a.score", ["a.score"], 63, 256) == "fewer than 64 rows"
    reason = left_in_floats(config, "a.o_proj", ["a.o_proj"], 64, 256)
    assert reason == "matches the pattern 'o_proj'"


@pytest.mark.parametrize(
    "fields",
    [
        {"keep": ["k_proj"]},
        {"augment": {"q_proj": 64}},
        {"skip": ["v_proj"]},
        {"bits": {"k_proj": 6}},
        {"bits": {"k_proj": 6, "*": 8}},
    ],
)
def test_layers_of_one_product_are_treated_alike(fields):
    with pytest.raises(ValueError, match=r"a\.qkv_proj: expected a\.q_proj, .* treated alike"):
        left_in_floats(LiquidConfig(**fields), "a.qkv_proj", QKV, 192, 256)


@pytest.mark.parametrize(("bits", "block_bytes"), [(4, 2176), (6, 3200), (8, 4096)])
def test_a_layer_has_the_bits_of_its_pattern(bits, block_bytes):
    weight = torch.randn(192, 256)
    packed = quantized(weight, LiquidConfig(bits={"a.*": bits}), QKV)
    assert packed.weight.shape == (3, 4, block_bytes)
    assert packed.gather is None


def test_what_needs_more_than_one_layer_is_refused():
    check_online(LiquidConfig(augment=64, keep=["down_proj"], bits={"o_proj": 6}))
    for fields, name in (
        ({"smooth": True}, "smooth"),
        ({"method": "gptq"}, "method"),
        ({"budget": 5.0}, "budget"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            check_online(LiquidConfig(**fields))


def test_experts_have_four_bits_alone():
    for bits in ({}, {"*experts": 4, "*": 6}, {"down_proj": 8}):
        check_experts(LiquidConfig(bits=bits, keep=["*"]), "a.experts")
    with pytest.raises(ValueError, match=r"bits: expected 4 for a\.experts, .*got 6"):
        check_experts(LiquidConfig(bits={"*": 6}), "a.experts")
