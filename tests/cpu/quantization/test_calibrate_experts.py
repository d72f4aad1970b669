"""Calibration of experts: each on its own tokens, filled up with those of its layer."""

import warnings

import pytest
import torch
from moe_models import moe_model
from torch import nn

from liquidgemm import LiquidConfig, LiquidExperts, LiquidLinear, quantize_
from liquidgemm.quantization.calibration.blocks import Call
from liquidgemm.quantization.calibration.experts import Routed, _mixed, capture
from liquidgemm.quantization.calibration.moments import Moments
from liquidgemm.quantization.experts import experts_as_linear

GPTQ = LiquidConfig("gptq", gate="off")


def batches(count=3, seed=0, shape=(2, 32)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 128, shape, generator=generator) for _ in range(count)]


def calibrated(model, data=None, config=GPTQ, **options):
    return quantize_(
        model, config, calibration=data or batches(), progress=False, verify=False, **options
    )


def counted(model, data):
    """Tokens per expert of the first layer, by the float model's own router."""
    counts = torch.zeros(4, dtype=torch.int64)

    def hook(module, args):
        counts.add_(torch.bincount(args[1].flatten(), minlength=4))

    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in data:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return counts.tolist()


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4"])
def test_errors_at_the_output_are_less_than_without_data(family):
    """On the tokens themselves; counts are those of the router."""
    data = batches()
    model = moe_model(family)
    report = calibrated(model, data, GPTQ)
    plain = calibrated(moe_model(family), data, LiquidConfig("search", gate="off"))
    for ours, theirs in zip(report.layers, plain.layers, strict=True):
        if ".experts." in ours.name:
            assert ours.method == "gptq"
            # The better codes of the layers before are in it as well.
            assert ours.output_error < theirs.output_error
    assert len([m for m in model.modules() if isinstance(m, LiquidExperts)]) == 2
    assert all(
        sum(e.tokens) == 192 * (1 if family == "Llama4" else 2) for e in report.experts.values()
    )
    assert "tokens per expert: " in str(report)
    rows = report.expert_table().row_count
    assert rows == len(report.experts) == 2


def test_tokens_are_counted_without_padding():
    data = batches()
    masks = [torch.ones_like(batch) for batch in data]
    for mask in masks:
        mask[0, :20] = 0
    masked = [{"input_ids": b, "attention_mask": m} for b, m in zip(data, masks, strict=True)]
    model = moe_model("Mixtral")
    report = calibrated(model, masked)
    tokens = report.experts["model.layers.0.mlp.experts"].tokens
    assert sum(tokens) == 2 * sum(int(mask.sum()) for mask in masks)
    model = moe_model("Mixtral")
    assert calibrated(model, data).experts["model.layers.1.mlp.experts"].tokens != tokens


def test_counts_are_those_of_the_router():
    data, model = batches(1), moe_model("Mixtral")
    for layer in model.model.layers:  # so that the quantized attention changes nothing
        layer.self_attn.o_proj.weight.data.zero_()
    expected = counted(model, data)
    assert calibrated(model, data).experts["model.layers.0.mlp.experts"].tokens == expected


def test_an_expert_without_tokens_is_named():
    """It is calibrated on the other tokens of its layer; its codes are not those without data."""
    model = moe_model("Mixtral")
    router = model.model.layers[0].mlp.gate
    # One direction in which all tokens are far out.
    model.model.layers[0].post_attention_layernorm.weight.data[0] = 0
    router.weight.data.zero_()
    router.weight.data[:3] = torch.randn(3, 64)
    router.weight.data[3] = -router.weight.data[:3].sum(0)
    model.model.embed_tokens.weight.data[:, 1:] = model.model.embed_tokens.weight.data[5, 1:]
    first = model.model.layers[0].mlp.experts
    report = calibrated(model)
    experts = report.experts["model.layers.0.mlp.experts"]
    empty = [e for e, tokens in enumerate(experts.tokens) if tokens == 0]
    assert empty
    assert experts.fell_back.keys() == set(empty)
    assert all(
        "no token of the calibration data is routed" in w for w in experts.fell_back.values()
    )
    assert "no token of the calibration data is routed to it" in str(report)
    plain = LiquidExperts.from_experts(first)
    fused = model.model.layers[0].mlp.experts
    for ours, theirs in zip(fused.expert(empty[0]), plain.expert(empty[0]), strict=True):
        assert not torch.equal(ours.qweight, theirs.qweight)


def test_hessians_are_filled_up():
    x = torch.randn(100, 64)
    layer = Moments.of([x])
    own = x[:16]
    mixed = _mixed(own, layer)
    expected = (own.T @ own + 48 * (x.T @ x) / 100) / 64
    torch.testing.assert_close(mixed.hessian, expected)
    assert mixed.tokens == 64
    many = _mixed(x, layer)
    torch.testing.assert_close(many.hessian, layer.hessian)
    assert many.tokens == 100
    assert _mixed(x[:0], Moments.of([x[:10]])).tokens == 10
    routed = Routed(x, {0: torch.tensor([3, 4])})
    assert not set(routed.others(0, 98).tolist()) & {3, 4}
    assert len(routed.others(0, 500)) == 98
    assert len(routed.others(1, 7)) == 7


def test_capture_runs_each_call_once():
    model, data = moe_model("Mixtral"), batches(2)
    seen = []
    with experts_as_linear(model), torch.no_grad():
        block = model.model.layers[0]
        block.mlp.gate.register_forward_hook(lambda *_: seen.append(1))
        hidden = [model.model.embed_tokens(ids) for ids in data]
        position = model.model.rotary_emb(hidden[0], torch.arange(32)[None])
        calls = [Call((h,), {"position_embeddings": position}) for h in hidden]
        routed = capture(block, block.mlp.experts, calls)
    assert len(seen) == 2
    assert routed.x.shape == (128, 64)
    assert sum(len(rows) for rows in routed.rows.values()) == 256


def test_an_interrupted_calibration_goes_on(tmp_path):
    data = batches()
    expected = moe_model("Mixtral")
    calibrated(expected, data)
    model = moe_model("Mixtral")
    calibrated(model, data, resume=tmp_path)
    next(tmp_path.glob("block-0001*")).unlink()
    again = moe_model("Mixtral")
    report = calibrated(again, data, resume=tmp_path)
    for other in (model, again):
        state = other.state_dict()
        assert all(torch.equal(state[k], v) for k, v in expected.state_dict().items())
    assert all(sum(e.tokens) == 384 for e in report.experts.values())


def test_tuning_and_the_gate_take_experts():
    config = LiquidConfig("gptq", tune=4, gate="off", smooth=True, augment=64)
    model = moe_model("Qwen3Moe")
    report = calibrated(model, batches(9), config, held_out=batches(2, 5))
    assert report.held_out.keys() == {"reference", "data-free", "untuned", "calibrated"}
    assert len([m for m in model.modules() if isinstance(m, LiquidExperts)]) == 2
    assert model.model.layers[0].self_attn.q_proj.columns is not None


class Routing(nn.Module):
    """A list of experts at the top, of which the data chooses."""

    def __init__(self, count=16):
        super().__init__()
        self.embed, self.router, self.out = (
            nn.Linear(64, 64),
            nn.Linear(64, count),
            nn.Linear(64, 8),
        )
        parts = (
            nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)) for _ in range(count)
        )
        self.experts = nn.ModuleList(parts)

    def forward(self, x):
        x = self.embed(x)
        out = torch.zeros_like(x)
        weights, ids = self.router(x).softmax(-1).topk(1, -1)
        for e in ids.unique().tolist():
            rows, slots = (ids == e).nonzero(as_tuple=True)
            out.index_add_(0, rows, self.experts[e](x[rows]) * weights[rows, slots, None])
        return self.out(out)


def test_a_list_of_experts_of_which_the_data_chooses():
    """Batches call other experts, in other orders."""
    torch.manual_seed(0)
    model = Routing().eval()
    data = [{"x": torch.randn(8, 64)} for _ in range(4)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* tokens are too few")
        report = calibrated(model, data)
    assert report.skipped == {"router": "the router of experts, of 16 rows"}
    assert all(isinstance(expert[0], LiquidLinear) for expert in model.experts)
    tokens = {r.name: r.tokens for r in report.layers}
    assert sum(tokens[f"experts.{e}.0"] for e in range(16)) == 32


def test_a_list_of_which_something_else_chooses_is_told():
    """Nothing shows by structure that its entries are experts."""

    class Other(Routing):
        def __init__(self):
            super().__init__()
            self.hidden = [self.router]
            del self.router

        def forward(self, x):
            self.__dict__["router"] = self.hidden[0]
            try:
                return super().forward(x)
            finally:
                del self.__dict__["router"]

    torch.manual_seed(0)
    data = [{"x": torch.randn(2, 64)} for _ in range(4)]
    with pytest.raises(ValueError, match=r"The data may choose among .* a router, a linear"):
        calibrated(Other().eval(), data)
