"""transformers' generate over a quantized KV cache on a GPU: eagerly, and as a replayed graph."""

import pytest
import torch
from tiny_llama import attention_model

import liquidgemm

PROMPT = torch.arange(2 * 29).view(2, 29) * 7 % 90 + 3
NEW = 8


@pytest.fixture(scope="module")
def model():
    return attention_model().cuda()


@pytest.mark.parametrize(("format", "error"), [("int8", 0.02), ("int4", 0.25)])
def test_steps_are_near_the_float_ones(model, format: str, error: float) -> None:
    """The tokens of a float cache, one by one through the quantized one; then a graph of a step."""
    ids = PROMPT.cuda()
    model.set_attn_implementation("sdpa")
    options = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True}
    found = model.generate(ids, return_dict_in_generate=True, **options)
    tokens, expected = found.sequences, torch.stack(found.logits, 1)

    model.set_attn_implementation("liquidgemm")
    cache = liquidgemm.LiquidCache(model.config, 64, format)
    steps = range(ids.shape[1], tokens.shape[1] - 1)
    position = torch.zeros(2, 1, dtype=torch.long, device="cuda")
    token = torch.zeros(2, 1, dtype=torch.long, device="cuda")

    def step() -> torch.Tensor:
        return model(token, position_ids=position, past_key_values=cache).logits[:, -1]

    def run(call) -> torch.Tensor:
        logits = [model(ids, past_key_values=cache).logits[:, -1]]
        for i in steps:
            token.copy_(tokens[:, i : i + 1])
            position.fill_(i)
            logits.append(call().clone())
        return torch.stack(logits, 1)

    with torch.no_grad():
        eager = run(step)
        assert (eager - expected).norm() / expected.norm() < error
        cache.reset()
        model(ids, past_key_values=cache)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        cache.reset()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        assert torch.equal(run(replay), eager)
