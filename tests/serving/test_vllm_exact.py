"""vLLM's row-parallel layers in the exact mode; CHECKLIST 34. The engine is in test_vllm_engine."""

from contextlib import contextmanager

import pytest
import torch
from engine import as_rank, config_of, down
from slices import BITS, alone, finish, load, tensors, tokens, weight
from torch.distributed import ReduceOp
from vllm.config import get_current_vllm_config

from liquidgemm import LiquidConfig
from liquidgemm.integrations.serving import exact as arithmetic
from liquidgemm.integrations.vllm import exact
from liquidgemm.integrations.vllm.config import LiquidGemmConfig

K, N = 344, 72
ASKED = {"liquidgemm": {"exact_tensor_parallel": True}}


@contextmanager
def exact_mode(rank: int, size: int, settings: object = ASKED):
    with as_rank(rank, size):
        get_current_vllm_config().additional_config = settings
        yield


def layer_of(w, rank: int, size: int, **options) -> torch.nn.Module:
    with exact_mode(rank, size):
        layer = down(config_of({"a.down_proj": w.augment}), K, N, reduce=True, **options)
        load(layer, tensors(w))
        return finish(layer)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["plain", "augment", "keep", "six"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_rank_gives_the_bits_of_one(kind, size, bias, monkeypatch):
    """The whole layer of vLLM, which adds nothing after it. A first round finds the sums."""
    w = weight(N, K, 64 if kind == "augment" else 0, 3, BITS.get(kind, 4))
    x = tokens(K)
    layers = [layer_of(w, rank, size, bias=bias) for rank in range(size)]
    b = torch.randn(N).bfloat16() if bias else None
    if b is not None:
        for layer in layers:
            layer.bias.data.copy_(b)
    sums = []

    def reduced(tensor, op):
        if op == ReduceOp.MAX:
            return arithmetic.row_maxima(x)
        sums.append(tensor.clone())
        return torch.stack(sums[:size]).sum(0, dtype=torch.int32)

    monkeypatch.setattr(exact, "_reduced", reduced)
    own = x.split(K // size, 1)
    for _ in range(2):
        outputs = [layer(part)[0] for layer, part in zip(layers, own, strict=True)]
    assert all(torch.equal(y, alone(w, x, b)) for y in outputs)
    assert len(sums) == 2 * size
    assert "; 1 with the bits of one GPU on several" in layers[0].quant_method.summary.more()


def test_the_op_is_what_compilers_are_told(monkeypatch):
    monkeypatch.setattr(exact, "_reduced", lambda tensor, op: tensor)
    layer, x = layer_of(weight(N, K, 64), 0, 2), tokens(K // 2)
    given = x, layer.qweight, layer.scale, None, layer.columns, *layer.liquid_pad
    op = torch.ops.liquidgemm_vllm.exact_row_parallel
    torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(op(*given), exact.row_parallel(layer, x))


def test_one_gpu_has_nothing_to_ask():
    layer = layer_of(weight(N, K), 0, 1)
    assert torch.equal(layer(tokens(K))[0], alone(weight(N, K), tokens(K)))
    assert "bits of one GPU" not in layer.quant_method.summary.more()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"exact": True},
            "{exact_tensor_parallel, fused_producers} or some of them, got",
        ),
        ({"exact_tensor_parallel": 1}, "exact_tensor_parallel: expected true or false, got 1"),
        ("yes", "got yes"),
    ],
)
def test_settings_that_are_not_understood_are_refused(settings, error):
    with exact_mode(0, 2, {"liquidgemm": settings}), pytest.raises(ValueError, match=error):
        down(config_of({"a.down_proj": 0}), K, N)


def test_what_cannot_be_exact_is_refused():
    with exact_mode(0, 2):
        layer = down(config_of({"a.down_proj": 0}), K, N, reduce=False)
        load(layer, tensors(weight(N, K)))
        with pytest.raises(ValueError, match=r"a\.down_proj: expected no layer whose parts"):
            finish(layer)
        get_current_vllm_config().lora_config = object()
        with pytest.raises(ValueError, match="expected no LoRA"):
            down(config_of({"a.down_proj": 0}), K, N, reduce=True)
    online = LiquidGemmConfig.from_config({"quant_method": "liquidgemm"})
    assert online.recipe == LiquidConfig()
    with exact_mode(0, 2), pytest.raises(ValueError, match="run `liquidgemm quantize`"):
        down(online, K, N, reduce=True)
