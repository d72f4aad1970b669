"""transformers' continuous batching of a quantized model: as it answers alone, so in a batch."""

import pytest
import torch
from tiny_llama import transformers

import liquidgemm

if not hasattr(transformers, "ContinuousBatchingConfig"):
    pytest.skip("this transformers has no ContinuousBatchingConfig", allow_module_level=True)

PROMPTS = [[3, 5, 7], [11] * 40, list(range(4, 90)), [17, 23]]
NEW = 6


@pytest.fixture(scope="module")
def llama():
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    recipe = liquidgemm.LiquidConfig(augment={"down_proj": 64}, keep=("o_proj",))
    liquidgemm.quantize_(model, recipe, progress=False, verify=False)
    return model


def alone(model, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The tokens of `generate`, and the logarithm of the probability of each."""
    found = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = found.sequences[0, len(prompt) :]
    likely = torch.cat(found.logits).float().log_softmax(-1)
    return tokens.tolist(), likely.gather(1, tokens[:, None])[:, 0]


# Of the batch with 32 tokens in a step the longer prompts are cut in chunks.
@pytest.mark.parametrize("tokens_of_a_step", [256, 32])
def test_generate_batch_says_what_generate_says(llama, tokens_of_a_step: int) -> None:
    found = llama.generate_batch(
        PROMPTS,
        generation_config=transformers.GenerationConfig(
            do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=-1
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            page_size=32, num_blocks=16, max_batch_tokens=tokens_of_a_step, return_logprobs=True
        ),
        progress_bar=False,
    )
    assert len(found) == len(PROMPTS)
    for result in found.values():
        tokens, likely = alone(llama, result.prompt_ids)
        assert result.error is None
        assert result.generated_tokens == tokens
        torch.testing.assert_close(torch.tensor(result.logprobs), likely, rtol=1e-4, atol=1e-4)
