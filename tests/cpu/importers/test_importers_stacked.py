"""Imports of experts that lie in stacked tensors, several formats of them."""

import json

import foreign_models
import pytest
import torch
from foreign_models import make, outputs, transformers, write
from safetensors.torch import load_file, save_file

from liquidgemm import LiquidExperts, import_checkpoint, quantize_weight
from liquidgemm.weights.weight import dequantize_weight

OLD = int(transformers.__version__.partition(".")[0]) < 5
pytestmark = pytest.mark.skipif(OLD, reason="experts are layers like others")

E2M1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


def save(folder, state):
    contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def stack(state, channels, joint, shape):
    """Experts of a layer as one tensor, gate and up of each as one matrix.

    channels: axis of channels of a matrix.
    shape: what to do about weight_shape: "each", "one", "none".
    """
    experts = {}
    for key in [key for key in state if ".experts." in key]:
        prefix, _, rest = key.partition(".experts.")
        number, part, kind = rest.split(".")
        experts.setdefault((prefix, kind), {})[int(number), part] = state.pop(key)
    for (prefix, kind), parts in experts.items():
        numbers = sorted({number for number, _ in parts})

        def both(number, parts=parts, kind=kind):
            gate, up = (parts[number, f"{name}_proj"] for name in ("gate", "up"))
            if kind == "weight_shape":
                return gate * torch.tensor([2, 1])
            return gate if kind == "g_idx" else torch.cat((gate, up), channels)

        if kind == "weight_shape" and shape == "none":
            continue
        for name, matrix in (
            ("gate_up_proj", both),
            ("down_proj", lambda number, parts=parts: parts[number, "down_proj"]),
        ):
            every = [matrix(number) for number in numbers]
            one = kind == "weight_shape" and shape == "one"
            key = kind.removeprefix("weight_") if joint == "_" else kind
            state[f"{prefix}.experts.{name}{joint}{key}"] = every[0] if one else torch.stack(every)


@pytest.mark.parametrize(
    ("name", "channels", "joint", "shape"),
    [
        ("pack-quantized", 0, ".", "each"),
        ("pack-quantized", 0, ".", "one"),
        ("pack-quantized", 0, "_", "none"),
        ("int-quantized", 0, ".", "each"),
        ("awq", 1, ".", "each"),
        ("awq", 1, "_", "each"),
        ("gptq", 1, ".", "each"),
        ("gptq_v2", 1, ".", "each"),
    ],
)
def test_stacked_experts_are_those_one_by_one(tmp_path, monkeypatch, name, channels, joint, shape):
    """The import of either is the same, to the bit."""
    if shape == "none":  # for groups of columns alone
        grouped = foreign_models.compressed(strategy="group", group_size=64)
        monkeypatch.setitem(foreign_models.SETTINGS, name, grouped)

        def in_groups(weight, _):
            scales = (weight.unflatten(1, (-1, 64)).abs().amax(2) / 7).half()
            codes = weight / scales.repeat_interleave(64, 1)
            codes = (codes.round().clamp(-8, 7) + 8).to(torch.uint8)
            values = foreign_models.foreign.weight_of(codes, scales, 8)
            return foreign_models.foreign.compressed_tensors(codes, scales), values

        monkeypatch.setattr(foreign_models, "quantized", in_groups)
    write(make("one parameter"), tmp_path / "apart", name)
    report = import_checkpoint(tmp_path / "apart", tmp_path / "apart out", progress=False)
    state = load_file(tmp_path / "apart/model.safetensors")
    stack(state, channels, joint, shape)
    assert not any(".experts.0." in key for key in state)
    (tmp_path / "stacked").mkdir()
    save(tmp_path / "stacked", state)
    config = (tmp_path / "apart/config.json").read_text()
    (tmp_path / "stacked/config.json").write_text(config)
    found = import_checkpoint(tmp_path / "stacked", tmp_path / "stacked out", progress=False)
    # Two matrices of an expert instead of three, in each of two layers.
    assert len(found.layers) == len(report.layers) - 2 * 4
    one, other = (load_file(tmp_path / f"{n} out/model.safetensors") for n in ("apart", "stacked"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def gpt_oss(folder, change=None):
    """A gpt-oss with random MXFP4 experts; returns the float model of the same weights."""
    config = transformers.GptOssConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        layer_types=["full_attention"] * 2,
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for key in [key for key in state if key.endswith(("gate_up_proj", "down_proj"))]:
        weight = state.pop(key)
        experts, k, n = weight.shape  # the model's own axes are the other way around
        codes = torch.randint(0, 16, (experts, n, k), dtype=torch.uint8)
        scales = torch.randint(119, 122, (experts, n, k // 32), dtype=torch.uint8)
        state[f"{key}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).unflatten(-1, (-1, 16))
        state[f"{key}_scales"] = scales
        values = E2M1[(codes & 7).int()] * torch.where(codes > 7, -1.0, 1.0)
        values = values.unflatten(-1, (-1, 32)) * (scales.float() - 127).exp2().unsqueeze(-1)
        parameter = model.get_parameter(key)
        parameter.data.copy_(values.flatten(2).transpose(1, 2))
        bias = model.get_parameter(f"{key}_bias")
        bias.data.uniform_(-0.1, 0.1)
        state[f"{key}_bias"] = bias.data.clone()
    if change is not None:
        change(state)
    save(folder, state)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return model


def test_gpt_oss(tmp_path):
    """Stacks whose gate and up alternate, with biases: each expert is its float matrices in four
    bits, in the order of ours."""
    model = gpt_oss(tmp_path / "source")
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert report.source == "mxfp4"
    assert len(report.layers) == 2 * 4 * 2
    assert all(0 < layer.error < 0.15 for layer in report.layers)
    assert sum("experts have no form of 8 bits" in note for note in report.notes) == 2
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    experts = {n: m for n, m in loaded.named_modules() if isinstance(m, LiquidExperts)}
    assert len(experts) == 2
    for name, layer in experts.items():
        theirs = model.get_submodule(name)
        order = torch.arange(128).view(-1, 2).T.flatten()
        for e in range(4):
            assert torch.equal(layer.gate_up.bias(e), theirs.gate_up_proj_bias[e, order])
            assert torch.equal(layer.down.bias(e), theirs.down_proj_bias[e])
            floats = theirs.gate_up_proj[e].T[order], theirs.down_proj[e].T
            for ours, weight in zip(layer.expert(e), floats, strict=True):
                expected = dequantize_weight(quantize_weight(weight.detach().contiguous()))
                assert torch.equal(dequantize_weight(ours), expected)
    got, expected = outputs(loaded), outputs(model)
    assert (got - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s, key: s.update({f"{key}_scales": s[f"{key}_scales"][:3]}),
            r"gate_up_proj_scales: expected experts along .* as many as .*\[3\] and \[4\]",
        ),
        (lambda s, key: s.pop(f"{key}_scales"), r"experts\.0\.gate_up_proj\.scales: missing"),
        (lambda s, key: s[f"{key}_scales"][2, 0, 0].fill_(255), r"experts\.2\.gate_up_proj: scale"),
        (
            lambda s, key: s.update({f"{key}_blocks": s[f"{key}_blocks"].flatten(2)}),
            r"experts\.0\.gate_up_proj: blocks: expected shape \[N, K / 32, 16\]",
        ),
        (
            lambda s, key: s.update({f"{key}_more": s[f"{key}_scales"].clone()}),
            r"experts\.0\.gate_up_proj\.more: expected nothing but",
        ),
    ],
)
def test_damaged_stacks_are_refused(tmp_path, change, message):
    gpt_oss(tmp_path / "source", lambda s: change(s, "model.layers.1.mlp.experts.gate_up_proj"))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_experts_that_stay_in_float_are_named(tmp_path, monkeypatch):
    old = foreign_models.is_linear
    monkeypatch.setattr(
        foreign_models, "is_linear", lambda key, value: "self_attn" in key and old(key, value)
    )
    write(make("one parameter"), tmp_path / "source")
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    for number in range(2):
        name = f"model.layers.{number}.mlp.experts"
        assert f"{name}: 4 experts in float, as in the source" in report.notes
