"""Tiny models through SGLang's engine, on the CPU: what transformers says after a prompt."""

import sglang_layers  # noqa: F401, I001 - the stand-ins, before SGLang

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import foreign_models
import moe_models
import pytest
import requests
import sglang
import torch
from engine_models import BOUND, PROMPT, VOCABULARY, float_model

from liquidgemm import LiquidConfig, import_checkpoint, load_quantized, quantize_, save_quantized

OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "skip_tokenizer_init": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 512,
    "context_length": 128,
    "log_level": "error",
}


def expected(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1].float()
    return logits.log_softmax(-1)


def log_probabilities(folder: Path, **options) -> list[torch.Tensor]:
    """Of the token after the prompt, twice."""
    engine = sglang.Engine(model_path=str(folder), **OPTIONS | options)
    try:
        found = []
        for _ in range(2):
            (result,) = engine.generate(
                input_ids=[PROMPT],
                sampling_params={"temperature": 0, "max_new_tokens": 1},
                return_logprob=True,
                top_logprobs_num=VOCABULARY,
            )
            engine.flush_cache()
            pairs = result["meta_info"]["output_top_logprobs"][0]
            own = torch.full((VOCABULARY,), torch.nan)
            own[torch.tensor([token for _, token, _ in pairs])] = torch.tensor(
                [value for value, _, _ in pairs]
            )
            found.append(own)
        return found
    finally:
        engine.shutdown()


def assert_near(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (actual - wanted).norm() / wanted.norm()
    assert error < BOUND, f"expected a relative difference below {BOUND}, got {error:.2e}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """With the recommended residual columns, and its head."""
    folder = tmp_path_factory.mktemp("ours")
    augment = {"down_proj": 64, "q_proj": 64, "k_proj": 128}
    config = LiquidConfig(augment=augment, keep=["o_proj"], skip=[])
    model = float_model()
    quantize_(model, config, progress=False, verify=False)
    save_quantized(model, folder)
    return folder


def test_what_we_save_is_served(saved):
    """As offline, and to the bit from call to call."""
    first, second = log_probabilities(saved)
    assert_near(first, expected(load_quantized(saved)))
    assert torch.equal(first, second)


def test_a_float_checkpoint_is_quantized_as_it_is_loaded(tmp_path):
    float_model().save_pretrained(tmp_path)
    fields = {"augment": {"down_proj": 64}, "keep": ["o_proj"], "head": "int8"}
    settings = {"quantization_config": {"quant_method": "liquidgemm", "config": fields}}
    options = {"quantization": "liquidgemm", "json_model_override_args": json.dumps(settings)}
    first, _ = log_probabilities(tmp_path, **options)
    model = float_model()
    quantize_(model, LiquidConfig(**fields), progress=False, verify=False)
    assert_near(first, expected(model))


@pytest.mark.parametrize("name", ["awq", "gptq", "pack-quantized"])
def test_other_projects_checkpoints_are_converted_as_they_are_loaded(name, tmp_path):
    model = float_model()
    foreign_models.write(model, tmp_path / "source", name)
    import_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    first, _ = log_probabilities(tmp_path / "source", quantization="liquidgemm")
    assert_near(first, expected(load_quantized(tmp_path / "out")))


@pytest.mark.parametrize("kind", ["saved", "floats"])
def test_experts_are_served(kind, tmp_path):
    """As offline; attention in floats, so that what reaches the experts is the same in both."""
    # On a CPU SGLang fills inner channels up to whole 64s, which is refused.
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    model = moe_models.moe_model(
        "Qwen3Moe", vocab_size=VOCABULARY, max_position_embeddings=256, **sizes
    )
    fields = {"skip": ["lm_head", "*self_attn*"]}
    options = {}
    if kind == "floats":
        model.save_pretrained(tmp_path)
        settings = {"quantization_config": {"quant_method": "liquidgemm", "config": fields}}
        options = {"quantization": "liquidgemm", "json_model_override_args": json.dumps(settings)}
    quantize_(model, LiquidConfig(**fields), progress=False, verify=False)
    if kind == "saved":
        save_quantized(model, tmp_path)
    first, second = log_probabilities(tmp_path, **options)
    assert_near(first, expected(model))
    assert torch.equal(first, second)


def test_launch_server(saved):
    """The command as a user writes it, and a request over HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = []
    for name, value in OPTIONS.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = ["-m", "sglang.launch_server", "--model-path", str(saved), "--port", str(port)]
    command += [*flags, "--skip-server-warmup"]
    server = subprocess.Popen([sys.executable, *command], start_new_session=True)
    try:
        request = {
            "input_ids": PROMPT,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
        }
        answer = None
        while answer is None:
            assert server.poll() is None, f"expected a server, got exit status {server.poll()}"
            with contextlib.suppress(requests.ConnectionError):
                url = f"http://127.0.0.1:{port}/generate"
                answer = requests.post(url, json=request, timeout=60).json()
            time.sleep(0.5)
        wanted = expected(load_quantized(saved))
        (value, token, _) = answer["meta_info"]["output_token_logprobs"][0]
        assert token == int(wanted.argmax())
        assert value == pytest.approx(float(wanted.max()), rel=BOUND)
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with the processes that it has started
        server.wait()
