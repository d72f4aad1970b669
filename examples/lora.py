"""Trains a LoRA adapter on top of a model whose layers stay quantized.

    python examples/lora.py MODEL TEXT OUT

MODEL is a folder or a name of transformers, TEXT a file to train on, OUT the adapter's folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import liquidgemm


def main(arguments: list[str] | None = None) -> list[float]:
    """Returns the loss before each step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--window", type=int, default=256, help="tokens per step")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.float32,
        quantization_config=liquidgemm.LiquidGemmConfig(),
    )
    # By name: "all-linear" finds nn.Linear alone.
    adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter)
    model.print_trainable_parameters()

    tokens = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(tokens) <= options.window:
        parser.error(f"text: expected more than {options.window} tokens, got {len(tokens)}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for step in range(options.steps):
        start = step * options.window % (len(tokens) - options.window)
        batch = tokens[None, start : start + options.window]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()  # through the quantized layers, to the adapters alone
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    model.save_pretrained(options.output)
    return losses


if __name__ == "__main__":
    main()
