"""Builds copies of the library with planted bugs: `python tests/planted/variants.py [name ...]`.

Each lands in build/planted/<name>/liquidgemm, a package of its own. To keep compilation short the
library has only a few tiles, and of those a bug is planted into one.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from bugs import BUGS, BUILD, DELAY, EVERY_LANE, INSTANTIATIONS, Bug  # noqa: E402

import setup as build  # noqa: E402

NONE = Bug("none", (), (), units=(f"{INSTANTIATIONS}/t8_p1_k4_s4.cu",))
VARIANTS = (NONE, DELAY, EVERY_LANE, *BUGS)
FOLDER = ROOT / "build/planted"
REFUSED = "refused.txt"  # in place of a package: why there is none

# Decode with four k groups, two, and three, whose turns of summing up overlap in the taller tile;
# several panels that store by TMA, and that store rows themselves.
TILES = (
    *("t8_p1_k4_s4", "t32_p1_k2_s2_half", "t32_p1_k3_s2", "t96_p1_k3_s2"),
    *("t128_p2_k1_s2", "t256_p2_k1_s2"),
)

# Of INT8 weights: with k groups, and without, both among those above.
INT8_TILES = ("t32_p1_k3_s2", "t256_p2_k1_s2")

# Of 6-bit codes and of groups of 32: one of those that are among them.
LIQUIDQUANT6_TILES = ("t256_p2_k1_s2",)
LIQUIDQUANT_G32_TILES = ("t32_p1_k3_s2",)

# Of grouped products: decode with several k groups, and prefill.
GROUPED_TILES = ("t8_p1_k2_s4_half", "t16_p1_k4_s4", "t128_p3_k1_s2")

SLOT_TILES = ("t8_p1_k2_s4_half", "t8_p1_k4_s4")

# Per folder of instantiations: where its tiles are listed, in which array, and which are kept.
LISTS = {
    "liquidquant": ("csrc/liquidgemm/plan/tiles.hpp", "kTileShapes", TILES),
    "int8": ("csrc/liquidgemm/plan/tiles.hpp", "kInt8TileShapes", INT8_TILES),
    "liquidquant6": (
        "csrc/liquidgemm/plan/tiles.hpp",
        "kLiquidQuant6TileShapes",
        LIQUIDQUANT6_TILES,
    ),
    "liquidquant_g32": (
        "csrc/liquidgemm/plan/tiles.hpp",
        "kLiquidQuantG32TileShapes",
        LIQUIDQUANT_G32_TILES,
    ),
    "grouped": ("csrc/liquidgemm/plan/grouped.hpp", "kGroupedTileShapes", GROUPED_TILES),
    "slots": ("csrc/liquidgemm/plan/slots.hpp", "kSlotTileShapes", SLOT_TILES),
}


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
    numbers = re.search(r"{([\d, ]+)}", row)[1].split(", ")
    return "t{}_p{}_k{}_s{}".format(*numbers) + ("_half" if numbers[4:5] == ["2"] else "")


def reduced_sources(root: Path, lists: dict[str, tuple] = LISTS) -> dict[str, str]:
    """Text of every source by path, with the lists of tiles cut down to the given ones."""
    paths = [path for path in sorted((root / "csrc").rglob("*")) if path.is_file()]
    sources = {str(path.relative_to(root)): path.read_text() for path in paths}
    for header, array, tiles in lists.values():
        text = sources[header]
        begin, end, rows = rows_of(text, array)
        if missing := set(tiles) - set(map(tile_name, rows)):
            raise LookupError(f"{header} has no tile {', '.join(sorted(missing))}: choose others")
        kept = [row for row in rows if tile_name(row) in tiles]
        sources[header] = text[:begin] + "".join(kept) + text[end:]

    def is_kept(file: str) -> bool:
        path = Path(file)
        return path.parts[1] != "instantiations" or path.stem in lists[path.parent.name][2]

    return {file: text for file, text in sources.items() if is_kept(file)}


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


@dataclass(frozen=True)
class Base:
    """The library without a bug, compiled, with what it takes to compile a part of it again."""

    root: Path
    tree: Path
    folder: Path  # of ninja
    libraries: dict[str, Path]

    @classmethod
    def build(cls, root: Path) -> "Base":
        """Brings build/planted/tree up to date with the sources below root."""
        tree = FOLDER / "tree"
        write_tree(tree, reduced_sources(root))
        build.ROOT = tree
        build.TILES_PER_UNIT = 1  # so that one can be compiled and linked in place of another
        libraries = build.build_libraries(list(build.SOURCES))
        return cls(root, tree, libraries["liquidgemm._C_cuda"].parent, libraries)

    def command(self, target: str) -> list[str]:
        """How ninja makes one file, without what it does with the compiler's messages."""
        commands = build.run_quietly(
            sys.executable, "-m", "ninja", "-C", self.folder, "-t", "commands", "-s", target
        )
        line = commands.stdout.strip().splitlines()[-1]
        return shlex.split(line.split(" > ")[0])


def compile_variant(base: Base, bug: Bug) -> str:
    """Puts a library with this bug into build/planted; says where, or why there is none."""
    target = FOLDER / slug(bug)
    shutil.rmtree(target, ignore_errors=True)
    package = target / "liquidgemm"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(base.root / "liquidgemm", package, ignore=ignored)
    tree = target / "tree"
    write_tree(tree, patched_sources(base.root, bug))

    link = base.command("_C_cuda.so")
    for unit in bug.units or [f"{INSTANTIATIONS}/{tile}.cu" for tile in TILES]:
        old, new = str(base.folder / f"csrc/{unit}.o"), str(tree / f"{Path(unit).name}.o")
        sources = str(base.tree / "csrc"), str(tree / "csrc")
        compiled = build.run_quietly(
            *(word.replace(old, new).replace(*sources) for word in base.command(old))
        )
        report = compiled.stdout + compiled.stderr
        problems = build.check_ptxas_report(report) if BUILD in bug.caught_by else []
        if compiled.returncode or problems:
            shutil.rmtree(package)
            reason = problems[0] if problems else report
            (target / REFUSED).write_text(f"{reason}\n")
            if not problems:
                raise SystemExit(f"{bug.name} does not compile:\n{report}")
            return f"refused by the check of ptxas' report: {reason}"
        link = [new if word == old else word for word in link]
    library = package / "_C_cuda.so"
    linked = build.run_quietly(*[str(library) if word == "_C_cuda.so" else word for word in link])
    if linked.returncode:
        raise SystemExit(f"{bug.name} does not link:\n{linked.stdout}{linked.stderr}")
    build.run_quietly("strip", "--strip-unneeded", library)
    shutil.copy2(base.libraries["liquidgemm._C_host"], package)
    shutil.rmtree(tree)
    return str(target)


def build_variants(bugs: list[Bug], root: Path = ROOT, jobs: int | None = None) -> None:
    """Compiles these variants, several at a time; prints what became of each.

    Raises:
        SystemExit: after all, if an anchor is gone or one does not compile.
    """
    base = Base.build(root)

    def compile_one(bug: Bug) -> tuple[bool, str]:
        try:
            return True, compile_variant(base, bug)
        except (LookupError, SystemExit) as error:
            return False, f"{error}"

    failed = 0
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        for bug, (done, result) in zip(bugs, pool.map(compile_one, bugs), strict=True):
            failed += not done
            print(f"{bug.name}: {result}", flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(bugs)} variants could not be built")


def build_variant(bug: Bug) -> Path:
    """`build_variants` for one of them; its folder."""
    build_variants([bug])
    return FOLDER / slug(bug)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="substrings of names; all variants by default")
    parser.add_argument("--root", type=Path, default=ROOT, help="the sources to start from")
    parser.add_argument("--jobs", type=int, help="compilers at a time")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    names = arguments.names or [""]
    chosen = [bug for bug in VARIANTS if any(name in bug.name for name in names)]
    if arguments.list:
        print(*(bug.name for bug in chosen), sep="\n")
    else:
        build_variants(chosen, arguments.root.resolve(), arguments.jobs)


if __name__ == "__main__":
    main()
