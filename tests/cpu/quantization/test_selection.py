"""What quantize_ takes and what it leaves: each matrix accounted for, each for what it is for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liquidgemm import LiquidConfig, LiquidLinear, quantize_


def small(**modules):
    torch.manual_seed(0)
    return nn.ModuleDict({"linear": nn.Linear(64, 64), **modules})


def matrices(model):
    return {name: p for name, p in model.named_parameters() if p.dim() >= 2}


class Bare(nn.Module):
    """Parameters of its own, of two and three dimensions."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(64, 32))
        self.stack = nn.Parameter(torch.zeros(4, 64, 32))


class TinyExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 32))


# The report.


@pytest.mark.parametrize(
    ("make", "owner", "reason"),
    [
        (lambda: nn.LSTM(64, 64), "it", "not nn.Linear but LSTM"),
        (lambda: nn.GRUCell(64, 64), "it", "not nn.Linear but GRUCell"),
        (lambda: nn.MultiheadAttention(64, 4), "it", "not nn.Linear but MultiheadAttention"),
        (lambda: nn.Embedding(9, 64), "it", "not nn.Linear but Embedding"),
        (lambda: nn.Conv2d(4, 4, 3), "it", "not nn.Linear but Conv2d"),
        (lambda: nn.Bilinear(4, 4, 4), "it", "not nn.Linear but Bilinear"),
        (lambda: nn.ParameterList([torch.zeros(3, 3)]), "it", "not nn.Linear but ParameterList"),
        (Bare, "it", "unknown: parameters of Bare"),
        (TinyExperts, "it", "experts of TinyExperts, whose layout is unknown"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            "it",
            "not nn.Linear but ParametrizedLinear",
        ),
    ],
)
def test_every_matrix_is_accounted_for(make, owner, reason):
    """CHECKLIST 22"""
    model = small(it=make())
    expected = {name: p.numel() for name, p in matrices(model).items()}
    report = quantize_(model, progress=False)
    assert report.quantized == ("linear",)
    assert {name: p.size for name, p in report.parameters.items()} == expected
    assert reason in report.skipped[owner]
    assert report.kept.keys() == expected.keys() - {"linear.weight"}
    assert all(p.reason for p in report.kept.values())
    total, kept = sum(expected.values()), sum(p.size for p in report.kept.values())
    assert f"{total - kept} of {total} weights quantized" in str(report)
    largest = max(report.kept, key=lambda name: report.kept[name].size)
    assert f"the largest in floats: {largest} {list(report.kept[largest].shape)}" in str(report)


def test_parameters_of_the_model_itself():
    model = Bare()
    model.linear = nn.Linear(64, 64)
    report = quantize_(model, progress=False)
    assert report.skipped.keys() == {""}
    assert report.parameters["table"].reason == report.skipped[""]
    assert "skipped the model: unknown" in str(report)


def test_a_dry_run_accounts_for_the_same():
    model = small(it=Bare())
    plan = quantize_(model, dry_run=True)
    assert "4096 of 14336 weights quantized (28.6 %)" in str(plan)
    assert quantize_(model, progress=False).parameters == plan.parameters


def test_experts_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config)
    expected = {name: p.numel() for name, p in matrices(model).items()}
    report = quantize_(model, progress=False)
    assert {name: p.size for name, p in report.parameters.items()} == expected
    experts = {name: p for name, p in report.parameters.items() if len(p.shape) == 3}
    assert len(experts) == 2
    assert all(p.quantized for p in experts.values())


# Nothing to quantize.


def test_nothing_to_quantize_is_an_error():
    """CHECKLIST 22"""
    with pytest.raises(ValueError, match=r"model: .*got a module without any matrix"):
        quantize_(nn.Sequential(nn.ReLU()))
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Conv1d(4, 4, 3)})
    with pytest.raises(ValueError, match=r"^a: matches the pattern 'a'; b: .*, got none"):
        quantize_(model, LiquidConfig(skip=("a",)))
    with pytest.raises(ValueError, match=r"^a: rejected by filter_fn"):
        quantize_(model, filter_fn=lambda *_: False)
    assert type(model["a"]) is nn.Linear
    assert not hasattr(model, "liquid_config")


# Again.


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_second_time_changes_nothing(method):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    first, data = LiquidConfig("rtn"), [torch.randn(64, 64)]
    quantize_(model, first, progress=False)
    layers = list(model)
    report = quantize_(model, LiquidConfig(method, 128), calibration=data, progress=False)
    assert report.quantized == ()
    assert report.skipped == {"0": "already quantized", "1": "already quantized"}
    assert "0 linear layers quantized" in str(report)
    assert "8192 of 8192 weights quantized (100.0 %)" in str(report)
    assert list(model) == layers
    assert model.liquid_config == first


@pytest.mark.parametrize(("again", "recorded"), [("rtn", True), ("search", False)])
def test_of_a_mix_no_config_is_recorded(again, recorded):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(model, LiquidConfig("rtn"), lambda name, _: name == "0", progress=False)
    done = model[0]
    report = quantize_(model, LiquidConfig(again), progress=False)
    assert report.quantized == ("1",)
    assert model[0] is done
    assert model.liquid_config == (LiquidConfig("rtn") if recorded else None)


# What is shared.


class Linked(nn.Module):
    """Two layers, of which one uses the weight of the other in some way."""

    def __init__(self, link):
        super().__init__()
        torch.manual_seed(0)
        self.free, self.first = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        link(self)


def by_parameter(net):
    net.second.weight = net.first.weight


def by_data(net):
    net.second.weight.data = net.first.weight.data


def by_view(net):
    net.second.weight = nn.Parameter(net.first.weight.data.T)


def by_slice(net):
    whole = torch.randn(96, 64)
    net.first.weight, net.second.weight = nn.Parameter(whole[:64]), nn.Parameter(whole[32:])


@pytest.mark.parametrize("link", [by_parameter, by_data, by_view, by_slice])
def test_tied_weights_are_left_alone(link):
    report = quantize_(Linked(link), progress=False)
    assert report.quantized == ("free",)
    assert report.skipped == dict.fromkeys(
        ("first", "second"), "its weight is tied to another module's"
    )


def test_neighbours_in_one_memory_are_not_tied():
    def link(net):
        whole = torch.randn(128, 64)
        net.first.weight, net.second.weight = nn.Parameter(whole[:64]), nn.Parameter(whole[64:])

    assert len(quantize_(Linked(link), progress=False).quantized) == 3


def test_a_transposed_copy_in_an_attribute_is_a_tie():
    def link(net):
        net.transposed = net.first.weight.data.T

    report = quantize_(Linked(link), progress=False)
    assert report.skipped == {"first": "its weight is tied to another module's"}


def test_layers_in_plain_attributes_are_left_alone():
    """A list that is no ModuleList would go on using the float layers."""

    def link(net):
        net.all = [net.first, {"not": "a module"}]
        vars(net)["direct"] = net.second

    report = quantize_(Linked(link), progress=False)
    assert report.skipped == {
        "first": "Linked holds it in a plain attribute, 'all'",
        "second": "Linked holds it in a plain attribute, 'direct'",
    }


def test_subclasses_of_tensors_are_left_alone():
    class Wrapped(torch.Tensor):
        pass

    model = small(it=nn.Linear(64, 64))
    model["it"].weight = nn.Parameter(torch.zeros(64, 64).as_subclass(Wrapped))
    report = quantize_(model, progress=False)
    assert report.skipped == {"it": "its weight is a Wrapped, not a plain tensor"}


# Heads of transformers' models.


def tiny(kind, **fields):
    transformers = pytest.importorskip("transformers")
    config_class, model_class = kind
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, config_class)(
        **{**sizes, "intermediate_size": 128, "vocab_size": 100, **fields}
    )
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval()


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (("GPTNeoXConfig", "GPTNeoXForCausalLM"), "embed_out"),
        (("BertConfig", "BertForMaskedLM"), "cls.predictions.decoder"),
        (("BertConfig", "BertForSequenceClassification"), "classifier"),
        (("BertConfig", "BertForQuestionAnswering"), "qa_outputs"),
        (("LlamaConfig", "LlamaForSequenceClassification"), "score"),
        (("RobertaConfig", "RobertaForTokenClassification"), "classifier"),
    ],
)
def test_heads_are_left_alone_whatever_their_name(kind, head):
    model = tiny(kind, tie_word_embeddings=False)
    if not hasattr(model, head.partition(".")[0]):
        head = "lm_head"
    report = quantize_(copy.deepcopy(model), progress=False)
    assert report.skipped[head].startswith("matches the pattern 'lm_head'")
    everything = quantize_(model, LiquidConfig(skip=()), progress=False)
    assert head in everything.quantized


# Adapters of PEFT.


def adapted(**options):
    peft = pytest.importorskip("peft")
    model = tiny(("LlamaConfig", "LlamaForCausalLM"))
    options = {"r": 8, "target_modules": ["q_proj", "v_proj"], **options}
    kind = options.pop("kind", "LoraConfig")
    return peft.get_peft_model(model, getattr(peft, kind)(**options))


def test_bases_of_adapters_are_quantized_and_adapters_are_not():
    model = adapted(modules_to_save=["lm_head"])
    x = torch.arange(12)[None]
    with torch.no_grad():
        before = model(x).logits
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    report = quantize_(model, progress=False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, LiquidLinear)
    assert len(report.quantized) == 7
    reasons = {why for name, why in report.skipped.items() if "lora_" in name or "lm_head" in name}
    assert all("adapter" in why or "PEFT" in why for why in reasons)
    logits = model(x).logits
    assert (logits - before).norm() < 0.2 * before.norm()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1)
    F.cross_entropy(logits[0], x[0]).backward()
    optimizer.step()
    assert layer.lora_B.default.weight.norm() > 0
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "may read its weight"), ({"kind": "LoHaConfig"}, "may read its weight")],
)
def test_bases_that_an_adapter_may_read_are_left_alone(options, reason):
    model = adapted(**options)
    report = quantize_(model, progress=False)
    assert len(report.quantized) == 5
    assert sum(reason in why for why in report.skipped.values()) == 2
    with torch.no_grad():
        model(torch.arange(12)[None])


def test_a_merged_adapter_is_left_alone():
    model = adapted()
    model.merge_adapter()
    report = quantize_(model, progress=False)
    assert sum("merged into it" in why for why in report.skipped.values()) == 2


def test_adapters_by_name():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_a, self.lora_b = nn.Linear(64, 8), nn.Linear(8, 64)
            self.base = nn.Linear(64, 64)

    report = quantize_(Own(), progress=False)
    assert report.quantized == ("base",)
    assert report.skipped["lora_a"] == "part of an adapter, by its name"
    assert sum(p.size for p in report.kept.values()) == 2 * 8 * 64
