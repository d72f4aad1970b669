"""Quantizes a model with calibration, saves it, loads it, and says what that cost.

    python examples/quantize_a_model.py MODEL TEXT OUT

MODEL is a folder or a name of transformers, TEXT a file to calibrate on, OUT the folder to create.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import liquidgemm


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Of the next token, natural logarithm."""
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--window", type=int, default=512, help="tokens per calibration window")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokens = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    windows = tokens[0, : tokens.shape[1] // options.window * options.window]
    windows = windows.reshape(-1, options.window)
    if len(windows) < 2:
        parser.error(f"text: expected {2 * options.window} tokens or more, got {tokens.shape[1]}")
    calibration, held_out = windows[:-1], windows[-1:]
    before = loss(model, held_out)

    # Codes that make up for one another's errors, outliers moved from activations to weights.
    config = liquidgemm.LiquidConfig(method="gptq", smooth=True, gate="warn")
    report = liquidgemm.quantize_(model, config, calibration=calibration.split(4))
    print(report)

    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    # `import liquidgemm` above is all that loading needs.
    loaded = AutoModelForCausalLM.from_pretrained(options.output, dtype=torch.float32).eval()
    after = loss(loaded, held_out)
    if after != loss(model, held_out):
        raise SystemExit("the loaded model differs from the saved one")
    print(f"loss on the last {options.window} tokens: {before:.4f} -> {after:.4f}")


if __name__ == "__main__":
    main()
