"""Documents are held to what they promise: named tests exist, links lead somewhere, words are defined."""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = ROOT / "docs" / "protocol.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def named_tests() -> dict[str, str]:
    """Every test function of the project and the file it is in."""
    found = {}
    for folder, _, names in os.walk(ROOT / "tests"):
        for name in names:
            if name.startswith("test_") and name.endswith(".py"):
                path = Path(folder) / name
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
                        "test_"
                    ):
                        found[node.name] = path.relative_to(ROOT).as_posix()
    return found


def rules() -> list[str]:
    """The normative sentences of docs/protocol.md: its list items, each joined to one line."""
    text = PROTOCOL.read_text(encoding="utf-8")
    return [" ".join(item.split()) for item in re.findall(r"^- (.+(?:\n  .+)*)", text, re.MULTILINE)]


def test_every_rule_of_the_protocol_names_tests_that_exist() -> None:
    assert len(rules()) > 20
    for rule in rules():
        ending = re.search(r"\(((?:`test_\w+`(?:, )?)+)\)$", rule)
        assert ending, f"no test is named at the end of: {rule}"
        for name in re.findall(r"`(test_\w+)`", ending.group(1)):
            assert name in named_tests(), f"{name} does not exist, but holds: {rule}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [
        target
        for target in targets
        if target and "://" not in target and not (document.parent / target).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    pattern = r"`((?:protocol|dht|compute|node|simnet|src|tests|bench|docs|examples|scripts)/[\w./-]+\.\w+)`"
    assert [name for name in re.findall(pattern, text) if not (ROOT / name).exists()] == []


def test_glossary_defines_each_word_once_in_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\*\*([^*]+)\*\*", text, re.MULTILINE)
    assert len(words) > 25
    assert words == sorted(words, key=str.lower)
    assert len(words) == len(dict.fromkeys(words))
