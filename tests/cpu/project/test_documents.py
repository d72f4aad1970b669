"""Documents: links lead somewhere, paths exist, rooms are described, code runs."""

import re
from pathlib import Path

import pytest
from repository import ROOT

SKIPPED = {"build", "dist", "node_modules", "third_party"}
DOCUMENTS = sorted(
    file
    for file in ROOT.rglob("*.md")
    if not any(
        part in SKIPPED or part.startswith(".") for part in file.relative_to(ROOT).parts[:-1]
    )
    and "results" not in file.relative_to(ROOT).parts  # written by bench
)
LINK = re.compile(r"\]\(([^()\s]+)\)|<img[^>]* src=\"([^\"]+)\"")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def headings(file: Path) -> list[str]:
    return re.findall(
        r"^#+ +(.+?) *$", without_code(file.read_text(encoding="utf-8")), re.MULTILINE
    )


def anchor(heading: str) -> str:
    """As GitHub derives it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(file: Path) -> list[str]:
    broken = []
    for match in LINK.finditer(without_code(file.read_text(encoding="utf-8"))):
        link = match[1] or match[2]
        if re.match(r"\w+:", link):  # http:, mailto:
            continue
        path, _, fragment = link.partition("#")
        target = file.parent / path if path else file
        if not target.exists() or (
            fragment and target.suffix == ".md" and fragment not in map(anchor, headings(target))
        ):
            broken.append(link)
    return broken


def test_there_are_documents() -> None:
    names = {str(file.relative_to(ROOT)) for file in DOCUMENTS}
    assert {"README.md", "bench/README.md", "docs/guarantees.md"} <= names


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    assert broken_links(file) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text(
        "# A title\n[a](#a-title) [b](#b) [c](c.md) [d](https://x.y)\n```\n[e](f)\n```\n"
    )
    assert broken_links(file) == ["#b", "c.md"]


# Documents in which every path is one of this repository.
OF_THE_SOURCES = [
    ROOT / name
    for name in (
        "CONTRIBUTING.md",
        "SECURITY.md",
        "csrc/README.md",
        "liquidgemm/README.md",
        "bench/README.md",
        "tests/README.md",
        "examples/README.md",
        "docs/design/kernel.md",
        "docs/design/plan.md",
        "docs/design/formats.md",
    )
]
CSRC = [folder for folder in (ROOT / "csrc").rglob("*") if folder.is_dir()]
PATH = re.compile(r"`((?:[\w.]+/)+[\w.*]*|[\w*]+\.(?:py|hpp|cu|cpp|md))(?:::\w+)?`")


def lost_paths(file: Path) -> list[str]:
    """Paths in code font that are found neither from the root, nor from the document's folder,
    nor from a folder of csrc."""
    lost = []
    for path in PATH.findall(without_code(file.read_text(encoding="utf-8"))):
        bases = [file.parent, ROOT, *CSRC]
        if path.startswith(("build/", "dist/")):
            continue
        if not any(any(base.glob(path.rstrip("/"))) for base in bases):
            lost.append(path)
    return lost


@pytest.mark.parametrize("file", OF_THE_SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_paths_exist(file: Path) -> None:
    assert lost_paths(file) == []


def test_a_lost_path_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text(
        "`csrc/README.md` `csrc/none/` `tests/gpu/test_*.py` `make test` `x/y.hpp` `a.md`"
    )
    assert lost_paths(file) == ["csrc/none/", "x/y.hpp"]


def test_every_room_is_described() -> None:
    """Each folder and module of a tree is in its README."""
    for tree, pattern in (("liquidgemm", "*"), ("bench", "*"), ("csrc/liquidgemm", "*/")):
        readme = (ROOT / tree.split("/")[0] / "README.md").read_text(encoding="utf-8")
        for entry in (ROOT / tree).glob(pattern):
            described = entry.name in readme or (entry.name.startswith("cli") and "cli*" in readme)
            if entry.is_dir():
                assert described or entry.name == "__pycache__", entry
            elif entry.suffix == ".py" and entry.name != "__init__.py":
                assert described, entry


def code_of(file: Path, heading: str) -> list[str]:
    section = file.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [part.partition("```")[0] for part in section.split("```python\n")[1:]]


@pytest.mark.parametrize(
    ("name", "heading"), [("README.md", "Use"), ("docs/quickstart.md", "One layer, one model")]
)
def test_the_first_code_runs(name: str, heading: str, tmp_path: Path, monkeypatch) -> None:
    """With smaller sizes."""
    monkeypatch.chdir(tmp_path)
    code = code_of(ROOT / name, heading)[0].replace("4096", "128").replace("14336", "192")
    exec(code, {})
    assert (tmp_path / "model-w4a8").is_dir()
