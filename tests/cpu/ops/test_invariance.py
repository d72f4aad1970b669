"""Batch invariance of the layers of a whole model, on the CPU; tests/stress has a real one."""

import pytest
import torch
from invariance import batch_around, calls_of_row, changed_kinds, changed_layers

import liquidgemm


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers", reason="there is no model without it")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    liquidgemm.quantize_(model, progress=False)
    return model


def test_layers_do_not_notice_the_batch(model) -> None:
    """CHECKLIST 9."""
    prompt = torch.arange(7) * 5 % 64
    for size in (2, 5):
        ids, row = batch_around(prompt, size, 64)
        assert torch.equal(ids[row], prompt)
        calls, logits = calls_of_row(model, ids, row)
        assert logits.shape == (1, 7, 64)
        assert changed_layers(model, calls) == []
        alone, _ = calls_of_row(model, prompt[None], 0)
        kinds = changed_kinds(model, alone, calls)
        assert kinds.get("LiquidLinear", (0, 0))[1] == 0
        assert "LlamaAttention" in kinds


def test_a_layer_that_notices_is_named(model) -> None:
    """CHECKLIST 9: the check itself, with a layer that adds the size of the batch."""
    layer = model.model.layers[1].mlp.up_proj
    plain = layer.forward
    layer.forward = lambda x: plain(x) + len(x)
    try:
        ids, row = batch_around(torch.arange(7), 3, 64)
        calls, _ = calls_of_row(model, ids, row)
        assert changed_layers(model, calls) == ["model.layers.1.mlp.up_proj"]
    finally:
        del layer.forward
