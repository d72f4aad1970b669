"""What the measurements ran on, and in what state it was."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
from pathlib import Path

import torch

from liquidgemm.ops.plans import explain_plan

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("bench/results")  # in the root
PACKAGES = (
    "torch",
    "triton",
    "humming-kernels",
    "gemlite",
    "vllm",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
)

# nvidia-smi's name -> ours. The reasons for lower clocks have an old name and a new one.
_QUERY = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "pstate": "pstate",
}
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
_REASON_BITS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}


def now() -> str:
    """UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def command_line(name: str, words: list[str]) -> str:
    """How a measurement was started. Paths from the root are cut to their names: where somebody
    keeps files is no part of a result."""
    return shlex.join(
        ["python", "-m", "bench", name, *(re.sub(r"^/.*/", "", word) for word in words)]
    )


def require_gpu(parser: argparse.ArgumentParser) -> None:
    """Ends the program with a message where no Hopper GPU is."""
    if not torch.cuda.is_available():
        parser.error("needs a Hopper GPU; there is no CUDA device here")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        name = torch.cuda.get_device_name()
        parser.error(f"needs a Hopper GPU (compute capability 9.0); {name} has {major}.{minor}")


def run_text(command: list[str], **options) -> str | None:
    """Standard output of a command, or None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, **options
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit of this checkout, with "+changes" if tracked files differ from it."""
    head = run_text(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT)
    if not head:
        return "unknown"
    changes = run_text(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT)
    return f"{head}+changes" if changes else head


def gpu_slug(name: str) -> str:
    """A folder's name for a GPU: "NVIDIA H100 80GB HBM3" gives "h100-sxm", "NVIDIA H200" "h200"."""
    words = [word.lower() for word in name.split() if word.lower() != "nvidia"]
    if words[:1] == ["h100"] and "hbm3" in words:
        return "h100-sxm"
    kept = [word for word in words if not re.fullmatch(r"\d+gb|hbm\de?", word)]
    return "-".join(kept or words or ["unknown"])


def results_folder(gpu: str, date: str | None = None) -> Path:
    """Where the results of a GPU go, relative to the root: one folder per GPU and day."""
    return RESULTS / gpu_slug(gpu) / (date or now()[:10])


def newest_results(root: Path = ROOT, name: str = "results.json") -> Path | None:
    """The newest file of that name by its folder's date, of whatever GPU; relative to root."""
    found = sorted((root / RESULTS).glob(f"*/*/{name}"), key=lambda path: path.parts[-2:-4:-1])
    return found[-1].relative_to(root) if found else None


def save_json(path: Path, data: dict, indent: int | None = 1) -> None:
    """Writes the file in one step, so that an interruption leaves the last one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(data, indent=indent) + "\n")
    draft.replace(path)


def memory_bytes_per_us(properties) -> float:
    """Peak of the memory, from torch's properties of a device: two transfers per clock."""
    return properties.memory_clock_rate * properties.memory_bus_width / 4e3  # kHz, bits


def chosen_plan(
    m: int, n: int, k: int, device: torch.device, bits: int = 4, group_size: int = 64
) -> str:
    """How the library describes the plan that it runs on this GPU."""
    properties = torch.cuda.get_device_properties(device)
    return explain_plan(
        m,
        n,
        k,
        bits=bits,
        group_size=group_size,
        num_sms=properties.multi_processor_count,
        memory_tbps=1e-6 * memory_bytes_per_us(properties),
    ).summary()


def describe(device: torch.device) -> dict:
    """GPU and software, for the record."""
    gpu = torch.cuda.get_device_properties(device)
    driver = run_text(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "sms": gpu.multi_processor_count,
        "l2_bytes": gpu.L2_cache_size,
        "memory_bytes": gpu.total_memory,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": versions,
    }


def snapshot(when: str, device: torch.device) -> dict:
    """Clocks, power, temperature and what holds the clocks back; {"error": ...} without nvidia-smi.

    Asking takes tens of milliseconds of the host and none of the GPU.
    """
    record: dict = {"when": when, "at": now()}
    for reasons in _REASONS:
        fields = ",".join((*_QUERY, reasons))
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        text = run_text([*query, *_which(device)])
        if text:
            return record | parse_snapshot(text.splitlines()[0])
    return record | {"error": "nvidia-smi did not answer"}


def _which(device: torch.device) -> list[str]:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return ["-i", f"GPU-{uuid}"] if uuid else []


def parse_snapshot(line: str) -> dict:
    """One line of nvidia-smi's CSV; a value that it does not know becomes None."""
    *values, reasons = (value.strip() for value in line.split(","))
    record: dict = {}
    for name, value in zip(_QUERY.values(), values, strict=True):
        try:
            record[name] = float(value)
        except ValueError:
            record[name] = value if name == "pstate" else None
    record["slowed_by"] = throttle_reasons(reasons)
    return record


def throttle_reasons(text: str) -> list[str] | None:
    """Names of the bits of nvidia-smi's mask, such as 0x0000000000000004; None if it is none."""
    try:
        mask = int(text, 16)
    except ValueError:
        return None
    return [name for bit, name in _REASON_BITS.items() if mask & bit]


def main(arguments: list[str] | None = None) -> None:
    """Prints the folder that results of this machine belong in: for the Makefile."""
    argparse.ArgumentParser(prog="python -m bench folder", description=main.__doc__).parse_args(
        arguments
    )
    print(results_folder(torch.cuda.get_device_name()))
