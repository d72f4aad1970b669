"""What holds of the linear layers of every engine, for any rank and size of tensor parallelism.

An engine is a module that makes its layers: `engine` for vLLM, `sglang_layers` for SGLang.
"""

from collections.abc import Iterable
from types import ModuleType

import foreign
import torch
from torch import Tensor, nn

from liquidgemm import LiquidConfig, LiquidLinear, QuantizedWeight, linear
from liquidgemm.integrations.serving.foreign import convert, foreign_layers
from liquidgemm.integrations.serving.layout import Slice, as_packed, pack
from liquidgemm.quantization.layer import quantize_layer

K = 256
LOGICAL = ("qweight", "qscale", "qoffset", "scale")
SIZES = (1, 2, 4, 8)
BITS = {"six": 6, "keep": 8}


def weight(
    n: int, k: int, augment: int = 0, seed: int = 0, bits: int = 4, group: int = 64
) -> QuantizedWeight:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    config = LiquidConfig(augment=augment, bits={"layer": bits}, group_size=group)
    return quantize_layer(w, config)[0]


def tensors(w: QuantizedWeight) -> dict[str, torch.Tensor]:
    found = {name: getattr(w, name) for name in LOGICAL}
    return found if w.columns is None else found | {"columns": w.columns}


def tokens(k: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(5, k, generator=torch.Generator().manual_seed(9)).to(dtype)


def alone(w: QuantizedWeight, x: torch.Tensor, bias=None) -> torch.Tensor:
    return LiquidLinear.from_quantized(w, bias)(x)


def load(layer: nn.Module, tensors: dict[str, Tensor], shard: int | str | None = None) -> None:
    """As a model's load_weights does it."""
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        args = () if shard is None else (shard,)
        parameter.weight_loader(parameter, tensor, *args)


def finish(layer: nn.Module) -> nn.Module:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def output(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return layer.quant_method.apply(layer, x, bias)


def groups_of(names: Iterable[str], group: int) -> dict:
    """What `config_of` takes beside the layers."""
    return {} if group == 64 else {"format_version": 3, "group_sizes": dict.fromkeys(names, group)}


def check_fused_qkv(
    engine: ModuleType, size: int, augments: tuple[int, ...], group: int = 64
) -> None:
    """Four heads of queries and two of keys and values, which more ranks than two share."""
    heads, kv_heads, width = 8, 2, 16
    x = tokens(K)
    rows = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
    weights = {
        shard: weight(n, K, augment, i, group=group)
        for i, ((shard, n), augment) in enumerate(zip(rows.items(), augments, strict=True))
    }
    whole = {shard: alone(w, x) for shard, w in weights.items()}
    for rank in range(size):
        with engine.as_rank(rank, size):
            named = zip(("q", "k", "v"), augments, strict=True)
            layers = {f"a.{s}_proj": a for s, a in named}
            config = engine.config_of(layers, **groups_of(layers, group))
            layer = engine.qkv(config, K, width, heads, kv_heads)
            for shard, w in weights.items():
                load(layer, tensors(w), shard)
            y = output(finish(layer), x)
        expected = []
        for shard, y_whole in whole.items():
            copies = max(1, size // kv_heads) if shard != "q" else 1
            step = y_whole.shape[1] * copies // size
            start = rank // copies * step
            expected.append(y_whole[:, start : start + step])
        assert torch.equal(y, torch.cat(expected, 1))
        assert layer.scale.dtype == torch.float32


def check_row_parallel(engine: ModuleType, kind: str, k: int, size: int) -> None:
    """CHECKLIST 34: each rank's product is that of its own columns, also within groups."""
    group = 32 if kind == "fine" else 64
    w = weight(72, k, 64 if kind == "augment" else 0, 3, BITS.get(kind, 4), group)
    x = tokens(k)
    bias = torch.randn(72).bfloat16()
    for rank in range(size):
        with engine.as_rank(rank, size):
            layers = {"a.down_proj": w.augment}
            layer = engine.down(engine.config_of(layers, **groups_of(layers, group)), k, 72)
            load(layer, tensors(w))
            part = Slice(rank * k // size, k // size, k)
            own = x[:, part.start : part.start + part.length]
            y = output(finish(layer), own, bias)
        if size == 1:
            assert torch.equal(y, alone(w, x, bias))
            continue
        codes = tuple(part.of_codes(getattr(w, name), w.augment) for name in LOGICAL[:3])
        columns = torch.empty(0, dtype=torch.int32) if w.columns is None else w.columns
        packed = pack(codes, w.scale, [72], [part.of_columns(columns)], part)
        own_packed = as_packed(own, packed.gather, packed.pad)
        assert torch.equal(y, linear(own_packed, packed.weight, w.scale, bias))
        if kind in ("plain", "fine") and not part.lead and not part.length % 64:
            assert torch.equal(y, alone(w.narrow_columns(part.start, part.length), own, bias))


def check_head(engine: ModuleType, size: int) -> None:
    """Vocabularies are filled up, to 64 rows and by the last rank."""
    w, x = weight(200, K, 64), tokens(K)
    got = []
    for rank in range(size):
        with engine.as_rank(rank, size):
            layer = engine.head(engine.config_of({"lm_head": 64}), 200, K)
            load(layer, tensors(w))
            got.append(output(finish(layer), x))
    assert torch.equal(torch.cat(got, 1)[:, :200], alone(w, x))


def foreign_layer(
    name: str, group: int = 64
) -> tuple[dict[str, torch.Tensor], dict, QuantizedWeight]:
    """A layer [64, 256] of another project's format, its settings, and what it becomes."""
    tensors_of, settings, _ = foreign.packed(name, group)
    found = foreign_layers({"config.json": settings}, [f"a.{key}" for key in tensors_of])
    return tensors_of, settings, convert(found["a"].read(tensors_of))[0]


def check_foreign(engine: ModuleType, name: str, size: int, group: int = 64) -> None:
    """Each rank has its slice of the conversion of the whole layer, in whatever order it comes."""
    held, settings, w = foreign_layer(name, group)
    assert w.group_size == group
    keys = [f"a.{part}.{key}" for part in ("gate_proj", "up_proj", "down_proj") for key in held]
    x = tokens(K)
    whole = alone(w, x)
    for rank in range(size):
        with engine.as_rank(rank, size):
            config = engine.foreign_config(settings, keys)
            layer = engine.gate_up(config, K, [64, 64])
            for shard in (1, 0):
                load(layer, held, shard)
            step = 64 // size
            part = whole[:, rank * step : (rank + 1) * step]
            assert torch.equal(output(finish(layer), x), torch.cat((part, part), 1))
            layer = engine.down(config, K, 64)
            load(layer, held)
            own = x.narrow(1, rank * K // size, K // size)
            expected = alone(w.narrow_columns(rank * K // size, K // size), own)
            assert torch.equal(output(finish(layer), own), expected)
