"""A small model that is not from transformers, with what a checkpoint has to bear."""

import json

import reference
import torch
from torch import nn

from liquidgemm import quantize_

MANIFEST, WEIGHTS = "liquidgemm.json", "liquidgemm.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(96)
        self.up = nn.Linear(96, 200)
        self.down = nn.Linear(200, 96, bias=False)
        self.register_buffer("step", torch.tensor(3))

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding tied to the head, two blocks and one of them used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 96)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks.append(self.blocks[0])
        self.pool = nn.Linear(96, 96)
        self.lm_head = nn.Linear(96, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.pool(x))


TOKENS = torch.arange(12).view(2, 6)
QUANTIZED = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "pool"]


def make(seed=0, quantized=True):
    torch.manual_seed(seed)
    net = Net().eval()
    if quantized:
        quantize_(net, progress=False)
    return net


@torch.no_grad()
def run(net):
    return net(TOKENS)


def snapshot(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def assert_same_state(net, expected):
    state = net.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        reference.assert_same(state[key], value, key=key)


def edit_manifest(**changes):
    def edit(directory):
        manifest = json.loads((directory / MANIFEST).read_text())
        for key, value in changes.items():
            manifest[key] = value
            if value is None:
                del manifest[key]
        (directory / MANIFEST).write_text(json.dumps(manifest))

    return edit
