"""Layers and models with groups of 32: quantized, held, saved and loaded so."""

import copy
import io
import json

import pytest
import reference
import torch
from torch import nn
from torch.func import functional_call

import liquidgemm
from liquidgemm import LiquidConfig, LiquidLinear, MergedLinear, QuantizedWeight
from liquidgemm.nn.stack import ExpertStack
from liquidgemm.weights.weight import Form

K = 100
BLOCK = 2304


def weights(n=70, k=K, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def weight_of(n=70, k=K, seed=0, **arguments):
    return liquidgemm.quantize_weight(weights(n, k, seed), 32, **arguments)


def layer_of(n=70, k=K, seed=0):
    return LiquidLinear.from_quantized(weight_of(n, k, seed), torch.ones(n))


def decoded(weight):
    """int64 ``[N, K]``, one code after the other."""
    codes = torch.stack((weight.qweight % 16, weight.qweight // 16), -1).flatten(1).long()
    steps, offsets = (
        grid.long().repeat_interleave(32, 1) for grid in (weight.qscale, weight.qoffset)
    )
    return codes * steps + offsets - 128


def squared_error(weight, w):
    return (liquidgemm.dequantize_weight(weight) - w).square().sum(1)


@pytest.mark.parametrize("method", ["search", "rtn"])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 64, 96, 100, 129, 161, 320])
def test_the_quantizer_searches_each_group_of_32(k, method):
    """Every column past K is q = 0; a row does not depend on others; equal halves cost nothing."""
    w = weights(40, k)
    weight = liquidgemm.quantize_weight(w, 32, method)
    padded = -(-k // 64) * 64
    assert weight.group_size == 32
    assert weight.qscale.shape == weight.qoffset.shape == (40, padded // 32)
    codes = liquidgemm.formats.liquidquant.unpack_nibbles(weight.qweight)
    assert not codes[:, k:].any()
    alone = liquidgemm.quantize_weight(w[7:8], 32, method)
    for name in ("qweight", "qscale", "qoffset", "scale"):
        reference.assert_same(getattr(alone, name), getattr(weight, name)[7:8])
    if k > 64:
        coarse = liquidgemm.quantize_weight(w, 64, method)
        assert squared_error(weight, w).sum() < squared_error(coarse, w).sum()


def test_the_error_is_a_quarter_less():
    """Of Gaussian weights, as docs/design/formats.md has it; columns of more weight lose less."""
    w = weights(64, 2048)
    error = squared_error(weight_of(64, 2048), w).sum() / w.square().sum()
    coarse = squared_error(liquidgemm.quantize_weight(w), w).sum() / w.square().sum()
    assert 0.72 < error / coarse < 0.80
    importance = torch.rand(2048, generator=torch.Generator().manual_seed(1)) + 0.01
    weighed = liquidgemm.quantize_weight(w, 32, importance=importance)
    lost = (liquidgemm.dequantize_weight(weighed) - w).square() * importance
    plain = (liquidgemm.dequantize_weight(weight_of(64, 2048)) - w).square() * importance
    assert lost.sum() < plain.sum()


def test_every_set_of_kernels_searches_the_same():
    expected = weight_of(30, 224)
    for kernel in liquidgemm.cpu_kernels():
        liquidgemm.set_cpu_kernel(kernel)
        try:
            found = weight_of(30, 224)
        finally:
            liquidgemm.set_cpu_kernel()
        for name in ("qweight", "qscale", "qoffset", "scale"):
            reference.assert_same(getattr(found, name), getattr(expected, name), kernel=kernel)


@pytest.mark.parametrize("k", [32, 64, 100, 161])
def test_a_layer_computes_with_them(k):
    weight = weight_of(k=k)
    layer = LiquidLinear.from_quantized(weight, torch.ones(70))
    assert layer.packed.shape == (2, -(-k // 64), BLOCK)
    assert layer.group_size == 32
    assert "group_size=32" in repr(layer)
    x = torch.randn(5, k)
    x8, scale = reference.quantize_activation(x)
    w8 = decoded(weight)[:, :k]
    acc = reference.product(x8, w8)
    y = reference.epilogue(acc, scale, weight.scale, torch.ones(70), torch.float32)
    reference.assert_same(layer(x), y)
    for name in ("qweight", "qscale", "qoffset", "scale"):
        reference.assert_same(getattr(layer, name), getattr(weight, name))
    reference.assert_same(layer.dequantize(), liquidgemm.dequantize_weight(weight))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    """CHECKLIST 19: into a layer of either groups, from either, and from the meta device."""
    source, x = layer_of(), torch.randn(3, K)
    state = source.state_dict()
    for target in (LiquidLinear(K, 70), LiquidLinear(K, 70, group_size=32)):
        target.load_state_dict(state, assign=assign)
        assert target.group_size == 32
        reference.assert_same(target(x), source(x))
        coarse = LiquidLinear.from_quantized(liquidgemm.quantize_weight(weights()), torch.ones(70))
        target.load_state_dict(coarse.state_dict(), assign=assign)
        assert target.group_size == 64
        reference.assert_same(target(x), coarse(x))
    meta = LiquidLinear(K, 70, device="meta", group_size=32)
    assert meta.group_size == 32
    meta.load_state_dict(state, assign=True)
    reference.assert_same(meta(x), source(x))
    for size in (128, 32.0):
        with pytest.raises(ValueError, match=f"group_size: expected 32 or 64, got {size}"):
            LiquidLinear(K, 70, group_size=size)


def test_copies_pickles_assigned_tensors_and_calls_with_others():
    """CHECKLIST 19, 27."""
    one, other = layer_of(seed=1), layer_of(seed=2)
    x = torch.randn(3, K)
    expected = other(x)
    reference.assert_same(functional_call(one, other.state_dict(), (x,)), expected)
    for name, tensor in other.state_dict().items():
        setattr(one, name, tensor)
    reference.assert_same(one(x), expected)
    assert one.group_size == 32
    one.eval()
    buffer = io.BytesIO()
    torch.save(one, buffer)
    buffer.seek(0)
    for again in (torch.load(buffer, weights_only=False), copy.deepcopy(one).double().float()):
        assert again.packed.shape[-1] == BLOCK
        reference.assert_same(again(x), expected)


def test_gradients_and_compiled_graphs():
    """CHECKLIST 18, 27."""
    layer = layer_of()
    x = torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    reference.assert_same(x.grad, torch.ones(3, 70) @ layer.dequantize())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    reference.assert_same(compiled(x.detach()), layer(x.detach()))
    program = torch.export.export(layer, (x.detach(),))
    reference.assert_same(program.module()(x.detach()), layer(x.detach()))


def test_layers_are_merged_with_their_like():
    parts = [layer_of(64, seed=1), layer_of(128, seed=2)]
    x = torch.randn(3, K)
    expected = torch.cat([part(x) for part in parts], 1)
    merged = MergedLinear(parts)
    assert merged.is_merged
    reference.assert_same(merged(x), expected)
    coarse = LiquidLinear.from_quantized(liquidgemm.quantize_weight(weights(64)), torch.ones(64))
    with pytest.raises(ValueError, match="or other groups"):
        MergedLinear([parts[0], coarse])


def test_weights_are_checked_and_sliced():
    """CHECKLIST 7."""
    weight = weight_of(8, 192)
    narrow = weight.narrow_columns(64, 128)
    assert narrow.group_size == 32
    whole = liquidgemm.dequantize_weight(weight)
    reference.assert_same(liquidgemm.dequantize_weight(narrow), whole[:, 64:])
    reference.assert_same(liquidgemm.dequantize_weight(weight.narrow_rows(2, 3)), whole[2:5])
    with pytest.raises(ValueError, match="whole groups of 64, got 32 to 192"):
        weight.narrow_columns(32, 160)
    for steps in (weight.qscale[:, :5], weight.qscale[:, :2], weight.qscale[:, ::2]):
        with pytest.raises(ValueError, match=r"(qscale|qoffset): expected shape"):
            QuantizedWeight(weight.qweight, steps, weight.qoffset, weight.scale, 192)
    stack = ExpertStack(2, 192, 8, gated=False, bias=False)
    with pytest.raises(ValueError, match="weight: expected groups of 64 in an expert, got 32"):
        stack.set(0, weight)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(K, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def model_of(seed=0):
    torch.manual_seed(seed)
    return Model()


@pytest.mark.parametrize("method", ["search", "rtn", "hessian", "gptq"])
def test_every_method_makes_them(method):
    """Data pays as with groups of 64; residual columns, and bits of their own, go beside them."""
    x = torch.randn(256, K) * torch.linspace(0.1, 3, K)
    settings = {"method": method, "group_size": 32, "gate": "off"}
    calibration = [x[:128], x[128:]] if method in ("hessian", "gptq") else None
    errors = {}
    for name, more in (
        ("plain", {}),
        ("coarse", {"group_size": 64}),
        ("augment", {"augment": {"first": 64}}),
        ("bits", {"bits": {"first": 6}}),
        ("keep", {"keep": ("first",)}),
    ):
        model = model_of()
        expected = model(x)
        config = LiquidConfig(**{**settings, **more})
        report = liquidgemm.quantize_(
            model, config, calibration=calibration, held_out=None, progress=False
        )
        errors[name] = (model(x) - expected).square().mean().item()
        bits = {layer.name: layer.bits for layer in report.layers}
        groups = model.first.group_size, model.second.group_size
        assert groups[1] == config.group_size
        assert bits["second"] == (4.5 if config.group_size == 32 else 4.25) + 32 / 128
        assert (groups[0] == 32) == (name in ("plain", "augment"))
        if name in ("bits", "keep"):
            assert model.first.packed.shape[-1] == {"bits": 3200, "keep": 4096}[name]
        if name == "augment":
            assert model.first.packed.shape == (2, 3, BLOCK)
    assert errors["plain"] < errors["coarse"]
    assert errors["augment"] < errors["plain"]
    assert errors["bits"] < errors["plain"]


def test_learned_rounding_takes_them():
    """Codes move within the steps and offsets of their groups, and the error falls."""
    x = weights(512, K)
    found, errors = [], []
    for tune in (0, 40):
        model = model_of()
        expected = model(x)
        config = LiquidConfig(method="hessian", group_size=32, tune=tune, gate="off")
        liquidgemm.quantize_(model, config, calibration=list(x.split(64)), progress=False)
        found.append(model)
        errors.append((model(x) - expected).square().mean().item())
    before, after = found
    for name in ("first", "second"):
        one, other = before.get_submodule(name), after.get_submodule(name)
        assert other.group_size == 32
        for grid in ("qscale", "qoffset"):
            reference.assert_same(getattr(other, grid), getattr(one, grid))
        assert 0 < (one.qweight != other.qweight).float().mean() < 0.2
    assert errors[1] < errors[0]


def test_a_budget_counts_their_bits():
    """4.5 and a scale per row, of whole blocks: what is below that is refused by the number."""
    x = [torch.randn(64, K) for _ in range(2)]
    config = LiquidConfig(group_size=32, budget=5.0, gate="off")
    columns = 128 * 128 + 64 * 128  # padded
    least = (4.5 * columns + 32 * (128 + 64)) / (128 * K + 64 * 128)
    with pytest.raises(ValueError, match=f"budget: expected at least {least:.2f} bits"):
        liquidgemm.quantize_(model_of(), config, calibration=x, progress=False)
    model = model_of()
    config = LiquidConfig(group_size=32, budget=12.0, gate="off")
    report = liquidgemm.quantize_(model, config, calibration=x, progress=False)
    assert all(layer.bits > 8 for layer in report.layers)


def test_experts_get_groups_of_64():
    assert LiquidConfig(group_size=32, augment=64).for_experts() == LiquidConfig()
    assert LiquidConfig(group_size=128).for_experts() == LiquidConfig(group_size=128)
    assert [LiquidConfig(group_size=32).group_of(bits) for bits in (4, 6)] == [32, 64]
    assert [LiquidConfig(group_size=-1).group_of(bits) for bits in (4, 6)] == [-1, -1]
    assert LiquidConfig.from_json(LiquidConfig(group_size=32).to_json()).group_size == 32


def test_checkpoints(tmp_path):
    """CHECKLIST 19: to the bit, of a version that older ones refuse; what does not fit is named."""
    model, x = model_of(), torch.randn(3, K)
    config = LiquidConfig(group_size=32, keep=("second",))
    liquidgemm.quantize_(model, config, progress=False)
    expected = model(x)
    liquidgemm.save_quantized(model, tmp_path)
    manifest = json.loads((tmp_path / "liquidgemm.json").read_text())
    assert manifest["format_version"] == 4
    assert manifest["layers"]["first"]["group_size"] == 32
    assert "group_size" not in manifest["layers"]["second"]
    coarse = model_of()
    liquidgemm.quantize_(coarse, LiquidConfig(), progress=False)
    with torch.device("meta"):
        meta = Model()
    for target in (model_of(1), coarse, copy.deepcopy(model), meta):
        loaded = liquidgemm.load_quantized(tmp_path, target)
        assert loaded.first.group_size == 32
        reference.assert_same(loaded(x), expected)
        assert loaded.liquid_config == config
    del manifest["layers"]["first"]["group_size"]
    (tmp_path / "liquidgemm.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"first\.qscale: expected groups of 64, got 32"):
        liquidgemm.load_quantized(tmp_path, model_of(1))


def test_transformers(tmp_path):
    """Both ways of saving, from_pretrained, and what a damaged config says."""
    transformers = pytest.importorskip("transformers")
    from liquidgemm import LiquidGemmConfig

    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    liquidgemm.quantize_(
        model, LiquidConfig(group_size=32, bits={"o_proj": 6}, augment={"up_proj": 64}),
        progress=False,
    )  # fmt: skip
    ids = torch.arange(10)[None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "a")
    liquidgemm.save_quantized(model, tmp_path / "b")
    for folder in ("a", "b"):
        settings = json.loads((tmp_path / folder / "config.json").read_text())
        settings = settings["quantization_config"]
        assert settings["format_version"] == 3
        assert len(settings["group_sizes"]) == 6
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        reference.assert_same(again(ids).logits, expected)
        reference.assert_same(liquidgemm.load_quantized(tmp_path / folder)(ids).logits, expected)
        assert again.model.layers[0].mlp.up_proj.group_size == 32
    forms = LiquidGemmConfig(layers={"a": 64, "b": 0}, group_sizes={"b": 32}).forms()
    assert forms == {"a": Form(64, 64), "b": Form(0, 32)}
    for wrong in ({"b": 64}, {"c": 32}, {"b": True}, 32):
        with pytest.raises(ValueError, match="group_sizes: expected 32 by the name of a layer"):
            LiquidGemmConfig(layers={"b": 0}, group_sizes=wrong)
    fresh = transformers.AutoModelForCausalLM.from_pretrained
    online = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    online.save_pretrained(tmp_path / "float")
    loaded = fresh(
        tmp_path / "float", quantization_config=LiquidGemmConfig(group_size=32, verify=False)
    )
    assert loaded.model.layers[0].mlp.up_proj.group_size == 32
