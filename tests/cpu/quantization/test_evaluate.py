"""liquidgemm.quantization.evaluate, and the commands ``quantize`` and ``eval``."""

import json

import pytest
import torch
from tiny_models import batches, logits, make, transformers
from typer.testing import CliRunner

from liquidgemm.cli import main as cli
from liquidgemm.quantization.evaluate import evaluate, evaluate_context, sliding_windows


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


def test_evaluate_says_what_it_cannot_compare():
    """CHECKLIST 28."""
    (window,) = sliding_windows(torch.arange(24), 24, 1)
    with pytest.raises(ValueError, match="reference: expected the model's vocabulary of 64 tok"):
        evaluate(make(), [window], make(vocab_size=72))
    with pytest.raises(ValueError, match="windows: expected at least one"):
        evaluate(make(), [])


def test_a_broken_model_has_no_finite_perplexity():
    model = make()
    model.lm_head.weight.data.mul_(1e6)
    (window,) = sliding_windows(torch.arange(24), 24, 1)
    assert evaluate(model, [window]).perplexity == float("inf")


@pytest.mark.parametrize("chunk", [1, 7, 64, 999])
def test_evaluate_context_is_that_of_one_forward(monkeypatch, chunk):
    """Bands of 1 to 7 tokens before, 8 to 15, 16 to 31 and 32 to 49."""
    monkeypatch.setattr("liquidgemm.quantization.evaluate._SHORTEST_BAND", 8)
    model, other = make(), make(seed=1)
    windows = list(torch.randint(0, 64, (2, 1, 50), generator=torch.Generator().manual_seed(3)))
    bands = evaluate_context(model, windows, other, chunk)
    assert [(band.first, band.last) for band in bands] == [(1, 7), (8, 15), (16, 31), (32, 49)]
    log_p, log_r = (
        torch.stack([logits(m, w)[0, :-1].double().log_softmax(1) for w in windows])
        for m in (model, other)
    )
    target = torch.cat(windows)[:, 1:, None]
    for band in bands:
        at = slice(band.first - 1, band.last)
        assert band.tokens == 2 * (band.last - band.first + 1)
        for log, perplexity in ((log_p, band.perplexity), (log_r, band.reference_perplexity)):
            nll = -log[:, at].gather(2, target[:, at]).mean()
            assert perplexity == pytest.approx(nll.exp().item(), rel=1e-4)
        same = (log_p[:, at].argmax(2) == log_r[:, at].argmax(2)).double().mean()
        assert band.agreement == pytest.approx(same.item())
        kl = (log_r.exp() * (log_r - log_p))[:, at].sum(2).mean()
        assert band.mean_kl == pytest.approx(kl.item(), rel=1e-4)
    (whole,) = (evaluate(model, [(w, 1)]).perplexity for w in windows[:1])
    one = evaluate_context(model, windows[:1], chunk=chunk)
    assert one[0].agreement is None
    mean = sum(b.tokens * torch.tensor(b.perplexity).log() for b in one) / 49
    assert mean.exp().item() == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        ([], {}, "windows: expected some of one length of at least 2, got none"),
        ([torch.zeros(1, 1)], {}, r"windows: expected .*, got lengths \[1\]"),
        ([torch.zeros(1, 4), torch.zeros(1, 5)], {}, r"windows: expected .*, got lengths \[4, 5\]"),
        ([torch.zeros(1, 65)], {}, "expected at most 64 tokens, as LlamaForCausalLM has positions"),
        ([torch.zeros(1, 5)], {"chunk": 0}, "chunk: expected at least 1, got 0"),
        (
            [torch.zeros(1, 5).long()],
            {"reference": {"vocab_size": 72}},
            "reference: expected the model's vocabulary of 64 tokens, got one of 72",
        ),
    ],
)
def test_evaluate_context_says_what_it_cannot_do(windows, options, message):
    """CHECKLIST 28."""
    if fields := options.get("reference"):
        options = {"reference": make(**fields)}
    with pytest.raises(ValueError, match=message):
        evaluate_context(make(), windows, **options)


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
    found = json.loads(result.stdout)
    assert found["tokens"] == 9 * 13 - 1
    assert 0.5 < found["agreement"] <= 1
    assert run("eval", out, "--text", folder / "b.txt", "--device", "cpu").exit_code == 0
    by_context = ["eval", out, "--text", folder / "b.txt", "--reference", model, "--context", 32]
    (band,) = json.loads(run(*by_context, "--json", "--device", "cpu").stdout)
    assert (band["first"], band["last"], band["tokens"]) == (1, 31, 3 * 31)
    assert 0.5 < band["agreement"] <= 1
    assert "by tokens before" in run(*by_context, "--device", "cpu").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere.gguf", "--text", "a.txt"], "nowhere.gguf: no such file"),
        (["eval", "model", "--text", "c.txt"], "c.txt: expected a UTF-8 text file"),
        (
            ["eval", "model", "--text", "a.txt", "--length", "8", "--stride", "8"],
            "stride: expected",
        ),
        (
            ["eval", "model", "--text", "a.txt", "--context", "9", "--stride", "8"],
            "--stride: expected to be left out beside --context",
        ),
        (
            ["eval", "model", "--text", "a.txt", "--context", "999"],
            "--context 999: expected a text as long, got 117 tokens",
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
