"""Rooms: imports and includes run down the tables of the READMEs, never up, and no file is long."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGE, SOURCES = ROOT / "liquidgemm", ROOT / "csrc"


def rooms(readme: Path) -> list[list[str]]:
    """The names in the first column of the table of rooms, from top to bottom."""
    rows = re.findall(r"^\| (`.*?) \|", readme.read_text(), re.MULTILINE)
    return [[name.rstrip("/") for name in re.findall("`(.*?)`", row)] for row in rows]


def floor_of(name: str, floors: list[list[str]]) -> int:
    """The row of the room that a path lies in: of the most that is said of it."""
    fits = [
        (len(room), floor)
        for floor, names in enumerate(floors)
        for room in names
        if name == room
        or name.startswith(f"{room}/")
        or (room.endswith("/*.hpp") and re.fullmatch(re.escape(room[:-5]) + r"[^/]+\.hpp", name))
    ]
    assert fits, f"{name} lies in no room of the README"
    return max(fits)[1]


def imports(file: Path) -> Iterator[str]:
    """The modules of the package that a file of it imports, wherever in the file, as paths."""
    here = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            base = (here[: len(here) - node.level + 1] if node.level else ()) + module
            if base[:1] == ("liquidgemm",):
                yield from ("/".join((*base, name.name)) for name in node.names)


def test_imports_run_down():
    floors = rooms(PACKAGE / "README.md")
    assert floors.index(["weights"]) < floors.index(["ops"])
    seen, up = 0, []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name == "__init__.py":  # the public names
            continue
        floor = floor_of(name, floors)
        for path in imports(file):
            target = path.removeprefix("liquidgemm/")
            if (PACKAGE / target.partition("/")[0]).is_dir() or target.startswith("_files"):
                seen += 1
                target = "_files.py" if target.startswith("_files") else target
                if floor_of(target, floors) < floor:
                    up.append(f"{name} imports {target}")
    assert seen > 200
    assert not up


def test_includes_run_down():
    """But that a source file includes the header of the C++ API which it implements."""
    floors = rooms(SOURCES / "README.md")
    api = next(floor for floor, names in enumerate(floors) if "liquidgemm/*.hpp" in names)
    seen, up = 0, []
    for file in sorted(f for f in SOURCES.rglob("*") if f.suffix in (".hpp", ".cu", ".cpp")):
        name = file.relative_to(SOURCES).as_posix()
        for included in re.findall('#include "(.*?)"', file.read_text()):
            beside = (file.parent / included).resolve()
            path = beside if beside.exists() else SOURCES / included
            assert path.exists(), f"{name}: {included} lies neither beside it nor in csrc"
            target = path.relative_to(SOURCES).as_posix()
            seen += 1
            down = floor_of(target, floors) >= floor_of(name, floors)
            if not down and not (file.suffix != ".hpp" and floor_of(target, floors) == api):
                up.append(f"{name} includes {target}")
    assert seen > 200
    assert not up


def test_no_file_takes_minutes_to_scroll_through():
    trees = [ROOT / name for name in ("liquidgemm", "csrc", "bench", "tests", "examples")]
    kinds = (".py", ".cpp", ".hpp", ".cu", ".cuh")
    files = [f for tree in trees for f in tree.rglob("*") if f.suffix in kinds]
    files += ROOT.glob("*.py")
    assert len(files) > 400
    lengths = {f.relative_to(ROOT).as_posix(): f.read_text().count("\n") for f in files}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_griddepcontrol_has_one_home() -> None:
    """CUTLASS's header of it reads more than most kernels take to compile."""
    for file in SOURCES.rglob("*"):
        if file.suffix in (".hpp", ".cu"):
            assert "grid_dependency_control.h" not in file.read_text(), file
