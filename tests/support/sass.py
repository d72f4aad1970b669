"""Compares the machine code of two builds: `python tests/support/sass.py OLD.so NEW.so`.

Needs no GPU. A change that only moves or renames source must leave every kernel's instructions as
they were, whatever the kernels are called: their streams are compared as a multiset. Instructions
are compared with their encodings, control words included. Exits with 1, and prints the first
difference of every kernel that has one, if the builds differ.

With --ignore-parameter-offsets two kernels count as equal if they differ only in where parameters
lie in constant bank 0, and encodings are not compared: for a change of the parameters' layout.

cuobjdump and nvdisasm come with the CUDA toolkit, or from PyPI (nvidia-cuda-cuobjdump,
nvidia-cuda-nvdisasm); they are searched in $CUDA_HOME/bin and on PATH.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"^\s+Function : (\S+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ;\s+/\* (0x[0-9a-f]+) \*/")
SECOND_WORD = re.compile(r"^\s+/\* (0x[0-9a-f]+) \*/")
PARAMETER = re.compile(r"c\[0x0\]\[0x[0-9a-f]+\]")
RESOURCES = re.compile(r"^ Function (\S+):\n\s+(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    name: str
    resources: str  # registers, stack and static shared memory
    instructions: tuple[str, ...]

    @property
    def code(self) -> tuple[str, tuple[str, ...]]:
        """All that must not change."""
        return self.resources, self.instructions


def parse(sass: str, resources: str, ignore_parameter_offsets: bool = False) -> list[Kernel]:
    """The kernels in the output of `cuobjdump -sass` and of `cuobjdump -res-usage`."""
    usage = {
        name: " ".join(re.findall(r"(?:REG|STACK|SHARED|LOCAL):\d+", line))
        for name, line in RESOURCES.findall(resources)
    }
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if match := FUNCTION.match(line):
            lines = found.setdefault(match[1], [])
        elif match := INSTRUCTION.match(line):
            text = re.sub(r"\s+", " ", match[1])
            if ignore_parameter_offsets:
                lines.append(PARAMETER.sub("c[0x0][...]", text))
            else:
                lines.append(f"{text}  {match[2]}")
        elif (match := SECOND_WORD.match(line)) and not ignore_parameter_offsets and lines:
            lines[-1] += f" {match[1]}"
    return [Kernel(name, usage.get(name, "?"), tuple(code)) for name, code in found.items()]


def tool(name: str) -> str:
    """Where a program of the CUDA toolkit lies."""
    path = shutil.which(name, path=f"{os.environ.get('CUDA_HOME', '')}/bin") or shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is neither in $CUDA_HOME/bin nor on PATH: see {__file__}")
    return path


def kernels(library: Path, ignore_parameter_offsets: bool = False) -> list[Kernel]:
    tool("nvdisasm")  # cuobjdump calls it
    outputs = [
        subprocess.run(
            [tool("cuobjdump"), option, library], check=True, capture_output=True, text=True
        ).stdout
        for option in ("-sass", "-res-usage")
    ]
    return parse(*outputs, ignore_parameter_offsets)


def difference(old: Kernel, new: Kernel) -> str:
    """The first line in which two kernels differ, with the lines around it."""
    if old.resources != new.resources:
        return f"  resources: {old.resources} -> {new.resources}"
    pairs = itertools.zip_longest(old.instructions, new.instructions, fillvalue="(end)")
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
    before = [f"    {line}" for line in old.instructions[max(0, at - 3) : at]]
    minus = [f"  - {line}" for line in old.instructions[at : at + 4]]
    plus = [f"  + {line}" for line in new.instructions[at : at + 4]]
    return "\n".join([f"  at instruction {at}:", *before, *minus, *plus])


def compare(old: list[Kernel], new: list[Kernel]) -> list[str]:
    """What differs; nothing if every kernel of one build is also in the other."""
    # Kernels of equal code, however many there are on each side, pair off.
    left, right = ([*side] for side in (old, new))
    surplus = Counter(kernel.code for kernel in old)
    surplus.subtract(Counter(kernel.code for kernel in new))
    for side, sign in ((left, 1), (right, -1)):
        for kernel in [*side]:
            if sign * surplus[kernel.code] > 0:
                surplus[kernel.code] -= sign
            else:
                side.remove(kernel)
    report = []
    for kernel in left:
        if not right:
            report.append(f"{kernel.name} is gone")
            continue
        counts = Counter(kernel.instructions)
        nearest = max(right, key=lambda k: (counts & Counter(k.instructions)).total())
        right.remove(nearest)
        report.append(f"{kernel.name}\n  became {nearest.name}\n{difference(kernel, nearest)}")
    return report + [f"{kernel.name} is new" for kernel in right]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--ignore-parameter-offsets", action="store_true")
    arguments = parser.parse_args()
    old, new = (
        kernels(library, arguments.ignore_parameter_offsets)
        for library in (arguments.old, arguments.new)
    )
    if not old:
        raise SystemExit(f"{arguments.old} holds no kernels")
    report = compare(old, new)
    print(*report, sep="\n")
    lines = sum(len(kernel.instructions) for kernel in new)
    print(f"{len(old)} and {len(new)} kernels, {lines} instructions: {len(report)} differ")
    return int(bool(report))


if __name__ == "__main__":
    sys.exit(main())
