"""`vllm serve DIR`, with no flag, and requests by HTTP."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path


def endpoint(check, folder: Path) -> None:
    """Answers by HTTP: near those of transformers, and the text of an engine without a server."""
    if check.options.model:
        floats, wanted = check.save_given(folder)
    else:
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
    server = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    threading.Thread(target=listen, args=(server, said, began), daemon=True).start()
    try:
        if not there(server, port, check.options.deadline):
            check.note("ended by itself with", server.poll())
            say_where(server)
            check.require(False, "the server is there, and neither ended nor late")
            return
        check.note("started_s", round(time.perf_counter() - began, 1))
        lines = [line for line in said if "linear layers in W4A8" in line]
        check.note("its line", lines)
        check.require(bool(lines), "its log says which kernel runs")
        body = {"model": str(folder), "temperature": 0, "logprobs": 5}
        body["return_tokens_as_token_ids"] = True
        for prompt, one, other in zip(check.prompts(), wanted, floats, strict=True):
            asked = body | {"prompt": prompt, "max_tokens": 1}
            found = ask(port, asked)["choices"][0]["logprobs"]["top_logprobs"][0]
            theirs = {int(word.removeprefix("token_id:")): value for word, value in found.items()}
            ours, before = one.log_softmax(-1), other.log_softmax(-1)
            error = math.sqrt(sum((ours[t] - v) ** 2 for t, v in theirs.items()) / len(theirs))
            quantization = float((ours - before).pow(2).mean().sqrt())
            check.require(
                error < quantization,
                f"{len(prompt)} tokens: log-probabilities by HTTP differ by {error:.3f} (RMS) from "
                f"transformers, quantization by {quantization:.3f} from floats",
            )
        said_first = "The capital of France is" if check.options.model else "w17 w4 w99"
        text = body | {"prompt": said_first, "max_tokens": 24}
        first, second = (ask(port, text)["choices"][0]["text"] for _ in range(2))
        check.note("text", first)
        check.require(
            first == second and len(first.split()) > 0, "a text has the same answer twice"
        )
        asked = {"prompt": check.prompts()[-2], "max_tokens": 24, "ignore_eos": True}
        answer = ask(port, body | asked)["choices"][0]["text"]
    finally:
        server.terminate()
        try:
            ended = server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            ended = "not in time"
        check.note("ended with", ended)
    check.require(answer == offline(check, folder, **asked), "offline it is the same text")


def offline(check, folder: Path, prompt: list[int], max_tokens: int, ignore_eos: bool) -> str:
    """What an engine in a program says."""
    import vllm

    eager = check.options.device == "cpu"
    llm = vllm.LLM(str(folder), enforce_eager=eager, gpu_memory_utilization=0.5)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)
    (result,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return result.outputs[0].text


def listen(server: subprocess.Popen, said: list[str], began: float) -> None:
    """So that the log has what the server says and when, also if this is killed."""
    for line in server.stdout:
        said.append(line.rstrip())
        print(f"    {time.perf_counter() - began:5.0f} s {said[-1]}", flush=True)


def say_where(server: subprocess.Popen) -> None:
    """Makes the server and its processes say, in the log, where each of their threads is."""
    import psutil

    if server.poll() is None:
        for process in (*psutil.Process(server.pid).children(recursive=True), server):
            process.send_signal(signal.SIGABRT)  # which Python's fault handler answers
        time.sleep(3)


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


def there(server: subprocess.Popen, port: int, until: float) -> bool:
    """Whether it answers in time."""
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
