"""The benchmark of decode steps, on a tiny model and a CPU."""

import json
import re

import pytest
import torch

import liquidgemm
from bench.decoder import measure
from bench.decoder.cache import Cache
from bench.decoder.decoder import PARTS, Decoder, random_weight
from bench.decoder.elementwise import Elementwise
from bench.decoder.formats import Format, Int8, Linear, make, parse_formats
from bench.decoder.sizes import MODELS, parse_models
from bench.report import step as report
from bench.suites import generate, step

CPU = torch.device("cpu")
TINY = MODELS["tiny"]
ELEMENTWISE = Elementwise(compiled=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("step") / "step.json"


@pytest.fixture(scope="module")
def record(path):
    words = ["--models", "tiny", "--device", "cpu", "--context", "12", "--batch", "1,3"]
    words += ["--settings", "bf16/bf16,bf16/8bit", "--prefill", "2x8", "--json", str(path)]
    code = step.main([*words, "--commit", "c0ffee"])
    return code, json.loads(path.read_text())


def test_a_run_from_end_to_end(record):
    code, found = record
    assert code == 0
    assert found["problems"] == []
    assert set(found["absent"]) >= {"fp8-tensor", "fp8-row", "fp8-row-apart", "humming"}
    steps = [row for row in found["rows"] if "prefill" not in row]
    formats = [name for name in ("bf16", "w4a8-linear", "w4a8") if name not in found["absent"]]
    assert [(row["format"], row["head"], row["batch"]) for row in steps] == [
        (name, head, batch) for name in formats for head in ("bf16", "8bit") for batch in (1, 3)
    ]
    for row in steps:
        assert row["status"] == "ok"
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        assert sum(row["parts"].values()) == pytest.approx(row["ms"])
        if row["format"] == "w4a8":
            assert row["logits_equal_composite"] is True
    assert sum("prefill" in row for row in found["rows"]) == 2 * len(formats)


def test_checks_leave_the_choice_of_attention_as_it_was():
    """What is timed afterwards is what torch itself chooses."""
    cache = Cache(TINY, 1, 4, ELEMENTWISE, CPU)

    def choice():
        enabled = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
        return enabled, torch._C._get_sdp_priority_order()

    before = choice()
    assert before[0] == (True, True)
    with cache.repeating():
        assert choice() == ((False, True), before[1])
    assert choice() == before


@pytest.mark.parametrize("name", ["bf16", "w4a8-linear"])
def test_prefill_and_steps_give_the_same_logits(name):
    """The decoder is one: a step on the cache of a sequence continues that sequence."""
    decoder = Decoder(TINY, make(name, ELEMENTWISE), "bf16", CPU)
    ids = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(0))
    cache = Cache(TINY, 2, 5, ELEMENTWISE, CPU)
    for keys, values in cache.layers:
        keys.zero_()
        values.zero_()
    whole = cache.attend

    def attend(layer, q):  # to what there is by now
        keys, values = cache.layers[layer]
        length = int(cache.position) + 1
        cache.layers[layer] = keys[:, :, :length], values[:, :, :length]
        try:
            return whole(layer, q)
        finally:
            cache.layers[layer] = keys, values

    cache.attend = attend
    for position in range(6):
        cache.position.fill_(position)
        logits = decoder.step(ids[:, position].clone(), cache, write=False)
    expected = decoder.prefill(ids)
    error = (logits.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.05


def test_a_step_writes_the_next_tokens():
    decoder = Decoder(TINY, make("bf16", ELEMENTWISE), "bf16", CPU)
    cache = Cache(TINY, 3, 4, ELEMENTWISE, CPU)
    ids = decoder.first_tokens(3)
    logits = decoder.step(ids, cache)
    assert torch.equal(ids, logits.argmax(-1))
    ids = decoder.first_tokens(3)
    before = ids.clone()
    assert torch.equal(decoder.step(ids, cache, write=False), logits)
    assert torch.equal(ids, before)
    assert decoder.step(ids, cache, PARTS - {"head"}).shape == (3, TINY.hidden)


@pytest.mark.parametrize("vocabulary", [1, 97, 256, 32000, 128256])
def test_the_most_likely_token_is_the_first_of_equals(vocabulary):
    logits = torch.randint(-20, 20, (3, vocabulary)).bfloat16()
    logits[2] = 1
    expected = torch.from_numpy(logits.float().numpy().argmax(-1))
    assert torch.equal(ELEMENTWISE.greedy(logits), expected)


def test_weights_in_our_formats():
    weight = random_weight(128, 96, 0, CPU)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    for kind, bound in ((Format, 1e-9), (Int8, 0.01), (Linear, 0.15)):
        form = kind(ELEMENTWISE)
        held = form.hold(weight)
        expected = x.float() @ weight.float().T
        error = (form.linear(x, held).float() - expected).norm() / expected.norm()
        assert error < bound + 0.01
        assert form.nbytes(held) > 0


def test_a_wrong_composite_is_noticed(monkeypatch):
    """The proof in the run: fused producers that are off by one code are found."""
    if not hasattr(liquidgemm, "rms_norm_quantize"):
        pytest.skip("liquidgemm has no rms_norm_quantize")
    true = liquidgemm.rms_norm_quantize

    def off_by_one(*args, return_y=False, **kwargs):
        tokens, *rest = true(*args, return_y=return_y, **kwargs)
        if not return_y:
            tokens.x8[..., 0] ^= 1
        return tokens, *rest

    monkeypatch.setattr(liquidgemm, "rms_norm_quantize", off_by_one)
    words = ["--models", "tiny", "--device", "cpu", "--context", "4", "--batch", "2"]
    assert step.main([*words, "--formats", "w4a8", "--no-breakdown"]) == 1


def test_generate_of_transformers(tmp_path, capsys):
    path = tmp_path / "generate.json"
    words = ["--models", "tiny", "--device", "cpu", "--context", "4", "--new", "3", "--batch", "2"]
    assert generate.main([*words, "--json", str(path), "--commit", "c0ffee"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["format"] for row in rows] == list(generate.FORMATS)
    assert all(row["tokens_per_s"] == pytest.approx(2e3 / row["ms"]) for row in rows)
    assert rows[2]["fused"].startswith("2 layers fused")
    assert "tiny w4a8" in capsys.readouterr().out


def test_sizes_are_those_of_the_models():
    assert TINY.linears["qkv"] == (512, 128)
    billions = {name: round(sizes.weights / 1e9, 2) for name, sizes in MODELS.items()}
    assert billions["llama3-8b"] == 6.98
    assert billions["llama2-70b"] == 68.45
    assert billions["yi-34b"] == 33.47
    assert MODELS["llama3-8b"].kv_values * 2 == 128 * 1024
    assert MODELS["llama2-13b"].kv_values * 2 == 800 * 1024
    assert MODELS["llama2-70b"].with_layers(8).layers == 8


def test_largest_batch_leaves_room_to_grow():
    sizes = MODELS["llama3-8b"]
    fit = measure.largest_batch(sizes, Cache, int(4e9), 1024, int(80e9))
    each = Cache.bytes_per_token(sizes) * (1024 + measure.OUTPUT)
    assert fit % 8 == 0
    left = 80e9 - 4e9 - measure.SPARE_BYTES
    assert fit * each <= left < (fit + 8) * each
    assert measure.largest_batch(sizes, Cache, int(79e9), 1024, int(80e9)) == 0


def test_the_report_has_a_row_for_each_batch(record, path, tmp_path):
    assert report.main([str(path), "--out", str(tmp_path), "--no-plots"]) == 0
    text = (tmp_path / "step.md").read_text()
    assert "## tiny, 2 layers, KV bf16, head 8bit, context 12" in text
    bf16 = next(r for r in record[1]["rows"] if r["format"] == "bf16" and r["head"] == "8bit")
    assert f"| 1 | {bf16['ms']:.2f} |" in text
    assert "| tiny, head bf16, 2 x 8 |" in text
    (tmp_path / "other.json").write_text("{}")
    assert report.main([str(tmp_path / "other.json")]) == 1


def test_the_report_beside_the_paper():
    fields = {"status": "ok", "kv": "int8", "head": "8bit", "context": 1024, "wanted_batch": 64}
    rows = [
        row(format=name, ms=ms, tokens_per_s=64e3 / ms, gb_per_s=1.0, **fields | {"batch": 64})
        for name, ms in (("fp8-row", 6.0), ("w4a8", 3.0))
    ]
    other = fields | {"status": "does not fit", "wanted_batch": 256, "format": "w4a8"}
    rows.append(row(**other))
    assert "| 64 | 6.00 | 3.00 | 2.00x |" in report.step_table(rows)
    assert "| 256 |  | does not fit |  |" in report.step_table(rows)
    table = report.most_table(rows)
    assert "| w4a8, KV int8, head 8bit | 21333 (64) |" in table
    assert "| *the paper: QServe, H800* | 5240 (128) |" in table


def row(**fields):
    return {"model": "llama3-8b", "layers": 32, "format": "bf16", "batch": 1, **fields}


def test_a_harness_slower_than_what_is_published_says_so():
    assert step.gate([row(tokens_per_s=165.1)]) == []
    assert "reaches 164.0 tokens/s" in step.gate([row(tokens_per_s=164.0)])[0]
    assert step.gate([row(tokens_per_s=1.0, layers=8)]) == []
    assert step.gate([row(tokens_per_s=1.0, batch=16)]) == []
    assert "fp8-tensor" in step.gate([row(tokens_per_s=200.0, format="fp8-tensor")])[0]


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_models, "llama9", "'llama9' is none of llama1-30b"),
        (parse_models, " ", "no models given"),
        (parse_formats, "fp4", "'fp4' is none of bf16"),
        (step.parse_batches, "1,0", "'0' is neither a positive number of sequences nor max"),
        (step.parse_settings, "bf16", "'bf16' is no KV cache"),
        (step.parse_settings, "bf16/4bit", "'bf16/4bit' is no KV cache"),
        (step.parse_prefills, "4", "'4' is not a number of sequences x a number of tokens"),
    ],
)
def test_other_words_are_refused(parse, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)
    assert step.parse_batches("1, max,1") == [1, "max"]
