"""Builds copies of the library with planted bugs: `python tests/planted/variants.py [name ...]`.

Each lands in build/planted/<name>/liquidgemm, a package of its own. All copies are compiled in one
folder, build/planted/tree, whose objects are kept, and with a few tiles only: what a bug does not
touch is compiled once.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from bugs import BUGS, BUILD, DELAY, EVERY_LANE, Bug  # noqa: E402

import setup as build  # noqa: E402

NONE = Bug("none", (), ())
VARIANTS = (NONE, DELAY, EVERY_LANE, *BUGS)
FOLDER = ROOT / "build/planted"
REFUSED = "refused.txt"  # in place of a package: why there is none

# Decode with four k groups; a ring whose depth is rounded down to a multiple of them; several
# panels, several chunks in the epilogue and two staging buffers.
TILES = ("t8_p1_k4_s4", "t32_p1_k4_s2", "t128_p2_k1_s2")

TILE_HEADER = "csrc/liquidgemm/kernel/tile.hpp"
PLAN_HEADER = "csrc/liquidgemm/host/plan.hpp"


def slug(bug: Bug) -> str:
    return re.sub(r"\W+", "-", bug.name)


def rows_of(text: str, array: str) -> tuple[int, int, list[str]]:
    """Begin and end of the rows of a C++ array of aggregates, and the rows, one per line."""
    match = re.search(rf"{array}\[\] = {{\n(.*?)^}};", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise LookupError(f"the array {array} is not found")
    rows = [line for line in match[1].splitlines(keepends=True) if line.lstrip().startswith("{")]
    return match.start(1), match.end(1), rows


def tile_name(row: str) -> str:
    shape = re.search(r"{(\d+), (\d+), (\d+), (\d+)}", row)
    return "t{}_p{}_k{}_s{}".format(*shape.groups())


def reduced_sources(root: Path, tiles: tuple[str, ...] = TILES) -> dict[str, str]:
    """Text of every source by path, with the lists of tiles cut down to the given ones."""
    paths = [path for path in sorted((root / "csrc").rglob("*")) if path.is_file()]
    sources = {str(path.relative_to(root)): path.read_text() for path in paths}
    names = [tile_name(row) for row in rows_of(sources[TILE_HEADER], "kTileShapes")[2]]
    if missing := set(tiles) - set(names):
        raise LookupError(f"{TILE_HEADER} has no tile {', '.join(sorted(missing))}: choose others")
    for file, array in ((TILE_HEADER, "kTileShapes"), (PLAN_HEADER, "kTileCosts")):
        begin, end, rows = rows_of(sources[file], array)
        if len(rows) != len(names):
            raise LookupError(f"{file}: {array} has {len(rows)} rows for {len(names)} tiles")
        kept = [row for row, name in zip(rows, names, strict=True) if name in tiles]
        sources[file] = sources[file][:begin] + "".join(kept) + sources[file][end:]
    kept_names = [name for name in names if name in tiles]
    for file in [file for file in sources if file.startswith("csrc/instantiations/")]:
        name = Path(file).stem
        text = sources.pop(file)
        if name in kept_names:
            index = kept_names.index(name)
            sources[file] = re.sub(
                r"(is_tile\(|launch_tile<|launch_tile_impl<)\d+", rf"\g<1>{index}", text
            )
    return sources


def patched_sources(root: Path, bug: Bug) -> dict[str, str]:
    sources = reduced_sources(root)
    if unknown := bug.files - sources.keys():
        raise LookupError(f"{bug.name}: there is no {', '.join(sorted(unknown))}")
    return {file: bug.apply(text, file) for file, text in sources.items()}


def write_tree(tree: Path, sources: dict[str, str]) -> None:
    """Makes the tree hold these sources; files that do not change keep their time of change."""
    for path in list((tree / "csrc").rglob("*")):
        if path.is_file() and str(path.relative_to(tree)) not in sources:
            path.unlink()
    for file, text in sources.items():
        path = tree / file
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def build_variant(bug: Bug, root: Path = ROOT) -> Path:
    """The folder to put on the path of Python for a library with this bug in it.

    Raises:
        SystemExit: the compiler or, where the build is to catch the bug, the check of ptxas'
            report refuses it.
    """
    tree = FOLDER / "tree"
    write_tree(tree, patched_sources(root, bug))
    build.ROOT = tree
    if BUILD not in bug.caught_by:
        build.check_ptxas_report = lambda report: []  # slow code is no reason not to run it
    package = FOLDER / slug(bug) / "liquidgemm"
    shutil.rmtree(package.parent, ignore_errors=True)
    try:
        libraries = build.build_libraries(list(build.SOURCES))
    except SystemExit as error:
        package.parent.mkdir(parents=True)
        (package.parent / REFUSED).write_text(f"{error}\n")
        raise
    shutil.copytree(root / "liquidgemm", package, ignore=shutil.ignore_patterns("*.so", "__py*"))
    for library in libraries.values():
        shutil.copy2(library, package)
        build.run_quietly("strip", "--strip-unneeded", package / library.name)
    return package.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="substrings of names; all variants by default")
    parser.add_argument("--root", type=Path, default=ROOT, help="the sources to start from")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    check = build.check_ptxas_report
    for bug in VARIANTS:
        if arguments.names and not any(name in bug.name for name in arguments.names):
            continue
        if arguments.list:
            print(bug.name)
            continue
        build.check_ptxas_report = check
        try:
            print(f"{bug.name}: {build_variant(bug, arguments.root.resolve())}", flush=True)
        except SystemExit as error:
            print(f"{bug.name}: CAUGHT BY THE BUILD: {error}", flush=True)
            if BUILD not in bug.caught_by:
                raise


if __name__ == "__main__":
    main()
