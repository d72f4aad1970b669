"""Imports of whole models: each result is loaded as the model that its configuration names."""

import json

import foreign_models
import pytest
import torch
from foreign_models import (
    EXPERTS,
    MODELS,
    SETTINGS,
    TRANSPOSED,
    make,
    outputs,
    transformers,
    write,
)
from safetensors.torch import load_file, save_file

from liquidgemm import LiquidExperts, LiquidLinear, import_checkpoint, load_quantized
from liquidgemm.importers import architecture

OLD = int(transformers.__version__.partition(".")[0]) < 5


def rewrite(folder, change):
    """Changes the tensors of a folder in place."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def assert_same_model(folder, out, model_class, weights):
    """The import has the source's weights to the bit, and computes what they make of an input."""
    loaded = model_class.from_pretrained(out).eval()
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, LiquidLinear)}
    assert len(layers) == len(weights) > 0
    ours = sorted(layer.dequantize().double().norm().item() for layer in layers.values())
    theirs = sorted(weight.float().double().norm().item() for weight in weights.values())
    assert ours == theirs
    again = load_quantized(out)
    expected = outputs(model_class.from_pretrained(folder / "float").eval())
    got = outputs(loaded)
    assert torch.equal(got, outputs(again))
    assert (got - expected).norm() < 0.1 * expected.norm()
    return layers


@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"recurrent"}))
def test_every_architecture(tmp_path, kind):
    """CHECKLIST 25."""
    model = make(kind)
    weights = write(model, tmp_path / "source")
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert report.loaded_as.startswith(f"{type(model).__name__} of transformers")
    assert report.loaded_as.endswith("with its values")
    assert all(layer.error == 0 for layer in report.layers)
    saved = json.loads((tmp_path / "out/liquidgemm_import.json").read_text())
    assert saved["loaded_as"] == report.loaded_as
    assert_same_model(tmp_path / "source", tmp_path / "out", type(model), weights)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_format(tmp_path, name):
    model = make("grouped queries")
    weights = write(model, tmp_path / "source", name)
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert all(layer.error == 0 for layer in report.layers)
    layers = assert_same_model(tmp_path / "source", tmp_path / "out", type(model), weights)
    for layer, weight in weights.items():
        assert torch.equal(layers[layer].dequantize(), weight.float())
        assert layers[layer].group_size == (32 if name.endswith("groups of 32") else 64)


def test_transposed_weights(tmp_path):
    """Of GPT-2's own linear layer, which stores ``[K, N]``; the formats store them as others."""
    (kind,) = TRANSPOSED
    model = make(kind)
    weights = write(model, tmp_path / "source", "gptq")
    import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert_same_model(tmp_path / "source", tmp_path / "out", type(model), weights)


def test_layers_whose_weight_is_read_elsewhere_stay_in_float(tmp_path):
    model = make("recurrent")
    weights = write(model, tmp_path / "source")
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    state = load_file(tmp_path / "out/model.safetensors")
    why = ": in float, since MambaMixer."
    kept = [note.partition(why)[0] for note in report.notes if why in note]
    assert "backbone.layers.0.mixer.dt_proj" in kept
    for name in kept:
        assert torch.equal(state[f"{name}.weight"], weights.pop(name).float())
    assert not {layer.name for layer in report.layers} & set(kept)
    assert_same_model(tmp_path / "source", tmp_path / "out", type(model), weights)


def test_multimodal_names_of_either_age(tmp_path):
    """Files name the parts by the path in the model, or as they did before it changed."""
    model = make("vision tower")
    modules = dict(model.named_modules())
    for age, rename in (
        ("old", lambda key: key),
        ("new", lambda key: _path_in_model(key, modules)),
    ):
        weights = write(model, tmp_path / age, rename=rename)
        import_checkpoint(tmp_path / age, tmp_path / f"{age} out", progress=False)
        layers = assert_same_model(tmp_path / age, tmp_path / f"{age} out", type(model), weights)
        assert set(layers) <= set(modules)


def _path_in_model(key, modules):
    old = {"language_model.model": "model.language_model", "language_model.lm_head": "lm_head"}
    for start, path in {**old, "vision_tower": "model.vision_tower"}.items():
        if key.startswith(start) and key.rpartition(".")[0] not in modules:
            return path + key.removeprefix(start)
    return key if key.rpartition(".")[0] in modules else f"model.{key}"


@pytest.mark.parametrize("name", ["pack-quantized", "awq", "gptq"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts(tmp_path, monkeypatch, kind, name):
    """Layers of single experts become one layer; of older transformers they stay what they are."""
    old = foreign_models.is_linear
    if name != "pack-quantized":  # their words are eight rows, more than this router has
        monkeypatch.setattr(
            foreign_models, "is_linear", lambda key, value: ".gate." not in key and old(key, value)
        )
    model = make(kind)
    weights = write(model, tmp_path / "source", name)
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert all(layer.error == 0 for layer in report.layers)
    if OLD:
        assert_same_model(tmp_path / "source", tmp_path / "out", type(model), weights)
        return
    of_experts = {key: weights.pop(key) for key in list(weights) if ".experts." in key}
    for key in [key for key in weights if key.endswith(".gate")]:
        weights.pop(key)
        assert f"{key}: in float, since MixtralTopKRouter.forward reads its weight" in report.notes
    assert len(report.layers) == len(weights) + len(of_experts)
    assert_same_model(tmp_path / "source", tmp_path / "out", type(model), weights)
    loaded = type(model).from_pretrained(tmp_path / "out")
    experts = [m for m in loaded.modules() if isinstance(m, LiquidExperts)]
    assert len(of_experts) == 12 * len(experts) == 24
    for number, layer in enumerate(experts):
        for e in range(4):
            parts = [
                of_experts[key].float()
                for part in ("gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")
                for key in of_experts
                if f"layers.{number}." in key and key.endswith(f"experts.{e}.{part}")
            ]
            assert torch.equal(layer.gate_up.dequantize(e), torch.cat(parts[:2]))
            assert torch.equal(layer.down.dequantize(e), parts[2])


@pytest.mark.skipif(OLD, reason="experts are layers like others")
@pytest.mark.parametrize(
    ("rename", "error"),
    [
        ({}, None),
        ({"experts.3.down_proj": "else.down_proj"}, r"experts\.3: expected all experts .* down"),
        ({"experts.3.": "experts.9."}, r"experts\.3: expected all experts to be quantized"),
        ({"experts.3.up_proj": "experts.3.more_proj"}, r"experts\.3\.more_proj: expected a linear"),
    ],
)
def test_experts_are_imported_as_a_whole(tmp_path, rename, error):
    model = make("one parameter")
    write(model, tmp_path / "source")

    def change(state):
        for key in list(state):
            for old, new in rename.items():
                if "layers.1." in key and old in key:
                    tensor = state.pop(key)
                    if "else" not in new:
                        state[key.replace(old, new)] = tensor

    rewrite(tmp_path / "source", change)
    if error is None:
        import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
        return
    with pytest.raises(ValueError, match=error):
        import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(OLD, reason="experts are layers like others")
def test_fused_experts(tmp_path):
    """Gate and up of an expert as one layer; the result is the same."""
    model = make("one parameter")
    write(model, tmp_path / "apart")
    write(model, tmp_path / "fused")

    def fuse(state):
        for key in list(state):
            if ".gate_proj." in key and ".experts." in key:
                both = state.pop(key), state.pop(key.replace("gate_proj", "up_proj"))
                if key.endswith("weight_shape"):
                    both = (both[0] * torch.tensor([2, 1]),)
                state[key.replace("gate_proj", "gate_up_proj")] = torch.cat(both)

    rewrite(tmp_path / "fused", fuse)
    for name in ("apart", "fused"):
        import_checkpoint(tmp_path / name, tmp_path / f"{name} out", progress=False)
    states = [load_file(tmp_path / f"{name} out/model.safetensors") for name in ("apart", "fused")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_experts_in_float_are_kept(tmp_path, monkeypatch):
    """A checkpoint of which only the attention is quantized."""
    old = foreign_models.is_linear
    monkeypatch.setattr(
        foreign_models, "is_linear", lambda key, value: "self_attn" in key and old(key, value)
    )
    model = make("one parameter")
    weights = write(model, tmp_path / "source")
    import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert_same_model(tmp_path / "source", tmp_path / "out", type(model), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), r"model\.norm\.weight: .* 1 missing keys"),
        (lambda s: s.update({"more.weight": torch.ones(3)}), r"more\.weight: .* 1 unexpected keys"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight: expected shape \[128\] as in Llama.*, got \[3\]",
        ),
        (
            lambda s: s["model.norm.weight"][5:6].fill_(torch.nan),
            r"model\.norm\.weight: expected finite values, got a NaN",
        ),
        (
            lambda s: s.update({"model.layers.0.mlp.down_proj.bias": torch.ones(128)}),
            "bias: expected none in LlamaForCausalLM",
        ),
    ],
)
def test_what_finds_no_place_is_refused(tmp_path, change, message):
    write(make("grouped queries"), tmp_path / "source")
    rewrite(tmp_path / "source", change)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+: expected a linear layer .* nothing"),
        ({"intermediate_size": 512}, "weight: expected (512 x 128|128 x 512) as in Llama"),
        ({"hidden_act": "no such"}, r"config\.json: does not describe a LlamaForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "expected a linear layer"),
    ],
)
def test_a_configuration_of_another_model_is_refused(tmp_path, fields, message):
    write(make("grouped queries"), tmp_path / "source")
    reconfigure(tmp_path / "source", **fields)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"architectures": None}, "config.json names no architectures"),
        ({"architectures": ["TheirOwnForCausalLM"]}, "has no model TheirOwnForCausalLM"),
    ],
)
def test_what_cannot_be_tried_is_said(tmp_path, fields, why):
    write(make("grouped queries"), tmp_path / "source")
    reconfigure(tmp_path / "source", **fields)
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert report.loaded_as.startswith("not tried: ")
    assert why in report.loaded_as
    assert "not tried" in str(report)


def test_a_large_result_is_loaded_without_its_values(tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "LOADED_WHOLE_BYTES", 1000)
    write(make("vision tower"), tmp_path / "source")
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    if OLD:
        assert "only transformers 5" in report.loaded_as
        return
    assert report.loaded_as.endswith("on the meta device, without its values")
    rewrite(tmp_path / "source", lambda state: state.pop("language_model.model.norm.weight"))
    with pytest.raises(ValueError, match=r"norm\.weight: .* 1 missing keys"):
        import_checkpoint(tmp_path / "source", tmp_path / "again", progress=False)


def test_biases_of_zeros_are_left_out_where_the_model_has_none(tmp_path):
    """As some writers give every layer."""
    model = make("grouped queries")
    weights = write(model, tmp_path / "source", "gptq")
    zeros = {f"{layer}.bias": torch.zeros(len(weight)) for layer, weight in weights.items()}
    rewrite(tmp_path / "source", lambda state: state.update(zeros))
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert sum("bias: left out" in note for note in report.notes) == len(weights)
    assert_same_model(tmp_path / "source", tmp_path / "out", type(model), weights)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head(tmp_path, tied, monkeypatch):
    """It loads, or where the configuration ties it to the embeddings, it is refused."""
    model = make("tied head" if tied else "grouped queries")
    old = foreign_models.is_linear
    monkeypatch.setattr(
        foreign_models, "is_linear", lambda k, v: k == "lm_head.weight" or old(k, v)
    )
    monkeypatch.setitem(SETTINGS, "pack-quantized", {**SETTINGS["pack-quantized"], "ignore": []})
    weights = write(model, tmp_path / "source")
    if tied:
        parts, _ = foreign_models.quantized(model.lm_head.weight.detach(), "pack-quantized")
        rewrite(
            tmp_path / "source", lambda s: s.update({f"lm_head.{k}": v for k, v in parts.items()})
        )
        with pytest.raises(ValueError, match=r"lm_head: expected a weight of its own, .* ties"):
            import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
        return
    import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert "lm_head" in weights
    assert_same_model(tmp_path / "source", tmp_path / "out", type(model), weights)
