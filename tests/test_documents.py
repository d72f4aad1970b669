"""Documents: their links lead somewhere, and what sources refer to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "docs/experiments"
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


def references(source: str) -> list[tuple[str, str]]:
    """(file, heading) of `Experiment: decode.md, "Tiles".` in comments."""
    comments = re.sub(r"\n\s*// ", " ", source)
    return [
        pair
        for line in re.findall(r"Experiments?: (.*)", comments)
        for pair in re.findall(r'(\w+\.md), "([^"]+)"', line)
    ]


def test_sources_name_experiments_that_exist() -> None:
    found = [
        (file, *reference)
        for pattern in ("*.hpp", "*.cu", "*.cpp")
        for file in (ROOT / "csrc").rglob(pattern)
        for reference in references(file.read_text(encoding="utf-8"))
    ]
    assert any(file.name == "rules.hpp" for file, _, _ in found)
    for file, document, heading in found:
        assert heading in headings(EXPERIMENTS / document), (file.name, document, heading)


def test_references_are_read_from_comments() -> None:
    source = '// Why.\n// Experiments: a.md, "One"; b.md,\n// "Two".\nint x;\n'
    assert references(source) == [("a.md", "One"), ("b.md", "Two")]
