"""bench kv and kv-quality, as far as they need no GPU and no model."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.suites import kv, kv_quality
from bench.suites.quality import Reference


def test_bytes_of_a_call() -> None:
    size = kv.Size(batch=16, context=1024, heads=8, group=4, head_dim=128)
    queries_and_outputs = 2 * 2 * 16 * 32 * 128
    assert size.bytes_of("int8") == 16 * 8 * 1024 * 260 + queries_and_outputs
    assert size.bytes_of("bfloat16") == 16 * 8 * 1024 * 512 + queries_and_outputs


def test_an_error_is_found() -> None:
    size = kv.Size(batch=2, context=8, heads=1, group=2, head_dim=64)
    cache = kv.KVCache.allocate("int8", 2, 1, 16, 64)
    x = torch.randn(2, 8, 1, 64, generator=torch.Generator().manual_seed(0))
    cache.write_(x, x, torch.full((2,), 8, dtype=torch.int32))
    q = torch.randn(2, 1, 2, 64, generator=torch.Generator().manual_seed(1))
    out = cache.attention(q, torch.full((2,), 8, dtype=torch.int32))
    rows = kv.rows_of(cache, size.context)
    assert kv.error_of(out, q, rows) < kv.WITHIN
    out[1, 0, 1, 5] += 1
    assert kv.error_of(out, q, rows) > 0.1


def test_table() -> None:
    def row(label: str, us: float) -> dict:
        size = {"batch": 16, "context": 1024, "format": "int8", "label": label}
        return size | {"time": {"median_us": us}, "of_read": us / 12}

    record = {"machine": {"gpu": "G"}, "commit": "c", "rows": [row("SDPA", 24), row("int8", 13.2)]}
    assert "| 16 | 1024 | 13.2 (1.10) | 24.0 (2.00) |" in kv.markdown(record)


def words(text: str, add_special_tokens: bool) -> dict:
    """A tokenizer: a token for each word and each digit."""
    spaced = "".join(f" {c} " if c.isdigit() or c in ".\n" else c for c in text)
    ids = [
        int(word) if word.isdigit() else 10 + sum(map(ord, word)) % 900 for word in spaced.split()
    ]
    return {"input_ids": ids}


def test_facts_are_planted_once_and_asked() -> None:
    ids, answers = kv_quality.planted(words, ["lorem ipsum dolor " * 200], 300, seed=1)
    assert len(answers) == len(kv_quality.NAMES)
    for answer in answers:
        code = ids[0, answer]
        assert code.shape == (5,)
        places = ids[0].unfold(0, 5, 1).eq(code).all(-1)
        assert places.sum() == 2  # where it is told, and where it is asked for


class Oracle(nn.Module):
    """Says what comes next in a given text, from a token on."""

    device = torch.device("cpu")

    def __init__(self, ids: torch.Tensor, knows_from: int) -> None:
        super().__init__()
        self.next, self.knows_from = ids[0].roll(-1), knows_from

    def base_model(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        likely = self.next.clone()
        likely[: self.knows_from] = 999
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(likely, 1000).float()[None])

    def get_output_embeddings(self):
        return lambda hidden: hidden


@pytest.mark.parametrize("missed", [0, 1, 3])
def test_facts_found_are_counted(missed: int) -> None:
    ids, answers = kv_quality.planted(words, ["lorem ipsum dolor " * 200], 300, seed=2)
    model = Oracle(ids, answers[missed - 1].start if missed else 0)
    assert kv_quality.facts_found(model, [(ids, answers)]) == len(answers) - missed


def test_the_document_has_a_place_for_the_table(tmp_path, monkeypatch) -> None:
    """docs/quality.md takes it, a second time as well, and keeps what is around."""
    text = kv_quality.DOCUMENT.read_text()
    document = tmp_path / "quality.md"
    document.write_text(text)
    monkeypatch.setattr(kv_quality, "DOCUMENT", document)
    measured = {"perplexity": 2.02, "reference_perplexity": 2.0, "agreement": 0.5, "mean_kl": 0.1}
    rows = [
        {"model": "tiny", "format": name, "facts": {"300": 7}, "facts_asked": 8}
        | {"commit": "abc", "machine": "none"}
        | (
            dict(domains=dict.fromkeys((*kv_quality.HOME, kv_quality.UNSEEN), measured))
            if i
            else {}
        )
        for i, name in enumerate(("float32", "int8"))
    ]
    for _ in range(2):
        (tmp_path / "kv.json").write_text(json.dumps({"rows": rows}))
        kv_quality.render(tmp_path)
        written = document.read_text()
        assert "| int8 | +1.00% | +1.00% | +1.00% | 50.0% | 0.1000 | 7 |" in written
        assert written.count(kv_quality.BEGIN) == written.count(kv_quality.END) == 1
        before, _, after = text.partition(kv_quality.BEGIN)
        assert written.startswith(before)
        assert written.endswith(after.partition(kv_quality.END)[2])
    document.write_text(text.replace(kv_quality.END, ""))
    with pytest.raises(SystemExit, match="expected the lines"):
        kv_quality.render(tmp_path)


class Table(nn.Module):
    """A model whose hidden states are rows of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.eye(10))

    def base_model(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.rows[ids])

    def get_output_embeddings(self):
        return lambda hidden: 2 * hidden


def test_the_reference_keeps_no_graphs() -> None:
    """Of every window, which would fill a GPU."""
    reference = Reference(Table())
    ids = torch.tensor([[3, 1, 4]])
    for _ in range(2):
        logits = reference(ids).logits
        assert torch.equal(logits.argmax(-1), ids)
        assert not logits.requires_grad
    assert not any(hidden.requires_grad for hidden in reference._hidden.values())
