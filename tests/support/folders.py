"""Folders with small quantized models, what is in them, and a disk that is full."""

import resource
from contextlib import contextmanager
from pathlib import Path

import tiny_llama
import torch
from torch import nn
from transformers import LlamaForCausalLM

from liquidgemm import quantize_

MANIFEST, WEIGHTS, INDEX = "liquidgemm.json", "model.safetensors", "model.safetensors.index.json"


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))
    quantize_(model, progress=False)
    return model


def llama(folder: Path, seed: float = 0) -> LlamaForCausalLM:
    """Quantized; the seed is in one of its tensors."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama.float_model(folder / "float")).eval()
    quantize_(model, progress=False)
    model.model.norm.weight.data.fill_(seed)
    return model


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def seed_of(model: nn.Module) -> float:
    return model.model.norm.weight[0].item()


@contextmanager
def full_disk(limit: int = 20_000):
    """No file can be larger, which fails as a disk without space does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
