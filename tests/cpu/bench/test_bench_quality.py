"""bench quality from end to end, on tiny models and texts."""

import json
import random

import pytest
import torch

from bench.suites import quality, quality_data, quality_tables

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder as of bench quality-data, with a Llama and a BERT of two blocks."""
    words = [chr(97 + i) * 3 for i in range(26)]
    vocabulary = {word: i for i, word in enumerate([*words, "[UNK]", "[PAD]"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64
    )
    sizes = {"vocab_size": 28, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    models = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        "bert": transformers.BertModel(transformers.BertConfig(**sizes)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        wrapped.save_pretrained(tmp_path / name)
    generator = random.Random(0)
    for domain in (*quality_data.HOME, quality_data.UNSEEN):
        sentences = [" ".join(generator.choices(words, k=15)) for _ in range(60)]
        rows = [
            {"document": use, "use": use, "text": ". ".join(sentences)}
            for use in ("calibration", "evaluation")
        ]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    monkeypatch.setattr(quality, "MODELS", {"SmolLM2-135M": "llama", "MiniLM-L6": "bert"})
    monkeypatch.setattr(quality, "MINILM", "bert")
    monkeypatch.setattr(quality, "WINDOW", 32)
    monkeypatch.setattr(quality, "STRIDE", 16)
    return tmp_path


RECIPES = ["W8A8", "search", "gptq, smooth, augment 64, keep down_proj"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["quality", *map(str, arguments)])
    quality.main()


def test_results_and_tables(data, monkeypatch, capsys):
    out = data / "out"
    options = ["--tokens", 512, "--eval-tokens", 256, "--device", "cpu", "--commit", "c0ffee"]
    options += ["--out", out, "--cpu-too", RECIPES[2], "--perturb", RECIPES[2]]
    options += ["--weights-alone", "--recipes"]
    run(monkeypatch, data, *options, *RECIPES)
    results = json.loads((out / "quality.json").read_text())
    assert [(row["model"], row["recipe"]) for row in results["rows"]] == [
        *(("SmolLM2-135M", recipe) for recipe in RECIPES),
        *(("MiniLM-L6", recipe) for recipe in RECIPES[:2]),
    ]
    w8a8, _, best = results["rows"][:3]
    for row in (w8a8, best):
        assert row["domains"].keys() == {"anarchism", "pydoc", "debian"}
        for result in row["domains"].values():
            assert result["perplexity"] == pytest.approx(result["reference_perplexity"], rel=0.1)
        # With the same weights, but float activations.
        for domain, alone in row["weights_alone"].items():
            assert alone == pytest.approx(row["domains"][domain]["perplexity"], rel=0.02)
            assert alone != row["domains"][domain]["perplexity"]
    unseen = best["domains"]["debian"]["perplexity"]
    assert best["cpu"] == best["cpu_layers"] == unseen  # here all are the CPU
    unchanged, *perturbed = best["perturbed"]["perplexities"]
    assert unchanged == best["cpu"]
    assert len(set(perturbed)) > 1
    assert perturbed == pytest.approx([unchanged] * len(perturbed), rel=0.05)
    assert results["rows"][3]["mean"] > 0.99

    capsys.readouterr()
    run(monkeypatch, data, "--missing", *options, *RECIPES)
    assert capsys.readouterr().out == ""  # nothing was left to do

    document = data / "quality.md"
    document.write_text(f"before\n{quality_tables.begin(out)}\nold\n{quality_tables.END}\nafter\n")
    monkeypatch.setattr(quality_tables, "DOCUMENT", document)
    run(monkeypatch, "--render", out)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert text.count("| search |") == 2
    assert "commit c0ffee" in text
    assert 'Perplexity of "gptq, smooth, augment 64, keep down_proj" on debian' in text
    assert "one part in a million, 4 times:" in text
    points = quality_tables.of_activations(w8a8, ("anarchism", "pydoc", "debian"))
    assert len(points.split(", ")) == 3
    assert f" | {points} | " in text


@torch.no_grad()
def test_the_reference_is_the_model(data):
    model = transformers.AutoModelForCausalLM.from_pretrained(data / "llama").eval()
    reference = quality.Reference(model)
    first, second = torch.randint(0, 28, (2, 1, 9))
    for ids in (first, second, first):
        assert torch.equal(reference(ids).logits, model(ids).logits)
    model.base_model.forward = None  # not needed again
    assert torch.equal(reference(second).logits, reference(second).logits)


def test_plain_text_of_a_page():
    page = "<head><title>no</title></head><body><p>a &amp; b</p>\n\n<script>x</script>c"
    assert quality_data.plain(page) == "a & b\nc"
