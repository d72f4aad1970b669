"""Adapters on quantized layers, trained as people train them.

With an optimizer of 8 bits, gradient checkpointing, and on two processes by DDP and FSDP.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from adapters import (
    TARGETS,
    adapted_residual,
    check_8_bit_optimizer,
    codes,
    losses_of,
    problem,
    trained,
)
from tiny_llama import IDS, float_model, liquid_layers, quantized
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

peft = pytest.importorskip("peft", reason="peft is not installed")


def test_an_8_bit_optimizer_trains_as_well() -> None:
    check_8_bit_optimizer("cpu")


def test_checkpointed_gradients_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = quantized(float_model(tmp_path, torch.float32))
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(liquid_layers(model.get_base_model())) > 0
    for parameter, grad in zip(trained(model), expected, strict=True):
        reference.assert_same(parameter.grad, grad)


def ddp(model: nn.Module) -> Callable[..., Tensor]:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> Callable[..., Tensor]:
    for layer in (model.base_model.model.up_proj, model.base_model.model.down_proj):
        fully_shard(layer)
    return fully_shard(model)


def train_as(rank: int, folder: str) -> None:
    """What one of two processes does; they take long to start, so that it does both ways."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    x, y = (t.chunk(2)[rank] for t in problem())
    for way in (ddp, fsdp):
        model = adapted_residual()
        before, parallel = codes(model), way(model)
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        for _ in range(3):
            nn.functional.mse_loss(parallel(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in trained(model)]
        same = all(torch.equal(tensor, before[name]) for name, tensor in codes(model).items())
        torch.save((after, same), f"{folder}/{way.__name__}{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(train_as, (str(tmp_path),), nprocs=2)
    model = adapted_residual()
    losses_of(model, torch.optim.SGD(trained(model), lr=0.1), 3)
    for name in ("ddp0", "ddp1", "fsdp0", "fsdp1"):
        after, same = torch.load(tmp_path / f"{name}.pt")
        assert same, f"{name}: codes of the base have changed"
        for found, expected in zip(after, trained(model), strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)
