"""Adapters on two quantized layers, and how they are trained."""

import copy

import pytest
import reference
import torch
from torch import Tensor, nn

import liquidgemm

peft = pytest.importorskip("peft", reason="peft is not installed")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


class Residual(nn.Module):
    """Two layers that are large enough for an optimizer to keep its state in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(512)
        self.up_proj, self.down_proj = nn.Linear(512, 1024), nn.Linear(1024, 512)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.relu(self.up_proj(self.norm(x))))


def adapted_residual(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    model = Residual().to(device)
    liquidgemm.quantize_(model, progress=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=TARGETS))
    return adapted.to(device)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if b.dtype == torch.uint8}


def problem() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(64, 512)
    return x, x + 0.3 * torch.tanh(x @ torch.randn(512, 512) / 512**0.5)


def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    x, y = (t.to(next(model.parameters()).device) for t in problem())
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_8_bit_optimizer(device: str) -> None:
    """It trains as well as AdamW, with states in 8 bits, and leaves the base alone."""
    optim = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").optim
    model = adapted_residual(device)
    other, before = copy.deepcopy(model), codes(model)
    expected = losses_of(model, torch.optim.AdamW(trained(model), lr=1e-3), 30)
    optimizer = optim.AdamW8bit(trained(other), lr=1e-3)
    found = losses_of(other, optimizer, 30)
    assert expected[-1] < 0.9 * expected[0]
    assert found[-1] == pytest.approx(expected[-1], rel=0.02)
    states = {p.numel(): optimizer.state[p]["state1"].dtype for p in trained(other)}
    assert states == {16 * 512: torch.uint8, 16 * 1024: torch.uint8}
    for name, tensor in codes(other).items():
        reference.assert_same(tensor, before[name], key=name)
