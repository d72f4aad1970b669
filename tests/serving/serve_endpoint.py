"""`vllm serve DIR`, with no flag, and requests by HTTP."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

WAIT = 240  # seconds for the server to be there


def endpoint(check, folder: Path) -> None:
    """Answers by HTTP, with log-probabilities near those of transformers."""
    floats, wanted = check.save(folder, layers=2)
    write_tokenizer(check, folder)
    port = free_port()
    script = shutil.which("vllm")
    start = [script] if script else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    command = [*start, "serve", str(folder), "--port", str(port)]
    if check.options.device == "cpu":
        command.append("--enforce-eager")  # a rehearsal
    check.note("command", " ".join(command))
    began = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    threading.Thread(target=listen, args=(server, said), daemon=True).start()
    try:
        if not there(server, port):
            check.require(False, "the server is there, and neither ended nor late")
            return
        check.note("started_s", round(time.perf_counter() - began, 1))
        lines = [line for line in said if "linear layers in W4A8" in line]
        check.note("its line", lines)
        check.require(bool(lines), "its log says which kernel runs")
        body = {"model": str(folder), "temperature": 0, "logprobs": 5}
        for prompt, one, other in zip(check.prompts(), wanted, floats, strict=True):
            asked = body | {"prompt": prompt, "max_tokens": 1}
            found = ask(port, asked)["choices"][0]["logprobs"]["top_logprobs"][0]
            theirs = {int(word.strip().removeprefix("w")): value for word, value in found.items()}
            ours, before = one.log_softmax(-1), other.log_softmax(-1)
            error = math.sqrt(sum((ours[t] - v) ** 2 for t, v in theirs.items()) / len(theirs))
            quantization = float((ours - before).pow(2).mean().sqrt())
            check.require(
                error < quantization,
                f"{len(prompt)} tokens: log-probabilities by HTTP differ by {error:.3f} (RMS) from "
                f"transformers, quantization by {quantization:.3f} from floats",
            )
        text = body | {"prompt": "w17 w4 w99", "max_tokens": 24}
        first, second = (ask(port, text)["choices"][0]["text"] for _ in range(2))
        check.note("text", first)
        check.require(
            first == second and len(first.split()) > 0, "a text has the same answer twice"
        )
    finally:
        server.terminate()
        try:
            ended = server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            ended = "not in time"
        check.note("ended with", ended)


def listen(server: subprocess.Popen, said: list[str]) -> None:
    """So that the log has what the server says, also if this is killed."""
    for line in server.stdout:
        said.append(line.rstrip())
        print(f"    {said[-1]}", flush=True)


def write_tokenizer(check, folder: Path) -> None:
    """One word for each token."""
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(check.vocabulary)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="w0", bos_token="w1", eos_token="w2"
    )
    tokenizer.save_pretrained(folder)


def there(server: subprocess.Popen, port: int) -> bool:
    """Whether it answers in time."""
    until = time.monotonic() + WAIT
    while server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    return False


def ask(port: int, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=150) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
