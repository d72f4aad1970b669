"""liquidgemm.choose_recipe: by bits or by loss, or refused in words."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import assert_same_state, make, state, transformers

import liquidgemm
from liquidgemm import LiquidConfig, NoRecipeError, choose_recipe, quantize_
from liquidgemm.quantization import choice as choice_module
from liquidgemm.quantization import choice_trials

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def model():
    return make(**SIZES)


def of_its_own(model, seed):
    """Tokens that the model has drawn: no other model can expect them more than it does."""
    torch.manual_seed(seed)
    start = torch.randint(0, 64, (16, 1))
    return list(model.generate(start, do_sample=True, max_new_tokens=40, top_k=0).split(8))


@pytest.fixture(scope="module")
def data(model):
    return {"calibration": of_its_own(model, 1), "held_out": of_its_own(model, 2)}


@pytest.fixture(scope="module")
def within(model, data):
    """Of at most 6 bits, and the state of the model before."""
    before = state(model)
    return choose_recipe(model, target=6.0, **data, progress=False), before


def perplexity(model, batches):
    with torch.no_grad():
        losses = [F.cross_entropy(model(b).logits[:, :-1].mT, b[:, 1:]) for b in batches]
    return torch.stack(losses).mean().exp().item()


def test_target_takes_the_least_loss_within_it(model, data, within):
    choice, before = within
    assert_same_state(model, before)
    tried = {t.recipe: t for t in choice.trials if t.loss is not None}
    assert {"search", "gptq, smooth", "gptq, smooth, budget 6"} < set(tried)
    assert any("keep" in name for name in tried)
    (chosen,) = (t for t in choice.trials if t.outcome == "chosen")
    assert chosen.recipe == choice.chosen
    assert chosen.bits <= 6
    assert chosen.loss == min(t.loss for t in tried.values())
    assert {t.outcome for t in choice.trials if t.bits > 6} == {"not tried: more than 6 bits"}
    loss = 100 * (perplexity(choice.model, data["held_out"]) / perplexity(model, data["held_out"])
                  - 1)  # fmt: skip
    assert chosen.loss == pytest.approx(loss, abs=1e-3)
    assert [t.bits for t in choice.trials] == sorted(t.bits for t in choice.trials)


def test_the_choice_is_what_quantize_makes_of_its_config(model, data, within):
    choice, _ = within
    again = copy.deepcopy(model)
    config = LiquidConfig._from_dict(json.loads(choice.to_json())["config"])
    assert config == choice.config
    assert list(config.bits) == list(choice.config.bits)
    given = data["calibration"] if config.needs_calibration else None
    report = quantize_(again, config, calibration=given, progress=False)
    assert_same_state(again, state(choice.model))
    assert report.quantized == choice.report.quantized
    stored = sum(8 * (m.packed.nbytes + m.scale.nbytes) for m in _layers(again))
    trial = next(t for t in choice.trials if t.outcome == "chosen")
    assert trial.bits == stored / sum(m.in_features * m.out_features for m in _layers(again))


def _layers(model):
    return [m for m in model.modules() if isinstance(m, liquidgemm.LiquidLinear)]


def test_bits_are_known_before(model, within):
    """Those of every recipe that keeps no share, and at most those of a budget."""
    choice, _ = within
    layers, heads = choice_module._layers_of(model, LiquidConfig(), None)
    for trial in choice.trials:
        if trial.config is None:
            continue
        fields = {k: getattr(trial.config, k) for k in choice_module.CHOSEN_FIELDS}
        planned = choice_module._bits_of(LiquidConfig(), layers, heads, fields)
        if trial.config.budget is None:
            assert trial.bits == pytest.approx(planned, rel=1e-12), trial.recipe
        else:
            assert trial.bits <= planned == trial.config.budget


def test_max_loss_takes_the_fewest_bits(model, data, within):
    losses = {t.recipe: t.loss for t in within[0].trials}
    limit = (losses["search"] + losses["gptq, smooth"]) / 2
    assert losses["gptq, smooth"] < limit < losses["search"]
    choice = choose_recipe(model, max_loss=limit, **data, progress=False)
    assert choice.chosen == "gptq, smooth"
    by_name = {t.recipe: t for t in choice.trials}
    assert by_name["search"].outcome == f"loses more than {limit:g} %"
    rest = [t for name, t in by_name.items() if name not in ("search", "gptq, smooth")]
    assert len(rest) > 5
    assert {t.outcome for t in rest} == {"not tried: 'gptq, smooth' needs no more bits"}
    assert all(t.loss is None for t in rest)


def test_without_data_only_what_needs_none(model, data):
    choice = choose_recipe(model, target=6.5, held_out=data["held_out"], progress=False)
    tried = [t.recipe for t in choice.trials if t.loss is not None]
    assert tried == ["search", "search, augment 64", "search, 6 bits"]
    for trial in choice.trials:
        if trial.recipe.startswith("gptq") and trial.bits <= 6.5:
            assert trial.outcome == "not tried: needs calibration data"


def test_a_recipe_that_overfits_is_refused(model, data):
    """Calibrated on one token over and over, it does worse on other text than without data."""
    one = [torch.full((4, 40), 7)]
    choice = choose_recipe(model, target=4.5, calibration=one, held_out=data["held_out"],
                           progress=False)  # fmt: skip
    outcomes = {t.recipe: t.outcome for t in choice.trials}
    assert outcomes["gptq, smooth"] == "worse than 'search', which needs no data: it overfits"
    assert choice.chosen == "search"


def test_no_recipe_is_an_error(model, data, monkeypatch):
    with pytest.raises(ValueError, match=r"target: expected at least 4\.47 .* 'search' needs, got"):
        choose_recipe(model, target=4.4, **data, progress=False)
    # Of a model of this size a recipe may lose nothing at all.
    monkeypatch.setattr(choice_trials.Judge, "__call__", lambda *_: 5.0)
    with pytest.raises(NoRecipeError, match="no recipe has at most 4\\.5 bits") as caught:
        choose_recipe(model, target=4.5, max_loss=4.9, **data, progress=False)
    assert [t.recipe for t in caught.value.trials if t.loss is not None] == [
        "search",
        "gptq, smooth",
    ]
    assert "comes nearest" in str(caught.value)
    monkeypatch.setattr(choice_trials.Judge, "__call__", lambda *_: math.nan)
    with pytest.raises(NoRecipeError):
        choose_recipe(model, target=4.5, **data, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "target: expected bits per weight, or max_loss in percent, got neither"),
        ({"target": 0.0}, "target: expected a finite number > 0, got 0.0"),
        ({"target": math.nan}, "target: expected a finite number > 0, got nan"),
        ({"target": True}, "target: expected a finite number > 0, got True"),
        ({"target": "4"}, "target: expected a finite number > 0, got '4'"),
        ({"max_loss": -1}, "max_loss: expected a finite number > 0, got -1"),
        ({"max_loss": math.inf}, "max_loss: expected a finite number > 0, got inf"),
        (
            {"target": 5, "config": LiquidConfig(keep=("q_proj",))},
            r"config: expected the default keep, which recipes choose, got \('q_proj',\)",
        ),
        ({"target": 5, "config": LiquidConfig(gate="off")}, "config: expected the default gate"),
        ({"target": 5, "held_out": []}, "held_out: expected at least one batch"),
    ],
)
def test_a_demand_is_checked_first(model, data, monkeypatch, arguments, message):
    monkeypatch.setattr(choice_trials.Tries, "quantized", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=message):
        choose_recipe(model, **{"held_out": data["held_out"], **arguments}, progress=False)


def test_an_interrupted_choice_goes_on(model, data, within, tmp_path, monkeypatch):
    """Finished trials are not made again, but for the model of the one that is chosen."""
    made = []
    whole = choice_trials.Tries.quantized

    def counting(self, config):
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(config)
        return whole(self, config)

    monkeypatch.setattr(choice_trials.Tries, "quantized", counting)
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        choose_recipe(model, target=6.0, **data, resume=tmp_path / "r", progress=False)
    stop = -1
    choice = choose_recipe(model, target=6.0, **data, resume=tmp_path / "r", progress=False)
    expected, _ = within
    assert [(t.recipe, t.bits, t.loss, t.outcome) for t in choice.trials] == [
        (t.recipe, t.bits, t.loss, t.outcome) for t in expected.trials
    ]
    assert_same_state(choice.model, state(expected.model))
    tried = sum(t.loss is not None for t in expected.trials)
    made_before = [t for t in expected.trials if t.loss is not None][:2]
    assert len(made) == tried + any(t.outcome == "chosen" for t in made_before)
    again = choose_recipe(model, target=4.5, **data, resume=tmp_path / "r", progress=False)
    assert len(made) == tried + 1 + any(t.outcome == "chosen" for t in made_before)
    assert again.chosen == "gptq, smooth"
    for changed, what in (
        ({"held_out": data["calibration"]}, "held_out"),
        ({"calibration": data["held_out"]}, "calibration"),
        ({"config": LiquidConfig(seed=3)}, "config"),
    ):
        with pytest.raises(ValueError, match=f"resume: .* holds a choice with another {what}"):
            choose_recipe(model, target=6.0, **{**data, **changed}, resume=tmp_path / "r")
    (tmp_path / "r/choice.json").write_text("{")
    with pytest.raises(ValueError, match="truncated or damaged"):
        choose_recipe(model, target=6.0, **data, resume=tmp_path / "r")


def test_an_encoder_is_judged_by_its_outputs():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=256, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    held_out = [torch.randint(0, 64, (3, 20))]
    choice = choose_recipe(model, max_loss=1.0, held_out=held_out, progress=False)
    assert choice.measure == "relative output error"
    assert choice.chosen == "int8"
    with torch.no_grad():
        ours, theirs = (m(held_out[0]) for m in (choice.model, model))
    errors = [
        (a - b).norm() / b.norm() for a, b in zip(ours.to_tuple(), theirs.to_tuple(), strict=True)
    ]
    chosen = next(t for t in choice.trials if t.outcome == "chosen")
    assert chosen.loss == pytest.approx(100 * sum(errors).item() / len(errors), rel=1e-4)


def test_experts_are_quantized_by_every_recipe():
    """They have no INT8 form: a recipe must not leave them in floats for that."""
    model = make("Mixtral", **SIZES, num_local_experts=4, num_experts_per_tok=2)
    held_out = [torch.randint(0, 64, (2, 24))]
    choice = choose_recipe(model, max_loss=1e3, held_out=held_out, progress=False)
    layers, heads = choice_module._layers_of(model, LiquidConfig(), None)
    of_experts = {layer.experts for layer in layers.values()} - {None}
    assert of_experts
    assert of_experts < set(choice.report.quantized)
    int8 = next(r for r in choice_module._recipes(
        layers, lambda *_: 4.0, None, 3.0, False) if r.name == "int8")  # fmt: skip
    quantized = copy.deepcopy(model)
    report = quantize_(quantized, LiquidConfig(**int8.fields), progress=False)
    assert set(report.quantized) == set(choice.report.quantized)
    planned = choice_module._bits_of(LiquidConfig(), layers, heads, int8.fields)
    weights = sum(layer.size for layer in layers.values())
    assert 8 * report.bytes_after / weights == pytest.approx(planned, rel=1e-12)


def test_table_and_plot(within, tmp_path):
    choice, _ = within
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=open(tmp_path / "t", "w"))  # noqa: SIM115
    console.print(choice.table())
    text = console.export_text()
    for trial in choice.trials:
        assert trial.recipe in text
        assert trial.outcome in text
    assert f"chosen: {choice.chosen}" in str(choice)
    pytest.importorskip("matplotlib")
    choice.plot(tmp_path / "choice.png")
    assert (tmp_path / "choice.png").read_bytes().startswith(b"\x89PNG")
