"""Every program of examples/ runs, on tiny models, without downloads; cpp is in test_cpp_api.py."""

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from repository import ROOT

EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> str:
    from tiny_llama import float_model, with_tokenizer

    return str(with_tokenizer(float_model(tmp_path / "float", torch.float32)))


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Words that the tokenizer of `model` knows, some more frequent than others."""
    words = random.Random(0).choices(range(256), weights=[1 / (i + 1) for i in range(256)], k=600)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"t{word}" for word in words))
    return str(file)


def test_quantize_a_model(model: str, text: str, tmp_path: Path, capsys) -> None:
    example("quantize_a_model").main([model, text, str(tmp_path / "out"), "--window", "64"])
    assert "loss on the last 64 tokens" in capsys.readouterr().out
    assert (tmp_path / "out/config.json").is_file()


def test_lora(model: str, text: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    arguments = [model, text, str(tmp_path / "adapter"), "--steps", "12", "--window", "64"]
    losses = example("lora").main(arguments)
    assert losses[-1] < losses[0]
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_compiled_layer(capsys) -> None:
    torch.compiler.reset()
    example("compiled_layer").main(["--hidden", "128", "--inner", "192", "--backend", "aot_eager"])
    assert capsys.readouterr().out.count("the layer is exact") == 3


@pytest.mark.parametrize("name", ["quantize_a_model", "lora"])
def test_too_little_text_is_refused(name: str, model: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "short.txt"
    file.write_text("t1 t2 t3")
    with pytest.raises(SystemExit, match="2"):
        example(name).main([model, str(file), str(tmp_path / "out")])
    assert "text: expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_example_is_forgotten() -> None:
    tests = Path(__file__).read_text()
    for file in EXAMPLES.glob("*.py"):
        assert f'example("{file.stem}")' in tests, file.name
        assert file.name in (EXAMPLES / "README.md").read_text(), file.name
