"""What a user is told once all layers are loaded: which path runs, on what, and what does not."""

from __future__ import annotations

from collections import Counter

import torch

from ...ops import _cpu, _library


class Summary:
    """Counts the layers of one model, of one process, and tells when the last one is packed.

    Engines say how it is told (`say`), and what else there is to tell (`more`).
    """

    def __init__(self) -> None:
        self._expected = self._done = 0
        self._float: Counter[str] = Counter()
        self._errors: dict[str, float] = {}

    def say(self, line: str) -> None:
        raise NotImplementedError

    def more(self) -> str:
        return ""

    def expect(self, names: tuple[str, ...]) -> None:
        self._expected += 1

    def leave(self, name: str, reason: str) -> None:
        self._float[f"{name.rpartition('.')[2]} ({reason})"] += 1

    def imported(self, name: str, error: float) -> None:
        """How far a layer of another project's format is from ours, ``|W' - W| / |W|``."""
        self._errors[name] = error

    def done(self, names: tuple[str, ...], device: torch.device) -> None:
        self._done += 1
        if self._done == self._expected:
            self.complete(device)

    def complete(self, device: torch.device) -> None:
        """Say the lines: called once the last layer is packed, and again after each load."""
        for line in self.lines(device):
            self.say(line)

    def lines(self, device: torch.device) -> list[str]:
        left = ", ".join(f"{count} x {what}" for what, count in sorted(self._float.items()))
        lines = [
            f"liquidgemm: {self._done} linear layers in W4A8 with {_path(device)}; in floats: "
            f"{left or 'no linear layer'}{self.more()}"
        ]
        if self._errors:
            lossy = {name: error for name, error in self._errors.items() if error > 0}
            exact = len(self._errors) - len(lossy)
            line = f"liquidgemm: {len(self._errors)} weights imported, {exact} without any loss"
            if lossy:
                worst = max(lossy, key=lossy.__getitem__)
                mean = sum(lossy.values()) / len(lossy)
                line += (
                    f"; weight error of the others {mean:.2%} on average, at most "
                    f"{lossy[worst]:.2%} ({worst})"
                )
            lines.append(line)
        return lines


def _path(device: torch.device) -> str:
    if device.type == "cuda":
        return f"the Hopper kernel on {device} ({torch.cuda.get_device_name(device)})"
    return f"the CPU kernel {_cpu.cpu_kernel()!r}"


def check_gpu(remedy: str) -> None:
    """Raises a ValueError, with what to do, for a CUDA device whose kernel we do not have."""
    if (problem := _library.load_libraries()) is not None:
        raise ValueError(f"liquidgemm: {problem}")
    capability = torch.cuda.get_device_capability()
    if capability != _library.HOPPER:
        name = torch.cuda.get_device_name()
        raise ValueError(
            "device: expected compute capability 9.0, as the kernel uses instructions that no "
            f"other GPU has, got {capability[0]}.{capability[1]} ({name}): {remedy}"
        )
