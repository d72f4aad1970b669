"""``python -m bench COMMAND``: one command for all that is measured, fitted and drawn."""

from __future__ import annotations

import importlib
import sys

# Each command by its module, whose main() takes the words after the command.
COMMANDS = {
    "gemm": ("suites.gemm", "liquidgemm beside its peers: gemm and linear by shape and tokens"),
    "sustained": ("suites.sustained", "one large product for seconds on end, clocks and power"),
    "counters": ("suites.counters", "where the time goes, by Nsight Compute"),
    "host": ("suites.host_cost", "what an eager call costs on the CPU, beside torch's"),
    "builds": ("suites.builds", "two builds of liquidgemm in turn: is any shape slower?"),
    "moe": ("suites.moe", "layers of experts beside grouped products of others"),
    "moe-report": ("report.moe", "its tables and plot, from the JSON alone"),
    "kv": ("suites.kv", "decode attention over a KV cache, by format, batch and context"),
    "producers": ("suites.producers", "norm and gated activation fused with the quantizer"),
    "backward": ("suites.backward", "a layer's forward and backward pass beside a bf16 layer's"),
    "cpu": ("suites.cpu", "linear on the CPU beside torch's and llama.cpp's"),
    "cpu-report": ("report.cpu", "its table and plot, from the JSON alone"),
    "step": ("suites.step", "a decode step of whole models: bf16, FP8, humming and ours"),
    "step-report": ("report.step", "its tables and plots, from the JSON alone"),
    "generate": ("suites.generate", "ms per token of transformers' generate, fused and not"),
    "serve": ("suites.serve", "decode steps and prefill in vLLM: bf16, FP8, humming and ours"),
    "serve-report": ("report.serve", "its tables and plots, from the JSON alone"),
    "exact": ("suites.exact", "several GPUs with the bits of one: what that costs, by layer"),
    "sizing": ("report.sizing", "tokens per second and dollar and KV room, from serve's JSON"),
    "ablation": ("suites.ablation", "what each part of the design is worth"),
    "micro": ("suites.micro", "C++ microbenchmarks: the ceilings"),
    "quality": ("suites.quality", "perplexity and cosine of real models by recipe"),
    "kv-quality": ("suites.kv_quality", "perplexity and facts found, by format of the KV cache"),
    "quality-data": ("suites.quality_data", "fetches models and texts for it"),
    "quality-moe": ("suites.quality_moe", "perplexity of a small model with experts by recipe"),
    "sweep": ("plan.sweep", "every plan of the kernel at every shape"),
    "fit": ("plan.fit", "constants of the plan's cost model from a sweep"),
    "fit-grouped": ("plan.fit_grouped", "the same for grouped products, from moe --sweep"),
    "report": ("report.write", "tables and plots from results, without a GPU"),
    "readme-table": ("report.readme", "the tables of README and docs/performance.md"),
    "folder": ("core.machine", "the folder that results of this machine belong in"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m bench COMMAND [options]", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"python -m bench: error: no command {words[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{COMMANDS[words[0]][0]}", __package__)
    return module.main(words[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
