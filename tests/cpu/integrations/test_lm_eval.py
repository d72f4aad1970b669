"""lm-evaluation-harness on a quantized model: a task of local data, in Python and by command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import float_model, load, quantized, transformers, with_tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

TASK = """
task: words
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a task, and the share of it that the model has right by its own logits."""
    folder = tmp_path_factory.mktemp("harness")
    with_tokenizer(float_model(folder / "float", torch.float32))
    model = quantized(folder / "float")
    model.save_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_tokenizer(folder / "model"))
    tokenizer.eos_token = "t1"  # the harness asks for one
    tokenizer.save_pretrained(folder / "model")
    with torch.no_grad():
        logits = model(torch.arange(5, 13).view(-1, 1)).logits[:, -1]
    answers = torch.tensor([20, 40, 60])
    documents = [
        {
            "text": f"t{token}",
            "choices": [f"t{answers[a]}" for a in (i % 3, (i + 1) % 3, (i + 2) % 3)],
        }
        for i, token in enumerate(range(5, 13))
    ]
    best = answers[logits[:, answers].argmax(-1)]
    right = sum(doc["choices"][0] == f"t{own}" for doc, own in zip(documents, best, strict=True))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "words.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    (folder / "right").write_text(str(right / len(documents)))
    return folder


def test_in_python(folder: Path, monkeypatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = HFLM(pretrained=load(folder / "model"), tokenizer=tokenizer, batch_size=4)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=["words"], task_manager=tasks, bootstrap_iters=0)
    assert found["results"]["words"]["acc,none"] == float((folder / "right").read_text())


def test_by_its_command(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "liquidgemm.integrations.lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={folder / 'model'}", "--tasks", "words"]
    command += ["--include_path", str(folder), "--output_path", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        command, env=os.environ | OFFLINE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = tmp_path.rglob("results*.json")
    results = json.loads(result.read_text())["results"]
    assert results["words"]["acc,none"] == float((folder / "right").read_text())
