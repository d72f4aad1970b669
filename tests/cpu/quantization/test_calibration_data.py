"""What models take: masks of every kind, and errors before a calibration starts."""

import pytest
import torch
from outlier_models import build, transformers
from tiny_models import assert_same_state, batches, make, state
from torch import nn

from liquidgemm import LiquidConfig, quantize_
from liquidgemm.quantization.calibration import driver
from liquidgemm.quantization.calibration.masks import Padding, token_mask

# Of these models rounding is a large part of what they compute.
pytestmark = pytest.mark.filterwarnings("ignore:the quantized model does not do")


def tokens_of(model, data, method="hessian", **options):
    config = LiquidConfig(method, skip=("lm_head", "proj_out"), gate="off")
    report = quantize_(model, config, calibration=data, progress=False, **options)
    return {layer.name: layer.tokens for layer in report.layers}


def padded(x, count, value=0, side="right"):
    filling = torch.full((*x.shape[:1], count, *x.shape[2:]), value, dtype=x.dtype)
    return torch.cat((x, filling) if side == "right" else (filling, x), 1)


# Padding.


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("given", ["decoder_attention_mask", "labels"])
@pytest.mark.parametrize("count", [0, 4])
def test_padding_of_encoder_decoders(name, given, count):
    """16 tokens of the encoder and 12 of the decoder; with 4 more, both rows have 16."""
    model, (short, batch) = build(name, 2)
    batch = dict(batch, attention_mask=torch.ones(2, 16).long())
    batch["attention_mask"][:, 13:] = 0
    ids = padded(batch["labels"], count)
    if given == "labels":
        batch["labels"] = padded(batch["labels"], count, -100)
    else:
        mask = padded(torch.ones(2, 12).long(), count)
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        del batch["labels"]
    tokens = tokens_of(model, [short, batch])
    for layer, found in tokens.items():
        cross = any(part in layer for part in ("encoder_attn.k", "encoder_attn.v")) or (
            "EncDecAttention" in layer and layer[-1] in "kv"
        )
        expected = 2 * 16 + 2 * 13 if cross or ".encoder." in f".{layer}" else 4 * 12
        assert found == expected, layer


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_of_features(dtype):
    """A mask of frames, of which the encoder has half as many; the decoder has a row for each."""
    model, data = build("whisper", 2)
    for batch in data:
        batch["attention_mask"] = torch.ones(2, 64, dtype=dtype)
        batch["attention_mask"][0, 40:] = 0
    data[1]["decoder_input_ids"] = padded(data[1]["decoder_input_ids"], 20)
    data[1]["decoder_attention_mask"] = padded(torch.ones(2, 12), 20)  # 32, as the encoder
    tokens = tokens_of(model, data)
    for layer, found in tokens.items():
        cross = "encoder_attn.k" in layer or "encoder_attn.v" in layer
        assert found == (2 * (20 + 32) if cross or ".encoder." in layer else 4 * 12), layer


def test_padding_at_a_rate_that_the_model_says():
    """Frames of a waveform: the mask that the model makes of its own for attention counts."""
    config = transformers.Wav2Vec2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=16,
        feat_extract_norm="layer",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    batch = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400).long()}
    batch["attention_mask"][1, 200:] = 0
    lengths = model._get_feat_extract_output_lengths(torch.tensor([400, 200]))
    tokens = tokens_of(model, [batch])
    for layer, found in tokens.items():
        if ".encoder." in layer:
            assert found == lengths.sum(), layer


@pytest.mark.parametrize(
    "mask",
    [
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])},
        {"padding_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])},
        {"padding_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()},
        {"padding_mask": torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()},
        {"src_key_padding_mask": torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()},
        {"attention_mask": torch.tensor([[0.0] * 5, [0.0] * 3 + [float("-inf")] * 2])},
        {"labels": torch.tensor([[-100, 7, 7, 7, 7], [-100, 7, 7, -100, -100]])},
    ],
)
@pytest.mark.parametrize("shape", ["rows", "flat", "time first"])
def test_masks_of_plain_modules(mask, shape):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
            self.head = nn.Linear(64, 64)

        def forward(self, x, **masks):
            x = {"rows": x, "flat": x.flatten(0, 1), "time first": x.transpose(0, 1)}[shape]
            for block in self.blocks:
                x = block(x).relu()
            return self.head(x)

    tokens = tokens_of(Net(), [{"x": torch.randn(2, 5, 64), **mask}])
    assert set(tokens.values()) == {8}


def test_other_masks_are_none():
    ones = torch.ones(2, 5).long()
    for key in ("global_attention_mask", "head_mask", "mask_labels", "input_ids", "token_type_ids"):
        assert token_mask(key, ones) is None
    assert token_mask("attention_mask", ones[None]) is None
    assert not Padding({"attention_mask": ones}).any
    assert not Padding(ones).any


def test_labels_of_prompts_are_no_padding():
    """Where a language model's labels are -100 before the answer, or a mask says more."""
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    (mask,) = Padding({"input_ids": labels, "labels": labels}).main
    assert mask.tolist() == [[True, True, True, True, False]]
    assert not Padding({"labels": labels, "attention_mask": torch.ones(1, 5)}).any


# The gate.


@pytest.fixture
def no_calibration(monkeypatch):
    def fail(*args):
        raise AssertionError("the calibration has started")

    monkeypatch.setattr(driver, "_quantize_unit", fail)


def refused(model, error, message, calibration, held_out=None, config=None, **options):
    before = state(model)
    config = config or LiquidConfig("gptq", smooth=True, rotate=options.pop("rotate", False))
    with pytest.raises(error, match=message):
        quantize_(
            model, config, calibration=calibration, held_out=held_out, progress=False, **options
        )
    assert_same_state(model, before)


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(x).argmax(-1)


@pytest.mark.usefixtures("no_calibration")
def test_what_cannot_be_judged_is_refused_before():
    x = [torch.randn(3, 64)]
    refused(Silent(), ValueError, "held_out: batch 0: expected a model that gives tensors", x, x)
    refused(make(), ValueError, "held_out: batch 0: expected at least 2 tokens", batches(),
            [torch.ones(1, 1).long()], rotate=True)  # fmt: skip
    none = {"input_ids": torch.ones(1, 4).long(), "labels": torch.full((1, 4), -100)}
    refused(make(), ValueError, "held_out: batch 0: expected .* padding|other than -100", batches(),
            [none])  # fmt: skip
    model, data = build("whisper", 2)
    refused(model, ValueError, "held_out: batch 1: .*WhisperFor.*main input is 'input_fea",
            data, [data[0], {"decoder_input_ids": torch.ones(1, 4).long()}])  # fmt: skip


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("name", ["whisper", "vit"])
def test_texts_for_models_of_features_are_refused(name):
    model, data = build(name, 1)
    tokenizer = lambda text: {"input_ids": [ord(c) % 60 for c in text]}  # noqa: E731
    wanted = model.main_input_name
    message = f"calibration: expected mappings with '{wanted}'.* got texts"
    refused(model, ValueError, message, ["some text"], tokenizer=tokenizer)
    refused(model, ValueError, message.replace("calibration", "held_out"), data, ["some text"],
            tokenizer=tokenizer)  # fmt: skip
    refused(model, ValueError, f"batch 0: expected a mapping with '{wanted}', as .*forward\\(",
            [torch.ones(1, 8).long()])  # fmt: skip


@pytest.mark.usefixtures("no_calibration")
def test_what_the_model_does_not_take_is_refused():
    model, data = build("t5", 1)
    message = r"calibration: batch 0: expected what T5ForCond.*decoder_input_ids.* got input_ids \["
    refused(model, ValueError, message, [{"input_ids": data[0]["input_ids"]}])
    message = r"calibration: batch 1: expected what Llama.*, got nonsense \[1\]"
    refused(make(), ValueError, message, [*batches(1), {"nonsense": torch.ones(1)}])


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(0, 5).long(), r"expected data, got a tensor of \[0, 5\]"),
        (torch.ones(2, 0).long(), r"expected data, got a tensor of \[2, 0\]"),
        ({"input_ids": torch.ones(0, 5).long()}, r"expected data, got input_ids of \[0, 5\]"),
        (
            {"input_ids": torch.ones(1, 5).long(), "attention_mask": torch.zeros(1, 5).long()},
            "expected a token that is no padding, got none in attention_mask",
        ),
        (
            {"inputs_embeds": torch.full((1, 5, 96), torch.nan)},
            "expected finite numbers, got a NaN or an infinity in inputs",
        ),
    ],
)
@pytest.mark.parametrize("argument", ["calibration", "held_out"])
def test_batches_without_tokens_are_refused(batch, message, argument):
    """CHECKLIST 7."""
    data = [*batches(1), batch]
    others = {"calibration": [], "held_out": [batches()]}[argument]
    refused(make(), ValueError, f"{argument}: batch 1: {message}", *others, data)


@pytest.mark.parametrize("smooth", [False, True])
def test_rows_that_are_all_padding_do_not_count(smooth):
    model = make()
    mask = torch.ones(2, 24).long()
    mask[1] = 0
    data = [{"input_ids": ids, "attention_mask": mask} for ids in batches()]
    config = LiquidConfig("gptq", smooth=smooth)
    report = quantize_(model, config, calibration=data, progress=False)
    assert {layer.tokens for layer in report.layers} == {4 * 24}


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("name", ["whisper", "llava"])
def test_wrong_pairs_are_refused_before(name):
    """Also where blocks of another list have the names."""
    model, data = build(name, 1)
    block = "encoder" if name == "whisper" else "vision_tower"
    wrong = {"layer_norm1": ["self_attn.q_proj", "mlp.fc2"]}
    if block == "encoder":
        wrong = {"self_attn_layer_norm": ["self_attn.q_proj", "fc2"]}
    for pairs, message in (
        (wrong, "smooth: expected linears of one input size, got .*: .* into self_attn.q_proj"),
        ({"nowhere": ["self_attn.q_proj"]}, "smooth: expected names within a block, got 'nowhere'"),
        ({"self_attn": ["self_attn.q_proj"]}, "smooth: self_attn: expected a norm .* got "),
    ):
        refused(model, ValueError, message, data, config=LiquidConfig("gptq", smooth=pairs))
        with pytest.raises(ValueError, match=message):
            quantize_(model, LiquidConfig(smooth=pairs), dry_run=True)
