"""quantize_ with calibration data: whole models, smoothing, rotation, the gate, resuming."""

import json

import pytest
import reference
import torch
from torch import nn
from typer.testing import CliRunner

from liquidgemm import LiquidConfig, LiquidLinear, cli, load_quantized, quantize_, save_quantized
from liquidgemm.calibration import driver
from liquidgemm.calibration.blocks import capture, find_blocks, find_stages, run_block
from liquidgemm.calibration.data import as_batches, token_windows
from liquidgemm.calibration.rotate import rotate_
from liquidgemm.calibration.simulate import simulate_
from liquidgemm.calibration.smooth import find_sites, usable_sites
from liquidgemm.evaluate import evaluate, sliding_windows

transformers = pytest.importorskip("transformers")


def batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (2, 24), generator=generator) for _ in range(count)]


def make(kind="Llama", seed=0, **fields):
    """A tiny model of an architecture, with norms and outliers that are not all alike."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 96,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    if kind == "GPT2":
        sizes = {"vocab_size": 64, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 64}
    if kind == "GPTNeoX":
        del sizes["num_key_value_heads"], sizes["head_dim"]
    config = getattr(transformers, kind + "Config")(**sizes | fields)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or "bias" in name:
            parameter.data.add_(torch.rand_like(parameter))
        elif parameter.dim() == 2:
            parameter.data.mul_(2)
    return model


@torch.no_grad()
def logits(model, tokens=None):
    return model(batches(1, seed=9)[0] if tokens is None else tokens).logits


def error(model, expected):
    return ((logits(model) - expected).norm() / expected.norm()).item()


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model, expected):
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        reference.assert_same(actual[key], value, key=key)


RECIPES = {
    "hessian": {"method": "hessian"},
    "gptq": {"method": "gptq"},
    "smooth": {"smooth": True},
    "tune": {"method": "gptq", "tune": 20},
    "all": {
        "method": "gptq",
        "tune": 5,
        "smooth": True,
        "rotate": True,
        "rotate_heads": True,
        "augment": 64,
        "keep": ("down_proj",),
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_save_and_load(recipe, tmp_path):
    """Every recipe gives a model near the float one, that is stored and restored to the bit."""
    model = make()
    expected = logits(model)
    config = LiquidConfig(**RECIPES[recipe], gate="off")
    report = quantize_(model, config, calibration=batches(), progress=False)
    assert len(report.quantized) == len(report.layers) == 14
    assert {layer.name for layer in report.layers} == set(report.quantized)
    assert all(layer.tokens == 4 * 2 * 24 and layer.output_error < 0.1 for layer in report.layers)
    assert error(model, expected) < 0.25
    assert model.liquid_config == config
    save_quantized(model, tmp_path)
    other = load_quantized(tmp_path)
    assert_same_state(other, state(model))
    reference.assert_same(logits(other), logits(model))
    version = json.loads((tmp_path / "liquidgemm.json").read_text())["format_version"]
    assert version == (2 if recipe == "all" else 1)
    assert "method" in json.loads(report.to_json())["layers"][0]


def test_the_simulation_is_the_real_path():
    model = make()
    quantize_(model, LiquidConfig(augment=64), progress=False)
    expected = logits(model)
    # The same but for the order of float32 sums, which can also move the rounding of activations.
    assert error(simulate_(model), expected) < 1e-3


def test_int8_everywhere_is_close():
    model = make()
    expected = logits(model)
    quantize_(model, LiquidConfig(keep=("*",)), progress=False)
    assert error(model, expected) < 0.05


def test_calibration_is_deterministic():
    first, second = make(), make()
    config = LiquidConfig("gptq", smooth=True, rotate=True, gate="off")
    for model in (first, second):
        quantize_(model, config, calibration=batches(), progress=False)
    assert_same_state(second, state(first))


def test_later_blocks_see_what_quantized_blocks_give(monkeypatch):
    """Moments of a layer in the second block come from the quantized first block."""
    model = make()
    seen = {}
    original = driver.quantize_layer

    def spy(weight, config, name, moments):
        seen[name] = moments
        return original(weight, config, name, moments)

    monkeypatch.setattr(driver, "quantize_layer", spy)
    quantize_(model, LiquidConfig("hessian"), calibration=batches(), progress=False)
    q, k = (seen[f"model.layers.1.self_attn.{name}"] for name in ("q_proj", "k_proj"))
    assert q is k
    inputs = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(0, 1))
    )
    for batch in batches():
        logits(model, batch)
    hook.remove()
    x = driver.round_activation(torch.cat(inputs)).double()
    expected = x.T @ x / len(x)
    assert (q.hessian.double() - expected).norm() < 1e-2 * expected.norm()


def test_tuning_brings_blocks_closer_to_the_float_model():
    """On text that it has not seen, of the kind that it has."""
    errors = {}
    for tune in (0, 100):
        model = make()
        expected = logits(model)
        config = LiquidConfig("gptq", tune=tune)
        quantize_(model, config, calibration=batches(24), progress=False)
        errors[tune] = error(model, expected)
    assert errors[100] < 0.97 * errors[0], errors


def test_a_model_without_blocks_is_one_block():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96), nn.Linear(96, 64))
    x = [torch.randn(50, 96) for _ in range(4)]
    expected = net(x[0])
    report = quantize_(net, LiquidConfig("gptq"), calibration=x, progress=False)
    assert report.quantized == ("0", "2", "3")
    assert all(layer.tokens == 200 and layer.method == "gptq" for layer in report.layers)
    assert (net(x[0]) - expected).norm() < 0.15 * expected.norm()


def test_a_layer_that_is_never_called_is_searched():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    report = quantize_(
        Net(), LiquidConfig("gptq"), calibration=[torch.randn(29, 64)], progress=False
    )
    assert {layer.name: (layer.method, layer.tokens) for layer in report.layers} == {
        "used": ("gptq", 29),
        "unused": ("search", 0),
    }


def test_padding_is_left_out():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = transformers.BertModel(config).eval()
    short = {"input_ids": torch.arange(10).view(1, 10), "attention_mask": torch.ones(1, 10).long()}
    padded = {
        "input_ids": torch.cat((short["input_ids"], torch.full((1, 6), 63)), 1),
        "attention_mask": torch.cat((short["attention_mask"], torch.zeros(1, 6).long()), 1),
    }
    report = quantize_(model, LiquidConfig("hessian"), calibration=[short, padded], progress=False)
    inside = [layer for layer in report.layers if "encoder" in layer.name]
    assert len(inside) == 12
    assert {layer.tokens for layer in inside} == {20}


# Smoothing and rotation leave the float model's function as it is.


NORMS = ["input_layernorm", "post_attention_layernorm"]
LINEARS = ["self_attn.v_proj", "mlp.up_proj"]


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        ("Llama", [*NORMS, *LINEARS]),
        ("Qwen2", [*NORMS, *LINEARS]),
        ("Mistral", [*NORMS, *LINEARS]),
        ("Gemma", [*NORMS, *LINEARS]),
        ("Gemma2", ["pre_feedforward_layernorm", "input_layernorm", *LINEARS]),
        ("GPTNeoX", NORMS),
        ("GPT2", []),  # its layers are no nn.Linear
    ],
)
def test_smoothing_pairs(kind, sources):
    """What is found can be folded: `usable_sites` has tried each with arbitrary factors."""
    model = make(kind)
    name = find_blocks(model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)])[0]
    if not sources:
        assert find_sites(model.transformer.h[0], LiquidConfig(smooth=True)) == []
        return
    block = model.get_submodule(name)
    batch = capture(model, [name], batches(1)[0])
    found = find_sites(block, LiquidConfig(smooth=True))
    before = state(block)
    usable, refused = usable_sites(block, found, lambda b: run_block(b, batch, 0))
    assert [site.source for site in usable] == sources, refused
    assert_same_state(block, before)


def test_a_pair_that_cannot_be_folded_is_found_out():
    """In a block whose norm feeds the residual stream as well."""

    class Block(nn.Module):
        def __init__(self, original):
            super().__init__()
            self.input_layernorm = original.input_layernorm
            self.self_attn = original.self_attn

        def forward(self, hidden_states, **kwargs):
            x = self.input_layernorm(hidden_states)
            return x + self.self_attn(x, **kwargs)[0]

    model = make()
    block = Block(model.model.layers[0])
    batch = capture(model, ["model.layers.0"], batches(1)[0])
    sites = find_sites(block, LiquidConfig(smooth=True))
    usable, refused = usable_sites(block, sites, lambda b: run_block(b, batch, 0))
    assert [site.source for site in usable] == ["self_attn.v_proj"]
    assert [site.source for site in refused] == ["input_layernorm"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"nowhere": ["mlp.up_proj"]}, "smooth: expected names within a block, got 'nowhere'"),
        ({"input_layernorm": ["mlp"]}, "smooth: mlp: expected an nn.Linear, got LlamaMLP"),
        ({"input_layernorm": ["mlp.up_proj"]}, "smooth: input_layernorm into mlp.up_proj: what"),
        ({"input_layernorm": ["self_attn.q_proj"]}, "smooth: input_layernorm into .* used else"),
        ({"mlp.down_proj": ["mlp.up_proj"]}, "smooth: mlp.down_proj into"),
    ],
)
def test_wrong_pairs_are_refused(pairs, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        quantize_(model, LiquidConfig(smooth=pairs), calibration=batches(), progress=False)
    assert_same_state(model, before)


def test_named_pairs():
    pairs = {"post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}
    report = quantize_(
        make(), LiquidConfig("gptq", smooth=pairs), calibration=batches(), progress=False
    )
    smoothed = {layer.name.rpartition(".")[2] for layer in report.layers if layer.alpha}
    assert smoothed <= {"gate_proj", "up_proj"}
    assert smoothed


def test_smoothing_tames_outliers():
    """A feature a hundred times as large as the others, as models have them."""
    errors = {}
    for smooth in (False, True):
        model = make()
        for block in model.model.layers:
            block.input_layernorm.weight.data[7] *= 100
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                linear.weight.data[:, 7] /= 100
        expected = logits(model)
        config = LiquidConfig("hessian", smooth=smooth)
        report = quantize_(model, config, calibration=batches(), progress=False)
        assert max(layer.outlier for layer in report.layers) > (1 if smooth else 30)
        errors[smooth] = error(model, expected)
    assert errors[True] < 0.7 * errors[False]


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
def test_rotation_leaves_the_function(kind, heads):
    model = make(kind)
    expected, before = logits(model), state(model)
    rotate_(model, LiquidConfig(rotate=True, rotate_heads=heads))
    assert error(model, expected) < 1e-4
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    changed = {key for key, value in before.items() if not torch.equal(value, state(model)[key])}
    assert "model.layers.0.mlp.down_proj.weight" in changed
    assert ("model.layers.0.self_attn.v_proj.weight" in changed) >= heads


def test_rotation_spreads_outliers():
    model = make()
    model.model.embed_tokens.weight.data[:, 5] *= 50

    def ratio():
        x = capture(model, find_blocks(model, ["model.layers.0"]), batches(1)[0]).hidden
        amax = x.abs().flatten(0, 1).amax(0)
        return (amax.max() / amax.median()).item()

    before = ratio()
    rotate_(model, LiquidConfig(rotate=True))
    assert ratio() < 0.2 * before


@pytest.mark.parametrize("kind", ["Gemma", "Gemma2", "GPTNeoX", "GPT2"])
def test_rotation_of_other_models_is_refused(kind):
    model = make(kind)
    before = state(model)
    with pytest.raises(ValueError, match="rotate: expected a model of the Llama family, got one"):
        quantize_(model, LiquidConfig(rotate=True), progress=False)
    assert_same_state(model, before)


# The gate.


@pytest.mark.parametrize("gate", ["raise", "warn", "off"])
def test_gate(gate, monkeypatch):
    """A calibrated model that does worse on unseen text is refused and the float model is left."""
    model = make()
    before = state(model)

    def broken(weight, config, name, moments):
        quantized, method = original(weight, config, name, moments)
        quantized.scale.mul_(3)
        return quantized, method

    original = driver.quantize_layer
    monkeypatch.setattr(driver, "quantize_layer", broken)

    def run():
        return quantize_(
            model,
            LiquidConfig("gptq", gate=gate),
            calibration=batches(),
            held_out=tokens_of(make()),
            progress=False,
        )

    if gate == "raise":
        with pytest.raises(RuntimeError, match="gate: on held-out text the calibrated model has"):
            run()
        assert_same_state(model, before)
        return
    if gate == "warn":
        with pytest.warns(UserWarning, match="gate: on held-out text"):
            report = run()
    else:
        report = run()
    assert report.held_out["calibrated"] > report.held_out["data-free"]
    assert isinstance(model.model.layers[0].mlp.up_proj, LiquidLinear)


@torch.no_grad()
def tokens_of(model):
    """Text that the float model is sure of: its own greedy continuations."""
    tokens = batches(1, seed=3)[0][:, :2]
    while tokens.shape[1] < 24:
        tokens = torch.cat((tokens, logits(model, tokens)[:, -1:].argmax(-1)), 1)
    return [tokens]


def test_losses_of_the_gate_are_those_of_the_models():
    model, data_free = make(), make()
    unseen = batches(2, seed=5)
    config = LiquidConfig("gptq", smooth=True, gate="off")
    report = quantize_(model, config, calibration=batches(), held_out=unseen, progress=False)
    quantize_(data_free, progress=False)
    for kind, one in (("reference", make()), ("data-free", data_free), ("calibrated", model)):
        losses = [
            nn.functional.cross_entropy(logits(one, b)[:, :-1].flatten(0, 1), b[:, 1:].flatten())
            for b in unseen
        ]
        assert report.held_out[kind] == pytest.approx(sum(losses).item() / 2, rel=1e-3), kind
    assert "loss on held-out text: reference" in str(report)


# Resuming.


def test_resume_gives_the_same_bits(tmp_path, monkeypatch):
    config = LiquidConfig("gptq", smooth=True, augment=64, gate="off")
    expected = make(kind="Qwen2")
    quantize_(expected, config, calibration=batches(), progress=False)

    model, run = make(kind="Qwen2"), driver._quantize_block

    def interrupted(block, prefix, *args):
        if prefix == "model.layers.1.":
            raise KeyboardInterrupt
        return run(block, prefix, *args)

    monkeypatch.setattr(driver, "_quantize_block", interrupted)
    before = state(model)
    options = {"calibration": batches(), "resume": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, config, **options)
    assert_same_state(model, before)
    files = ["block-0000.safetensors", "calibration.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == files

    def second_only(block, prefix, *args):
        assert prefix == "model.layers.1."
        return run(block, prefix, *args)

    monkeypatch.setattr(driver, "_quantize_block", second_only)
    report = quantize_(model, config, **options)
    assert_same_state(model, state(expected))
    assert len(report.layers) == 14

    with pytest.raises(ValueError, match=r"resume: .* another config"):
        quantize_(make(kind="Qwen2"), LiquidConfig("gptq"), **options)
    with pytest.raises(ValueError, match=r"resume: .* another calibration"):
        quantize_(make(kind="Qwen2"), config, **{**options, "calibration": batches(seed=1)})
    with pytest.raises(ValueError, match=r"resume: .* other weights"):
        quantize_(make(kind="Qwen2", seed=1), config, **options)


# Arguments.


def fake_tokenizer(text):
    return {"input_ids": [ord(letter) % 64 for letter in text]}


def test_texts_and_windows():
    windows = token_windows(["abc" * 5, "xyz" * 6], fake_tokenizer, length=10)
    assert [w.shape for w in windows] == [(1, 10)] * 3
    assert torch.cat(windows, 1)[0].tolist() == [ord(c) % 64 for c in "abc" * 5 + "xyz" * 5]
    few = token_windows(["abc" * 100], fake_tokenizer, length=10, limit=35)
    assert len(few) == 3
    assert [w.shape for w in token_windows(["ab"], fake_tokenizer, length=10)] == [(1, 2)]
    assert len(as_batches(["abc", batches(1)[0]], fake_tokenizer)) == 2


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        ({"method": "gptq"}, {}, ValueError, "calibration: expected .* for method 'gptq', got N"),
        ({"smooth": True}, {}, ValueError, "calibration: expected .* for smooth, got None"),
        ({}, {"calibration": []}, ValueError, "calibration: expected at least one"),
        ({}, {"calibration": "text"}, TypeError, "calibration: .* got one str: put it in a list"),
        ({}, {"calibration": batches(1)[0]}, TypeError, "calibration: .* got one Tensor"),
        ({}, {"calibration": ["text"]}, ValueError, "tokenizer: .* calibration holds texts"),
        ({}, {"calibration": [3]}, TypeError, "calibration: .* got int"),
        ({}, {"calibration": batches(), "held_out": [3]}, TypeError, "held_out: .* got int"),
    ],
)  # fmt: skip
def test_arguments_are_checked(config, options, error, message):
    """CHECKLIST 7."""
    model = make()
    before = state(model)
    with pytest.raises(error, match=message):
        quantize_(model, LiquidConfig(**config), progress=False, **options)
    assert_same_state(model, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment": 63}, "augment: expected a multiple of 64"),
        ({"augment": {"x": -64}}, "augment: "),
        ({"smooth": "norm"}, "smooth: expected True, False or names"),
        ({"smooth": {"norm": "q"}}, r"smooth\['norm'\]: expected a sequence"),
        ({"keep": "q"}, "keep: expected a sequence"),
        ({"rotate": 1}, "rotate: expected True or False"),
        ({"damping": -1}, "damping: "),
        ({"shrinkage": 2}, "shrinkage: "),
        ({"tune": -1}, "tune: expected an integer >= 0"),
        ({"seed": 0.5}, "seed: "),
        ({"gate": "shut"}, "gate: expected one of"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        LiquidConfig(**fields)


def test_config_json_round_trip():
    config = LiquidConfig(
        "gptq",
        128,
        ("a",),
        ("b",),
        {"x": 64},
        {"n": ["q", "k"]},
        True,
        True,
        0.5,
        0.25,
        9,
        7,
        "warn",
    )
    assert LiquidConfig.from_json(config.to_json()) == config


def test_dry_run_changes_nothing():
    model = make()
    before = state(model)
    config = LiquidConfig("gptq", smooth=True, augment=64, keep=("down_proj",))
    report = quantize_(model, config, dry_run=True)
    assert_same_state(model, before)
    text = str(report)
    assert "model.layers.0.self_attn.q_proj  96 x 96, gptq, 64 residual columns" in text
    assert "model.layers.1.mlp.down_proj     96 x 136, int8" in text
    assert report.plan["model.layers.1.mlp.up_proj"].endswith("by post_attention_layernorm")
    assert "lm_head: matches the pattern 'lm_head'" in text


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    report = quantize_(make(), LiquidConfig("gptq"), calibration=batches(), progress=False)
    report.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert report.table(worst=3).row_count == 3
    assert "no held-out text" in str(report)
    first = json.loads(report.to_json())["layers"][0]
    assert first["method"] == "gptq"
    assert 0 < first["output_error"] < 1


def test_stages_share_their_input():
    model = make()
    block = model.model.layers[0]
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    batch = capture(model, ["model.layers.0"], batches(1)[0])
    assert find_stages(block, layers, batch, 0) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


# Evaluation.


@pytest.mark.parametrize(
    ("count", "length", "stride"), [(50, 16, 8), (50, 16, 15), (9, 16, 4), (17, 16, 1)]
)
def test_sliding_windows_predict_each_token_once(count, length, stride):
    tokens = torch.arange(count)
    predicted = []
    for window, first in sliding_windows(tokens, length, stride):
        assert window.shape[1] <= length
        assert first >= 1
        if predicted and window.shape[1] == length:
            assert first >= length - stride
        predicted += window[0, first:].tolist()
    assert predicted == list(range(1, count))


def test_sliding_windows_are_checked():
    with pytest.raises(ValueError, match="stride: "):
        list(sliding_windows(torch.arange(9), 4, 4))
    with pytest.raises(ValueError, match="tokens: "):
        list(sliding_windows(torch.arange(1), 4, 2))


def test_evaluate():
    model, other = make(), make(seed=1)
    tokens = batches(1)[0].flatten()[:24]
    (window,) = sliding_windows(tokens, 24, 1)
    log_p, log_r = (logits(m, tokens[None])[0, :-1].double().log_softmax(1) for m in (model, other))
    result = evaluate(model, [window], other)
    assert result.tokens == 23
    nll = -log_p[range(23), tokens[1:]].mean()
    assert result.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)
    assert result.agreement == (log_p.argmax(1) == log_r.argmax(1)).double().mean()
    kl = (log_r.exp() * (log_r - log_p)).sum(1)
    assert result.mean_kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result.p99_kl == pytest.approx(kl.quantile(0.99).item(), rel=1e-4)
    same = evaluate(model, [window], model)
    assert (same.agreement, same.mean_kl) == (1, 0)
    assert evaluate(model, [window]).mean_kl is None


# The command line.


@pytest.fixture
def folder(tmp_path):
    """A tiny model of transformers on disk, with a tokenizer and texts."""
    tokenizers = pytest.importorskip("tokenizers")
    make().save_pretrained(tmp_path / "model")
    vocabulary = {chr(97 + i): i for i in range(26)} | {"?": 26}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    wrapped.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("a b c d e f g h i j k l m " * 9)
    (tmp_path / "b.txt").write_text("z y x w v u t s r q p o n " * 9)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_quantize_and_eval_commands(folder):
    model, out = folder / "model", folder / "out"
    options = ["--method", "gptq", "--calib", folder / "a.txt", "--calib", folder / "b.txt"]
    options += ["--smooth", "--augment", "64", "--keep", "down_proj", "--device", "cpu"]
    dry = run("quantize", model, "-o", out, *options, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "mlp.down_proj" in dry.stdout
    assert not out.exists()
    gate = ["--held-out", folder / "b.txt", "--gate", "off"]
    result = run("quantize", model, "-o", out, *options, *gate, "--resume", folder / "blocks")
    assert result.exit_code == 0, result.output
    assert "loss on held-out text" in result.stdout
    assert json.loads((out / "quantization.json").read_text())["layers"]
    result = run("eval", out, "--text", folder / "b.txt", "--reference", model, "--json",
                 "--length", 32, "--stride", 16, "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    simulated = json.loads(result.stdout)
    assert simulated["tokens"] == 9 * 13 - 1
    assert 0.5 < simulated["agreement"] <= 1
    result = run("eval", out, "--text", folder / "b.txt", "--exact", "--json", "--device", "cpu",
                 "--length", 32, "--stride", 16)  # fmt: skip
    exact = json.loads(result.stdout)
    assert exact["perplexity"] == pytest.approx(simulated["perplexity"], rel=1e-3)
    assert run("eval", out, "--text", folder / "b.txt", "--device", "cpu").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere.gguf", "--text", "a.txt"], "nowhere.gguf: no such file"),
        (["eval", "model", "--text", "c.txt"], "c.txt: expected a UTF-8 text file"),
        (
            ["eval", "model", "--text", "a.txt", "--length", "8", "--stride", "8"],
            "stride: expected",
        ),
        (["quantize", "model", "-o", "out", "--method", "gptq"], "--calib: expected text files"),
        (["quantize", "model", "-o", "out", "--augment", "3"], "augment: expected a multiple"),
        (["quantize", "model", "-o", "out", "--config", "{"], "Expecting"),
    ],
)
def test_errors_of_the_commands_are_one_line(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    result = run(*arguments)
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if "error" in line)
    assert line.startswith("liquidgemm: error: ")
    assert message in line
    assert not (folder / "out").exists()
