"""Every line of the list of what a trusted GEMM and its integrations survive has its tests.

A test belongs to a line if its docstring says CHECKLIST and the number.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT, TESTS

LINES = {
    1: "every compiled plan is exact, and then the epilogue's formula to the bit",
    2: "shapes: M, N and K of every kind, M = 0",
    3: "saturation: both ends of the range, the largest K",
    4: "every step, offset and code through the kernel's own decoding",
    5: "offsets past 2^31",
    6: "canaries around the output, which is poisoned",
    7: "inputs of every layout, and a clear error for every misuse",
    8: "activation quantization of zeros, denormals, outliers, infinities, NaN and ties",
    9: "batch invariance",
    10: "repetition, alone and beside a busy stream",
    11: "threads, streams and devices",
    12: "CUDA graphs",
    13: "programmatic launch does not overtake a slow producer",
    14: "few SMs, with a watchdog",
    15: "compute-sanitizer, which must find what is planted",
    16: "delay injection",
    17: "fuzzing",
    18: "opcheck, compilation with dynamic M, export and AOTInductor",
    19: "saving and loading: the same bits, and nothing damaged is accepted",
    20: "the wrong machine",
    21: "no growth, and no synchronization with the host",
    22: "every parameter of two dimensions or more is accounted for; none quantized is no success",
    23: "models by structure: quantized, saved and loaded by each pair, near the float model",
    24: "a layer of K features refuses any other number",
    25: "importers: settings understood or refused, results tried on their architecture",
    26: "folders: a source is never overwritten, an interruption leaves what was there",
    27: "generic walkers, wrappers and derivatives: right or refused",
    28: "exceptions: documented types in Python, one line in the command",
    29: "every instruction set of the CPU kernels equals the reference to the bit",
    30: "grouped: no rows, one, all in one, elsewhere; other routings under graph replay",
    31: "fused producers equal their composite to the bit",
    32: "attention over the KV cache: page boundaries, one token, long contexts, stale memory",
    33: "serving engines: reload, prefix cache, chunks, LoRA: the outputs of the offline model",
    34: "tensor parallel: of any size, slices bit for bit",
}
ON_A_CPU = (4, 7, 8, 17, 18, 19, 20, *range(22, 30))
NOT_ON_A_GPU = (20, *range(22, 30), 33, 34)
IN_AN_ENGINE = (33, 34)


def documented_tests() -> Iterator[tuple[Path, str, str]]:
    """File, name and docstring of every test function."""
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield file.relative_to(TESTS), node.name, ast.get_docstring(node) or ""


def lines_of(docstring: str) -> set[int]:
    """{10, 13} of "CHECKLIST 10, 13: ..."."""
    found = re.search(r"CHECKLIST ((?:\d+)(?:, \d+)*)", docstring)
    return {int(number) for number in found[1].split(", ")} if found else set()


NAMED = defaultdict(list)
for _file, _name, _docstring in documented_tests():
    for _line in lines_of(_docstring):
        NAMED[_line].append((_file, _name))


@pytest.mark.parametrize("line", LINES)
def test_every_line_has_tests(line: int) -> None:
    """On a GPU where it needs one, and on the CPU where that is possible."""
    on_gpu = [name for file, name in NAMED[line] if {"gpu", "stress"} & set(file.parts)]
    on_cpu = [name for file, name in NAMED[line] if file.parts[0] == "cpu"]
    assert on_gpu or line in NOT_ON_A_GPU, f"no GPU test for CHECKLIST {line}: {LINES[line]}"
    in_engine = [name for file, name in NAMED[line] if file.parts[0] == "serving"]
    assert in_engine or line not in IN_AN_ENGINE, f"no test in an engine for CHECKLIST {line}"
    assert on_cpu or line not in ON_A_CPU, f"no CPU test for CHECKLIST {line}: {LINES[line]}"


def test_no_other_numbers() -> None:
    assert set(NAMED) == set(LINES)


def test_numbers_are_read_from_docstrings() -> None:
    assert lines_of("CHECKLIST 7: misuse") == {7}
    assert lines_of("Text.\n\nCHECKLIST 10, 13: more, 14 less") == {10, 13}
    assert lines_of("nothing") == set()


def test_plans_are_those_that_the_library_dispatches_from() -> None:
    """CHECKLIST 1: the exactness suite enumerates them, so that a new one cannot be forgotten."""
    import variants

    from bench.plan.fit import tile_of
    from liquidgemm.ops.plans import (
        compiled_plans,
        grouped_plan_names,
        plan_names,
        slot_plan_names,
    )

    names = {
        "liquidquant": plan_names(),
        "int8": [name for _, name in compiled_plans(8)],
        "liquidquant6": [name for _, name in compiled_plans(6)],
        "liquidquant_g32": [name for _, name in compiled_plans(4, 32)],
        "grouped": grouped_plan_names(),
        "slots": slot_plan_names(),
    }
    assert {file.name for file in (ROOT / "csrc/instantiations").iterdir()} == set(names)
    for folder, (file, array, _) in variants.LISTS.items():
        compiled = {path.stem for path in (ROOT / "csrc/instantiations" / folder).glob("*.cu")}
        rows = variants.rows_of((ROOT / file).read_text(), array)[2]
        tiles = [variants.tile_name(row) for row in rows]
        assert list(dict.fromkeys(map(tile_of, names[folder]))) == tiles
        assert compiled == set(tiles)
    for file in ("test_gemm.py", "test_canaries.py", "test_overtaking.py", "test_few_sms.py"):
        assert "plan_names()" in (TESTS / "gpu" / file).read_text()
    text = (TESTS / "gpu/test_weight_formats.py").read_text()
    assert "FORMATS = ((4, 32), (6, 64), (8, 64))" in text
    assert "compiled_plans(*of)" in text
    assert "slot_plan_names()" in (TESTS / "gpu/test_moe_by_slots.py").read_text()
    for file in ("test_grouped_gemm.py", "test_moe_chain.py"):
        assert "GROUPED_PLANS" in (TESTS / "gpu" / file).read_text()


def test_guarantees_name_tests_that_exist() -> None:
    """Every path and every test in docs/guarantees.md."""
    text = (ROOT / "docs/guarantees.md").read_text()
    here = {(str(file), name) for file, name, _ in documented_tests()}
    files = re.findall(r"`((?:[\w/]+/)?\w+\.py)(?:::\w+)?`", text)
    assert len(files) > 20
    for file in files:
        assert (TESTS / file).is_file(), file
    names = {name for _, name in here}
    for name in re.findall(r"\b(test_\w+)\b(?!\.py|/)", text):
        assert name in names or any(file.endswith(f"{name}.py") for file, _ in here), name
