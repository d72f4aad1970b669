"""Batch invariance on a real model: SmolLM2-135M-Instruct alone and in batches of 2 to 64.

On a Hopper GPU the kernel's, elsewhere that of the CPU path.
"""

from pathlib import Path

import pytest
import torch
from invariance import batch_around, calls_of_row, changed_kinds, changed_layers

import liquidgemm
from liquidgemm import LiquidLinear
from liquidgemm.cli import demo
from liquidgemm.ops import _library

SIZES = (2, 3, 4, 8, 16, 32, 64)


@pytest.fixture(scope="module")
def smollm2() -> tuple:
    """The quantized model in bfloat16, and a prompt."""
    for package in demo.PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed: make demo installs it")
    file = demo.cache_dir() / Path(demo.MODEL_MEMBER).name
    if not demo.is_model_file(file):
        pytest.skip(f"{file} is missing: make demo fetches it")
    device = torch.device("cuda" if _library.status().cuda_available else "cpu")
    model, tokenizer = demo.load_model(file, device, torch.bfloat16)
    liquidgemm.quantize_(model, progress=False)
    text = f"{demo.PROMPT} {demo.evaluation_text()[:1500]}"
    prompt = torch.tensor(tokenizer(text)["input_ids"][:200], device=device)
    return model, prompt


@pytest.mark.parametrize("size", SIZES)
def test_layers_do_not_notice_the_batch(smollm2, size: int) -> None:
    """CHECKLIST 9: every quantized layer gives a row the bits that it gives the row alone.

    Each layer is asked again with the input that it got, alone; and where the input was the same
    as in a run of the prompt alone, the outputs of the two runs are compared. Which other modules
    do notice is printed: they are not ours to promise.
    """
    model, prompt = smollm2
    ids, row = batch_around(prompt, size, model.config.vocab_size)
    calls, logits = calls_of_row(model, ids, row)
    layers = [name for name, module in model.named_modules() if isinstance(module, LiquidLinear)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert set(layers) <= calls.keys()
    assert changed_layers(model, calls) == []

    alone, alone_logits = calls_of_row(model, prompt[None], 0)
    kinds = changed_kinds(model, alone, calls)
    for kind, (same, changed) in sorted(kinds.items()):
        print(f"batch of {size}: {kind}: {changed} of {same} with equal inputs differ")
    print(f"batch of {size}: logits are equal: {torch.equal(logits, alone_logits)}")
    assert kinds["LiquidLinear"][0] > 0
    assert kinds["LiquidLinear"][1] == 0
